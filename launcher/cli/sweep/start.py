"""`plan --sweep`, `run --sweep` and `resume SWEEP`: decide, write, and start what is left."""

from __future__ import annotations

import click

from launcher.cli.options import Request
from launcher.cli.sweep.decide import decide_recorded, decide_request
from launcher.cli.sweep.refusals import check_ready
from launcher.cli.sweep.show import show_plan
from launcher.cli.sweep.state import ask_live, end_of
from launcher.cli.sweep.types import DecidedSweep
from launcher.cli.sweep.write import written
from launcher.errors import ExitCode
from launcher.insight.sweep import run_states
from launcher.render.text import plural
from launcher.runs.sweep import SweepDirectory


def plan_sweep(request: Request) -> ExitCode:
    """`plan --sweep`."""
    show_plan(decide_request(request), request)
    return ExitCode.DONE


def start_sweep(request: Request, *, dry_run: bool) -> ExitCode:
    """`run --sweep`; goes on with the same sweep where there is one."""
    return _start(decide_request(request), request, dry_run=dry_run)


def resume_sweep(sweep: SweepDirectory, request: Request, *, dry_run: bool) -> ExitCode:
    """`resume SWEEP`: plan it again from its record, with what else was said."""
    return _start(decide_recorded(sweep, request), request, dry_run=dry_run)


def _start(decided: DecidedSweep, request: Request, *, dry_run: bool) -> ExitCode:
    """Write what is not complete and not on its way, and start it; or only show it."""
    if dry_run:
        show_plan(decided, request)
        return ExitCode.DONE
    live = ask_live(decided.sweep)
    states = run_states(decided.sweep, live) if decided.sweep.exists() else []
    left = [
        place
        for place, one in enumerate(decided.runs)
        if not (states and (states[place].state == "completed" or states[place].job))
    ]
    if states and not left:
        return _nothing_left(decided, request)
    check_ready(decided, [decided.runs[place] for place in left], live, request)
    show_plan(decided, request, to_stderr=request.json)
    if states:
        number = f"{len(left):,} of {plural(len(decided.runs), 'run')}"
        click.echo(f"resume     {decided.output}: {number} left to start", err=request.json)
    if request.target == "slurm":
        from launcher.cli.sweep.slurm import submit_and_follow

        return submit_and_follow(decided, left, request)
    from launcher.cli.sweep.local import run_in_sequence

    with written(decided, left):
        pass
    return run_in_sequence(decided, left, request)


def _nothing_left(decided: DecidedSweep, request: Request) -> ExitCode:
    """All is complete, or on its way in Slurm: then it is followed."""
    click.echo(f"{decided.output}: no run is left to start", err=True)
    live = ask_live(decided.sweep)
    if live and not request.detach:
        from launcher.cli.sweep.slurm import follow_jobs

        if not follow_jobs(decided.sweep, max(decided.sweep.read().jobs)):
            return ExitCode.DONE
    return end_of(decided.sweep, request.json)
