"""Where a sweep stands: `status SWEEP`, `cancel SWEEP`, the live line, and the table at its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from launcher.cli.on_slurm import settle
from launcher.errors import EnvironmentNotReady, ExitCode, SpecError
from launcher.insight.find import find_sweep
from launcher.insight.sweep import RunState, count_states, run_states
from launcher.launch.processes import ask_to_stop, end_all, members
from launcher.render.quote import shell_line
from launcher.render.table import table
from launcher.render.text import duration
from launcher.runs.sweep import SweepDirectory

if TYPE_CHECKING:
    from launcher.launch.slurm_array import Task

POLL_SECONDS = 1.0
CANCEL_POLL_SECONDS = 0.2
# Looks at the records between two questions to the controller, which many others ask too.
LOOKS_PER_QUESTION = 5
PLAIN_INTERVAL_SECONDS = 5.0
ON_THE_WAY = ("queued", "running")
SHOWN_ERROR = 60


def which_sweep(name: str | None) -> SweepDirectory | None:
    """The sweep that a path, a name or an array's job number means, from any directory."""
    found = find_sweep(name)
    if found is not None or name is None or shutil.which("squeue") is None or "/" in name:
        return found
    from launcher.launch.slurm_array import sweep_of_job, sweep_of_name

    return sweep_of_job(int(name)) if name.isdecimal() else sweep_of_name(name)


def ask_live(sweep: SweepDirectory) -> Mapping[str, Task] | None:
    """Slurm's jobs that are not over; None where the sweep has none, or nobody can be asked."""
    if not sweep.exists() or shutil.which("squeue") is None:
        return None
    if not any(run.read_status().get("slurm") for run in sweep.runs):
        return None
    from launcher.launch.slurm_array import live_tasks

    return live_tasks()


def show_states(sweep: SweepDirectory, *, as_json: bool) -> list[RunState]:
    """One line a run, or all of it as JSON."""
    states = states_of(sweep, quiet=as_json)
    for line in state_lines(sweep, states, as_json=as_json):
        click.echo(line)
    return states


def states_of(sweep: SweepDirectory, *, quiet: bool) -> list[RunState]:
    """All runs, by the controller where it answers."""
    try:
        return run_states(sweep, ask_live(sweep))
    except EnvironmentNotReady as refusal:
        if not quiet:
            click.echo(f"({refusal.message}: states are those of the records)", err=True)
        return run_states(sweep, None)


def state_lines(
    sweep: SweepDirectory, states: Sequence[RunState], *, as_json: bool = False
) -> list[str]:
    """The whole of a sweep, one line a run; or the lines of one JSON object."""
    if as_json:
        return [json.dumps(as_record(sweep, states), indent=1)]
    return [summary(sweep, states), *_table(states)]


def summary(sweep: SweepDirectory, states: Sequence[RunState]) -> str:
    """A sweep in one line."""
    return f"{sweep.path}  {counts_text(states)}"


def any_on_the_way(states: Sequence[RunState]) -> bool:
    """Whether a run waits or runs."""
    return any(not one.lost and (one.job or one.state in ON_THE_WAY) for one in states)


def as_record(sweep: SweepDirectory, states: Sequence[RunState]) -> dict[str, object]:
    """A sweep and its runs as `--json` has them."""
    record = sweep.read()
    return {
        "sweep": {
            "run": str(sweep.path),
            "axes": list(record.axes),
            "count": len(states),
            "jobs": list(record.jobs),
            "states": count_states(states),
        },
        "runs": [one.as_json() for one in states],
    }


def counts_text(states: Sequence[RunState]) -> str:
    """How many of the runs are where: `6 runs: 2 running, 4 queued`."""
    counts = ", ".join(f"{number} {state}" for state, number in count_states(states).items())
    return f"{len(states):,} runs: {counts}"


def _table(states: Sequence[RunState]) -> list[str]:
    evaluated = any(one.eval_loss is not None for one in states)
    header = ["run", "state", "step", "loss", *(["eval loss"] if evaluated else []), ""]
    rows = []
    for one in states:
        step = "" if one.step is None else f"{one.step}/{one.max_steps or '?'}"
        losses = [one.loss, *([one.eval_loss] if evaluated else [])]
        numbers = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        rows.append([one.name, one.state, step, *numbers, _remark(one)])
    return table(header, rows)


