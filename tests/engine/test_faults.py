"""Runs that are disturbed go on from where they were: a slice of bench.faults."""

from __future__ import annotations

import json
import os

import pytest

from bench.faults import Setting, disturb, fill_disk, reference
from launcher.runs.directory import RunDirectory, read_lines

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
SETTING = Setting("fsdp", "lora")
SLICE = (
    "SIGKILL one rank in a save",
    "SIGKILL the launcher",
    "SIGTERM all ranks twice",
    "SIGUSR1 one rank",
    "flipped bit",
    "NaN in one rank",
    "one rank hangs",
    "SIGKILL one rank, --max-restarts 1",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return reference(SETTING, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", SLICE)
def test_nothing_is_lost(fault, undisturbed, tmp_path) -> None:
    result = disturb(fault, SETTING, tmp_path, SLICE.index(fault), undisturbed)
    assert result.good, result


def test_a_stop_does_not_wait_for_an_evaluation(undisturbed, tmp_path) -> None:
    fault = "SIGUSR1 one rank in an evaluation"
    result = disturb(fault, SETTING, tmp_path, 2, undisturbed)
    assert (result.good, result.steps_lost) == (True, 0), result
    (run,) = [RunDirectory(path) for path in tmp_path.iterdir() if path.is_dir()]
    # The one that the stop cut off, after step 9, was made up for by the resume.
    evaluated = [m["step"] for m in run.read_metrics() if "eval_loss" in m]
    assert evaluated == [*range(3, 25, 3), 24]  # and one after the training
    sealed = json.loads((run.checkpoints / "checkpoint-20" / "complete.json").read_text())
    assert sealed["rows_digest"]


def test_a_stop_does_not_wait_for_samples(undisturbed, tmp_path) -> None:
    fault = "SIGUSR1 one rank while sampling"
    result = disturb(fault, SETTING, tmp_path, 3, undisturbed)
    assert (result.good, result.steps_lost) == (True, 0), result
    (run,) = [RunDirectory(path) for path in tmp_path.iterdir() if path.is_dir()]
    answered = [sample["step"] for sample in read_lines(run.samples)]
    assert answered == [step for step in (0, 5, 10, 15, 20, 24) for _ in range(4)]


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root to mount")
def test_a_full_disk_loses_nothing(undisturbed, tmp_path) -> None:
    result = fill_disk(SETTING, tmp_path, 1, undisturbed)
    assert result.good, result
