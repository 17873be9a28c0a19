"""`run` and `plan`: the same probe and decide; `run` then launches."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.going_on import (
    check_source,
    find_source,
    free_name,
    keep_global_batch,
    other_hardware,
    read_spec,
    refuse_foreign,
    refuse_other_run,
    refuse_running,
    say_complete,
    say_where,
    set_aside_after,
    with_measured_save,
    with_source_of,
)
from launcher.cli.on_slurm import origin, queue_and_follow, refuse_queued
from launcher.cli.options import Request, load_request, make_request, plan_options
from launcher.cli.refusals import no_rows, unwritable
from launcher.cli.show import show_lines
from launcher.cli.which import which_run
from launcher.errors import ExitCode, SpecError
from launcher.facts.probe import Facts, probe
from launcher.insight.find import find_sweep
from launcher.plan.make import Planned, make_plan
from launcher.plan.types import Plan
from launcher.render.files import run_files, with_files
from launcher.render.slurm import SCRIPT, Origin
from launcher.render.text import plan_lines
from launcher.runs.checkpoints import Checkpoint, remove_unsealed
from launcher.runs.directory import RunDirectory
from launcher.runs.prepared import only_prepared
from launcher.spec.load import Override

# Docker's modules are imported where a run goes there: the others start without them.
if TYPE_CHECKING:
    from launcher.render.docker import Caller
    from launcher.render.docker_nodes import Nodes


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
    slurm: Origin | None = None
    """Who makes the job script, where it goes to Slurm."""
    docker: Caller | Nodes | None = None
    """Who starts the containers, where it goes to Docker."""


@click.command(context_settings={"max_content_width": 100})
@click.option("--dry-run", is_flag=True, expose_value=False, help="What plan does anyway.")
@plan_options
def plan(**arguments: Any) -> int:
    """Say what would happen: strategy, batch, memory, time, files, command.

    Starts nothing and needs neither a GPU nor torch. Without a SPEC it takes ./sft.yaml,
    else the built-in recipe tiny.
    """
    request = make_request(arguments)
    if request.sweep:
        from launcher.cli.sweep.start import plan_sweep

        return plan_sweep(request)
    decided = decide(request)
    show(decided, request, script=True)
    return ExitCode.DONE


@click.command(context_settings={"max_content_width": 100})
@click.option("--dry-run", is_flag=True, help="Plan and print, launch nothing.")
@plan_options
def run(dry_run: bool, **arguments: Any) -> int:
    """Plan, print the plan, then launch it and follow it to its end.

    Without a SPEC it takes ./sft.yaml, else the built-in recipe tiny.
    """
    request = make_request(arguments)
    if request.sweep:
        from launcher.cli.sweep.start import start_sweep

        return start_sweep(request, dry_run=dry_run)
    return start(request, dry_run)


@click.command(context_settings={"max_content_width": 100})
@click.option("--dry-run", is_flag=True, help="Plan and print, launch nothing.")
@plan_options
def resume(dry_run: bool, **arguments: Any) -> int:
    """Go on with a RUN from its last whole checkpoint, also on other hardware.

    SPEC is a run directory here: its path, its name or a job number; the newest one below
    ./runs without it. The global batch stays as it is: on another number of GPUs the
    accumulation is solved again.
    """
    sweep = find_sweep(arguments["spec_path"])
    if sweep is not None:
        from launcher.cli.sweep.start import resume_sweep

        return resume_sweep(sweep, make_request(arguments), dry_run=dry_run)
    found = which_run(arguments["spec_path"])
    request = dataclasses.replace(make_request(arguments), spec=str(found.spec))
    if request.sweep:
        raise SpecError(
            "resume_sweep",
            f"resume goes on with one run, {found.path}",
            fix="use sftlaunch run --sweep ...; the same command goes on with a sweep",
        )
    if request.output_said:
        raise SpecError(
            "resume_output",
            "resume goes on in the run's own folder, --output names another",
            fix=f"use sftlaunch run --resume {found.path} --output ... for a new run from there",
        )
    if request.resume == "never":
        raise SpecError(
            "resume_never", "resume with --resume never", fix="start anew with another --output"
        )
    overrides = (
        *other_hardware(read_spec(found), request.overrides),
        *request.overrides,
        Override("output", str(found.path), "RUN"),
    )
    return start(dataclasses.replace(request, overrides=overrides), dry_run)


def start(request: Request, dry_run: bool) -> int:
    """Decide, then launch or go on; what `run` and `resume` share."""
    decided = decide(request)
    run_directory = RunDirectory(Path(os.path.abspath(decided.output)))  # noqa: PTH100 - keeps links
    goes_on = run_directory.exists() and request.resume != "never"
    if goes_on:
        decided = _go_on(decided, request, run_directory)
    decided, own = _with_source(decided, request, run_directory, goes_on)
    if dry_run:
        show(decided, request, script=True)
        if goes_on and not request.json:
            say_where(run_directory, decided.output, to_stderr=False)
        return ExitCode.DONE
    if goes_on and run_directory.read_status().get("state") == "completed":
        say_complete(run_directory, decided.output, as_json=request.json)
        return ExitCode.DONE
    decided = _check_ready(decided, run_directory)
    elsewhere = decided.slurm is not None or decided.docker is not None
    before = run_directory.snapshot() if elsewhere else None
    claim_output(decided, run_directory, goes_on=goes_on)
    if own is not None:
        set_aside_after(run_directory, own)
    show(decided, request, to_stderr=request.json)
    if goes_on:
        say_where(run_directory, decided.output, to_stderr=request.json)
    return _launch(decided, request, run_directory, before)


def _check_ready(decided: Decided, run: RunDirectory) -> Decided:
    """Refuse what cannot start, before anything is written.

    Returns:
        The same, an image by its digest.

    Raises:
        Refusal: no rows, no GPUs, no packages, no cluster, no space.
    """
    if decided.planned.spec.dataset is None:
        raise no_rows()
    from launcher.launch.local import check_environment, check_space

    if decided.slurm is not None:
        from launcher.launch.slurm import check

        check(decided.plan, decided.planned.spec.slurm)
    elif decided.docker is not None:
        from launcher.cli.on_docker import checked

        target = checked(decided.docker, decided.planned, run)
        decided = _rendered(dataclasses.replace(decided, docker=target), decided.planned)
    else:
        check_environment(decided.plan, len(decided.facts.gpus))
    check_space(decided.plan, run)
    return decided


def _launch(
    decided: Decided, request: Request, run: RunDirectory, before: dict[str, bytes] | None
) -> int:
    """Hand the run over to its target, and follow it."""
    if decided.slurm is not None:
        slurm = decided.planned.spec.slurm
        return queue_and_follow(run, slurm, decided.output, before, request)
    if decided.docker is not None:
        from launcher.cli.on_docker import run_and_follow

        return run_and_follow(
            decided.plan,
            run,
            decided.output,
            decided.docker,
            before,
            spec=decided.planned.spec,
            request=request,
        )
    from launcher.cli.follow import follow_here

    return follow_here(decided.plan, run, decided.output, decided.facts.cpu_count, request.json)


def _go_on(decided: Decided, request: Request, run: RunDirectory) -> Decided:
    """Plan the run that is there with this request's hardware.

    Raises:
        SpecError: where the folder holds another run.
    """
    refuse_running(run)
    refuse_queued(run)
    from launcher.cli.on_docker import refuse_in_container

    refuse_in_container(run)
    if "batch.global_batch_size" in decided.plan.defaults:
        decided = decide(keep_global_batch(request, run))
    refuse_other_run(run, decided.planned.spec, decided.output)
    plan = with_source_of(with_measured_save(decided.planned.plan, run), run)
    planned = dataclasses.replace(decided.planned, plan=plan)
    return _rendered(decided, planned)


def _with_source(
    decided: Decided, request: Request, run: RunDirectory, goes_on: bool
) -> tuple[Decided, Checkpoint | None]:
    """The plan with the checkpoint that `--resume PATH` names; or that one, of this very run."""
    if request.resume in ("auto", "never"):
        return decided, None
    source = find_source(request.resume)
    if goes_on:
        refuse_foreign(source, run, request.resume)
        return decided, source
    check_source(source, decided.plan, request.resume)
    refuse_other_run(RunDirectory(source.path.parents[1]), decided.planned.spec, request.resume)
    worker = dataclasses.replace(decided.planned.plan.worker, resume_from=str(source.path))
    plan = dataclasses.replace(decided.planned.plan, worker=worker)
    return _rendered(decided, dataclasses.replace(decided.planned, plan=plan)), None


def _rendered(decided: Decided, planned: Planned) -> Decided:
    path = os.path.abspath(decided.output)  # noqa: PTH100 - keeps links
    plan = with_files(planned, path, decided.facts.cpu_count, decided.slurm or decided.docker)
    return dataclasses.replace(decided, planned=planned, plan=plan)


def decide(request: Request) -> Decided:
    """Load, probe, plan and render.

    Raises:
        Refusal: as the plan says.
    """
    loaded, recipe = load_request(request)
    spec = loaded.spec
    if request.target == "docker":
        from launcher.cli.on_hosts import with_nodes_of_hosts

        spec = with_nodes_of_hosts(spec)
    facts = probe(spec)
    planned = make_plan(spec, facts)
    output = planned.spec.output or "runs/run"
    if recipe and not request.output_said and not only_prepared(Path(output)):
        output = free_name(output)
    path = os.path.abspath(output)  # noqa: PTH100 - keeps links
    slurm = origin() if request.target == "slurm" else None
    docker = None
    if request.target == "docker":
        from launcher.cli.on_docker import container_caller

        docker = container_caller(planned, path)
    full = with_files(planned, path, facts.cpu_count, slurm or docker)
    return Decided(planned, full, facts, output, recipe, slurm, docker)


def show(
    decided: Decided, request: Request, *, to_stderr: bool = False, script: bool = False
) -> None:
    """The plan, as JSON or as text, with a job's whole script where it is asked for."""
    if request.json and not to_stderr:
        click.echo(json.dumps(decided.plan.as_json(), indent=1))
        return
    model, data = decided.facts.model, decided.facts.dataset
    lines = plan_lines(
        decided.plan,
        decided.planned.spec,
        parameters=model.parameters if model else None,
        rows=data.rows if data else None,
        output=decided.output,
        width=shutil.get_terminal_size((100, 24)).columns,
    )
    show_lines(decided.recipe, lines, to_stderr=to_stderr)
    if script:
        _show_scripts(decided.plan.files)


