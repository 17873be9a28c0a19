"""job.sbatch of a sweep: the single job's script, for any task of one job array.

What differs between the tasks is the run directory alone, which each finds by its number.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from launcher.errors import SpecError
from launcher.plan.make import Planned
from launcher.plan.types import Plan
from launcher.render.sbatch import directives
from launcher.render.slurm import Origin, fill, ranks, script_values, words
from launcher.render.slurm_container import container_argv, own_paths, refuse_unmountable
from launcher.runs.sweep import compact
from launcher.spec.schema import Spec

# Stands for the task's run directory until the words around it are quoted; no path holds it.
_RUN = "\x00run\x00"
# Slurm expands %a to the task: its link leads to the run directory.
LOG = "tasks/%a/logs/slurm-%A_%a.log"
# The name of one task, also of the one whose job id is the whole array's.
TASK = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"


def array_script(runs: Sequence[Planned], sweep_directory: str, origin: Origin) -> str:
    """The whole script.

    Args:
        runs: all of the sweep, in order; their hardware and slurm sections are the same.
        sweep_directory: absolute path, seen by all nodes.
        origin: who makes it.

    Raises:
        SpecError: for what Slurm or a container runtime cannot be told safely.
    """
    plan, spec = _widest(runs), _with_all_mounts(runs)
    slurm = spec.slurm
    if slurm.prepare == "job":
        raise SpecError(
            "sweep_prepare",
            "the runs of a sweep do not wait for preparation jobs of their own",
            fix="use --set slurm.prepare=step: each task prepares its rows, then trains",
        )
    if slurm.container is not None:
        refuse_unmountable((sweep_directory,), slurm.container)
    array = array_range(range(len(runs)), slurm.array_throttle)
    return fill(
        {
            **script_values(plan, spec, sweep_directory, origin),
            "DIRECTIVES": directives(plan, slurm, sweep_directory, {"array": array, "output": LOG}),
            "RUN": _choose_run(sweep_directory),
            "JOB": TASK,
            "CONTAINER": words(container_argv(plan, spec, _RUN), _quote),
            "RANKS": words(ranks(plan, _RUN), _quote),
        }
    )


def array_range(tasks: Sequence[int], throttle: int | None) -> str:
    """The value of `--array`: which tasks, and how many of them at one time."""
    return compact(tasks) + (f"%{throttle}" if throttle else "")


def _choose_run(sweep_directory: str) -> str:
    """What follows `run=`: the task's link, read, and its run as working directory."""
    return (
        '$(readlink "tasks/$SLURM_ARRAY_TASK_ID")\n'
        f"run={shlex.quote(sweep_directory)}/${{run##*/}}\n"
        'cd "$run"'
    )


def _quote(word: str) -> str:
    return '"$run"'.join(shlex.quote(part) if part else "" for part in word.split(_RUN))


def _widest(runs: Sequence[Planned]) -> Plan:
    """A plan whose patience at a stop is enough for every run."""
    patience = max(run.plan.worker.limits["shutdown_timeout_seconds"] for run in runs)
    plan = runs[0].plan
    limits = {**plan.worker.limits, "shutdown_timeout_seconds": patience}
    return dataclasses.replace(plan, worker=dataclasses.replace(plan.worker, limits=limits))


def _with_all_mounts(runs: Sequence[Planned]) -> Spec:
    """The first spec; its container sees the models and data of all runs."""
    spec = runs[0].spec
    container = spec.slurm.container
    if container is None:
        return spec
    paths = dict.fromkeys(path for run in runs for path in own_paths(run.spec))
    refuse_unmountable(paths, container)
    more = [f"{path}:{path}" for path in paths if path not in own_paths(spec)]
    update = {"mounts": [*container.mounts, *more]}
    slurm = spec.slurm.model_copy(update={"container": container.model_copy(update=update)})
    return spec.model_copy(update={"slurm": slurm})
