"""`status` and `logs`: what the run directory says."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from launcher.cli.on_slurm import job_record, job_text, which_run
from launcher.cli.sweep_state import show_status, which_sweep
from launcher.errors import ExitCode, SpecError
from launcher.insight.find import known_runs
from launcher.render.text import progress_text
from launcher.runs.directory import RunDirectory

FOLLOW_SECONDS = 0.5
RUNNING = ("planned", "queued", "running")


@click.command()
@click.argument("run_name", required=False, metavar="[RUN]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (a list for all).")
def status(run_name: str | None, as_json: bool) -> int:
    """Show where a run or a sweep stands; all runs below ./runs without a name."""
    sweep = which_sweep(run_name)
    if sweep is not None:
        return show_status(sweep, as_json)
    runs = [which_run(run_name)] if run_name else known_runs()
    records = [{"run": str(run.path), **run.read_status(), **job_record(run)} for run in runs]
    if as_json:
        click.echo(json.dumps(records[0] if run_name else records, indent=1))
        return ExitCode.DONE
    if not runs:
        click.echo("no runs below ./runs")
    for run, record in zip(runs, records, strict=True):
        click.echo(f"{run.path}  {record.get('state', 'unknown')}  {_detail(run, record)}")
    return ExitCode.DONE


def _detail(run: RunDirectory, record: dict[str, object]) -> str:
    error = record.get("error")
    if isinstance(error, dict):
        return str(error.get("message", ""))
    if record.get("state") == "completed":
        return f"step {record.get('step')}, {run.path}/final"
    return f"{progress_text(record, run.read_metrics())}{job_text(record)}"


@click.command()
@click.argument("run_name", required=False, metavar="[RUN]")
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--attempt", type=click.IntRange(min=1), help="Attempt; the last one by default.")
def logs(run_name: str | None, follow: bool, rank: int, attempt: int | None) -> int:
    """Show one rank's log of a run."""
    run = which_run(run_name)
    number = attempt or int(run.read_status().get("attempt") or 1)
    path = run.rank_log(number, rank)
    if not path.is_file():
        there = ", ".join(p.name for p in sorted(run.logs(number).glob("*.log"))) or "none"
        raise SpecError(
            "no_log", f"attempt {number} has no log of rank {rank}", fix=f"there are: {there}"
        )
    _print_log(run, path, follow)
    return ExitCode.DONE


def _print_log(run: RunDirectory, path: Path, follow: bool) -> None:
    with path.open(encoding="utf-8", errors="replace") as stream:
        while True:
            text = stream.read()
            if text:
                click.echo(text, nl=False)
            elif not follow or run.read_status().get("state") not in RUNNING:
                return
            else:
                time.sleep(FOLLOW_SECONDS)
