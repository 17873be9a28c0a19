"""`--sweep`: plan the product of some values, write a run directory each, and start them all.

Facts are probed once for all runs that look at the same things. What a run of the sweep would
be refused for is said before anything is written, with the run's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from launcher import __version__
from launcher.cli.going_on import (
    free_name,
    read_spec,
    refuse_other_run,
    refuse_running,
    with_measured_save,
    with_source_of,
)
from launcher.cli.on_slurm import origin
from launcher.cli.options import Request, find_spec
from launcher.cli.sweep_state import ask_live, show_states
from launcher.errors import EnvironmentNotReady, ExitCode, Refusal, SpecError
from launcher.facts.probe import Facts, probe
from launcher.insight.sweep import run_states
from launcher.launch.slurm_array import Task
from launcher.plan.defaults import run_name
from launcher.plan.make import Planned, make_plan
from launcher.render.array import array_script
from launcher.render.files import run_files, spec_text, with_files
from launcher.render.slurm import SCRIPT
from launcher.render.sweep import Row, sweep_lines
from launcher.render.text import bytes_text, plural
from launcher.runs.checkpoints import remove_unsealed
from launcher.runs.directory import RunDirectory, write_atomic
from launcher.runs.sweep import SweepDirectory, SweepRecord
from launcher.spec.load import Override, Source
from launcher.spec.schema import Spec
from launcher.spec.sweep import Axis, Combination, combinations, parse_axes

FALLBACK = "runs/sweep"


@dataclass(frozen=True)
class SweptRun:
    """One run, decided."""

    combination: Combination
    run: RunDirectory
    planned: Planned
    """With all files but plan.json."""
    facts: Facts


@dataclass(frozen=True)
class DecidedSweep:
    """All runs, with what printing and launching need."""

    sweep: SweepDirectory
    output: str
    """Its folder, as people name it."""
    axes: tuple[Axis, ...]
    common: Source
    """What all runs have in common, as it was said."""
    runs: tuple[SweptRun, ...]
    recipe: str | None
    script: str | None
    """The job array's, where it goes to Slurm."""

    @property
    def record(self) -> SweepRecord:
        """For sweep.json."""
        return SweepRecord(
            version=__version__,
            spec=self.common.data,
            axes=tuple(
                {"key": axis.key, "values": list(axis.values), "texts": list(axis.texts)}
                for axis in self.axes
            ),
            runs=tuple(
                {
                    "name": one.combination.name,
                    "values": {o.key: o.value for o in one.combination.overrides},
                }
                for one in self.runs
            ),
        )


def plan_sweep(request: Request) -> ExitCode:
    """`plan --sweep`."""
    show_plan(_decide_request(request), request)
    return ExitCode.DONE


def start_sweep(request: Request, *, dry_run: bool) -> ExitCode:
    """`run --sweep`; goes on with the same sweep where there is one."""
    decided = _decide_request(request)
    if dry_run:
        show_plan(decided, request)
        return ExitCode.DONE
    return _start(decided, request)


def resume_sweep(sweep: SweepDirectory, request: Request, *, dry_run: bool) -> ExitCode:
    """`resume SWEEP`: plan it again from its record, with what else was said."""
    if request.sweep or request.output_said:
        raise SpecError(
            "resume_sweep",
            "resume goes on with a sweep as it is",
            why="its runs and its folder are fixed",
            fix="use sftlaunch run --sweep ... --output ... for another one",
        )
    record = sweep.record
    source = Source(record.spec, {(): str(sweep.file)}, str(sweep.file), sweep.path)
    axes = [
        Axis(said["key"], tuple(said["values"]), tuple(said["texts"]), f"--sweep {said['key']}")
        for said in record.axes
    ]
    decided = _decide(source.with_overrides(request.overrides), axes, request, str(sweep.path))
    if dry_run:
        show_plan(decided, request)
        return ExitCode.DONE
    return _start(decided, request)


def _decide_request(request: Request) -> DecidedSweep:
    _refuse_request(request)
    axes = parse_axes(request.sweep, request.overrides, request.target)
    source, recipe = find_spec(request)
    common = source.with_overrides(request.overrides)
    output = _output(common)
    if recipe and not request.output_said and not SweepDirectory(Path(output)).exists():
        output = free_name(output)
    return dataclasses.replace(_decide(common, axes, request, output), recipe=recipe)


