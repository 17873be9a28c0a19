"""Containers on Slurm: what stands between srun's options and the ranks' command."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import assert_never

from launcher.errors import SpecError
from launcher.plan.types import Plan
from launcher.spec.schema import ContainerSpec, Spec


def container_argv(plan: Plan, spec: Spec, run_directory: str) -> tuple[str, ...]:
    """What stands between srun's options and the ranks' command."""
    container = spec.slurm.container
    if container is None:
        return ()
    own = (run_directory, *own_paths(spec))
    refuse_unmountable(own, container)
    mounts = (*(f"{path}:{path}" for path in own), *container.mounts)
    workdir = container.workdir or run_directory
    match container.runtime:
        case "pyxis":
            return _pyxis(container, mounts, workdir)
        case "apptainer":
            return _apptainer(container, mounts, workdir, plan.topology.device)
        case never:
            assert_never(never)


def _pyxis(container: ContainerSpec, mounts: Iterable[str], workdir: str) -> tuple[str, ...]:
    names = ",".join(container.environment)
    return (
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={workdir}",
        # The image's own value would win otherwise.
        *([f"--container-env={names}"] if names else []),
    )


def _apptainer(
    container: ContainerSpec, mounts: Iterable[str], workdir: str, device: str
) -> tuple[str, ...]:
    return (
        "apptainer",
        "exec",
        *(["--nv"] if device == "cuda" else []),
        *(f"--bind={mount}" for mount in mounts),
        f"--pwd={workdir}",
        container.image,
    )


def own_paths(spec: Spec) -> tuple[str, ...]:
    """A model and data that lie in the file system."""
    data = spec.dataset
    named = (spec.model.path, *(data.places() if data else ()))
    local = [path for path in named if path and path.startswith("/")]
    return tuple(dict.fromkeys(local))


def refuse_unmountable(own: Iterable[str], container: ContainerSpec) -> None:
    """Refuse paths that a container runtime would take apart.

    Raises:
        SpecError: with the first of them.
    """
    wrong = [path for path in own if re.search(r"[:,]", path)]
    wrong += [mount for mount in container.mounts if "," in mount]
    if wrong:
        raise SpecError(
            "bad_name",
            f"{wrong[0]!r} cannot be mounted",
            why="container runtimes separate mounts by commas, and their parts by colons",
            fix="use a path without them",
        )
