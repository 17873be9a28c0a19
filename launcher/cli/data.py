"""`data check` and `data prepare`: look at a run's rows, and make them ready, ahead of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from launcher.cli.check import check
from launcher.cli.on_slurm import show_error
from launcher.cli.options import make_request, plan_options
from launcher.cli.refusals import unwritable
from launcher.cli.run import Decided, decide
from launcher.errors import ExitCode, SpecError
from launcher.render.text import bytes_text, duration
from launcher.runs.directory import RunDirectory
from launcher.runs.prepared import LOG, preparation_error, read_record, up_to_date


@click.group()
def data() -> None:
    """Work on a run's rows before the run."""


data.add_command(check)


@data.command(context_settings={"max_content_width": 100})
@click.option("--dry-run", is_flag=True, help="Say what would be done, do nothing.")
@plan_options
def prepare(dry_run: bool, **arguments: Any) -> int:
    """Fetch model and rows, tokenise, and keep the result in the run's output folder.

    A run with the same output finds it there, tokenises nothing and asks nothing of the Hub.
    Needs no GPU: do it on a login node or a laptop.
    """
    request = make_request(arguments)
    decided = decide(request)
    if decided.planned.spec.dataset is None:
        raise SpecError("missing_key", "dataset is not set", fix="pass --dataset FILE")
    run = RunDirectory(Path(os.path.abspath(decided.output)))  # noqa: PTH100 - keeps links
    refuse_foreign_folder(run, decided.output)
    ready = up_to_date(decided.plan, run)
    if dry_run:
        what = "is ready" if ready else "would be made"
        click.echo(f"{decided.output}/prepared {what}", err=request.json)
        return ExitCode.DONE
    if not ready and (code := _start(decided, run, as_json=request.json)):
        return code
    _say(run, decided.output, ready=ready, as_json=request.json)
    return ExitCode.DONE


def refuse_foreign_folder(run: RunDirectory, output: str) -> None:
    """Refuse a folder that is neither a run nor empty nor prepared before.

    Raises:
        SpecError: with what to use instead.
    """
    known = run.exists() or not run.path.exists()
    if not known and not (run.path.is_dir() and _is_ours(run.path)):
        raise SpecError(
            "output_taken",
            f"{output} is neither a run nor empty",
            fix="use --output with another folder",
        )


def _is_ours(folder: Path) -> bool:
    """Nothing but what a preparation leaves, also one that failed or was ended."""
    names = (path.name for path in folder.iterdir())
    return all(name in ("prepared", "logs") or name.startswith(".prepared.") for name in names)


def _start(decided: Decided, run: RunDirectory, *, as_json: bool) -> int:
    """The preparation in a process of its own: this one must not import the training stack."""
    from launcher.launch.local import check_packages, python_path

    check_packages(decided.plan)
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.train.prepare", str(run.path), "-"],
        input=json.dumps(decided.plan.as_json()),
        text=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=None if sys.stderr.isatty() else subprocess.PIPE,
        check=False,
    )
    if not done.returncode:
        return ExitCode.DONE
    _keep_log(run, done.stderr)
    error = preparation_error(run, f"it ended with exit code {done.returncode}")
    if error["exit_code"] == ExitCode.BAD_SPEC:
        raise SpecError("preparation", error["message"], fix=error["fix"])
    show_error(error)
    if as_json:
        click.echo(json.dumps({"error": error}))
    return ExitCode.RUN_FAILED


def _keep_log(run: RunDirectory, text: str | None) -> None:
    if text is None:
        return
    try:
        path = run.path / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(str(run.path), error) from None


def _say(run: RunDirectory, output: str, *, ready: bool, as_json: bool) -> None:
    record = read_record(run)
    assert record is not None  # noqa: S101 - it has just been made
    shown = {key: record[key] for key in ("rows", "tokens", "seconds")}
    size = sum(record["files"].values())
    if as_json:
        click.echo(json.dumps({"folder": str(run.prepared), "bytes": size, **shown}))
        return
    when = "already" if ready else f"in {duration(record['seconds'])}"
    rows = ", ".join(f"{number:,} {name}" for name, number in record["rows"].items())
    click.echo(
        f"prepared   {output}/prepared {when}: rows {rows}; {record['tokens']:,} tokens, "
        f"{bytes_text(size)}"
    )