def _decide(common: Source, axes: Sequence[Axis], request: Request, output: str) -> DecidedSweep:
    """Plan all runs, and compare them with those that are there.

    Raises:
        Refusal: by a run's name where it is one's own; or for a folder that is taken.
    """
    path = os.path.abspath(output)  # noqa: PTH100 - keeps links
    sweep = SweepDirectory(Path(path))
    found = combinations(axes)
    _refuse_taken(sweep, output, axes, request)
    if request.target == "slurm" and shutil.which("scontrol") is not None:
        from launcher.launch.slurm_array import check_array

        check_array(len(found))
    facts: dict[str, Facts] = {}
    runs = []
    for one in found:
        with _named(one):
            runs.append(_decide_run(common, one, sweep, request.target, facts))
    script = None
    if request.target == "slurm":
        script = array_script([one.planned for one in runs], path, origin())
    return DecidedSweep(sweep, output, tuple(axes), common, tuple(runs), None, script)


def _decide_run(
    common: Source, one: Combination, sweep: SweepDirectory, target: str, facts: dict[str, Facts]
) -> SweptRun:
    run = RunDirectory(sweep.path / one.name)
    place = Override("output", str(run.path), "--output")
    spec = common.with_overrides((*one.overrides, place)).checked().spec
    looked_at = json.dumps([spec.model.model_dump(), _dumped(spec), spec.hardware.model_dump()])
    if looked_at not in facts:
        facts[looked_at] = probe(spec)
    known = facts[looked_at]
    planned = make_plan(spec, known)
    if run.exists():
        planned = _as_it_was(run, spec, planned, known)
    # On Slurm there is one script for all, beside the runs.
    plan = with_files(planned, str(run.path), known.cpu_count, script=target == "local")
    return SweptRun(one, run, dataclasses.replace(planned, plan=plan), known)


def _dumped(spec: Spec) -> Mapping[str, Any] | None:
    return spec.dataset.model_dump() if spec.dataset else None


def _as_it_was(run: RunDirectory, spec: Spec, planned: Planned, facts: Facts) -> Planned:
    """The plan of a run that is there: with its own global batch, patience and source.

    Raises:
        SpecError: where it was another run.
    """
    try:
        same = run.spec.read_text(encoding="utf-8") == spec_text(planned.spec)
    except OSError:
        same = False
    if not same:  # it may still be the same run: what counts is compared
        if "batch.global_batch_size" in planned.plan.defaults:
            total = read_spec(run).batch.global_batch_size
            batch = spec.batch.model_copy(update={"global_batch_size": total})
            planned = make_plan(spec.model_copy(update={"batch": batch}), facts)
        refuse_other_run(run, planned.spec, str(run.path))
    plan = with_source_of(with_measured_save(planned.plan, run), run)
    return dataclasses.replace(planned, plan=plan)


def _output(common: Source) -> str:
    """The folder that was asked for, else one by the model and the method."""
    try:
        spec = common.checked().spec
    except SpecError as error:
        # A key that every run gets from the sweep.
        if error.code != "missing_key":
            raise
        return str(common.data.get("output") or FALLBACK)
    return spec.output or f"runs/{run_name(spec)}"


@contextlib.contextmanager
def _named(one: Combination) -> Iterator[None]:
    """Put the run's name in front of what it is refused for."""
    try:
        yield
    except Refusal as refusal:
        refusal.what = f"{one.title}: {refusal.what}"
        raise


def _refuse_request(request: Request) -> None:
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


