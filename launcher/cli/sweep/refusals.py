"""What a sweep is refused for, before anything of it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.going_on import free_name, refuse_running
from launcher.cli.options import Request
from launcher.cli.refusals import no_rows
from launcher.cli.sweep.types import DecidedSweep, SweptRun
from launcher.errors import EnvironmentNotReady, Refusal, SpecError
from launcher.insight.sweep import run_states
from launcher.render.slurm import SCRIPT
from launcher.render.text import bytes_text, plural
from launcher.runs.directory import RunDirectory
from launcher.runs.sweep import SweepDirectory
from launcher.spec.sweep import Axis, Combination

if TYPE_CHECKING:
    from launcher.launch.slurm_array import Task


@contextlib.contextmanager
def named(one: Combination) -> Iterator[None]:
    """Put the run's name in front of what it is refused for."""
    try:
        yield
    except Refusal as refusal:
        refusal.what = f"{one.title}: {refusal.what}"
        raise


def refuse_request(request: Request) -> None:
    """Refuse what was asked for and no sweep can do."""
    if request.target == "docker":
        raise EnvironmentNotReady(
            "target", "--on docker is not in this version", fix="use --on local or --on slurm"
        )
    if request.resume not in ("auto", "never"):
        raise SpecError(
            "sweep_resume",
            "--resume PATH names one run's checkpoint, a sweep has many runs",
            fix="leave it out: a sweep goes on by itself; or resume one of its runs",
        )
    if request.target == "slurm" and any(o.key == "slurm.chain" for o in request.overrides):
        raise _no_chain()


def _no_chain() -> SpecError:
    return SpecError(
        "sweep_chain",
        "a sweep cannot be a chain of jobs",
        why="Slurm lets a task wait for the same task of another array to succeed, not to stop "
        "early, and a chain goes on after the latter",
        fix="leave out slurm.chain: tasks are queued again by themselves; where that is not "
        "allowed, sftlaunch resume SWEEP --on slurm goes on with what is left",
        source="sbatch(1), --dependency=aftercorr",
    )


def refuse_taken(
    sweep: SweepDirectory, output: str, axes: Sequence[Axis], request: Request
) -> None:
    """Refuse a folder that holds something else; a sweep is never overwritten either.

    Raises:
        SpecError: with a name that is free.
    """
    what = None
    if sweep.exists():
        there = [(axis["key"], axis["values"]) for axis in sweep.record.axes]
        if there != [(axis.key, list(axis.values)) for axis in axes]:
            said = " x ".join(f"{a['key']}={','.join(a['texts'])}" for a in sweep.record.axes)
            what = f"{output} holds another sweep ({said})"
        elif request.resume == "never":
            what = f"{output} holds this sweep already"
    elif RunDirectory(sweep.path).exists():
        what = f"{output} holds a run"
    elif _in_use(sweep.path):
        what = f"{output} exists and is no empty folder"
    if what is not None:
        raise SpecError(
            "output_taken",
            what,
            why="a sweep needs a folder of its own",
            fix=f"use --output {free_name(output)}",
        )


def _in_use(path: Path) -> bool:
    try:
        return path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError:
        return False  # said by what writes


def check_ready(
    decided: DecidedSweep,
    runs: Sequence[SweptRun],
    live: Mapping[str, Task] | None,
    request: Request,
) -> None:
    """Refuse what cannot start, before anything is written.

    Raises:
        Refusal: no rows, no GPUs, no packages, no cluster, no space, or runs on their way.
    """
    from launcher.launch.local import check_environment

    for one in runs:
        with named(one.combination):
            if one.planned.spec.dataset is None:
                raise no_rows()
            if one.run.read_status().get("state") == "running":
                refuse_running(one.run)
            if request.target == "local":
                check_environment(one.planned.plan, len(one.facts.gpus))
    if request.target == "slurm":
        from launcher.launch.slurm import check

        spec, plan = runs[0].planned.spec, runs[0].planned.plan
        if spec.slurm.chain is not None:
            raise _no_chain()
        check(dataclasses.replace(plan, files={SCRIPT: decided.script or ""}), spec.slurm)
    elif live and len(runs) < len(decided.runs):
        _refuse_queued(decided, live)
    _check_space(decided, runs)


def _refuse_queued(decided: DecidedSweep, live: Mapping[str, Task]) -> None:
    waiting = [one for one in run_states(decided.sweep, live) if one.job]
    if waiting:
        raise EnvironmentNotReady(
            "running",
            f"{plural(len(waiting), 'run')} of {decided.output} are in Slurm's queue or running",
            fix=f"wait for their end, or sftlaunch cancel {decided.output}",
        )


def _check_space(decided: DecidedSweep, runs: Sequence[SweptRun]) -> None:
    """Hold the free space against what all runs will leave there."""
    needed = sum(one.planned.plan.storage.total_bytes or 0 for one in runs)
    paths = (decided.sweep.path, *decided.sweep.path.parents)
    try:
        disk = shutil.disk_usage(next(path for path in paths if path.is_dir()))
    except OSError:
        return  # a folder that cannot be looked at cannot be written either, which is said then
    if disk.total and needed > disk.free:
        raise EnvironmentNotReady(
            "disk_space",
            f"the checkpoints and final saves of {plural(len(runs), 'run')} need "
            f"{bytes_text(needed)}, {bytes_text(disk.free)} are free for {decided.output}",
            fix="use --set checkpoints.keep=1, or --output on another disk",
        )
