"""Effects on a Slurm cluster: check, submit, look, cancel. What is decided, is decided elsewhere.

Every question is an argv with a time limit: a controller that is down answers nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import EnvironmentNotReady, PlanRefused, SpecError
from launcher.plan.types import Plan, Topology
from launcher.render.slurm import PREPARE_SCRIPT, SCRIPT
from launcher.runs.directory import RunDirectory
from launcher.spec.durations import seconds
from launcher.spec.schema import SlurmSpec

ANSWER_SECONDS = 10
SUBMIT_SECONDS = 60
# States of a job that is not over; REQUEUED and the like are on their way to PENDING.
PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ALIVE = ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
GPUS = re.compile(r"gpu:(?:([^:(,\s]+):)?(\d+)")
UNLIMITED = ("UNLIMITED", "INFINITE", "NONE")


@dataclass(frozen=True)
class Job:
    """A job as the controller knows it."""

    number: int | str
    """Its number; of an array's task ARRAY_TASK."""
    state: str
    reason: str
    time_left: str
    position: int | None
    """Place among the pending jobs of its partition, from 1; None where it is not pending."""

    @property
    def pending(self) -> bool:
        """Whether it waits."""
        return self.state in PENDING

    @property
    def alive(self) -> bool:
        """Whether it waits, runs or ends just now."""
        return self.pending or self.state in ALIVE


def check(plan: Plan, slurm: SlurmSpec) -> None:
    """Refuse what the cluster would not start, before anything is written or queued.

    Raises:
        EnvironmentNotReady: no Slurm here, or its controller does not answer.
        SpecError: a partition or account that does not exist.
        PlanRefused: more than the partition has.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentNotReady(
            "no_sbatch",
            "there is no sbatch on this machine",
            fix="run this on a login node of the cluster, or use --dry-run to see the job",
        )
    _check_controller()
    partition = _partition(slurm.partition)
    if slurm.prepare == "job" and slurm.prepare_partition is not None:
        _partition(slurm.prepare_partition, "slurm.prepare_partition")
    _check_account(slurm.account)
    _check_size(plan.topology, partition)
    _check_time(slurm, partition)
    for name in (PREPARE_SCRIPT, SCRIPT):
        if name in plan.files:
            _test_only(plan.files[name])


def ask(
    argv: Sequence[str],
    limit_seconds: int = ANSWER_SECONDS,
    *,
    text: str = "",
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """What one of Slurm's commands says.

    Args:
        argv: the command.
        limit_seconds: how long it may take.
        text: its standard input.
        folder: its working directory.

    Raises:
        EnvironmentNotReady: where it is not here, or does not answer in time.
    """
    try:
        return subprocess.run(
            argv,
            input=text,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=limit_seconds,
        )
    except FileNotFoundError:
        why = f"there is no {argv[0]} on this machine"
    except subprocess.TimeoutExpired:
        why = f"{argv[0]} did not answer within {limit_seconds} s"
    raise no_controller(why)


def no_controller(why: str) -> EnvironmentNotReady:
    """The refusal where Slurm does not answer."""
    return EnvironmentNotReady(
        "slurm_down",
        "Slurm's controller does not answer",
        why=why,
        fix="look at `scontrol ping`, and try again when slurmctld is up",
    )


def _check_controller() -> None:
    done = ask(["scontrol", "ping"])
    if done.returncode or "is UP" not in done.stdout:
        raise no_controller(_one_line(done.stderr or done.stdout))


def _partition(name: str | None, key: str = "slurm.partition") -> dict[str, str]:
    """The partition that will be used, the default one without a name."""
    done = ask(["scontrol", "show", "partition", "--oneliner"])
    found = [fields(line) for line in done.stdout.splitlines() if line.strip()]
    for one in found:
        if one["PartitionName"] == name or (name is None and one.get("Default") == "YES"):
            return one
    known = ", ".join(one["PartitionName"] for one in found) or "none"
    what = f"partition {name!r} does not exist" if name else "the cluster has no default partition"
    raise SpecError("unknown_partition", what, fix=f"set {key} to one of: {known}")


def _check_account(name: str | None) -> None:
    """Accounts are known only where there is accounting; elsewhere any name will do."""
    if name is None or shutil.which("sacctmgr") is None:
        return
    done = ask(["sacctmgr", "--noheader", "--parsable2", "show", "associations", "format=account"])
    known = sorted({line for line in done.stdout.splitlines() if line})
    if done.returncode == 0 and known and name not in known:
        raise SpecError(
            "unknown_account",
            f"account {name!r} does not exist",
            fix=f"set slurm.account to one of: {', '.join(known)}",
        )


def _check_size(topology: Topology, partition: dict[str, str]) -> None:
    name, there = partition["PartitionName"], int(partition["TotalNodes"])
    limit = partition.get("MaxNodes", "UNLIMITED")
    most = there if limit in UNLIMITED else min(there, int(limit))
    if topology.nodes > most:
        raise PlanRefused(
            "too_many_nodes",
            f"{topology.nodes} nodes were asked for, partition {name} gives {most} at most",
            fix="use fewer --nodes, or another slurm.partition",
        )
    if topology.device != "cuda":
        return
    has = _most_gpus(name)
    if topology.gpus_per_node > has:
        raise PlanRefused(
            "too_many_gpus",
            f"{topology.gpus_per_node} GPUs per node were asked for, "
            f"partition {name} has {has or 'none'}",
            fix=f"use --gpus-per-node {has} and more --nodes" if has else "use another partition",
        )


def _most_gpus(partition: str) -> int:
    """GPUs of the best node of a partition."""
    done = ask(["sinfo", "--noheader", f"--partition={partition}", "--format=%G"])
    counts = [sum(int(n) for _, n in GPUS.findall(line)) for line in done.stdout.splitlines()]
    return max(counts, default=0)


def _check_time(slurm: SlurmSpec, partition: dict[str, str]) -> None:
    limit = partition.get("MaxTime", "UNLIMITED")
    if slurm.time_limit is None or limit in UNLIMITED:
        return
    if seconds(slurm.time_limit) > seconds(limit):
        raise PlanRefused(
            "time_limit",
            f"slurm.time_limit {slurm.time_limit} is above the {limit} "
            f"of partition {partition['PartitionName']}",
            fix=f"use --set slurm.time_limit={limit}; the run goes on in the next job by itself",
        )


def _test_only(script: str) -> None:
    """Slurm's own judgement of the whole script; it queues nothing."""
    # The folder is made only when the job is queued; a test does not look into it.
    done = ask(["sbatch", "--test-only", "--chdir=/"], SUBMIT_SECONDS, text=script)
    if done.returncode:
        raise PlanRefused(
            "slurm_refused",
            f"Slurm would not take the job: {refusal_words(done.stderr)}",
            fix="correct slurm: in the spec; --dry-run shows the script",
        )