def _refuse_taken(
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


def _start(decided: DecidedSweep, request: Request) -> ExitCode:
    """Write what is not complete and not on its way, and start it."""
    live = ask_live(decided.sweep)
    states = run_states(decided.sweep, live) if decided.sweep.exists() else []
    left = [
        place
        for place, one in enumerate(decided.runs)
        if not (states and (states[place].state == "completed" or states[place].job))
    ]
    if states and not left:
        return _nothing_left(decided, request)
    _check_ready(decided, [decided.runs[place] for place in left], live, request)
    show_plan(decided, request, to_stderr=request.json)
    if states:
        number = f"{len(left):,} of {plural(len(decided.runs), 'run')}"
        click.echo(f"resume     {decided.output}: {number} left to start", err=request.json)
    if request.target == "slurm":
        return _submit(decided, left, request)
    from launcher.cli.sweep_local import run_in_sequence

    with written(decided, left):
        pass
    return run_in_sequence(decided, left, request)


def _nothing_left(decided: DecidedSweep, request: Request) -> ExitCode:
    """All is complete, or on its way in Slurm: then it is followed."""
    from launcher.cli.sweep_state import end_of, follow_sweep

    click.echo(f"{decided.output}: no run is left to start", err=True)
    live = ask_live(decided.sweep)
    if live and not request.detach:
        follow_sweep(decided.sweep)
    return end_of(decided.sweep, request.json)


def _check_ready(
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
        with _named(one.combination):
            if one.planned.spec.dataset is None:
                raise SpecError(
                    "missing_key",
                    "dataset is not set",
                    why="a run needs rows",
                    fix="pass --dataset FILE",
                )
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


@contextlib.contextmanager
def written(decided: DecidedSweep, left: Sequence[int]) -> Iterator[None]:
    """The sweep's folder with all that was decided; undone where what follows fails.

    Raises:
        SpecError: where it cannot be written.
    """
    sweep = decided.sweep
    runs = [decided.runs[place] for place in left]
    fresh = not sweep.exists()
    jobs = () if fresh else sweep.read().jobs
    own = sweep.snapshot()
    before = {} if fresh else {one.run: one.run.snapshot() for one in runs}
    try:
        _write(decided, runs, jobs)
        yield
    except BaseException as error:
        sweep.restore(own)
        for run, files in before.items():
            if run.path.exists():
                run.restore(files)
        if isinstance(error, OSError):
            raise SpecError(
                "output_unwritable",
                f"{decided.output} cannot be written: {error.strerror}",
                fix="use --output with a folder that you may write",
            ) from None
        raise


def _write(decided: DecidedSweep, runs: Sequence[SweptRun], jobs: tuple[int, ...]) -> None:
    sweep = decided.sweep
    sweep.create(dataclasses.replace(decided.record, jobs=jobs))
    if decided.script is not None:
        write_atomic(sweep.path / SCRIPT, decided.script)
    for one in runs:
        remove_unsealed(one.run.checkpoints)  # what a full disk has left makes room
        # Not durable: nothing is lost with a run that has not begun, and resume writes it again.
        durable = one.run.exists()
        one.run.create(run_files(one.planned.plan), durable=durable)
        if decided.script is None:  # Slurm's says that it is queued
            one.run.update_status(durable=durable, state="planned", error=None, notes=[])


def _submit(decided: DecidedSweep, left: Sequence[int], request: Request) -> ExitCode:
    from launcher.cli.sweep_state import end_of, follow_sweep
    from launcher.launch.slurm_array import submit_array

    sweep, slurm = decided.sweep, decided.runs[0].planned.spec.slurm
    with written(decided, left):
        fresh = SweepDirectory(sweep.path)
        job = submit_array(fresh, left, slurm.array_throttle)
    click.echo(
        f"queued     job array {job} of {plural(len(left), 'run')}; sftlaunch status {job}",
        err=True,
    )
    if request.detach:
        if request.json:
            show_states(fresh, as_json=True)
        return ExitCode.DONE
    try:
        follow_sweep(fresh)
    except KeyboardInterrupt:
        click.echo(f"\njob array {job} goes on; sftlaunch cancel {job} stops it", err=True)
        return ExitCode.DONE
    return end_of(fresh, request.json)


def show_plan(decided: DecidedSweep, request: Request, *, to_stderr: bool = False) -> None:
    """What all runs have in common, and a line a run; or all of it as JSON."""
    if request.json and not to_stderr:
        click.echo(json.dumps(_as_json(decided, request), indent=1))
        return
    if decided.recipe:
        click.echo(
            f"No spec was given and there is no ./sft.yaml: the built-in recipe {decided.recipe}.",
            err=to_stderr,
        )
    rows = [
        Row(
            texts=list(one.combination.texts.values()),
            folder=one.combination.name,
            planned=one.planned,
            parameters=one.facts.model.parameters if one.facts.model else None,
            rows=one.facts.dataset.rows if one.facts.dataset else None,
        )
        for one in decided.runs
    ]
    axes = [(axis.short, axis.texts) for axis in decided.axes]
    width = shutil.get_terminal_size((100, 24)).columns
    for line in sweep_lines(axes, rows, _jobs_text(decided, request), decided.output, width):
        click.echo(
            click.style(line, fg="yellow") if line.startswith("warning") else line, err=to_stderr
        )


def _jobs_text(decided: DecidedSweep, request: Request) -> str:
    if request.target != "slurm":
        return "one after the other, on this machine"
    throttle = decided.runs[0].planned.spec.slurm.array_throttle
    most = f", at most {throttle} at one time" if throttle else ""
    return f"1 job array of {plural(len(decided.runs), 'task')}{most}"


def _as_json(decided: DecidedSweep, request: Request) -> dict[str, Any]:
    """The sweep, and of each run its plan without the texts of its files."""
    record = decided.record
    return {
        "sweep": {
            "run": str(decided.sweep.path),
            "axes": list(record.axes),
            "count": len(decided.runs),
            "target": request.target,
            "jobs": 1 if request.target == "slurm" else 0,
            "array_throttle": decided.runs[0].planned.spec.slurm.array_throttle,
            "files": {SCRIPT: decided.script} if decided.script is not None else {},
        },
        "runs": [
            {
                "index": one.combination.index,
                "name": one.combination.name,
                "run": str(one.run.path),
                "values": said["values"],
                "plan": dataclasses.replace(one.planned.plan, files={}).as_json(),
            }
            for one, said in zip(decided.runs, record.runs, strict=True)
        ],
    }
