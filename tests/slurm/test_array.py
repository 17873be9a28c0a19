"""Sweeps on a real cluster: one array, each task on its own through what happens to it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.runs.sweep import SweepDirectory
from tests.slurm.cluster import Cluster, command
from tests.slurm.conftest import SHORT, Queued, sft
from tests.support import ROOT, tree

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]
TINY = str(ROOT / "recipes" / "tiny" / "sft.yaml")
HOSTILE = """it's "x" $(touch pwned) ; touch pwned & @RUN@ #"""
Sweep = Callable[..., "QueuedSweep"]


class QueuedSweep:
    """A sweep on the cluster."""

    def __init__(self, path: Path) -> None:
        self.sweep = SweepDirectory(path)
        self.runs = [Queued(run) for run in self.sweep.runs]

    @property
    def array(self) -> int:
        return self.sweep.read().jobs[-1]

    @property
    def states(self) -> list[str]:
        return [one.status["state"] for one in self.runs]

    def until_over(self) -> None:
        def gone() -> bool:
            left = command("squeue", "--noheader", f"--jobs={self.array}", "--format=%T")
            return not left and not {"queued", "running"} & set(self.states)

        self.runs[0].until("the array's end", gone)


@pytest.fixture
def launch_sweep(cluster: Cluster, tmp_path: Path) -> Iterator[Sweep]:
    """Queue a sweep of the recipe tiny, one rank a run; what is left is cancelled."""
    started: list[QueuedSweep] = []

    def start(*flags: str, name: str = "sweep", steps: int, **environment: str) -> QueuedSweep:
        output = tmp_path / name
        base = ("--device=cpu", "--on=slurm", "--detach", f"--output={output}")
        settings = [*SHORT, f"training.max_steps={steps}"]
        swept = {flag.partition("=")[2].partition("=")[0] for flag in flags if "--sweep" in flag}
        sets = [f"--set={each}" for each in settings if each.partition("=")[0] not in swept]
        done = sft(TINY, *base, *sets, *flags, **environment)
        assert done.returncode == 0, done.stderr
        started.append(QueuedSweep(output))
        return started[-1]

    yield start
    for one in started:
        jobs = [str(job) for job in one.sweep.read().jobs]
        subprocess.run(["scancel", *jobs], capture_output=True, check=False, timeout=20)