def submit(run: RunDirectory, chain: int, *, prepare: bool = False) -> list[int]:
    """Queue a run whose files are written; its record holds the jobs before one can start.

    Args:
        run: with job.sbatch.
        chain: jobs that continue one another, at least 1.
        prepare: whether a job of its own makes the rows ready before the first of them.

    Returns:
        Numbers of the jobs that train, the first one first.

    Raises:
        EnvironmentNotReady: where Slurm refuses; nothing stays queued then.
    """
    run.logs(1).parent.mkdir(parents=True, exist_ok=True)
    run.cancelled.unlink(missing_ok=True)
    jobs: list[int] = []
    # Held until the record holds its number: a job may start before sbatch has returned.
    first = ["--hold"]
    try:
        if prepare:
            jobs.append(_queue(run, PREPARE_SCRIPT, first))
            first = _after("afterok", jobs[0])
        jobs.append(_queue(run, SCRIPT, first))
        for _ in range(chain - 1):
            jobs.append(_queue(run, SCRIPT, _after("afternotok", jobs[-1])))
        _record(run, jobs, prepare=prepare)
        release(jobs[0])
    except BaseException:
        if jobs:
            ask(["scancel", *map(str, jobs)])
        raise
    return jobs[prepare:]


def _record(run: RunDirectory, jobs: Sequence[int], *, prepare: bool) -> None:
    ours = list(jobs[prepare:])
    numbers = {"job": ours[0], "jobs": ours, **({"prepare": jobs[0]} if prepare else {})}
    run.update_status(state="queued", stage="queued", slurm=numbers)


def _after(how: str, job: int) -> list[str]:
    """Options of a job that waits for another, and goes where that wait can never end."""
    return [f"--dependency={how}:{job}", "--kill-on-invalid-dep=yes"]


