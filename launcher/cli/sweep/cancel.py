"""`cancel SWEEP`: its jobs, the runs here, and the launcher that would start the next."""

from __future__ import annotations

import time

import click

from launcher.cli.on_slurm import settle
from launcher.cli.stopping import POLL_SECONDS, patience
from launcher.cli.sweep.state import ask_live, counts_text, way_on
from launcher.errors import ExitCode, SpecError
from launcher.insight.sweep import run_states
from launcher.launch.processes import ask_to_stop, end_all, members
from launcher.runs.sweep import SweepDirectory


def cancel_sweep(sweep: SweepDirectory, *, now: bool) -> ExitCode:
    """`cancel SWEEP`: its jobs, the runs here, and the launcher that would start the next."""
    states = run_states(sweep, ask_live(sweep))
    queued = any(one.job for one in states)
    with sweep.held() as free:
        here = not free
    here = here or any(members(str(o.run.path)) for o in states if o.state == "running")
    if not queued and not here:
        raise SpecError(
            "not_running",
            f"{sweep.path} is not running",
            fix=f"sftlaunch status {sweep.path} shows its runs",
        )
    if queued:
        _cancel_jobs(sweep, now)
    if here:
        _cancel_here(sweep, now)
    states = run_states(sweep, None)
    click.echo(f"{sweep.path}  {counts_text(states)}; go on with: {way_on(sweep)}")
    return ExitCode.DONE


def _cancel_jobs(sweep: SweepDirectory, now: bool) -> None:
    from launcher.launch.slurm_array import live_tasks, stop_array

    stop_array(sweep.runs, save=not now)
    deadline = time.monotonic() + max(patience(run) for run in sweep.runs)
    states = run_states(sweep, live_tasks())
    while any(one.job for one in states) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        states = run_states(sweep, live_tasks())
    for one in states:
        if one.lost:
            settle(one.run)


def _cancel_here(sweep: SweepDirectory, now: bool) -> None:
    """Ask the launcher for no further run, and the ranks of the present one to stop."""
    sweep.cancelled.touch()
    asked: set[str] = set()
    deadline = time.monotonic() + max(patience(run) for run in sweep.runs)
    while time.monotonic() < deadline:
        running = [one for one in run_states(sweep, None) if one.state == "running"]
        for one in running:
            mark = str(one.run.path)
            if now:
                end_all(mark, 0.0)
                one.run.update_status(state="failed", error={"message": "cancelled"})
            elif mark not in asked and members(mark):
                ask_to_stop(mark)
                asked.add(mark)
        with sweep.held() as free:
            if free and not any(members(str(one.run.path)) for one in running):
                return
        time.sleep(POLL_SECONDS)
