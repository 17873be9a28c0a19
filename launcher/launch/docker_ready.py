"""What every Docker host of a run is asked before anything of the run is written.

No file is sent to a host: a run directory, a model and rows lie where all of them see them
under the same path. A container with the run's own mounts and network looks at that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import EnvironmentNotReady, SpecError
from launcher.launch import docker
from launcher.launch.docker_client import each, naming, no_daemon
from launcher.plan.types import Plan
from launcher.render.docker import Caller
from launcher.render.docker_nodes import Nodes, check_argv
from launcher.render.docker_place import client
from launcher.runs.directory import RunDirectory
from launcher.spec.schema import Spec

CHECK_SECONDS = 60
REVISION_LABEL = "org.opencontainers.image.revision"


def ready(plan: Plan, spec: Spec, run: RunDirectory, nodes: Nodes) -> Nodes:
    """Refuse what one of the hosts could not run; nothing of the run is written yet.

    Returns:
        The same, images by digest, with each host's InfiniBand devices.

    Raises:
        SpecError: one daemon under two names.
        EnvironmentNotReady: a host that does not answer, has no such image, does not see the
            files, or a first host whose port is in use.
    """
    callers = nodes.callers
    _refuse_same(callers, each(_identity, callers))
    pinned = each(lambda caller: _pinned(plan, caller), callers)
    _refuse_builds(callers, each(_revision, pinned))
    with _token(run.path) as (folder, token):
        found = each(lambda caller: _look_inside(plan, spec, caller, folder, token), pinned)
    return Nodes(
        tuple(
            _judged(plan, run, caller, seen, token)
            for caller, seen in zip(pinned, found, strict=True)
        )
    )


def _identity(caller: Caller) -> str:
    """What tells one daemon from another.

    Copies of a machine may have one id, and so have two daemons of one machine (Docker 20.10).
    """
    daemon = caller.place.daemon
    # `info` says of a daemon that is not there nothing but that it has no fields.
    for argv in (
        ("version", "--format={{.Server.Version}}"),
        ("info", "--format={{.ID}} {{.Name}} {{.DockerRootDir}}"),
    ):
        done = docker.ask([*client(daemon), *argv])
        if done.returncode or not done.stdout.strip():
            raise no_daemon(done.args, done.stderr)
    return done.stdout.strip()


def _refuse_same(callers: Sequence[Caller], identities: Sequence[str]) -> None:
    for number, identity in enumerate(identities):
        first = identities.index(identity)
        if first < number:
            raise SpecError(
                "docker_hosts",
                f"{callers[first].place.daemon} and {callers[number].place.daemon} are the same "
                "Docker daemon",
                why="each node needs a machine of its own",
                fix="name another host, or use --nodes 1 with all its GPUs",
            )


def _pinned(plan: Plan, caller: Caller) -> Caller:
    daemon = caller.place.daemon
    bring = (
        f"docker save {caller.image} | docker --host {daemon} load; or sftlaunch image build "
        "--push NAME, and set docker.image"
    )
    with naming(daemon, {"no_image": bring, "image_version": bring}):
        return docker.pinned(plan, caller)


def _revision(caller: Caller) -> str:
    form = f'{{{{index .Config.Labels "{REVISION_LABEL}"}}}}'
    argv = [*client(caller.place.daemon), "image", "inspect", f"--format={form}", caller.image]
    return docker.ask(argv).stdout.strip()


def _refuse_builds(callers: Sequence[Caller], revisions: Sequence[str]) -> None:
    for caller, revision in zip(callers, revisions, strict=True):
        if revision != revisions[0]:
            first, other = callers[0].place.daemon, caller.place.daemon
            raise EnvironmentNotReady(
                "image_version",
                f"the image of {other} was built from revision {revision}, that of {first} from "
                f"{revisions[0]}",
                why="all nodes run the same code",
                fix=f"docker --host {first} save {caller.image} | docker --host {other} load",
            )


@contextlib.contextmanager
def _token(path: Path) -> Iterator[tuple[Path, str]]:
    """A file in the nearest folder that there is, which the hosts must see; gone afterwards."""
    folder = next(there for there in (path, *path.parents) if there.is_dir())
    try:
        file = tempfile.NamedTemporaryFile("w", dir=folder, prefix=".sftlaunch-")  # noqa: SIM115
    except OSError as error:
        raise SpecError(
            "output_unwritable",
            f"{folder} cannot be written: {error.strerror}",
            fix="use --output with a folder that you may write",
        ) from None
    with file:
        name = Path(file.name).name
        file.write(name)
        file.flush()
        Path(file.name).chmod(0o644)
        yield folder, name


def _look_inside(
    plan: Plan, spec: Spec, caller: Caller, folder: Path, token: str
) -> dict[str, Any] | None:
    """What a container on a host sees; None where the folder is not even there."""
    daemon, owner = caller.place.daemon, folder.stat()
    # The folder's owner can look into it, whoever the run's own user is.
    asks = dataclasses.replace(caller, user=owner.st_uid, group=owner.st_gid, caches=())
    done = docker.ask(check_argv(plan, spec, str(folder), token, asks), CHECK_SECONDS)
    if done.returncode and f"path does not exist: {folder}" in done.stderr:
        return None
    with naming(daemon, {"mount_missing": "copy it there under the same path"}):
        if done.returncode:
            raise docker.refused(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _judged(
    plan: Plan, run: RunDirectory, caller: Caller, seen: dict[str, Any] | None, token: str
) -> Caller:
    """The caller with its devices.

    Raises:
        EnvironmentNotReady: for what its host lacks.
    """
    place = caller.place
    if seen is None or seen["token"] != token:
        raise _not_seen(plan, run, place.daemon)
    if seen["port"] is not None:
        raise EnvironmentNotReady(
            "port_in_use",
            f"Docker host {place.daemon}: port {place.port} of the rendezvous cannot be used",
            why=seen["port"],
            fix="end what uses it (ss -ltnp shows it), or use --set docker.port=NUMBER",
        )
    if not seen["resolves"]:
        raise EnvironmentNotReady(
            "address",
            f"Docker host {place.daemon}: the first node's name in {place.endpoint} is not known "
            "there",
            fix="set docker.addresses to addresses by which the hosts reach each other, one a node",
        )
    infiniband = seen["infiniband"] and plan.topology.device == "cuda"
    devices = (str(docker.INFINIBAND),) if infiniband else ()
    return dataclasses.replace(caller, devices=devices)


def _not_seen(plan: Plan, run: RunDirectory, daemon: str | None) -> EnvironmentNotReady:
    what = f"Docker host {daemon} does not see the run directory {run.path} of this machine"
    if plan.topology.nodes > 1:
        fix = "use --output on a file system that this machine and all hosts mount at the same path"
    else:
        fix = (
            "mount the host's folder here under the same path (sshfs USER@HOST:/runs /runs) and "
            "use --output there, or start docker-node-0.sh of sftlaunch plan --on docker --json "
            "on the host itself"
        )
    why = "no file is sent to a host: the ranks read and write that very folder"
    return EnvironmentNotReady("not_shared", what, why=why, fix=fix)
