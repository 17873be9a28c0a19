"""`cancel`: stop a run, with a checkpoint or at once."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from launcher.cli.on_docker import cancel_container, has_container
from launcher.cli.on_slurm import has_job, settle
from launcher.cli.stopping import POLL_SECONDS, patience
from launcher.cli.sweep.cancel import cancel_sweep
from launcher.cli.which import which_run, which_sweep
from launcher.errors import ExitCode, SpecError
from launcher.launch.presence import refuse_elsewhere
from launcher.launch.processes import ask_to_stop, end_all, members
from launcher.runs.checkpoints import newest_whole
from launcher.runs.directory import RunDirectory


@click.command()
@click.argument("run_name", required=False, metavar="[RUN]")
@click.option(
    "--now",
    "--no-checkpoint",
    "now",
    is_flag=True,
    help="End all ranks at once; what came after the last checkpoint is lost.",
)
def cancel(run_name: str | None, now: bool) -> int:
    """Stop a run or a sweep: its ranks save first. RUN is a path, a name or a job number."""
    sweep = which_sweep(run_name)
    if sweep is not None:
        return cancel_sweep(sweep, now=now)
    run = which_run(run_name)
    if has_job(run.read_status()) and _cancel_job(run, now):
        return _say(run)
    if has_container(run):
        cancel_container(run, now=now)
        return _say(run)
    if not members(str(run.path.resolve())):
        refuse_elsewhere(run)
        raise SpecError(
            "not_running", f"{run.path} is not running", fix="sftlaunch status shows all runs"
        )
    _cancel_here(run, now)
    return _say(run)


def _cancel_here(run: RunDirectory, now: bool) -> None:
    mark = str(run.path.resolve())
    if now:
        end_all(mark, 0.0)
        run.update_status(state="failed", error={"message": "cancelled"})
        return
    ask_to_stop(mark)
    _wait(run, lambda: bool(members(mark)))


def _cancel_job(run: RunDirectory, now: bool) -> bool:
    """Whether there was a job to cancel."""
    from launcher.launch.slurm import current_job, stop

    def alive() -> bool:
        job = current_job(run)
        return job is not None and job.alive

    if not alive():
        return False
    stop(run, save=not now)
    _wait(run, alive)
    settle(run)
    return True


def _wait(run: RunDirectory, goes_on: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience(run)
    while goes_on() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _say(run: RunDirectory) -> ExitCode:
    newest, _ = newest_whole(run.checkpoints, contents=False)
    saved = f"{newest.path.name} is whole" if newest else "there is no checkpoint"
    state = run.read_status().get("state")
    click.echo(f"{run.path}  {state}; {saved}; go on with: sftlaunch resume {run.path}")
    return ExitCode.DONE
