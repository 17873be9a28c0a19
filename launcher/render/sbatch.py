"""The `#SBATCH` lines: what a job asks of Slurm, and what Slurm cannot be asked safely.

sbatch reads their values by rules of its own, which are not bash's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import SpecError
from launcher.plan.types import Plan, Topology
from launcher.runs.prepared import LOG as PREPARE_LOG
from launcher.spec.durations import seconds
from launcher.spec.schema import SlurmSpec

CHECK_MINUTES = 5
# Processors of a rank where nothing was said: data loading and the host side of a GPU.
RANK_CPUS = {"cuda": 8, "cpu": 1}
# Slurm looks at its clock once a minute, so a warning may come that much early.
CLOCK_SECONDS = 60
DAY, HOUR, MINUTE = 86_400, 3_600, 60
PLAIN_VALUE = re.compile(r"[\w@%+=:,./\[\]&|*-]+", re.ASCII)
# sbatch option -> the key of the spec that it belongs to; `directives` must not repeat it.
OWNED = {
    "account": "slurm.account",
    "array": "--sweep",
    "chdir": "output",
    "constraint": "slurm.constraint",
    "cpus-per-task": "slurm.cpus_per_node",
    "dependency": "slurm.chain",
    "error": "output",
    "exclude": "slurm.exclude",
    "exclusive": "slurm.exclusive",
    "gpus-per-node": "hardware.gpus_per_node",
    "gres": "hardware.gpus_per_node",
    "job-name": "output",
    "mail-type": "slurm.mail.events",
    "mail-user": "slurm.mail.user",
    "no-requeue": "slurm.requeue",
    "nodes": "hardware.nodes",
    "ntasks": "hardware.nodes",
    "ntasks-per-node": "hardware.nodes",
    "open-mode": "output",
    "output": "output",
    "partition": "slurm.partition",
    "qos": "slurm.qos",
    "requeue": "slurm.requeue",
    "reservation": "slurm.reservation",
    "signal": "slurm.warning",
    "time": "slurm.time_limit",
    "wrap": "the recipe",
}


def directives(
    plan: Plan, slurm: SlurmSpec, run_directory: str, more: Mapping[str, str] | None = None
) -> str:
    """The `#SBATCH` lines, sorted; `more` wins over the usual ones."""
    topology = plan.topology
    options: dict[str, str | int | bool | None] = {
        **slurm.directives,
        **_places(slurm, run_directory),
        **_gpus(topology, slurm),
        "cpus-per-task": cpus_per_node(topology, slurm),
        "exclusive": slurm.exclusive,
        "mail-type": ",".join(slurm.mail.events) or None,
        "mail-user": slurm.mail.user,
        "nodes": topology.nodes,
        "ntasks-per-node": 1,
        "open-mode": "append",
        "signal": _warning(plan, slurm),
        "time": clock(seconds(slurm.time_limit)) if slurm.time_limit else None,
        ("requeue" if may_requeue(slurm) else "no-requeue"): True,
        **(more or {}),
    }
    return _directive_lines(options)


def prepare_directives(plan: Plan, slurm: SlurmSpec, run_directory: str) -> str:
    """The `#SBATCH` lines of the preparation's own job: one task, no GPUs.

    Another partition has time limits of its own: its default holds there. Further
    directives are the training job's alone.
    """
    places = _places(slurm, run_directory)
    if slurm.prepare_partition is not None:
        # These name nodes and rules of the other partition.
        places |= dict.fromkeys(("constraint", "exclude", "qos", "reservation"), None)
    limit = None if slurm.prepare_partition else slurm.time_limit
    return _directive_lines(
        {
            **places,
            "cpus-per-task": prepare_cpus(plan.topology, slurm),
            "job-name": f"{Path(run_directory).name}-prepare",
            "nodes": 1,
            "ntasks": 1,
            "open-mode": "append",
            "output": PREPARE_LOG,
            "partition": slurm.prepare_partition or slurm.partition,
            "time": clock(seconds(limit)) if limit else None,
            ("requeue" if slurm.requeue else "no-requeue"): True,
        }
    )


def check_directives(slurm: SlurmSpec, folder: str, nodes: int) -> str:
    """The `#SBATCH` lines of the tiny job that asks the nodes what they see."""
    return _directive_lines(
        {
            **slurm.directives,
            **_places(slurm, folder),
            # From where every node can start; what it prints is of no use.
            "chdir": "/",
            "output": "/dev/null",
            "job-name": "sftlaunch-doctor",
            "cpus-per-task": 1,
            "nodes": nodes,
            "ntasks-per-node": 1,
            "no-requeue": True,
            "time": clock(CHECK_MINUTES * MINUTE),
        }
    )


def prepare_cpus(topology: Topology, slurm: SlurmSpec) -> int:
    """Threads of one tokenizer; a node without GPUs may have fewer than one with them."""
    return min(cpus_per_node(topology, slurm), RANK_CPUS["cuda"])


def _places(slurm: SlurmSpec, run_directory: str) -> dict[str, str | None]:
    return {
        "account": slurm.account,
        "chdir": run_directory,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "job-name": Path(run_directory).name,
        "output": "logs/slurm-%j.log",
        "partition": slurm.partition,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
    }


def _gpus(topology: Topology, slurm: SlurmSpec) -> dict[str, str]:
    if topology.device != "cuda":
        return {}
    typed = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    count = f"{typed}{topology.gpus_per_node}"
    return {slurm.gpus_as: f"gpu:{count}" if slurm.gpus_as == "gres" else count}


def _warning(plan: Plan, slurm: SlurmSpec) -> str | None:
    ahead = warning_seconds(plan, slurm)
    # B: the batch shell alone, which tells all ranks.
    return None if ahead is None else f"B:USR1@{ahead}"


def warning_seconds(plan: Plan, slurm: SlurmSpec) -> int | None:
    """Seconds before the limit at which the ranks are told; None without a limit."""
    if slurm.time_limit is None:
        return None
    if slurm.warning is not None:
        return seconds(slurm.warning)
    patience = plan.worker.limits["shutdown_timeout_seconds"] + CLOCK_SECONDS
    return min(int(patience), seconds(slurm.time_limit) // 2)


def may_requeue(slurm: SlurmSpec) -> bool:
    """Whether the job itself is queued again; a chain continues in its next job."""
    return slurm.requeue and slurm.chain is None


def cpus_per_node(topology: Topology, slurm: SlurmSpec) -> int:
    """Processors of a node's one task; Slurm's own default would be a single one."""
    return slurm.cpus_per_node or topology.gpus_per_node * RANK_CPUS[topology.device]


def clock(total: int) -> str:
    """Seconds as Slurm writes a time: days-hours:minutes:seconds."""
    days, rest = divmod(total, DAY)
    hours, rest = divmod(rest, HOUR)
    return f"{days}-{hours:02}:{rest // MINUTE:02}:{rest % MINUTE:02}"


def _directive_lines(options: Mapping[str, str | int | bool | None]) -> str:
    said = sorted(name for name, value in options.items() if _is_said(value))
    return "\n".join(_directive(name, options[name]) for name in said)


def _is_said(value: object) -> bool:
    return value is not None and value is not False


def _directive(name: str, value: str | int | bool | None) -> str:
    return f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={directive_value(value)}"


def directive_value(value: object) -> str:
    r"""A value as sbatch reads it: in double quotes, `"` and `\` behind a backslash.

    sbatch (22.05 to 24.05, `_get_argument`) expands nothing and knows no other escape.
    """
    text = str(value)
    if PLAIN_VALUE.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def refuse_owned(slurm: SlurmSpec) -> None:
    """Refuse directives that the plan sets.

    Raises:
        SpecError: with the key to use.
    """
    for name in slurm.directives:
        if name in OWNED:
            raise SpecError(
                "owned_key",
                f"slurm.directives.{name} is set by the plan",
                fix=f"use {OWNED[name]}",
            )


def refuse_times(slurm: SlurmSpec) -> None:
    """Refuse a time limit that Slurm cannot count, and a warning that comes before the start.

    Raises:
        SpecError: with what to use.
    """
    if slurm.time_limit is None:
        return
    limit = seconds(slurm.time_limit)
    if limit < MINUTE:
        raise SpecError(
            "bad_value",
            f"slurm.time_limit is {limit} s",
            why="Slurm counts in minutes",
            fix="use 1m or more",
        )
    if slurm.warning is not None and seconds(slurm.warning) >= limit:
        raise SpecError(
            "bad_value",
            f"slurm.warning {slurm.warning} is no time before slurm.time_limit {slurm.time_limit}",
            fix="lower slurm.warning",
        )


def refuse_patterns(run_directory: str) -> None:
    """The job's log lies in the run directory, and Slurm takes its whole path for a pattern.

    Raises:
        SpecError: where it would be one.
    """
    if re.search(r"[%\\]", run_directory):
        raise SpecError(
            "bad_name",
            f"the run directory {run_directory!r} holds a percent sign or a backslash",
            why="Slurm reads them as patterns in file names, and would lose the job's log",
            fix="use --output with another folder",
            source="sbatch(1), filename pattern",
        )