def test_an_array_runs_to_its_end(launch_sweep: Sweep, tmp_path: Path) -> None:
    calls, real = tmp_path / "calls", command("which", "sbatch")
    (tmp_path / "bin").mkdir()
    counting = tmp_path / "bin" / "sbatch"
    counting.write_text(f'#!/bin/sh\necho "$*" >>"{calls}"\nexec {real} "$@"\n')
    counting.chmod(0o755)
    swept = launch_sweep(
        f"--sweep=samples.prompts=[{json.dumps(HOSTILE)}]",
        "--sweep=seed=1,2",
        "--set=slurm.array_throttle=3",
        name=HOSTILE,
        steps=1,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    submitted = [line for line in calls.read_text().splitlines() if "--test-only" not in line]
    assert submitted == ["--parsable --hold --array=0-1%3 job.sbatch"]
    shown = sft("status", str(swept.array), "--json")
    assert json.loads(shown.stdout)["sweep"]["jobs"] == [swept.array], shown.stderr
    swept.until_over()
    assert swept.states == ["completed"] * 2, [one.told() for one in swept.runs]
    assert [one.ends for one in swept.runs] == [["completed"]] * 2
    assert not list(tmp_path.rglob("pwned"))
    for task, one in enumerate(swept.runs):
        assert one.status["slurm"]["jobs"] == [f"{swept.array}_{task}"]
        assert (one.run.path / "logs" / f"slurm-{swept.array}_{task}.log").is_file()
        assert set(one.losses) == {1}
        assert "pwned" in one.run.samples.read_text("utf-8")
    assert swept.runs[0].losses != swept.runs[1].losses  # each had its own seed


def test_a_task_that_is_stopped_goes_on_alone(launch_sweep: Sweep) -> None:
    swept = launch_sweep("--sweep=seed=1,2", "--set=slurm.exclusive=true", steps=24)
    first, second = swept.runs
    for one in swept.runs:
        one.until_step(3)
    nodes = command("squeue", "--noheader", "--array", f"--jobs={swept.array}_0", "--format=%N")
    # The last task's own job id is the whole array's: what is done to it must not reach all.
    subprocess.run(["scancel", "-b", "-s", "USR1", f"{swept.array}_1"], check=True)
    shown = ("squeue", "--noheader", "--array", f"--jobs={swept.array}", "--format=%K %T")
    second.until("its place in the queue", lambda: "1 PENDING" in command(*shown))
    assert (first.ends, second.ends) == ([None], ["timeout"])
    assert "0 RUNNING" in command(*shown)
    asked = (f"--nodelist={nodes}", "--partition=urgent", "--exclusive", "--output=/dev/null")
    assert command("sbatch", "--parsable", *asked, "--wrap=sleep 1")
    first.until("the end of its attempt", lambda: first.ends[0] is not None)
    swept.until_over()
    assert (first.ends, second.ends) == (["preempted", "completed"], ["timeout", "completed"])
    for one in swept.runs:
        begun = [attempt["from_step"] for attempt in one.status["attempts"]]
        assert begun[0] == 0
        assert begun[1] >= 3
        assert sorted(one.losses) == list(range(1, 25))


@pytest.mark.slow
def test_a_sweep_is_cancelled_and_what_is_left_goes_on(launch_sweep: Sweep) -> None:
    swept = launch_sweep(
        "--sweep=training.max_steps=2,400,3", "--set=slurm.array_throttle=1", steps=1
    )
    done, stopped, _ = swept.runs
    stopped.until_step(2)
    assert done.status["state"] == "completed"
    job = swept.array
    shown = json.loads(sft("status", str(swept.sweep.path), "--json").stdout)
    assert shown["sweep"]["states"] == {"queued": 1, "running": 1, "completed": 1}
    assert shown["runs"][1]["job"] == f"{job}_1"
    cancelled = sft("cancel", str(job))
    assert cancelled.returncode == 0, cancelled.stderr
    assert swept.states == ["completed", "preempted", "preempted"]
    assert stopped.ends == ["cancelled"]
    assert stopped.saved >= 2
    assert command("squeue", "--noheader", f"--jobs={job}") == ""
    again = sft("resume", str(swept.sweep.path), "--on=slurm", "--detach")
    assert again.returncode == 0, again.stderr
    assert swept.array != job
    stopped.until("going on", lambda: len(stopped.ends) == 2)
    assert stopped.status["attempts"][1]["from_step"] == stopped.saved
    shown = json.loads(sft("status", str(swept.array), "--json").stdout)
    assert [one["job"] for one in shown["runs"]] == [None, f"{swept.array}_1", f"{swept.array}_2"]
    assert sft("cancel", str(swept.sweep.path), "--now").returncode == 0
    assert done.ends == ["completed"]


def test_more_runs_than_an_array_holds_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    seeds = ",".join(map(str, range(1002)))
    output = tmp_path / "sweep"
    done = sft(TINY, "--device=cpu", "--on=slurm", f"--sweep=seed={seeds}", f"--output={output}")
    assert (done.returncode, output.exists()) == (3, False), done.stderr
    assert "1001 at most" in done.stderr


def test_an_array_that_cannot_be_queued_changes_nothing(
    launch_sweep: Sweep, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    refusing = tmp_path / "bin" / "sbatch"
    refusing.write_text(
        f'#!/bin/sh\ncase $1 in --test-only) exec {command("which", "sbatch")} "$@";; esac\n'
        "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2\nexit 1\n"
    )
    refusing.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    output = tmp_path / "never"
    base = ("--device=cpu", "--on=slurm", f"--output={output}")
    done = sft(TINY, "--sweep=seed=1,2", *base, PATH=path)
    assert (done.returncode, output.exists()) == (4, False), done.stderr
    assert "QOSMaxSubmitJobPerUserLimit" in done.stderr

    holder = command("sbatch", "--parsable", "--exclusive", "-N2", "--wrap=sleep 60", "-o/dev/null")
    try:
        swept = launch_sweep("--sweep=seed=1,2", steps=1)
        assert sft("cancel", str(swept.array)).returncode == 0
        before = tree(swept.sweep.path)
        flags = ("--on=slurm", "--set=slurm.time_limit=1h")
        done = sft("resume", str(swept.sweep.path), *flags, PATH=path)
        assert done.returncode == 4, done.stderr
        assert tree(swept.sweep.path) == before
    finally:
        subprocess.run(["scancel", holder], check=False)
