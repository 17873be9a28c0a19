"""job.sbatch: a plan as a Slurm job. The one place that fills the template.

The text is pure: nothing is asked of a cluster here. Values are quoted for bash in the
body, and for sbatch, which has rules of its own, in the `#SBATCH` lines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import __version__
from launcher.assets import asset
from launcher.errors import SpecError
from launcher.plan.types import Plan, Topology
from launcher.render.quote import exports
from launcher.render.secrets import hide
from launcher.render.slurm_container import container_argv
from launcher.render.torchrun import launch_environment, rank_options
from launcher.runs.prepared import LOG as PREPARE_LOG
from launcher.spec.durations import seconds
from launcher.spec.schema import SlurmSpec, Spec

SCRIPT = "job.sbatch"
PREPARE_SCRIPT = "prepare.sbatch"
CHECK_SCRIPT = "check.sbatch"
CHECK_MINUTES = 5
# Processors of a rank where nothing was said: data loading and the host side of a GPU.
RANK_CPUS = {"cuda": 8, "cpu": 1}
# Slurm looks at its clock once a minute, so a warning may come that much early.
CLOCK_SECONDS = 60
# Seconds that srun waits for the other nodes once one node's ranks have ended.
STRAGGLER_SECONDS = 60
# What the shell in front of torchrun sends it, once (job.sbatch).
TOLD_BY = "SIGUSR2"
DAY, HOUR, MINUTE = 86_400, 3_600, 60
PLACEHOLDER = re.compile(r"^# @([A-Z]+)@$|@([A-Z]+)@", re.MULTILINE)
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


@dataclass(frozen=True)
class Origin:
    """Who makes the script: what it says of itself, and what its batch shell runs."""

    command: str
    """The launcher's command line."""
    python: str
    """Interpreter with this package, on a path that the nodes see."""
    python_path: str
    """Folder of the package."""


def job_script(plan: Plan, spec: Spec, run_directory: str, origin: Origin) -> str:
    """The whole script.

    Args:
        plan: decided.
        spec: resolved.
        run_directory: absolute path, seen by all nodes.
        origin: who makes it.

    Raises:
        SpecError: for what Slurm or a container runtime cannot be told safely.
    """
    return fill(script_values(plan, spec, run_directory, origin))


def script_values(plan: Plan, spec: Spec, run_directory: str, origin: Origin) -> dict[str, str]:
    """Placeholder of the template -> what stands there; see `job_script`."""
    _refuse_unsafe(spec.slurm)
    _refuse_patterns(run_directory)
    topology, slurm = plan.topology, spec.slurm
    return {
        **_common(plan, spec, run_directory, origin),
        "DIRECTIVES": directives(plan, slurm, run_directory),
        "JOB": "$SLURM_JOB_ID",
        "PREPARE": slurm.prepare,
        "STEP": words(_step(topology, slurm)),
        "RANKS": words(ranks(plan, run_directory)),
    }


def ranks(plan: Plan, run_directory: str) -> tuple[str, ...]:
    """Torchrun's arguments on each node, without the rendezvous."""
    topology = plan.topology
    options = rank_options(topology, plan.worker.limits, run_directory, TOLD_BY)
    return (f"--nnodes={topology.nodes}", *options)


def fill(values: Mapping[str, str], name: str = SCRIPT) -> str:
    """A template with its placeholders replaced."""
    template = asset("slurm", name).read_text(encoding="utf-8")
    # One pass: a value that looks like a placeholder stays what it is.
    return PLACEHOLDER.sub(lambda found: values[found[1] or found[2]], template)


def prepare_script(plan: Plan, spec: Spec, run_directory: str, origin: Origin) -> str:
    """The script of the job that makes a run's rows ready; see `job_script`."""
    values = {
        **_common(plan, spec, run_directory, origin),
        "DIRECTIVES": prepare_directives(plan, spec.slurm, run_directory),
        "CPUS": str(_prepare_cpus(plan.topology, spec.slurm)),
    }
    return fill(values, PREPARE_SCRIPT)


def _common(plan: Plan, spec: Spec, run_directory: str, origin: Origin) -> dict[str, str]:
    """Placeholders of both scripts."""
    topology, slurm = plan.topology, spec.slurm
    return {
        "VERSION": __version__,
        "COMMAND": _comment(origin.command),
        "RUN": shlex.quote(run_directory),
        "ENVIRONMENT": _environment(topology, slurm, origin),
        "PYTHON": shlex.quote(origin.python),
        "PYTHONPATH": shlex.quote(origin.python_path),
        "BEFORE": _before(slurm),
        "CPUS": str(cpus_per_node(topology, slurm)),
        "CONTAINER": words(container_argv(plan, spec, run_directory)),
    }


def words(elements: Iterable[str], quote: Callable[[str], str] = shlex.quote) -> str:
    """Elements of a bash array, one a line."""
    lines = "".join(f"\n  {quote(word)}" for word in elements)
    return f"{lines}\n" if lines else ""


def _comment(text: str) -> str:
    return " ".join(text.split())


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
            "cpus-per-task": _prepare_cpus(plan.topology, slurm),
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


