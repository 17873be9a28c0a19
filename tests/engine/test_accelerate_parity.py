"""torchrun with the plan's environment and `accelerate launch` with accelerate.yaml agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cells import Cell, default_ranks, prepare

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("plugin_fields.py")
TOOLS = Path(sys.executable).parent
STRATEGIES = ("zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp")
# What plan.json sets for CPU runs and accelerate cannot know.
CPU = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def start(argv: list[str]) -> None:
    done = subprocess.run(
        argv,
        env={**os.environ, **CPU, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plugins_are_equal_in_every_field(strategy, tmp_path) -> None:
    cell = Cell(strategy, "lora", default_ranks(strategy), 4)
    run, _ = prepare(cell, tmp_path)
    ranks = str(cell.ranks)
    start([str(TOOLS / "python"), str(SCRIPT), str(run.path), "ours"])
    accelerate = [str(TOOLS / "accelerate"), "launch", "--config_file"]
    accelerate += [str(run.path / "accelerate.yaml"), "--main_process_port", "0"]
    start([*accelerate, str(SCRIPT), str(run.path), "accelerate"])
    ours = json.loads((run.path / "plugins-ours.json").read_text())
    theirs = json.loads((run.path / "plugins-accelerate.json").read_text())
    kind = "deepspeed" if strategy.startswith("zero") else "fsdp"
    assert len(ours[kind]) > 10
    assert ours == theirs
    assert ranks in (run.path / "accelerate.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_accelerate_launch_trains_to_the_same_losses(strategy, tmp_path) -> None:
    losses = []
    for way in ("torchrun", "accelerate"):
        run, _ = prepare(Cell(strategy, "lora", 2, 4), tmp_path / way)
        accelerate = [str(TOOLS / "accelerate"), "launch", "--config_file"]
        accelerate += [str(run.path / "accelerate.yaml"), "--main_process_port", "0", "-m"]
        torchrun = [str(TOOLS / "torchrun"), "--standalone", "--nproc-per-node=2", "-m"]
        start([*(accelerate if way == "accelerate" else torchrun), "launcher.train", str(run.path)])
        assert run.read_status()["state"] == "completed"
        losses.append([m["loss"] for m in run.read_metrics() if "loss" in m])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
