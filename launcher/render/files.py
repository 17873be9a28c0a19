"""Every file that a run writes before it starts, as name -> text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher import __version__
from launcher.plan.engine import RUN_DIRECTORY
from launcher.plan.make import Planned, spec_as_mapping
from launcher.plan.types import Plan
from launcher.render.slurm import (
    PREPARE_SCRIPT,
    SCRIPT,
    Origin,
    job_script,
    prepare_script,
)
from launcher.render.torchrun import command_script, launch_environment, torchrun_argv
from launcher.spec.document import FLOAT
from launcher.spec.schema import Spec

if TYPE_CHECKING:
    from launcher.render.docker import Caller
    from launcher.render.docker_nodes import Nodes


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 1e5, which PyYAML alone takes for text."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Line separators that PyYAML would fold away stand escaped, in double quotes."""
    style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def with_files(
    planned: Planned,
    run_directory: str,
    cpu_count: int,
    target: Origin | Caller | Nodes | None = None,
    *,
    script: bool = True,
) -> Plan:
    """The plan with its command and all files.

    Args:
        planned: what was decided.
        run_directory: absolute path of the run.
        cpu_count: processors of a node, for the ranks' thread counts.
        target: who makes the job, where it goes to Slurm, or who starts the containers, where
            it goes to Docker: scripts of theirs stand in place of command.sh then.
        script: whether there is one of the two; the tasks of an array have theirs in common.

    Raises:
        SpecError: for what a job script cannot say.
    """
    plan = planned.plan
    argv = torchrun_argv(plan.topology, plan.worker.limits, run_directory, Path(run_directory).name)
    environment = launch_environment(plan.topology, cpu_count, plan.worker.limits["max_restarts"])
    files = {
        "accelerate.yaml": yaml_text(_replaced(planned.engine.accelerate, run_directory)),
        "spec.yaml": spec_text(planned.spec),
    }
    if planned.engine.deepspeed is not None:
        files["deepspeed.json"] = json.dumps(planned.engine.deepspeed, indent=2) + "\n"
    if isinstance(target, Origin):
        files[SCRIPT] = job_script(plan, planned.spec, run_directory, target)
        if planned.spec.slurm.prepare == "job":
            files[PREPARE_SCRIPT] = prepare_script(plan, planned.spec, run_directory, target)
    elif target is not None:
        from launcher.render.docker_nodes import docker_files  # noqa: PLC0415 - for Docker only

        argv, more = docker_files(plan, planned.spec, run_directory, target, files)
        files |= more
    elif script:
        files["command.sh"] = command_script(argv, environment, plan.topology)
    return dataclasses.replace(plan, command=argv, files=files)


def run_files(plan: Plan) -> dict[str, str]:
    """The files with plan.json, which lists the others and so cannot list itself."""
    return {**plan.files, "plan.json": json.dumps(dataclasses.asdict(plan), indent=1) + "\n"}


def spec_text(spec: Spec) -> str:
    """spec.yaml of a resolved spec."""
    made = f"# Resolved by sftlaunch {__version__}: every value is explicit.\n"
    return made + yaml_text(spec_as_mapping(spec))


def yaml_text(values: Mapping[str, Any]) -> str:
    """YAML that the spec's own reader, whose numbers are those of YAML 1.2, reads back alike."""
    return "".join(_section(json.dumps({key: value})) for key, value in values.items())


@lru_cache(maxsize=512)
def _section(text: str) -> str:
    """One top-level key; the runs of a sweep have most of them in common."""
    values = json.loads(text)
    written: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
    )
    return written


def _replaced(value: Any, run_directory: str) -> Any:
    """The run directory in place of its placeholder, at any depth."""
    if isinstance(value, str):
        return value.replace(RUN_DIRECTORY, run_directory)
    if isinstance(value, Mapping):
        return {key: _replaced(inner, run_directory) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, run_directory) for inner in value]
    return value
