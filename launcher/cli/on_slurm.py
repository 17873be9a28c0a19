"""What the commands say and ask of a run on Slurm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.options import Request
from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.plan.types import plan_from_json
from launcher.render.secrets import hide
from launcher.render.slurm import Origin
from launcher.runs.directory import ON_THE_WAY, RunDirectory
from launcher.runs.prepared import up_to_date
from launcher.spec.schema import SlurmSpec

if TYPE_CHECKING:
    from launcher.launch.accounting import PastJob

POLL_SECONDS = 1.0
# Looks at the record between two questions to the controller, which many others ask too.
LOOKS_PER_QUESTION = 5
EXIT_CODES = {"completed": ExitCode.DONE, "preempted": ExitCode.PREEMPTED}


def origin() -> Origin:
    """This process, as the job script names it."""
    package_parent = Path(__file__).resolve().parents[2]
    command = hide(shlex.join(["sftlaunch", *sys.argv[1:]]), os.environ)
    return Origin(command, sys.executable, str(package_parent))


def has_job(record: Mapping[str, Any]) -> bool:
    """Whether a run was queued, and Slurm can be asked about it here."""
    return bool(record.get("slurm")) and shutil.which("scontrol") is not None


def refuse_queued(run: RunDirectory) -> None:
    """Refuse to queue a run twice.

    Raises:
        EnvironmentNotReady: where one of its jobs waits or runs.
    """
    from launcher.launch.slurm import current_job

    job = current_job(run) if has_job(run.read_status()) else None
    if job is not None and job.alive:
        raise EnvironmentNotReady(
            "running",
            f"{run.path} is job {job.number} ({job.state})",
            why="two attempts would overwrite each other",
            fix=f"wait for its end, or sftlaunch cancel {job.number}",
        )


def queue_and_follow(
    run: RunDirectory,
    slurm: SlurmSpec,
    output: str,
    before: Mapping[str, bytes] | None,
    request: Request,
) -> ExitCode:
    """Queue the job, and show it to its end unless asked not to.

    Args:
        run: whose files are written.
        slurm: resolved.
        output: the run directory, as people name it.
        before: what was there before this command, for the case that nothing is queued.
        request: how to print.
    """
    from launcher.launch.slurm import submit

    try:
        prepare = slurm.prepare == "job" and not rows_ready(run)
        jobs = submit(run, slurm.chain or 1, prepare=prepare)
    except BaseException:
        run.restore(before)
        raise
    warn_unasked(slurm, output)
    more = f" and {len(jobs) - 1} after it" if len(jobs) > 1 else ""
    click.echo(f"queued     job {jobs[0]}{more}; sftlaunch status {jobs[0]}", err=True)
    if not slurm.requeue and slurm.chain is None:
        click.echo("           it is not queued again by itself (slurm.requeue)", err=True)
    if request.detach:
        if request.json:
            click.echo(json.dumps(run.read_status()))
        return ExitCode.DONE
    if not followed("job", jobs[0], partial(follow_job, run)):
        return ExitCode.DONE
    return _say_end(run, output, request.json)


def followed(what: str, number: int, follow: Callable[[], None]) -> bool:
    """Follow what is queued, to its end unless the user has seen enough: it goes on without us."""
    try:
        follow()
    except KeyboardInterrupt:
        click.echo(f"\n{what} {number} goes on; sftlaunch cancel {number} stops it", err=True)
        return False
    return True


def warn_unasked(slurm: SlurmSpec, output: str) -> None:
    """Say where no job has asked the nodes yet whether they see the folder, or one said no."""
    from launcher.launch.check_job import existing_folder, place, remembered

    folder = existing_folder(output)
    try:
        failed = remembered(place(folder, slurm.partition))
    except EnvironmentNotReady:
        return  # the job is queued: a question about advice must not fail the command
    if failed is None:
        text = f"nobody has asked the nodes whether they see {folder}"
    elif failed:
        text = f"the nodes were not ready when they were asked ({', '.join(failed)})"
    else:
        return
    click.secho(f"warning    {text}: sftlaunch doctor --on slurm", fg="yellow", err=True)


def follow_job(run: RunDirectory) -> None:
    """Show a run's progress until no job of it is left."""
    from launcher.cli.follow import Progress
    from launcher.launch.slurm import current_job

    progress = Progress(run)
    looks = 0
    while True:
        progress.poll()
        looks += 1
        if looks % LOOKS_PER_QUESTION == 0 or run.read_status().get("state") not in ON_THE_WAY:
            job = current_job(run)
            if job is None or not job.alive:
                break
        time.sleep(POLL_SECONDS)
    progress.close()
    settle(run)


