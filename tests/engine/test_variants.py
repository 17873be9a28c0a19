"""Settings that change what an engine does: checkpointing, bf16, early stopping, evaluation."""

from __future__ import annotations

import pytest

from bench.cells import Cell, default_ranks, run_cells

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

CHECKPOINTING = (("training.gradient_checkpointing", True),)
BF16 = (("training.bf16", True),)
SAMPLES = (
    ("samples.prompts", ["What is the capital of France?"]),
    ("samples.every_steps", 1),
)
STOPPING = (
    ("training.max_steps", 12),
    ("training.learning_rate", 1.0),
    ("evaluation.every_steps", 1),
    ("evaluation.early_stopping_patience", 2),
)


def variant(strategy: str, method: str, settings: tuple, label: str) -> Cell:
    return Cell(strategy, method, default_ranks(strategy), 4, settings, label)


def failures(cells: list[Cell], folder) -> dict[str, str]:
    return {o.cell.name: o.detail for o in run_cells(cells, folder) if o.state != "completed"}


def test_samples_between_steps_do_not_disturb_the_steps_after(tmp_path) -> None:
    cells = [
        variant("ddp", "lora", (), "quiet"),
        variant("ddp", "lora", CHECKPOINTING, "checkpointing"),
        *(
            variant(strategy, "lora", (*CHECKPOINTING, *SAMPLES), "sampled")
            for strategy in ("ddp", "zero3", "fsdp")
        ),
    ]
    outcomes = run_cells(cells, tmp_path)
    assert not {o.cell.name: o.detail for o in outcomes if o.state != "completed"}
    for outcome in outcomes[1:]:
        assert outcome.losses == pytest.approx(outcomes[0].losses, abs=1e-5), outcome.cell.name
    samples = (outcomes[-1].run.samples).read_text().splitlines()
    assert len(samples) == 4  # before, after steps 1 and 2, at the end


def test_early_stopping_stops(tmp_path) -> None:
    (outcome,) = run_cells([variant("single", "lora", STOPPING, "stopping")], tmp_path)
    assert outcome.state == "completed", outcome.detail
    assert len(outcome.losses) < 12
    assert len([m for m in outcome.run.read_metrics() if "eval_loss" in m]) >= 3


@pytest.mark.slow
def test_checkpointing_under_every_rule(tmp_path) -> None:
    cells = [
        variant(strategy, method, CHECKPOINTING, "checkpointing")
        for method in ("full", "lora", "qlora")
        for strategy in ("single", "ddp", "zero2", "zero3", "fsdp", "fsdp1")
    ]
    assert not failures(cells, tmp_path)


@pytest.mark.slow
def test_bf16(tmp_path) -> None:
    cells = [
        variant(strategy, method, BF16, "bf16")
        for method in ("full", "lora", "qlora")
        for strategy in ("single", "ddp", "zero2", "zero3", "fsdp", "fsdp1")
    ]
    assert not failures(cells, tmp_path)


@pytest.mark.slow
def test_offload(tmp_path) -> None:
    cells = [
        variant("zero2", "lora", (("offload", "optimizer"),), "offload"),
        variant("zero3", "lora", (("offload", "all"),), "offload"),
    ]
    assert not failures(cells, tmp_path)
