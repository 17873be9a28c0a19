"""Plan -> `docker run`: the argv, and docker.sh to read and to run by hand. Pure.

The run directory, and a model and data that lie in the file system, are mounted under the
very paths that they have outside, so that the plan's paths hold inside.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import __version__
from launcher.plan.types import Plan
from launcher.render.docker_place import HERE, Place, client
from launcher.render.quote import shell_block
from launcher.spec.schema import Spec, split_mount

SCRIPT = "docker.sh"
REPOSITORY = "sftlaunch"
CPU_BASE = "debian:bookworm-slim"
RUN_LABEL = "sftlaunch.run"
VERSION_LABEL = "org.opencontainers.image.version"
INTERPRETER = "python"
MODULE = "launcher.launch.inside"
GIB = 2**30
# Shared memory of a rank: NCCL's and gloo's buffers, beside what its loader workers hold.
RANK_SHARED_BYTES = GIB // 2
# Columns of a tokenised batch (input_ids, labels, attention_mask), eight bytes a token.
TOKEN_BYTES = 3 * 8
PREFETCH_FACTOR = 2
# Docker's own grace ends with SIGKILL: the launcher inside has to write down how it ended.
STOP_MARGIN_SECONDS = 30
GPU_LIMITS = ("--ulimit=memlock=-1", "--ulimit=stack=67108864")
LOG_OPTIONS = ("--log-opt=max-size=10m", "--log-opt=max-file=3")
UNSAFE_NAME = re.compile(r"[^a-zA-Z0-9_.-]+")
# What a run on this machine would take from its environment; not passed where it is unset.
PASSED = (
    "COMET_API_KEY",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "MLFLOW_TRACKING_URI",
    "WANDB_API_KEY",
    "WANDB_MODE",
    "WANDB_PROJECT",
)


@dataclass(frozen=True)
class Cache:
    """A folder of models and data that were fetched, and the variable that names it."""

    path: str
    variable: str
    writable: bool = True


@dataclass(frozen=True)
class Caller:
    """Who starts the container, and with what, as the machine says."""

    image: str
    """By digest where it has one: what a name means may change."""
    user: int
    group: int
    host: str
    """The container has its host's name: a run's record says which machine runs it."""
    caches: tuple[Cache, ...] = ()
    devices: tuple[str, ...] = ()
    """InfiniBand and the like."""
    groups: tuple[int, ...] = ()
    """Further groups of the user."""
    daemon: tuple[str, ...] = ()
    """Options without which this daemon's containers could not write the run directory."""
    place: Place = HERE
    """Which daemon is asked, and the container's part among several nodes."""


def container_name(run_directory: str) -> str:
    """One name for one run directory, that Docker takes; a second container cannot take it."""
    readable = UNSAFE_NAME.sub("-", Path(run_directory).name).strip("-.")[:40] or "run"
    return f"sftlaunch-{readable}-{hashlib.sha256(run_directory.encode()).hexdigest()[:8]}"


def default_image(device: str) -> str:
    """The image that `image build` makes."""
    return f"{REPOSITORY}:{__version__}{'-cpu' if device == 'cpu' else ''}"


def docker_argv(plan: Plan, spec: Spec, run_directory: str, caller: Caller) -> tuple[str, ...]:
    """Argv that starts a run's container in the background; it prints the container's id.

    Args:
        plan: decided.
        spec: resolved.
        run_directory: absolute path, written before.
        caller: whose files and processes they are.
    """
    docker = spec.docker
    return (
        *client(caller.place.daemon),
        "run",
        "--detach",
        f"--name={container_name(run_directory)}",
        f"--label={RUN_LABEL}={run_directory}",
        f"--hostname={caller.host}",
        *caller.place.options(),
        *((f"--restart=on-failure:{docker.restarts}",) if docker.restarts else ()),
        *_limits(plan),
        *_rights(caller),
        *_devices(plan, caller),
        f"--mount={mount(run_directory, run_directory)}",
        *(f"--mount={m}" for m in other_mounts(plan, spec, run_directory, caller)),
        # By name: their values never stand in an argv or a file.
        *(f"--env={name}" for name in sorted({*docker.environment, *PASSED})),
        *(f"--env={cache.variable}={cache.path}" for cache in caller.caches),
        f"--env=SFTLAUNCH_RUN_DIRECTORY={run_directory}",
        f"--workdir={run_directory}",
        f"--entrypoint={INTERPRETER}",
        *LOG_OPTIONS,
        caller.image,
        "-m",
        *(caller.place.arguments() or (MODULE,)),
        run_directory,
    )


def stop_seconds(plan: Plan) -> int:
    """How long Docker waits between SIGTERM and SIGKILL: the ranks' patience and a margin."""
    return int(plan.worker.limits["shutdown_timeout_seconds"]) + STOP_MARGIN_SECONDS


