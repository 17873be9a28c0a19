"""What going on with a run asks for: that it is the same one, at rest, and has a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from launcher.cli.options import Request
from launcher.errors import EnvironmentNotReady, PlanRefused, SpecError
from launcher.launch.presence import refuse_elsewhere
from launcher.launch.processes import members
from launcher.plan.same_run import differences
from launcher.plan.storage import shutdown_timeout_seconds
from launcher.plan.types import Plan
from launcher.runs.checkpoints import (
    NAME,
    Checkpoint,
    Skipped,
    checkpoint_folders,
    describe,
    move_aside,
    newest_whole,
    whole,
)
from launcher.runs.directory import RunDirectory
from launcher.spec.load import Override, load_spec
from launcher.spec.schema import Spec

ANY_COUNT = ("single", "hsdp")
SHOWN_DIFFERENCES = 3


def read_spec(run: RunDirectory) -> Spec:
    """The resolved spec of a run.

    Raises:
        SpecError: where it cannot be read: the folder belongs to something else.
    """
    try:
        return load_spec(run.spec, (), str(run.spec)).spec
    except SpecError as error:
        name = run.path.name
        raise SpecError(
            "output_taken",
            f"{name} holds another run, whose spec.yaml cannot be read",
            why=error.what,
            fix=f"use --output {free_name(name)}",
        ) from None


def free_name(output: str) -> str:
    """`output`, or the first `output-2`, `output-3`, ... that does not exist."""
    path, number = Path(output), 1
    while path.exists():
        number += 1
        path = Path(f"{output}-{number}")
    return str(path)


def other_hardware(old: Spec, overrides: tuple[Override, ...]) -> tuple[Override, ...]:
    """What another number of GPUs changes besides itself, where nothing else is said."""
    said = {override.key: override.value for override in overrides}
    gpus = said.get("hardware.gpus", old.hardware.gpus)
    if gpus == old.hardware.gpus or gpus is None:
        return ()
    if old.batch.global_batch_size is not None:
        _refuse_uneven(gpus, old.batch.global_batch_size)
    found = []
    if "strategy" not in said and (old.strategy in ANY_COUNT or gpus == 1):
        found.append(Override("strategy", "auto", "--gpus"))
    micro, total = old.batch.micro_batch_size, old.batch.global_batch_size
    divides = isinstance(micro, int) and total is not None and total % (micro * gpus) == 0
    if "batch.micro_batch_size" not in said and not divides:
        found.append(Override("batch.micro_batch_size", "auto", "--gpus"))
    return tuple(found)


def _refuse_uneven(gpus: int, total: int) -> None:
    """The run's global batch is given: where it does not divide, the GPUs must change.

    Raises:
        PlanRefused: with the nearest numbers of GPUs that divide it.
    """
    if total % gpus == 0:
        return
    fitting = [number for number in range(1, total + 1) if total % number == 0]
    near = [max(n for n in fitting if n < gpus), *(n for n in fitting if n > gpus)][:2]
    raise PlanRefused(
        "batch_equation",
        f"the run's global batch of {total} does not divide over {gpus} GPUs",
        why="a run keeps its global batch",
        fix=f"use --gpus {' or '.join(map(str, near))}",
    )


def keep_global_batch(request: Request, run: RunDirectory) -> Request:
    """A run's own global batch where the request leaves it open: its default depends on GPUs."""
    total = read_spec(run).batch.global_batch_size
    default = Override("batch.global_batch_size", total, str(run.path))
    return dataclasses.replace(request, overrides=(default, *request.overrides))


def refuse_other_run(run: RunDirectory, spec: Spec, output: str) -> None:
    """Refuse to go on with a run that was another one.

    Raises:
        SpecError: with what differs.
    """
    found = differences(read_spec(run), spec)
    if not found:
        return
    shown = [f"{key} was {old!r}, is {new!r}" for key, old, new in found[:SHOWN_DIFFERENCES]]
    if len(found) > SHOWN_DIFFERENCES:
        shown.append(f"{len(found) - SHOWN_DIFFERENCES} more")
    raise SpecError(
        "output_taken",
        f"{output} holds another run ({'; '.join(shown)})",
        why="a run is never overwritten",
        fix=f"use --output {free_name(output)}, or sftlaunch resume {output} for that one",
    )


def refuse_running(run: RunDirectory) -> None:
    """Refuse to start a run's ranks twice.

    Raises:
        EnvironmentNotReady: where some of its processes live, on this machine or another.
    """
    refuse_elsewhere(run)
    pids = members(str(run.path))
    if pids:
        raise EnvironmentNotReady(
            "running",
            f"{run.path} is running (process {pids[0]})",
            why="two attempts would overwrite each other",
            fix="wait for its end (sftlaunch status shows it), or stop it: sftlaunch cancel",
        )