def check_script(
    slurm: SlurmSpec, topology: Topology, folder: str, word: str, nodes: int, origin: Origin
) -> str:
    """The script of a tiny job that asks the nodes what they see.

    Args:
        slurm: of the run that it asks for.
        topology: of that run.
        folder: absolute path, with a file that holds `word`.
        word: what tells this folder from another one of the same name.
        nodes: how many are asked.
        origin: who makes it.
    """
    _refuse_secrets(slurm)
    options: dict[str, str | int | bool | None] = {
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
    bare = slurm.model_copy(update={"container": None})
    values = {
        "VERSION": __version__,
        "COMMAND": _comment(origin.command),
        "DIRECTIVES": _directive_lines(options),
        "RUN": shlex.quote(folder),
        "ENVIRONMENT": _environment(topology, bare, origin),
        "BEFORE": _before(slurm),
        "WORD": shlex.quote(word),
        "PYTHON": shlex.quote(origin.python),
    }
    return fill(values, CHECK_SCRIPT)


def _prepare_cpus(topology: Topology, slurm: SlurmSpec) -> int:
    """Threads of one tokenizer; a node without GPUs may have fewer than one with them."""
    return min(cpus_per_node(topology, slurm), RANK_CPUS["cuda"])


def _directive_lines(options: Mapping[str, str | int | bool | None]) -> str:
    said = sorted(name for name, value in options.items() if _is_said(value))
    return "\n".join(_directive(name, options[name]) for name in said)


def _is_said(value: object) -> bool:
    return value is not None and value is not False


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


def warning_seconds(plan: Plan, slurm: SlurmSpec) -> int | None:
    """Seconds before the limit at which the ranks are told; None without a limit."""
    if slurm.time_limit is None:
        return None
    if slurm.warning is not None:
        return seconds(slurm.warning)
    patience = plan.worker.limits["shutdown_timeout_seconds"] + CLOCK_SECONDS
    return min(int(patience), seconds(slurm.time_limit) // 2)


def _warning(plan: Plan, slurm: SlurmSpec) -> str | None:
    ahead = warning_seconds(plan, slurm)
    # B: the batch shell alone, which tells all ranks.
    return None if ahead is None else f"B:USR1@{ahead}"


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


def _environment(topology: Topology, slurm: SlurmSpec, origin: Origin) -> str:
    """`export` lines; what is secret stands in them by its name only."""
    environment = launch_environment(topology, cpus_per_node(topology, slurm))
    if slurm.network_interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = slurm.network_interface
        environment["NCCL_SOCKET_IFNAME"] = slurm.network_interface
    lines = exports(environment)
    container = slurm.container
    if container is None:
        programs = shlex.quote(str(Path(origin.python).parent))
        lines += f'export PATH={programs}:"$PATH"\n'
        lines += f"export PYTHONPATH={shlex.quote(origin.python_path)}\n"
    elif container.runtime == "apptainer":
        # Prefixed like this, apptainer sets them inside; on its argv others could read them.
        for name in sorted(container.environment):
            lines += f'export APPTAINERENV_{name}="${{{name}-}}"\n'
    return lines.rstrip("\n")


def _before(slurm: SlurmSpec) -> str:
    """The user's own lines; those of modules and conda use variables that are not set."""
    return "\n".join(["set +u", *slurm.before, "set -u"]) if slurm.before else ""


def _step(topology: Topology, slurm: SlurmSpec) -> tuple[str, ...]:
    return (
        f"--nodes={topology.nodes}",
        f"--ntasks={topology.nodes}",
        "--ntasks-per-node=1",
        # srun has not inherited it from sbatch since Slurm 22.05.
        f"--cpus-per-task={cpus_per_node(topology, slurm)}",
        "--kill-on-bad-exit=1",
        f"--wait={STRAGGLER_SECONDS}",
    )


def _refuse_unsafe(slurm: SlurmSpec) -> None:
    for name in slurm.directives:
        if name in OWNED:
            raise SpecError(
                "owned_key",
                f"slurm.directives.{name} is set by the plan",
                fix=f"use {OWNED[name]}",
            )
    _refuse_secrets(slurm)
    _refuse_times(slurm)


def _refuse_secrets(slurm: SlurmSpec) -> None:
    """Scripts are read by others: what is secret reaches a job by its variable's name."""
    texts = [*slurm.before, *map(str, slurm.directives.values())]
    found = next((text for text in texts if hide(text, {}) != text), None)
    if found is not None:
        raise SpecError(
            "secret",
            f"{hide(found, {})!r} under slurm holds what looks like a secret",
            why="it would be written into the job script",
            fix="export the variable before sftlaunch; a job inherits the environment",
        )


def _refuse_patterns(run_directory: str) -> None:
    """The job's log lies in the run directory, and Slurm takes its whole path for a pattern."""
    if re.search(r"[%\\]", run_directory):
        raise SpecError(
            "bad_name",
            f"the run directory {run_directory!r} holds a percent sign or a backslash",
            why="Slurm reads them as patterns in file names, and would lose the job's log",
            fix="use --output with another folder",
            source="sbatch(1), filename pattern",
        )


def _refuse_times(slurm: SlurmSpec) -> None:
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
