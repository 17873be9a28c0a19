"""Strategy x method with real engines on CPU: what the adapter table says is what happens."""

from __future__ import annotations

import json

import pytest

from bench.cells import Cell, Outcome, reload_all, run_cells
from bench.matrix import ADAPTERS, STRATEGIES, cells
from launcher.plan.adapter import adapter_rule

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

ENGINES = {
    "single": "single",
    "ddp": "DDP",
    "zero1": "DeepSpeed",
    "zero2": "DeepSpeed",
    "zero3": "DeepSpeed",
    "fsdp": "FSDP2",
    "hsdp": "FSDP2",
    "fsdp1": "FSDP1",
}
# What CI runs: every strategy and every weights family, hsdp (four ranks) once.
SLICE = [
    cell
    for cell in cells(STRATEGIES, ("full", "lora", "qlora"))
    if not (cell.strategy == "hsdp" and cell.method == "full")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[Outcome, dict[str, str]]]:
    found = run_cells(SLICE, tmp_path_factory.mktemp("matrix"))
    answers = reload_all([o.run for o in found if o.state == "completed"])
    return {o.cell.name: (o, answers.get(str(o.run.path), {}) if o.run else {}) for o in found}


@pytest.mark.parametrize("cell", SLICE, ids=lambda cell: cell.name)
def test_cell(cell: Cell, outcomes) -> None:
    outcome, reloaded = outcomes[cell.name]
    rule = adapter_rule(cell.strategy, cell.method, "nf4" if cell.method == "qlora" else "none")
    if rule.status == "refused":
        assert outcome.state == "refused"
        assert rule.why in outcome.detail
        return
    assert outcome.state == "completed", outcome.detail
    assert outcome.engine == ENGINES[cell.strategy]
    assert len(outcome.losses) == 3
    assert "error" not in reloaded, reloaded
    assert isinstance(reloaded["answer"], str)


def test_a_run_directory_holds_what_the_contract_names(outcomes) -> None:
    run = outcomes["fsdp-lora-2x4"][0].run
    names = {path.name for path in run.path.iterdir()}
    assert {
        "spec.yaml",
        "plan.json",
        "accelerate.yaml",
        "command.sh",
        "status.json",
        "logs",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "final",
    } <= names
    assert (run.path / "logs" / "attempt-1" / "rank-1.log").is_file()
    steps = run.read_metrics()
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"} <= set(steps[0])
    assert {"tokens_per_second", "samples_per_second", "gpu_memory_bytes"} <= set(steps[0])


def test_an_adapter_holds_only_the_adapter(outcomes) -> None:
    from safetensors import safe_open

    shapes = {}
    for strategy in ("single", "ddp", "zero2", "zero3", "fsdp", "fsdp1"):
        ranks = 1 if strategy == "single" else 2
        run = outcomes[f"{strategy}-lora-{ranks}x4"][0].run
        with safe_open(run.final / "adapter_model.safetensors", "pt") as tensors:
            shapes[strategy] = {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}  # noqa: SIM118
        assert not list(run.final.glob("model*.safetensors"))
        assert not (run.final / "training_args.bin").exists()
        config = json.loads((run.final / "adapter_config.json").read_text())
        assert config["r"] == 16
    assert len(shapes["single"]) == 56  # 4 layers x 7 linear modules x A and B
    assert all(found == shapes["single"] for found in shapes.values())


@pytest.mark.slow
def test_other_adapters(tmp_path) -> None:
    found = run_cells(cells(STRATEGIES, (*ADAPTERS, "8bit lora")), tmp_path)
    answers = reload_all([o.run for o in found if o.state == "completed"])
    wrong = {}
    for outcome in found:
        quantization = "8bit" if outcome.cell.label else "none"
        rule = adapter_rule(outcome.cell.strategy, outcome.cell.method, quantization)
        expected = "refused" if rule.status == "refused" else "completed"
        if outcome.state != expected:
            wrong[outcome.cell.name] = (expected, outcome.state, outcome.detail)
    assert not wrong
    assert not {path: answer for path, answer in answers.items() if "error" in answer}