def shared_memory_bytes(plan: Plan) -> int:
    """Upper bound of /dev/shm: what all ranks' data loaders and collectives hold there.

    A bound, not a reservation; Docker's own default of 64 MiB fails data-loader workers.
    """
    arguments = plan.worker.training_arguments
    workers = int(arguments.get("dataloader_num_workers") or 0)
    tokens = plan.batch.micro_batch_size * int(arguments.get("max_length") or 0)
    loader = workers * PREFETCH_FACTOR * tokens * TOKEN_BYTES
    needed = plan.topology.gpus_per_node * (RANK_SHARED_BYTES + loader)
    return -(-needed // GIB) * GIB


def _limits(plan: Plan) -> tuple[str, ...]:
    return (
        # Reaps what ranks leave behind, and passes signals on.
        "--init",
        f"--stop-timeout={stop_seconds(plan)}",
        f"--shm-size={shared_memory_bytes(plan)}",
        # What NCCL pins; a daemon without the right to raise them refuses the container.
        *(GPU_LIMITS if plan.topology.device == "cuda" else ()),
    )


def _rights(caller: Caller) -> tuple[str, ...]:
    return (
        f"--user={caller.user}:{caller.group}",
        *(f"--group-add={group}" for group in caller.groups),
        *caller.daemon,
        "--read-only",
        # Extensions are built and loaded there; nothing else can be written but the run.
        "--tmpfs=/tmp:exec,mode=1777",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
    )


def _devices(plan: Plan, caller: Caller) -> tuple[str, ...]:
    if plan.topology.device != "cuda":
        return ()
    return (f"--gpus={plan.topology.gpus_per_node}", *(f"--device={d}" for d in caller.devices))


def local_paths(plan: Plan) -> tuple[str, ...]:
    """A model, data and another run's checkpoint that lie in the file system."""
    data = plan.worker.dataset or {}
    sources = (source["path"] for source in data.get("sources") or ())
    named = (plan.worker.model["path"], data.get("path"), data.get("eval_path"), *sources)
    local = (p for p in (*named, plan.worker.resume_from) if p and p.startswith("/"))
    return tuple(dict.fromkeys(local))


def other_mounts(plan: Plan, spec: Spec, run_directory: str, caller: Caller) -> Iterable[str]:
    """Values of `--mount` beside the run's; Docker refuses them where the source is missing."""
    folders = dict.fromkeys(local_paths(plan), False)
    folders |= {cache.path: cache.writable for cache in caller.caches}
    for path, writable in folders.items():
        if not Path(path).is_relative_to(run_directory):
            yield mount(path, path, read_only=not writable)
    for said in spec.docker.mounts:
        source, target, read_only = split_mount(said)
        yield mount(source, target, read_only=read_only)


def mount(source: str, target: str, *, read_only: bool = False) -> str:
    """One value, as Docker's CSV reader takes it back: commas and quotes in paths hold."""
    fields = ["type=bind", f"source={source}", f"target={target}"]
    fields += ["readonly"] if read_only else []
    line = io.StringIO()
    csv.writer(line).writerow(fields)
    return line.getvalue().removesuffix("\r\n")


def image_build_argv(
    name: str,
    context: str,
    *,
    cpu: bool,
    base: str | None,
    revision: str,
    secrets: Mapping[str, str],
) -> list[str]:
    """Argv that builds the image.

    Args:
        name: of the image.
        context: folder with the sources.
        cpu: whether it is for CPUs: a plain Debian, and no CUDA libraries in it.
        base: base image; by `cpu` without it.
        revision: commit of the sources.
        secrets: files that the build may see, by id; none of them reaches a layer.
    """
    arguments = {"VERSION": __version__, "REVISION": revision}
    if cpu:
        arguments |= {"BASE": CPU_BASE, "DEVICE": "cpu"}
    if base is not None:
        arguments["BASE"] = base
    return [
        "docker",
        "build",
        f"--file={context}/docker/Dockerfile",
        f"--tag={name}",
        *(f"--build-arg={key}={value}" for key, value in sorted(arguments.items())),
        *(f"--secret=id={key},src={path}" for key, path in sorted(secrets.items())),
        context,
    ]


def docker_script(argv: tuple[str, ...]) -> str:
    """docker.sh: what ran, to read and to run by hand."""
    name = next(a.partition("=")[2] for a in argv if a.startswith("--name="))
    return (
        "#!/usr/bin/env bash\n"
        f"# Made by sftlaunch {__version__}. Starts the run's container in the background.\n"
        f"# Follow: docker logs -f {name}\n"
        f"# Stop with a checkpoint: docker stop {name}\n"
        f"# Remove what has ended: docker rm {name}\n"
        "set -euo pipefail\n"
        f"docker rm {name} >/dev/null 2>&1 || true\n"
        f"exec {shell_block(argv)}\n"
    )
