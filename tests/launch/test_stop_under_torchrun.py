"""A stop where ranks run under torchrun, as on GPUs: they save, however long it takes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from bench.cells import Cell, prepare
from launcher.errors import ExitCode
from launcher.launch import local
from launcher.launch.processes import members
from launcher.plan.types import Plan, plan_from_json
from launcher.runs.checkpoints import newest_whole
from launcher.runs.directory import RunDirectory
from tests.support import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
# Seconds: of each fsync, of torchrun's patience, and of a save that shows something.
FSYNC, PATIENCE, SLOW_SAVE = "0.4", 1, 3.0


def under_torchrun(run: RunDirectory) -> Plan:
    """The written plan's ranks as they are started on GPUs; they read their own from the file."""
    plan = plan_from_json(json.loads(run.plan.read_text()))
    patience = f"--shutdown-timeout={PATIENCE}"
    command = [patience if "--shutdown-timeout" in word else word for word in plan.command]
    topology = dataclasses.replace(plan.topology, device="cuda")
    return dataclasses.replace(plan, topology=topology, command=tuple(command))


def test_a_save_may_take_longer_than_torchruns_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, variables = prepare(
        Cell("ddp", "lora", 2, 4, settings=(("training.max_steps", 10_000),)), tmp_path
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "bench" / "inject"))
    asked: list[float] = []

    def stop_in_training() -> None:
        if len(run.read_metrics()) > 1 and not asked:
            asked.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    code, failure = local.launch(
        under_torchrun(run), run, {**variables, "BENCH_SLOW_FSYNC": FSYNC}, stop_in_training
    )
    assert (code, failure) == (ExitCode.PREEMPTED, None)
    assert time.monotonic() - asked[0] > SLOW_SAVE, "the save was not slow: nothing is shown"
    newest, skipped = newest_whole(run.checkpoints)
    assert newest is not None
    assert not skipped
    assert members(str(run.path)) == []
