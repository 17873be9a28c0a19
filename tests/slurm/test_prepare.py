"""Rows made ready on a real cluster: in a step, in a job of their own, and not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.runs.directory import RunDirectory
from launcher.runs.prepared import LOG, read_record
from tests.slurm.cluster import Cluster, command
from tests.slurm.conftest import Queued, sft
from tests.support import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]
Launch = Callable[..., Queued]
TINY = ROOT / "recipes" / "tiny"
# A row that no sample of the plan's sees, and that the loader stumbles over.
BAD_ROW = 300


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    lines = (TINY / "data" / "train.jsonl").read_text("utf-8").splitlines()[:BAD_ROW]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, '{"messages": 7}', ""]), encoding="utf-8")
    return path


def test_a_job_of_its_own_before_the_training_job(launch: Launch) -> None:
    flags = ("--set=slurm.prepare=job", "--set=slurm.prepare_partition=urgent")
    queued = launch(*flags, steps=2, nodes=1)
    preparing = queued.status["slurm"]["prepare"]
    asked = command("scontrol", "show", "job", "--oneliner", str(preparing))
    assert "Partition=urgent" in asked
    assert "Restarts=0" in asked
    waiting = command("scontrol", "show", "job", "--oneliner", str(queued.job))
    assert f"Dependency=afterok:{preparing}" in waiting
    queued.until("the preparation", lambda: read_record(queued.run) is not None)
    queued.until_over("completed")
    assert queued.status["prepared"] is True
    assert queued.ends == ["completed"]


def test_one_that_fails_ends_the_run_and_says_why(launch: Launch, bad_rows: Path) -> None:
    queued = launch("--set=slurm.prepare=step", f"--dataset={bad_rows}", steps=2, nodes=1)
    queued.until_over("failed")
    assert queued.ends == ["unprepared"]
    check_error(queued)


def test_the_training_job_does_not_wait_for_one_that_failed(
    cluster: Cluster, bad_rows: Path, tmp_path: Path
) -> None:
    """Nor does the next of the chain; who follows reads the preparation's own error."""
    output = tmp_path / "followed"
    asked = ("--gpus=1", "--device=cpu", "--on=slurm", "--chain=2", "--set=slurm.prepare=job")
    done = sft(
        str(TINY / "sft.yaml"), *asked, f"--dataset={bad_rows}", f"--output={output}", "--json"
    )
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["state"] == "failed"
    assert "error: the preparation failed" in done.stderr
    assert "fix: correct or remove" in done.stderr
    queued = Queued(RunDirectory(output))
    assert queued.ends == []
    check_error(queued)


def check_error(queued: Queued) -> None:
    """The preparation's own words, and nothing left that waits for it."""
    error = queued.status["error"]
    assert "the preparation failed" in error["message"]
    assert error["cause"]
    assert "correct or remove" in error["fix"]
    assert "Traceback" in (queued.run.path / error["log"]).read_text("utf-8")
    assert not list(queued.run.path.glob("**/rank-*.log")), "ranks were started all the same"
    slurm = queued.status["slurm"]
    left = command("squeue", "--noheader", "--format=%A").split()
    assert not {*map(str, slurm["jobs"]), str(slurm.get("prepare"))} & set(left)
    assert "the preparation failed" in sft("status", str(queued.run.path)).stdout


@pytest.mark.slow
def test_preempted_while_it_tokenises(launch: Launch) -> None:
    """That is no failure: it is queued again, prepares, and the ranks read what it made."""
    queued = launch("--set=slurm.prepare=step", steps=2, nodes=1)
    queued.until("the step", (queued.run.path / LOG).is_file)
    asked = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    assert command("sbatch", "--parsable", *asked, "--wrap=sleep 1")
    queued.until_over("completed")
    assert queued.ends == ["preempted", "completed"]
    assert queued.status["prepared"] is True
    assert read_record(queued.run)["rows"]["train"] == 2400
    assert "tokenising" in (queued.run.path / LOG).read_text("utf-8")
