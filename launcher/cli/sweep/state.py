"""Where a sweep stands: one line, the table of its runs, and what is left to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.insight.sweep import RunState, count_states, run_states
from launcher.render.quote import shell_line
from launcher.render.table import table
from launcher.runs.directory import ON_THE_WAY
from launcher.runs.sweep import SweepDirectory

if TYPE_CHECKING:
    from launcher.launch.slurm_array import Task

SHOWN_ERROR = 60


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
    click.echo(f"go on with: {way_on(sweep)}", err=True)
    return ExitCode.RUN_FAILED if "failed" in found else ExitCode.PREEMPTED


def way_on(sweep: SweepDirectory) -> str:
    """The command that goes on with a sweep."""
    queued = any(run.read_status().get("slurm") for run in sweep.runs)
    path = os.path.relpath(sweep.path)
    return shell_line(["sftlaunch", "resume", path, *(["--on=slurm"] if queued else [])])