def _queue(run: RunDirectory, script: str, options: Sequence[str]) -> int:
    done = ask(["sbatch", "--parsable", *options, script], SUBMIT_SECONDS, folder=run.path)
    if done.returncode:
        raise not_queued(done.stderr)
    return int(done.stdout.split(";")[0])


def release(job: int) -> None:
    """Let a job that was queued with --hold start, or all tasks of an array.

    Raises:
        EnvironmentNotReady: where Slurm refuses.
    """
    done = ask(["scontrol", "release", str(job)])
    if done.returncode:
        raise not_queued(done.stderr)


def not_queued(text: str) -> EnvironmentNotReady:
    """The refusal for what sbatch or scontrol said."""
    return EnvironmentNotReady(
        "not_queued",
        f"the job was not queued: {refusal_words(text)}",
        fix="correct slurm: in the spec, or try again",
    )


def look(number: int | str) -> Job | None:
    """A job, or None where the controller does not know it any more."""
    done = ask(["scontrol", "show", "job", "--oneliner", str(number)])
    if done.returncode or not done.stdout.strip():
        if "Invalid job id" in done.stderr or not done.stderr:
            return None
        raise no_controller(_one_line(done.stderr))
    found = fields(done.stdout)
    if "JobState" not in found:  # "Job 7_3 not found": it is gone, other tasks of its array are not
        return None
    state = found["JobState"]
    position = _position(number, found.get("Partition", "")) if state == "PENDING" else None
    left = ask(["squeue", "--noheader", f"--jobs={number}", "--format=%L"]).stdout.strip()
    return Job(number, state, found.get("Reason", "None"), left, position)


def _position(number: int | str, partition: str) -> int | None:
    """Place in the queue, by the order that the scheduler looks at it."""
    argv = ["squeue", "--noheader", "--states=PENDING", f"--partition={partition}"]
    lines = ask([*argv, "--array", "--sort=-p,i", "--format=%i"]).stdout.split()
    return lines.index(str(number)) + 1 if str(number) in lines else None


def current_job(run: RunDirectory) -> Job | None:
    """The first of a run's jobs that is not over; else the last one that is still known."""
    numbers = job_numbers(run.read_status())
    known = [job for number in numbers if (job := look(number)) is not None]
    return next((job for job in known if job.alive), known[-1] if known else None)


def job_numbers(record: Mapping[str, Any]) -> list[int]:
    """All jobs of a run's last submission, in the order in which they start."""
    slurm = record.get("slurm", {})
    return [*([slurm["prepare"]] if "prepare" in slurm else []), *slurm.get("jobs", [])]


def run_of_job(number: int) -> RunDirectory | None:
    """The run directory of a job that the controller knows, from anywhere."""
    done = ask(["squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%Z"])
    run = RunDirectory(Path(done.stdout.rstrip("\n")))
    return run if done.returncode == 0 and done.stdout.strip() and run.exists() else None


def run_of_name(name: str) -> RunDirectory | None:
    """The run directory of a job by its run's name, the newest where there are several."""
    done = ask(["squeue", "--noheader", "--states=all", "--me", "--sort=-i", "--format=%Z"])
    runs = (RunDirectory(Path(line)) for line in done.stdout.splitlines() if line)
    return next((run for run in runs if run.path.name == name and run.exists()), None)


def stop(run: RunDirectory, *, save: bool) -> None:
    """Cancel a run's jobs.

    Args:
        run: with jobs.
        save: whether the ranks of a running job save first; its batch script ends it then.
    """
    numbers = job_numbers(run.read_status())
    jobs = [job for number in numbers if (job := look(number)) is not None and job.alive]
    running = [str(job.number) for job in jobs if not job.pending]
    run.cancelled.touch()
    # Those that wait first, or the next of a chain would start.
    now = [str(job.number) for job in jobs if job.pending] + ([] if save else running)
    if now:
        ask(["scancel", *now])
    if save and running:
        ask(["scancel", "--batch", "--signal=USR1", *running])


def fields(line: str) -> dict[str, str]:
    """`Key=Value` pairs of scontrol's one-line form; values with spaces keep their first word."""
    pairs = (part.partition("=") for part in line.split())
    return {key: value for key, equals, value in pairs if equals}


def refusal_words(text: str) -> str:
    """What sbatch said, without its own name in front of every line."""
    return _one_line(re.sub(r"(?m)^(sbatch|scontrol|allocation failure): (error: )?", "", text))


def _one_line(text: str) -> str:
    return " ".join(text.split())