def _remark(one: RunState) -> str:
    if one.lost:
        return "its job ended without a word"
    if one.error is not None:
        return f"{one.error.splitlines()[0][:SHOWN_ERROR]}" if one.error else ""
    return f"job {one.job}" if one.job else ""


class SweepProgress:
    """Shows on standard error how many runs are where: a live line, or plain ones."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.started = time.monotonic()
        self.shown = ""
        self.next_time = 0.0

    def show(self, states: Sequence[RunState]) -> None:
        """Show what is new, plain lines only now and then."""
        now = time.monotonic()
        text = counts_text(states)
        line = f"{duration(now - self.started):>6}  {text}"
        if self.live:
            width = shutil.get_terminal_size((100, 24)).columns - 1
            click.echo(f"\r{line[:width]:<{width}}", nl=False, err=True)
        elif text != self.shown and now >= self.next_time:
            click.echo(line, err=True)
            self.next_time = now + PLAIN_INTERVAL_SECONDS
            self.shown = text

    def close(self) -> None:
        """Leave the live line."""
        if self.live:
            click.echo("", err=True)


def follow_sweep(sweep: SweepDirectory) -> None:
    """Show a sweep's progress until none of its jobs is left."""
    from launcher.launch.slurm_array import live_tasks

    progress, looks = SweepProgress(), 0
    live: Mapping[str, Task] = live_tasks()
    while True:
        states = run_states(sweep, live)
        progress.show(states)
        over = not any(one.job for one in states)
        if over:
            break
        looks += 1
        waits = any(one.run.read_status().get("state") in ON_THE_WAY for one in states if one.job)
        time.sleep(POLL_SECONDS)
        if looks % LOOKS_PER_QUESTION == 0 or not waits:
            # A controller that is down for a while ends no sweep.
            with contextlib.suppress(EnvironmentNotReady):
                live = live_tasks()
    progress.close()
    for one in states:
        if one.lost:
            settle(one.run)


def end_of(sweep: SweepDirectory, as_json: bool) -> ExitCode:
    """The table of final losses, what is left to do, and the exit code of the whole."""
    states = run_states(sweep, None)
    if as_json:
        click.echo(json.dumps(as_record(sweep, states), indent=1))
    else:
        for line in _table(states):
            click.echo(line)
    click.echo(counts_text(states), err=True)
    found = count_states(states)
    if found.keys() == {"completed"}:
        return ExitCode.DONE
    click.echo(f"go on with: {_way_on(sweep)}", err=True)
    return ExitCode.RUN_FAILED if "failed" in found else ExitCode.PREEMPTED


def _way_on(sweep: SweepDirectory) -> str:
    queued = any(run.read_status().get("slurm") for run in sweep.runs)
    path = os.path.relpath(sweep.path)
    return shell_line(["sftlaunch", "resume", path, *(["--on=slurm"] if queued else [])])


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
    click.echo(f"{sweep.path}  {counts_text(states)}; go on with: {_way_on(sweep)}")
    return ExitCode.DONE


def _cancel_jobs(sweep: SweepDirectory, now: bool) -> None:
    from launcher.cli.cancel import patience
    from launcher.launch.slurm_array import live_tasks, stop_array

    stop_array(sweep.runs, save=not now)
    deadline = time.monotonic() + max(patience(run) for run in sweep.runs)
    states = run_states(sweep, live_tasks())
    while any(one.job for one in states) and time.monotonic() < deadline:
        time.sleep(CANCEL_POLL_SECONDS)
        states = run_states(sweep, live_tasks())
    for one in states:
        if one.lost:
            settle(one.run)


def _cancel_here(sweep: SweepDirectory, now: bool) -> None:
    """Ask the launcher for no further run, and the ranks of the present one to stop."""
    from launcher.cli.cancel import patience

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
        time.sleep(CANCEL_POLL_SECONDS)