def settle(run: RunDirectory) -> None:
    """The record of a run whose jobs are gone: what nobody wrote down is said as it is."""
    if run.read_status().get("state") not in ON_THE_WAY:
        return
    if run.cancelled.exists():
        run.update_status(state="preempted", stage="cancelled")
        return
    message = "its job ended without a word: killed past its grace, or with its node"
    record = run.read_status()
    if "prepare" in record.get("slurm", {}) and not record.get("attempts"):
        message = "the preparation ended without a word: out of time or memory, or with its node"
    past = last_past_job(record)
    if past is not None:
        message = f"job {past.number} ended as {past.state}: {past.meaning}"
    run.update_status(state="failed", error={"message": message, "log": "logs"})


def last_past_job(record: Mapping[str, Any]) -> PastJob | None:
    """The job that a run ended with, by the accounting; one that never ran says nothing."""
    from launcher.launch.accounting import past_job
    from launcher.launch.slurm import job_numbers

    found = [job for number in job_numbers(record) if (job := past_job(number)) is not None]
    told = [job for job in found if job.state != "COMPLETED"]
    return told[0] if told else None


def rows_ready(run: RunDirectory) -> bool:
    """Whether a run's rows were prepared already, by `data prepare` or an earlier attempt."""
    plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    return up_to_date(plan, run)


def _say_end(run: RunDirectory, output: str, as_json: bool) -> ExitCode:
    record = run.read_status()
    if as_json:
        click.echo(json.dumps(record))
    code = EXIT_CODES.get(str(record.get("state")), ExitCode.RUN_FAILED)
    if code is ExitCode.DONE:
        click.echo(f"done: step {record.get('step')}, {output}/final", err=True)
        return code
    if (record.get("error") or {}).get("message"):
        show_error(record["error"])
    click.echo(f"{record.get('stage')}; go on with: sftlaunch resume {output} --on slurm", err=True)
    return code


def show_error(error: Mapping[str, Any]) -> None:
    """What status.json says of a failure, with its cause and fix where they are known."""
    click.secho("error: ", fg="red", nl=False, err=True)
    click.echo(str(error["message"]), err=True)
    if error.get("cause"):
        click.echo(f"  probable cause: {error['cause']}", err=True)
    if error.get("fix"):
        click.echo(f"  fix: {error['fix']}", err=True)
    if error.get("log"):
        click.echo(f"  full log: {error['log']}", err=True)


def job_record(run: RunDirectory) -> dict[str, Any]:
    """What the controller says of a run's job, where it knows one that is not over."""
    from launcher.launch.slurm import current_job

    record = run.read_status()
    if not has_job(record) or record.get("state") == "completed":
        return {}
    try:
        job = current_job(run)
    except EnvironmentNotReady:
        return {"job": {"state": "unknown: the controller does not answer"}}
    if job is not None and job.alive:
        return {"job": asdict(job)}
    # Its record says that it runs, and the queue does not: nobody could write down why.
    return {"job": _lost(record)} if record.get("state") in ON_THE_WAY else {}


def _lost(record: Mapping[str, Any]) -> dict[str, Any]:
    past = last_past_job(record)
    number = past.number if past else record["slurm"]["job"]
    why = f"{past.state}: {past.meaning}" if past else "not in this cluster's queue any more"
    return {"number": number, "state": why, "over": True}


def job_text(record: Mapping[str, Any]) -> str:
    """The same for a person; empty where there is nothing to say."""
    job = record.get("job")
    if not job:
        return ""
    if "number" not in job:
        return f"  ({job['state']})"
    if job.get("over"):
        return f"  (job {job['number']}: {job['state']})"
    text = f"  (job {job['number']} {job['state'].lower()}"
    if job["position"]:
        text += f", {job['position']} in the queue: {job['reason']}"
    elif job["time_left"] not in ("", "INVALID", "UNLIMITED"):
        text += f", {job['time_left']} of its time left"
    return f"{text})"