def _show_scripts(files: Mapping[str, str]) -> None:
    """What starts the job or the containers, and the names of what is carried by hand."""
    from launcher.render.docker_nodes import carried_files, first_script

    for name in (SCRIPT, first_script(files)):
        if name in files:
            click.echo(f"\n{files[name]}", nl=False)
    carried = carried_files(files)
    if carried:
        click.echo(f"\nUnder files of --json, for machines without ssh: {', '.join(carried)}")


def claim_output(decided: Decided, run_directory: RunDirectory, *, goes_on: bool) -> None:
    """Write the run directory's files; never over another run.

    Raises:
        SpecError: the folder is taken, or cannot be written.
    """
    try:
        if goes_on:
            remove_unsealed(run_directory.checkpoints)  # what a full disk has left makes room
        else:
            _refuse_taken(run_directory, decided.output)
        run_directory.create(run_files(decided.plan))
        attempt = int(run_directory.read_status().get("attempt") or 0)
        run_directory.update_status(state="planned", attempt=attempt, error=None, notes=[])
    except OSError as error:
        raise unwritable(decided.output, error) from None


def _refuse_taken(run_directory: RunDirectory, output: str) -> None:
    path = run_directory.path
    if run_directory.exists():
        raise SpecError(
            "output_taken",
            f"{output} holds another run",
            why="a run is never overwritten",
            fix=f"use --output {free_name(output)}, or --resume auto to go on with it",
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not only_prepared(path):
        raise SpecError(
            "output_taken",
            f"{output} exists and is no empty folder",
            fix=f"use --output {free_name(output)}",
        )
