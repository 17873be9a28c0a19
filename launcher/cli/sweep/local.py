"""The runs of a sweep on this machine: in order, one at a time, whatever becomes of each."""

from __future__ import annotations

from collections.abc import Sequence

import click

from launcher.cli.follow import Progress, show_failure
from launcher.cli.options import Request
from launcher.cli.sweep.state import end_of
from launcher.cli.sweep.types import DecidedSweep, SweptRun
from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.insight.sweep import last_metrics
from launcher.launch.local import StopSignals, launch
from launcher.render.torchrun import launch_environment


def run_in_sequence(decided: DecidedSweep, left: Sequence[int], request: Request) -> ExitCode:
    """Run what is left to its end.

    Returns:
        DONE; RUN_FAILED where a run failed; PREEMPTED where a stop was asked for, or a run
        stopped early by itself.

    Raises:
        EnvironmentNotReady: where another launcher runs this sweep.
    """
    sweep = decided.sweep
    with sweep.held() as mine, StopSignals() as stop:
        if not mine:
            raise EnvironmentNotReady(
                "running",
                f"{decided.output} is running",
                why="two launchers would start the same runs",
                fix=f"wait for its end, or sftlaunch cancel {decided.output}",
            )
        sweep.cancelled.unlink(missing_ok=True)
        for number, place in enumerate(left, 1):
            if stop.asked or sweep.cancelled.exists():
                break
            click.echo(
                f"\nrun {number}/{len(left)}    {decided.runs[place].combination.name}", err=True
            )
            try:
                _run(decided.runs[place])
            except KeyboardInterrupt:
                stop.asked = True
                message = {"message": "interrupted"}
                decided.runs[place].run.update_status(state="failed", error=message)
    click.echo("", err=True)
    asked = stop.asked or sweep.cancelled.exists()
    code = end_of(sweep, request.json)
    return ExitCode.PREEMPTED if asked and code is not ExitCode.DONE else code


def _run(one: SweptRun) -> None:
    progress = Progress(one.run)
    plan = one.planned.plan
    restarts = plan.worker.limits["max_restarts"]
    environment = launch_environment(plan.topology, one.facts.cpu_count, restarts)
    try:
        _, failure = launch(plan, one.run, environment, progress.poll)
    finally:
        progress.close()
    if failure is not None:
        show_failure(failure, str(one.run.path))
        return
    record, loss = one.run.read_status(), last_metrics(one.run).get("loss")
    said = f", loss {loss:.4f}" if loss is not None else ""
    click.echo(f"        {record.get('state')}: step {record.get('step') or 0}{said}", err=True)