def find_source(resume: str) -> Checkpoint:
    """The checkpoint that `--resume PATH` names: itself, or a run's newest whole one.

    Raises:
        SpecError: where there is no whole checkpoint.
    """
    path = Path(resume).resolve()
    named = bool(NAME.match(path.name))
    found = whole(path) if named else newest_whole(path / "checkpoints")[0]
    if not isinstance(found, Checkpoint):
        why = found.reason if isinstance(found, Skipped) else "it has none that is whole"
        raise SpecError(
            "no_checkpoint",
            f"--resume {resume}: {path.name} cannot be resumed from",
            why=why,
            fix="name a run directory or a checkpoint with its complete.json",
        )
    return found


def refuse_foreign(source: Checkpoint, run: RunDirectory, resume: str) -> None:
    """Refuse another run's checkpoint for a folder that holds a run.

    Raises:
        SpecError: where the checkpoint is not the run's own.
    """
    if source.path.parent == run.checkpoints.resolve():
        return
    raise SpecError(
        "output_taken",
        f"--resume {resume}: the output folder holds a run with checkpoints of its own",
        fix=f"use --output {free_name(str(run.path))}, or --resume auto",
    )


def set_aside_after(run: RunDirectory, chosen: Checkpoint) -> None:
    """Move checkpoints after the chosen one out of the way; nothing is deleted."""
    for folder in checkpoint_folders(run.checkpoints):
        if int(folder.name.rpartition("-")[2]) > chosen.step:
            move_aside(folder)


def check_source(checkpoint: Checkpoint, plan: Plan, resume: str) -> None:
    """Refuse a source whose data position would mean other rows, or that no run vouches for.

    Raises:
        PlanRefused: where the global batch is another.
        SpecError: where the checkpoint does not stand in its run's directory.
    """
    if not RunDirectory(checkpoint.path.parents[1]).exists():
        raise SpecError(
            "no_checkpoint",
            f"--resume {resume}: {checkpoint.path.name} does not stand in a run directory",
            why="nothing says what was trained",
            fix="name a run directory, or a checkpoint inside one",
        )
    total = checkpoint.record["global_batch_size"]
    if total != plan.batch.global_batch_size:
        raise PlanRefused(
            "global_batch",
            f"{checkpoint.path.name} was trained with a global batch of {total}, "
            f"the plan says {plan.batch.global_batch_size}",
            why="rows would be seen twice or skipped",
            fix=f"use --global-batch-size {total}",
        )


def with_source_of(plan: Plan, run: RunDirectory) -> Plan:
    """The plan with the checkpoint of another run that this one once started from."""
    try:
        old = json.loads(run.plan.read_text(encoding="utf-8"))
        source = old["worker"]["resume_from"]
    except (ValueError, KeyError, TypeError):
        source = None  # a plan that cannot be read is written anew
    return dataclasses.replace(plan, worker=dataclasses.replace(plan.worker, resume_from=source))


def with_measured_save(plan: Plan, run: RunDirectory) -> Plan:
    """The plan with its patience at a stop taken from the last checkpoint's real duration."""
    newest, _ = newest_whole(run.checkpoints, contents=False)
    if newest is None:
        return plan
    patience = shutdown_timeout_seconds(
        plan.storage, plan.time.seconds_per_step, float(newest.record.get("seconds", 0))
    )
    limits = {**plan.worker.limits, "shutdown_timeout_seconds": patience}
    return dataclasses.replace(plan, worker=dataclasses.replace(plan.worker, limits=limits))


def say_where(run: RunDirectory, output: str, *, to_stderr: bool) -> None:
    """From which checkpoint the run goes on, and which were skipped."""
    newest, skipped = newest_whole(run.checkpoints, contents=False)
    describe(skipped, lambda text: click.echo(f"resume     {text}", err=to_stderr))
    where = f"from {newest.path.name}" if newest else "from the start: no whole checkpoint"
    attempt = int(run.read_status().get("attempt") or 0) + 1
    click.echo(f"resume     {output}, {where} (attempt {attempt})", err=to_stderr)


def say_complete(run: RunDirectory, output: str, *, as_json: bool) -> None:
    """The run is done: nothing is started and nothing changed."""
    if as_json:
        click.echo(json.dumps(run.read_status()))
        return
    step = run.read_status().get("step")
    click.echo(f"{output} is complete (step {step}, {output}/final); use --output for a new run")
