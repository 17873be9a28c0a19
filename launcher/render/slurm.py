"""job.sbatch: a plan as a Slurm job. The one place that fills the templates.

The text is pure: nothing is asked of a cluster here. Values are quoted for bash in the
body, and for sbatch, which has rules of its own, in the `#SBATCH` lines
(`launcher.render.sbatch`).
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
from launcher.render.sbatch import (
    check_directives,
    cpus_per_node,
    directives,
    prepare_cpus,
    prepare_directives,
    refuse_owned,
    refuse_patterns,
    refuse_times,
)
from launcher.render.secrets import hide
from launcher.render.slurm_container import container_argv
from launcher.render.torchrun import launch_environment, rank_options
from launcher.spec.schema import SlurmSpec, Spec

SCRIPT = "job.sbatch"
PREPARE_SCRIPT = "prepare.sbatch"
CHECK_SCRIPT = "check.sbatch"
# Seconds that srun waits for the other nodes once one node's ranks have ended.
STRAGGLER_SECONDS = 60
# What the shell in front of torchrun sends it, once (job.sbatch).
TOLD_BY = "SIGUSR2"
PLACEHOLDER = re.compile(r"^# @([A-Z]+)@$|@([A-Z]+)@", re.MULTILINE)


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
    refuse_owned(spec.slurm)
    _refuse_secrets(spec.slurm)
    refuse_times(spec.slurm)
    refuse_patterns(run_directory)
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
        "CPUS": str(prepare_cpus(plan.topology, spec.slurm)),
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
    bare = slurm.model_copy(update={"container": None})
    values = {
        "VERSION": __version__,
        "COMMAND": _comment(origin.command),
        "DIRECTIVES": check_directives(slurm, folder, nodes),
        "RUN": shlex.quote(folder),
        "ENVIRONMENT": _environment(topology, bare, origin),
        "BEFORE": _before(slurm),
        "WORD": shlex.quote(word),
        "PYTHON": shlex.quote(origin.python),
    }
    return fill(values, CHECK_SCRIPT)


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
