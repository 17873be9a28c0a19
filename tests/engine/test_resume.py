"""A resumed run's curve, on as many ranks, on others, under another strategy."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bench.cells import Cell, run_cells
from bench.parity import uneven_rows
from bench.resume import CHAINS, ROWS, STRATEGIES, Lab, circle
from launcher.runs.checkpoints import whole

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]
# Every kind of engine, as a source or as a target; all of them in docs/resume.md.
CHANGES = (("single", "zero3"), ("zero3", "fsdp"), ("fsdp", "fsdp1"), ("fsdp1", "ddp"))
SOURCES = ("single", "zero3", "fsdp", "fsdp1")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    laboratory = Lab(folder)
    laboratory.start("lora", SOURCES)
    return laboratory


def strays(rows) -> dict[str, str]:
    return {row.path: f"{row.difference} {row.outcome.detail}" for row in rows if not row.good}


def test_the_same_curve_after_a_resume(lab) -> None:
    assert not strays(lab.same_world("lora", ("zero3", "fsdp")))


def test_the_same_curve_under_another_strategy(lab) -> None:
    assert not strays(lab.other_strategies("lora", CHANGES))


def test_the_same_curve_on_one_two_four_and_two_ranks(lab) -> None:
    assert not strays(lab.chain("lora", CHAINS["fsdp"], "fsdp"))


def test_a_checkpoint_is_what_the_contract_says(lab) -> None:
    cell = lab.cell("fsdp", "lora", 2)
    folder = lab.folder / cell.name / "checkpoints" / "checkpoint-6"
    record = json.loads((folder / "complete.json").read_text())
    assert (record["step"], record["world"], record["global_batch_size"]) == (6, 2, 16)
    assert record["strategy"] == "fsdp"
    assert record["versions"]["torch"]
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert on_disk - {"complete.json"} == set(record["files"])
    assert "adapter_model.safetensors" in on_disk
    assert whole(folder).step == 6


def test_other_rows_are_refused(lab) -> None:
    source = lab.checkpoint(lab.cell("fsdp", "lora", 2), 6)
    cell = lab.cell("ddp", "lora", 2, "other-rows", source)
    other = uneven_rows(lab.folder / "other.jsonl", ROWS)
    lines = other.read_text().splitlines()
    other.write_text("".join(f"{line}\n" for line in reversed(lines)))  # as many, in another order
    changed = dict(cell.settings) | {"dataset.path": str(other)}
    (outcome,) = run_cells([dataclasses.replace(cell, settings=tuple(changed.items()))], lab.folder)
    assert outcome.state == "failed"
    assert "this would be another run" in outcome.detail


def test_a_save_after_an_evaluation_holds_all_state(tmp_path) -> None:
    from launcher.train.tensors import saved_shapes

    often = ("evaluation.every_steps", 1), ("checkpoints.every_steps", 1), ("training.max_steps", 2)
    (outcome,) = run_cells([Cell("fsdp", "full", 2, 4, often)], tmp_path)
    assert outcome.state == "completed", outcome.detail
    names = saved_shapes(outcome.run.checkpoints / "checkpoint-2" / "state").keys()
    trained = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert any("embed" in name for name in trained)
    assert {name for name in trained if f"optimizer.{name}.exp_avg" not in names} == set()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_strategy_into_another(method, tmp_path) -> None:
    laboratory = Lab(tmp_path)
    laboratory.start(method, STRATEGIES)
    rows = laboratory.same_world(method, STRATEGIES)
    rows += laboratory.other_strategies(method, circle(STRATEGIES))
    for name, stages in CHAINS.items():
        rows += laboratory.chain(method, stages, name)
    assert not strays(rows)
