"""`data check`: what a run's rows are, before any GPU is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any

import click

from launcher.cli.follow import StatusLine
from launcher.cli.options import make_request, plan_options
from launcher.cli.refusals import no_rows
from launcher.cli.run import Decided, decide
from launcher.errors import EnvironmentNotReady, ExitCode, Refusal, SpecError
from launcher.render.data import bad_lines, marked, report_lines
from launcher.spec.load import Override

SILENT_SECONDS = 2.0
NEEDED = ("transformers", "trl", "datasets")


@click.command(context_settings={"max_content_width": 100})
@click.option("--drop-bad", is_flag=True, help="Exit 0 also where rows cannot be used.")
@plan_options
def check(drop_bad: bool, **arguments: Any) -> int:
    """Tokenise all rows as the run would, and say what is wrong with them.

    Needs no GPU. Exit code 2 with the first ten rows that cannot be used. A run leaves them
    out with `dataset.drop_bad: true`, and ends at the first one otherwise.
    """
    request = make_request(arguments)
    # The plan's own sample would end at the first bad row; here all of them are wanted.
    own = Override("dataset.drop_bad", True, "data check")
    decided = decide(dataclasses.replace(request, overrides=(*request.overrides, own)))
    if decided.planned.spec.dataset is None:
        raise no_rows()
    dropped = drop_bad or _said(request)
    report = _report(decided)
    error = None if dropped else _refusal(report)
    error = error or _nothing_left(report)
    if request.json:
        click.echo(json.dumps({**({"error": error.as_json()} if error else {}), **report}))
    else:
        _show(report)
    if error is None:
        if report["bad"]["rows"]:
            for line in ("rows left out", *bad_lines(report)):
                click.echo(line, err=True)
        return ExitCode.DONE
    click.secho("error: ", fg="red", nl=False, err=True)
    for line in (str(error), *bad_lines(report)):
        click.echo(line, err=True)
    return error.exit_code


def _said(request: Any) -> bool:
    """Whether the spec itself leaves bad rows out."""
    from launcher.cli.options import load_request

    data = load_request(request)[0].spec.dataset
    return bool(data and data.drop_bad)


def _refusal(report: Mapping[str, Any]) -> Refusal | None:
    bad, read = report["bad"]["rows"], report["bad"]["read"]
    if not bad:
        return None
    return SpecError(
        "bad_rows",
        f"{bad:,} of {read:,} rows cannot be used",
        fix="correct or remove them, or leave them out with --set dataset.drop_bad=true",
    )


def _nothing_left(report: Mapping[str, Any]) -> Refusal | None:
    if report["rows"].get("used"):
        return None
    return SpecError(
        "no_rows_left",
        f"no row of {report['dataset']} can be trained on",
        fix="see the rows below, dataset.columns, loss and training.max_length",
    )


# --- the other process ------------------------------------------------------------------------


def _report(decided: Decided) -> dict[str, Any]:
    """The check in a process of its own: this one must not import the training stack."""
    from launcher.launch.local import python_path

    _check_packages()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.train.check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": python_path()},
            start_new_session=True,  # Ctrl-C is ours: all its processes end with it
        )
        try:
            return _read(process, json.dumps(decided.plan.as_json()), log)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _read(process: subprocess.Popen[str], plan: str, log: IO[bytes]) -> dict[str, Any]:
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(plan)
        process.stdin.close()
    started, line = time.monotonic(), StatusLine()
    shown = False
    try:
        for text in process.stdout:
            told = json.loads(text)
            if "report" in told:
                report: dict[str, Any] = told["report"]
                process.wait()
                return report
            if "error" in told:
                _raise(told["error"])
            if time.monotonic() - started > SILENT_SECONDS:
                shown = True
                line.show(_progress(told["progress"]))
    finally:
        if shown:
            line.close()
    log.seek(0)
    tail = " ".join(log.read()[-500:].decode("utf-8", "replace").split())
    raise RuntimeError(f"the check ended with exit code {process.wait()}: {tail}")


def _progress(told: Mapping[str, Any]) -> str:
    if told["done"] < 0:
        return str(told["text"])
    of = f" of {told['total']:,}" if told["total"] > 0 else ""
    return f"{told['text']}: {told['done']:,}{of}"


def _raise(error: Mapping[str, Any]) -> None:
    kind = EnvironmentNotReady if error["exit_code"] == ExitCode.ENVIRONMENT else SpecError
    fix = error["fix"] or "see what the error names: the dataset, the model or the Hub"
    raise kind(error["code"], error["message"], fix=fix, source=error["source"])


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise EnvironmentNotReady(
            "packages",
            f"{', '.join(missing)} is not installed",
            why="rows are tokenised as the run does it",
            fix="pip install 'sftlaunch[train]'",
        )


# --- what people see --------------------------------------------------------------------------


def _show(report: Mapping[str, Any]) -> None:
    width = shutil.get_terminal_size((100, 24)).columns
    for line in report_lines(report, width):
        yellow = line.startswith("warning")
        click.echo(click.style(line, fg="yellow") if yellow else line)
    example = report.get("example")
    if example:
        _show_example(example)


def _show_example(example: Mapping[str, Any]) -> None:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    how = "in green" if colour else "in [[ ]]"
    cut = "" if example["shown_tokens"] == example["tokens"] else "; its beginning"
    click.echo(f"example    {example['place']}{cut}; what is trained on stands {how}:")
    if not colour:
        click.echo(marked(example))
        return
    for piece in example["pieces"]:
        click.echo(click.style(piece["text"], fg="green" if piece["trained"] else None), nl=False)
    click.echo()
