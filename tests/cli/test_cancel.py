"""`cancel` on this machine: with a checkpoint, at once, and where nothing runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.launch.processes import members
from launcher.runs.checkpoints import newest_whole
from launcher.runs.directory import RunDirectory
from tests.support import ROOT, sftlaunch

WAIT_SECONDS = 90


def _start(output: Path) -> subprocess.Popen[bytes]:
    settings = ("evaluation.exact_match=false", "samples.prompts=[]", "training.max_steps=10000")
    argv = [sys.executable, "-m", "launcher", str(ROOT / "recipes" / "tiny" / "sft.yaml")]
    flags = ["--gpus=2", "--strategy=fsdp", "--device=cpu", f"--output={output}"]
    sets = [f"--set={setting}" for setting in settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*argv, *flags, *sets], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + WAIT_SECONDS
    while len(RunDirectory(output).read_metrics()) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.engine
@pytest.mark.parametrize(("flags", "code"), [((), 75), (("--now",), 1)])
def test_a_running_run_is_stopped(flags: tuple[str, ...], code: int, tmp_path: Path) -> None:
    process = _start(tmp_path / "run")
    done = sftlaunch("cancel", str(tmp_path / "run"), *flags)
    assert done.code == 0, done.err
    assert process.wait(WAIT_SECONDS) == code
    newest, _ = newest_whole(tmp_path / "run" / "checkpoints")
    assert (newest is not None) == (not flags)
    assert ("is whole" in done.out) == (not flags)
    assert members(str(tmp_path / "run")) == []


def test_nothing_to_cancel(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create({"plan.json": "{}"})
    done = sftlaunch("cancel", str(run.path))
    assert (done.code, "is not running" in done.err) == (2, True)
    assert sftlaunch("cancel", "no-such-run").code == 2
