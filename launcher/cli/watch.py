"""`status`: what the run directories say, and the controller; once, or again and again."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from launcher.cli.on_slurm import job_record, job_text, which_run
from launcher.errors import ExitCode
from launcher.insight.find import known_runs
from launcher.render.text import progress_text
from launcher.runs.directory import RunDirectory

# The controller is asked each time, and many ask it.
WATCH_SECONDS = 2.0
RUNNING = ("planned", "queued", "running")


@click.command()
@click.argument("run_name", required=False, metavar="[RUN]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (a list for all).")
@click.option(
    "--watch", is_flag=True, help="Go on until all runs are over; Ctrl-C leaves them alone."
)
def status(run_name: str | None, as_json: bool, watch: bool) -> int:
    """Show where a run stands; all runs below ./runs without a name.

    RUN is a path, a name or a job number, from any directory.
    """
    if not watch:
        records = read_records(run_name)
        for line in shown_lines(records, named=run_name is not None, as_json=as_json):
            click.echo(line)
        return ExitCode.DONE
    try:
        _watch(run_name, as_json)
    except KeyboardInterrupt:
        click.echo("", err=True)
    return ExitCode.DONE


def read_records(run_name: str | None) -> list[dict[str, Any]]:
    """Where the run of a name stands, or each of those below ./runs."""
    runs = [which_run(run_name)] if run_name else known_runs()
    return [{"run": str(run.path), **run.read_status(), **job_record(run)} for run in runs]


def shown_lines(records: list[dict[str, Any]], *, named: bool, as_json: bool) -> list[str]:
    """One line a run, or the lines of one JSON value."""
    if as_json:
        return [json.dumps(records[0] if named else records, indent=1)]
    if not records:
        return ["no runs below ./runs"]
    return [_line(record) for record in records]


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
    while True:
        records = read_records(run_name)
        screen.show(shown_lines(records, named=run_name is not None, as_json=as_json))
        if not any(_goes_on(record) for record in records):
            return
        time.sleep(WATCH_SECONDS)


def _goes_on(record: dict[str, Any]) -> bool:
    # One that was preempted and queued again has a job.
    job = record.get("job") or {}
    lost = job.get("over", False)
    return not lost and (record.get("state") in RUNNING or bool(job))


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
