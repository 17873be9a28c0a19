"""What a sweep will do, for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

import click

from launcher.cli.options import Request
from launcher.cli.show import show_lines
from launcher.cli.sweep.types import DecidedSweep
from launcher.render.slurm import SCRIPT
from launcher.render.sweep import Row, sweep_lines
from launcher.render.text import plural


def show_plan(decided: DecidedSweep, request: Request, *, to_stderr: bool = False) -> None:
    """What all runs have in common, and a line a run; or all of it as JSON."""
    if request.json and not to_stderr:
        click.echo(json.dumps(_as_json(decided, request), indent=1))
        return
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
    lines = sweep_lines(axes, rows, _jobs_text(decided, request), decided.output, width)
    show_lines(decided.recipe, lines, to_stderr=to_stderr)


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
