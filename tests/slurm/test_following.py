"""One run on a real cluster, looked at and handled from another directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import Queued, sft

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]
TWO_RANKS = ("--gpus=2", "--gpus-per-node=2", "--strategy=ddp")


def test_from_any_directory(
    launch: Callable[..., Queued], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name and by its job's number, each command in one of the two ways."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    queued = launch(*TWO_RANKS, name="far-away", steps=10_000, nodes=1)
    number = str(queued.job)
    followed = subprocess.Popen(
        [sys.executable, "-m", "launcher", "logs", "far-away", "-f", "--rank=1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    queued.until_step(3)
    record = json.loads(sft("status", "far-away", "--json").stdout)
    assert (record["run"], record["job"]["number"]) == (str(queued.run.path), queued.job)
    assert record["job"]["state"] == "RUNNING"
    told = sft("status", number).stdout
    for words in ("step ", "loss ", f"job {queued.job} running", "of its time left"):
        assert words in told, told
    watched = subprocess.Popen(
        [sys.executable, "-m", "launcher", "status", number, "--watch"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watched.stdout is not None
    assert "running" in watched.stdout.readline()
    done = sft("cancel", "far-away")
    assert done.returncode == 0, done.stderr
    assert "is whole" in done.stdout
    log, _ = followed.communicate(timeout=30)
    assert log == queued.run.rank_log(1, 1).read_text("utf-8")
    lines, _ = watched.communicate(timeout=30)
    assert lines.splitlines()[-1].startswith(f"{queued.run.path}  preempted")
    assert (followed.returncode, watched.returncode) == (0, 0)
    saved = queued.saved
    again = sft("resume", number, "--on=slurm", "--detach")
    assert again.returncode == 0, again.stderr
    assert queued.job != int(number)
    queued.until("the resume", lambda: len(queued.ends) == 2)
    assert queued.status["attempts"][1]["from_step"] == saved
    assert sft("cancel", str(queued.job), "--now").returncode == 0
