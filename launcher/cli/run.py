"""`run` and `plan`: the same probe and decide; `run` then launches."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from launcher.cli.options import Request, load_request, make_request, plan_options
from launcher.errors import EnvironmentNotReady, ExitCode, SpecError
from launcher.facts.probe import Facts, probe
from launcher.plan.make import Planned, make_plan
from launcher.plan.types import Plan
from launcher.render.files import run_files, with_files
from launcher.render.text import plan_lines
from launcher.runs.directory import RunDirectory


@dataclass(frozen=True)
class Decided:
    """A plan with all that printing and launching need."""

    planned: Planned
    plan: Plan
    facts: Facts
    output: str
    """The run directory as people name it."""
    recipe: str | None
    """The built-in recipe, where no spec was given."""


@click.command(context_settings={"max_content_width": 100})
@click.option("--dry-run", is_flag=True, expose_value=False, help="What plan does anyway.")
@plan_options
def plan(**arguments: Any) -> int:
    """Say what would happen: strategy, batch, memory, time, files, command.

    Starts nothing and needs neither a GPU nor torch. Without a SPEC it takes ./sft.yaml,
    else the built-in recipe tiny.
    """
    request = make_request(arguments)
    decided = decide(request)
    show(decided, request)
    return ExitCode.DONE


@click.command(context_settings={"max_content_width": 100})
@click.option("--dry-run", is_flag=True, help="Plan and print, launch nothing.")
@plan_options
def run(dry_run: bool, **arguments: Any) -> int:
    """Plan, print the plan, then launch it and follow it to its end.

    Without a SPEC it takes ./sft.yaml, else the built-in recipe tiny.
    """
    request = make_request(arguments)
    decided = decide(request)
    if dry_run:
        show(decided, request)
        return ExitCode.DONE
    if decided.planned.spec.dataset is None:
        raise SpecError(
            "missing_key", "dataset is not set", why="a run needs rows", fix="pass --dataset FILE"
        )
    from launcher.launch.local import check_environment

    check_environment(decided.plan, len(decided.facts.gpus))
    directory = claim_output(decided)
    show(decided, request, to_stderr=request.json)
    from launcher.cli.follow import follow

    return follow(decided.plan, directory, decided.output, decided.facts.cpu_count, request.json)


def decide(request: Request) -> Decided:
    """Load, probe, plan and render.

    Raises:
        Refusal: as the plan says.
    """
    _refuse_unready(request)
    loaded, recipe = load_request(request)
    facts = probe(loaded.spec)
    planned = make_plan(loaded.spec, facts)
    output = planned.spec.output or "runs/run"
    if recipe and not request.output_said:
        output = free_name(output)
    full = with_files(planned, os.path.abspath(output), facts.cpu_count)  # noqa: PTH100 - keeps links
    return Decided(planned, full, facts, output, recipe)


def show(decided: Decided, request: Request, *, to_stderr: bool = False) -> None:
    """The plan, as JSON or as text."""
    if request.json and not to_stderr:
        click.echo(json.dumps(decided.plan.as_json(), indent=1))
        return
    if decided.recipe:
        click.echo(
            f"No spec was given and there is no ./sft.yaml: the built-in recipe {decided.recipe}.",
            err=to_stderr,
        )
    model, data = decided.facts.model, decided.facts.dataset
    lines = plan_lines(
        decided.plan,
        decided.planned.spec,
        parameters=model.parameters if model else None,
        rows=data.rows if data else None,
        output=decided.output,
        width=shutil.get_terminal_size((100, 24)).columns,
    )
    for line in lines:
        styled = click.style(line, fg="yellow") if line.startswith("warning") else line
        click.echo(styled, err=to_stderr)


def free_name(output: str) -> str:
    """`output`, or the first `output-2`, `output-3`, ... that does not exist."""
    path, number = Path(output), 1
    while path.exists():
        number += 1
        path = Path(f"{output}-{number}")
    return str(path)


def claim_output(decided: Decided) -> RunDirectory:
    """Write the run directory's files; never over another run.

    Raises:
        SpecError: the folder is taken, or cannot be written.
    """
    run_directory = RunDirectory(Path(os.path.abspath(decided.output)))  # noqa: PTH100 - keeps links
    try:
        _refuse_taken(run_directory, decided.output)
        run_directory.create(run_files(decided.plan))
        run_directory.update_status(state="planned", attempt=0)
    except OSError as error:
        raise SpecError(
            "output_unwritable",
            f"{decided.output} cannot be written: {error.strerror}",
            fix="use --output with a folder that you may write",
        ) from None
    return run_directory


def _refuse_taken(run_directory: RunDirectory, output: str) -> None:
    path = run_directory.path
    if run_directory.exists():
        raise SpecError(
            "output_taken",
            f"{output} holds another run",
            why="a run is never overwritten",
            fix=f"use --output {free_name(output)}, or remove the folder",
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SpecError(
            "output_taken",
            f"{output} exists and is no empty folder",
            fix=f"use --output {free_name(output)}",
        )


def _refuse_unready(request: Request) -> None:
    """What the interface promises and this version does not do yet."""
    if request.target != "local":
        raise EnvironmentNotReady(
            "target",
            f"--on {request.target} is not in this version",
            fix="use --on local, or start the command of `sftlaunch plan` in a job of your own",
        )
    if request.resume != "never":
        raise EnvironmentNotReady(
            "resume",
            f"--resume {request.resume} is not in this version",
            fix="start anew with another --output",
        )
