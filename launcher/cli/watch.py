"""`status`: what the run directories say, and the controller; once, or again and again."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from launcher.cli.on_slurm import job_record, job_text
from launcher.cli.sweep.state import any_on_the_way, as_record, state_lines, states_of, summary
from launcher.cli.which import which_run, which_sweep
from launcher.errors import ExitCode
from launcher.insight.find import known_runs, known_sweeps
from launcher.render.text import progress_text
from launcher.runs.directory import NOT_OVER, RunDirectory

# The controller is asked each time, and many ask it.
WATCH_SECONDS = 2.0


@click.command()
@click.argument("run_name", required=False, metavar="[RUN]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (a list for all).")
@click.option(
    "--watch", is_flag=True, help="Go on until all runs are over; Ctrl-C leaves them alone."
)
def status(run_name: str | None, as_json: bool, watch: bool) -> int:
    """Show where a run or a sweep stands; all below ./runs without a name.

    RUN is a path, a name or a job number, from any directory.
    """
    if not watch:
        lines, _ = read_lines(run_name, as_json)
        for line in lines:
            click.echo(line)
        return ExitCode.DONE
    try:
        _watch(run_name, as_json)
    except KeyboardInterrupt:
        click.echo("", err=True)
    return ExitCode.DONE


def read_lines(run_name: str | None, as_json: bool) -> tuple[list[str], bool]:
    """What there is to say of a run, a sweep, or all below ./runs; and whether any goes on."""
    sweep = which_sweep(run_name)
    if sweep is not None:
        states = states_of(sweep, quiet=as_json)
        return state_lines(sweep, states, as_json=as_json), any_on_the_way(states)
    runs = [which_run(run_name)] if run_name else known_runs()
    records = [{"run": str(run.path), **run.read_status(), **job_record(run)} for run in runs]
    goes_on = any(_goes_on(record) for record in records)
    if run_name:
        lines = [json.dumps(records[0], indent=1)] if as_json else [_line(records[0])]
        return lines, goes_on
    sweeps = [(sweep, states_of(sweep, quiet=as_json)) for sweep in known_sweeps()]
    goes_on = goes_on or any(any_on_the_way(states) for _, states in sweeps)
    if as_json:
        return [json.dumps([*records, *(as_record(*one) for one in sweeps)], indent=1)], goes_on
    lines = [*(_line(record) for record in records), *(summary(*one) for one in sweeps)]
    return lines or ["no runs below ./runs"], goes_on


def _line(record: dict[str, Any]) -> str:
    run = RunDirectory(Path(record["run"]))
    return f"{run.path}  {record.get('state', 'unknown')}  {_detail(run, record)}"


def _detail(run: RunDirectory, record: dict[str, Any]) -> str:
    error = record.get("error")
    if isinstance(error, dict):
        return str(error.get("message", ""))
    if record.get("state") == "completed":
        return f"step {record.get('step')}, {run.path}/final"
    return f"{progress_text(record, run.read_metrics())}{job_text(record)}"


def _watch(run_name: str | None, as_json: bool) -> None:
    """Show it again where it has changed, until nothing runs or waits any more."""
    screen = Screen()
    goes_on = True
    while goes_on:
        lines, goes_on = read_lines(run_name, as_json)
        screen.show(lines)
        if goes_on:
            time.sleep(WATCH_SECONDS)


def _goes_on(record: dict[str, Any]) -> bool:
    # One that was preempted and queued again has a job.
    job = record.get("job") or {}
    lost = job.get("over", False)
    return not lost and (record.get("state") in NOT_OVER or bool(job))


class Screen:
    """Redraws in place on a terminal; elsewhere prints each line once it is another one."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.last: list[str] = []

    def show(self, lines: list[str]) -> None:
        """Show these lines in place of the last ones."""
        if self.live:
            width = shutil.get_terminal_size((100, 24)).columns - 1
            cut = [line[:width] for text in lines for line in text.splitlines()]
            up = f"\x1b[{len(self.last)}A\r\x1b[J" if self.last else ""
            click.echo(up + "\n".join(cut))
            self.last = cut
            return
        for line in lines:
            if line not in self.last:
                click.echo(line)
        sys.stdout.flush()
        self.last = lines
