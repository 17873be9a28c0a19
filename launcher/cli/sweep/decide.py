"""Plan the product of some values: all runs, compared with those that are there.

Facts are probed once for all runs that look at the same things. What a run of the sweep would
be refused for is said before anything is written, with the run's name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.cli.going_on import (
    free_name,
    read_spec,
    refuse_other_run,
    with_measured_save,
    with_source_of,
)
from launcher.cli.on_slurm import origin
from launcher.cli.options import Request, find_spec
from launcher.cli.sweep.refusals import named, refuse_request, refuse_taken
from launcher.cli.sweep.types import DecidedSweep, SweptRun
from launcher.errors import SpecError
from launcher.facts.probe import Facts, probe
from launcher.plan.defaults import run_name
from launcher.plan.make import Planned, make_plan
from launcher.render.array import array_script
from launcher.render.files import spec_text, with_files
from launcher.runs.directory import RunDirectory
from launcher.runs.sweep import SweepDirectory
from launcher.spec.load import Override, Source
from launcher.spec.schema import Spec
from launcher.spec.sweep import Axis, Combination, combinations, parse_axes

FALLBACK = "runs/sweep"


def decide_request(request: Request) -> DecidedSweep:
    """Plan what was asked for.

    Raises:
        Refusal: as the plan of a run says.
    """
    refuse_request(request)
    axes = parse_axes(request.sweep, request.overrides, request.target)
    source, recipe = find_spec(request)
    common = source.with_overrides(request.overrides)
    output = _output(common)
    if recipe and not request.output_said and not SweepDirectory(Path(output)).exists():
        output = free_name(output)
    return dataclasses.replace(_decide(common, axes, request, output), recipe=recipe)


def decide_recorded(sweep: SweepDirectory, request: Request) -> DecidedSweep:
    """Plan a sweep again from its record, with what else was said.

    Raises:
        Refusal: as for a new one; or where another one is asked for.
    """
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
    return _decide(source.with_overrides(request.overrides), axes, request, str(sweep.path))


def _decide(common: Source, axes: Sequence[Axis], request: Request, output: str) -> DecidedSweep:
    """Plan all runs, and compare them with those that are there.

    Raises:
        Refusal: by a run's name where it is one's own; or for a folder that is taken.
    """
    path = os.path.abspath(output)  # noqa: PTH100 - keeps links
    sweep = SweepDirectory(Path(path))
    found = combinations(axes)
    refuse_taken(sweep, output, axes, request)
    if request.target == "slurm" and shutil.which("scontrol") is not None:
        from launcher.launch.slurm_array import check_array

        check_array(len(found))
    facts: dict[str, Facts] = {}
    runs = []
    for one in found:
        with named(one):
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
