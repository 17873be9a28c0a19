"""A sweep on a Slurm cluster: one job array, submitted, looked at and cancelled as a whole."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import PlanRefused
from launcher.launch.slurm import (
    PENDING,
    SUBMIT_SECONDS,
    ask,
    no_controller,
    not_queued,
    release,
)
from launcher.render.array import array_range
from launcher.render.slurm import SCRIPT
from launcher.runs.directory import RunDirectory
from launcher.runs.sweep import SweepDirectory, task_name

FORMAT = "%F|%K|%T|%L|%r"
# One task of an array, as people and Slurm write it.
TASK = re.compile(r"\d+_\d+")


@dataclass(frozen=True)
class Task:
    """A job, or a task of an array, that is not over."""

    state: str
    time_left: str
    reason: str

    @property
    def pending(self) -> bool:
        """Whether it waits."""
        return self.state in PENDING


def check_array(runs: int) -> None:
    """Hold the number of runs against the cluster's limit for one array.

    Raises:
        PlanRefused: where there are more.
        EnvironmentNotReady: where the controller does not answer.
    """
    lines = ask(["scontrol", "show", "config"]).stdout.splitlines()
    limits = {name.strip(): value.strip() for name, _, value in (x.partition("=") for x in lines)}
    most = limits.get("MaxArraySize", "")
    if most.isdecimal() and runs > int(most):
        raise PlanRefused(
            "sweep_too_large",
            f"the sweep has {runs:,} runs, a job array of this cluster {most} at most",
            fix="make several sweeps of it, each with an --output of its own",
            source="slurm.conf, MaxArraySize",
        )


def submit_array(sweep: SweepDirectory, tasks: Sequence[int], throttle: int | None) -> int:
    """Queue these runs of a sweep as one array; all records name it before one can start.

    Args:
        sweep: with its script, and the run directories written.
        tasks: places of the runs, at least one.
        throttle: how many may run at one time.

    Returns:
        The array's job number.

    Raises:
        EnvironmentNotReady: where Slurm refuses; nothing stays queued then.
    """
    runs = sweep.runs
    for task in tasks:
        runs[task].logs(1).parent.mkdir(parents=True, exist_ok=True)
        runs[task].cancelled.unlink(missing_ok=True)
    # Held as a single job is: a task may start before sbatch has returned.
    option = f"--array={array_range(tasks, throttle)}"
    done = ask(
        ["sbatch", "--parsable", "--hold", option, SCRIPT], SUBMIT_SECONDS, folder=sweep.path
    )
    if done.returncode:
        raise not_queued(done.stderr)
    job = int(done.stdout.split(";")[0])
    try:
        for task in tasks:
            name = task_name(job, task)
            slurm = {"job": name, "jobs": [name]}
            # Not durable: a thousand waits for the disk, for what the array's record says too.
            runs[task].update_status(
                durable=False, state="queued", stage="queued", slurm=slurm, error=None, notes=[]
            )
        record = sweep.read()
        sweep.write(dataclasses.replace(record, jobs=(*record.jobs, job)))
        release(job)
    except BaseException:
        ask(["scancel", str(job)])
        raise
    return job


def live_tasks() -> dict[str, Task]:
    """This user's jobs that are not over, by number; tasks of arrays by ARRAY_TASK.

    Raises:
        EnvironmentNotReady: where the controller does not answer.
    """
    done = ask(["squeue", "--noheader", "--array", "--me", f"--format={FORMAT}"])
    if done.returncode:
        raise no_controller(" ".join(done.stderr.split()))
    found = {}
    for line in done.stdout.splitlines():
        job, task, state, left, reason = line.split("|", 4)
        found[f"{job}_{task}" if task.isdecimal() else job] = Task(state, left, reason)
    return found


def sweep_of_job(job: int) -> SweepDirectory | None:
    """The sweep whose array a job number is, from anywhere."""
    sweep, _ = _folder(str(job))
    return sweep


def sweep_of_name(name: str) -> SweepDirectory | None:
    """The sweep of this user's jobs with this name, the newest where there are several."""
    done = ask(["squeue", "--noheader", "--states=all", "--me", "--sort=-i", "--format=%Z"])
    folders = dict.fromkeys(line for line in done.stdout.splitlines() if line)
    found = (SweepDirectory(Path(folder)) for folder in folders)
    return next((sweep for sweep in found if sweep.path.name == name and sweep.exists()), None)


def run_of_task(name: str) -> RunDirectory | None:
    """The run directory of ARRAY_TASK, from anywhere."""
    sweep, task = _folder(name)
    return sweep.runs[task] if sweep is not None and task is not None else None


def stop_array(runs: Sequence[RunDirectory], *, save: bool) -> None:
    """Cancel what is left of a sweep's jobs.

    Args:
        runs: of the sweep.
        save: whether the ranks of running tasks save first; their batch scripts end them then.
    """
    live = live_tasks()
    names = set()
    for run in runs:
        jobs = run.read_status().get("slurm", {}).get("jobs", [])
        mine = {str(job) for job in jobs if str(job) in live}
        if mine:
            run.cancelled.touch()
        names |= {name.partition("_")[0] for name in mine}
    if not names:
        return
    # Those that wait first, or they would start where others end.
    ask(["scancel", *(["--state=PENDING"] if save else []), *sorted(names)])
    if save:
        ask(["scancel", "--batch", "--signal=USR1", *sorted(names)])


def _folder(name: str) -> tuple[SweepDirectory | None, int | None]:
    """The sweep of an array or of one of its tasks, and the task."""
    shown = ["--states=all", f"--jobs={name}", "--format=%F|%K|%Z"]
    lines = ask(["squeue", "--noheader", "--array", *shown]).stdout.splitlines()
    if not lines:
        return None, None
    job, task, folder = lines[0].split("|", 2)
    sweep = SweepDirectory(Path(folder))
    if not sweep.exists() or int(job) not in sweep.record.jobs:
        return None, None
    return sweep, int(task)
