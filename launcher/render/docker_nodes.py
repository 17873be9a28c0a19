"""A run's Docker files: what starts here, and what is carried to machines without ssh. Pure.

Where the daemons are known, docker.sh starts all containers. For machines that only take a
script or user data there is one docker-node-K.sh each, self-contained, the same as
cloud-init, and a compose file for a single node.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher import __version__
from launcher.assets import asset
from launcher.plan.types import Plan
from launcher.render.docker import (
    SCRIPT,
    Caller,
    container_name,
    docker_argv,
    docker_script,
    local_paths,
    mount,
    other_mounts,
)
from launcher.render.docker_compose import compose_text
from launcher.render.docker_place import Place, client, endpoint, port_of
from launcher.render.quote import shell_block
from launcher.render.torchrun import torchrun_argv
from launcher.spec.schema import Spec

PLACEHOLDER = re.compile(r"^( *)# @([A-Z]+)@$|@([A-Z]+)@", re.MULTILINE)
INFINIBAND = "--device=/dev/infiniband"
# A machine that nobody attends starts a failed container again.
UNATTENDED_RESTARTS = 3
HUB_CACHE = "/cache"
# The image's own user, and the first one of most systems.
ORDINARY_USER = 1000
CHECK_MODULE = "launcher.launch.host_check"
CHECK_FOLDER = "/sftlaunch-check"
CARRIED = re.compile(r"docker-node-\d+\.sh|cloud-init(-\d+)?\.yaml|compose\.yaml")
# What the template itself says.
STARTS = (*client(None), "run", "--detach")
# Stands for the first node's address until the script knows it.
FIRST = "FIRST.NODE"
# What a block of YAML does not hold as it is (YAML 1.2, 5.1 and 5.4).
NOT_IN_YAML = re.compile(
    r"[^\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)


@dataclass(frozen=True)
class Nodes:
    """Who starts each node's container, the first node's first."""

    callers: tuple[Caller, ...]


def docker_files(
    plan: Plan,
    spec: Spec,
    run_directory: str,
    target: Caller | Nodes,
    files: Mapping[str, str],
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Argv that starts the first container, and the files.

    Args:
        plan: decided.
        spec: resolved.
        run_directory: absolute path.
        target: who starts the containers.
        files: what a run directory has besides, as name -> text.
    """
    callers = target.callers if isinstance(target, Nodes) else (target,)
    argvs = [docker_argv(plan, spec, run_directory, caller) for caller in callers]
    places = [caller.place for caller in callers]
    found: dict[str, str] = {}
    if places[0].daemon is not None:
        found[SCRIPT] = hosts_script(argvs, places)
        return argvs[0], found
    if len(callers) == 1:
        found[SCRIPT] = docker_script(argvs[0])
        found["compose.yaml"] = compose_file(argvs[0])
    carried = {**_carried(plan, run_directory), **files}
    for caller in callers:
        rank = caller.place.rank
        script = node_script(plan, spec, run_directory, caller, carried)
        name = container_name(run_directory)
        found[f"docker-node-{rank}.sh"] = script
        last = f"-{rank}" if len(callers) > 1 else ""
        found[f"cloud-init{last}.yaml"] = cloud_init(script, name, caller.place)
    return argvs[0], found


def first_script(files: Mapping[str, str]) -> str:
    """Name of the script that is shown: the one that starts all, or the first node's."""
    return SCRIPT if SCRIPT in files else "docker-node-0.sh"


def carried_files(files: Mapping[str, str]) -> tuple[str, ...]:
    """Names of what is there to be carried to a machine, beside the script that is shown."""
    return tuple(
        name
        for name in files
        if CARRIED.fullmatch(name) is not None and name != first_script(files)
    )


def places_of(spec: Spec, run_directory: str, nodes: int) -> tuple[Place, ...]:
    """Each node's place, as far as the spec says it; addresses of hosts are looked up later."""
    docker = spec.docker
    port = docker.port or port_of(run_directory)
    addresses = docker.addresses or [""] * nodes
    first = addresses[0] or FIRST
    return tuple(
        Place(
            rank=rank,
            nodes=nodes,
            address=addresses[rank],
            # The first node finds its own address by itself.
            endpoint=endpoint(addresses[0], port) if rank == 0 else endpoint(first, port),
        )
        for rank in range(nodes)
    )


def check_argv(plan: Plan, spec: Spec, folder: str, token: str, caller: Caller) -> tuple[str, ...]:
    """Argv that looks at a host from within a container, with the run's mounts and network.

    Args:
        plan: decided.
        spec: resolved.
        folder: of this machine, in which the token is looked for.
        token: name of a file.
        caller: of the run, with the user that looks.
    """
    place = caller.place
    rendezvous: tuple[str, ...] = ()
    if place.nodes > 1:
        host, port = place.host_and_port
        rendezvous = (f"--first={host}", *([f"--port={port}"] if place.rank == 0 else []))
    return (
        *client(place.daemon),
        "run",
        "--rm",
        *place.options(),
        f"--user={caller.user}:{caller.group}",
        *caller.daemon,
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        f"--mount={mount(folder, CHECK_FOLDER, read_only=True)}",
        *(f"--mount={value}" for value in other_mounts(plan, spec, folder, caller)),
        "--entrypoint=python",
        caller.image,
        "-m",
        CHECK_MODULE,
        f"--folder={CHECK_FOLDER}",
        f"--token={token}",
        *rendezvous,
    )


def hosts_script(argvs: list[tuple[str, ...]], places: list[Place]) -> str:
    """docker.sh for daemons on other machines: what ran, to read and to run by hand."""
    name = next(a.partition("=")[2] for a in argvs[0] if a.startswith("--name="))
    lines = [
        "#!/usr/bin/env bash",
        f"# Made by sftlaunch {__version__}. Starts the run's containers in the background, one a"
        " node.",
        "set -euo pipefail",
    ]
    for argv, place in zip(argvs, places, strict=True):
        docker = shell_line_of(place)
        lines += [
            "",
            f"# Node {place.rank}. Follow: {docker} logs -f {name}",
            f"{docker} rm {name} >/dev/null 2>&1 || true",
            shell_block(argv),
        ]
    return "\n".join(lines) + "\n"


def shell_line_of(place: Place) -> str:
    """Docker's client for a place, as a shell reads it."""
    return shlex.join(client(place.daemon))


def _carried(plan: Plan, run_directory: str) -> dict[str, str]:
    """plan.json for a machine without the launcher: what its ranks read, without the files."""
    name = run_directory.rpartition("/")[2]
    argv = torchrun_argv(plan.topology, plan.worker.limits, run_directory, name)
    alone = dataclasses.replace(plan, command=argv, files={})
    return {"plan.json": json.dumps(dataclasses.asdict(alone), separators=(",", ":")) + "\n"}


def node_script(
    plan: Plan, spec: Spec, run_directory: str, caller: Caller, files: Mapping[str, str]
) -> str:
    """One node's script, with everything in it."""
    docker = spec.docker.model_copy(
        update={"restarts": spec.docker.restarts or UNATTENDED_RESTARTS}
    )
    unattended = spec.model_copy(update={"docker": docker})
    # What lies on this machine says nothing about that one.
    there = dataclasses.replace(caller, caches=(), devices=(), groups=())
    argv = docker_argv(plan, unattended, run_directory, there)
    user, _, group = (spec.docker.user or str(ORDINARY_USER)).partition(":")
    place, first = caller.place, spec.docker.addresses[0] if spec.docker.addresses else ""
    values = {
        "VERSION": __version__,
        "RANK": str(place.rank),
        "NODES": str(place.nodes),
        "NAME": container_name(run_directory),
        "RUN": shlex.quote(run_directory),
        "IMAGE": shlex.quote(caller.image),
        "FIRST": first,
        "INPUTS": " ".join(shlex.quote(path) for path in local_paths(plan)),
        "USER": user,
        "GROUP": group or user,
        "HUB": " ".join(_hub(spec)),
        "FILES": "\n".join(_heredoc(name, text) for name, text in files.items()),
        "DEVICES": INFINIBAND if plan.topology.device == "cuda" else "",
        "OPTIONS": " \\\n  ".join(_words(argv, there)),
    }
    return fill("node.sh", values)


def _words(argv: tuple[str, ...], caller: Caller) -> Iterator[str]:
    """The argv for bash; what only the node knows stands as a variable of the script."""
    known = {
        caller.image: '"$image"',
        f"--user={caller.user}:{caller.group}": '"--user=$user:$group"',
        f"--hostname={caller.host}": '"--hostname=$(uname -n)"',
        f"--endpoint={caller.place.endpoint}": shlex.quote(
            f"--endpoint={caller.place.endpoint}"
        ).replace(FIRST, '"$first"'),
    }
    for word in argv[len(STARTS) :]:
        yield known.get(word) or shlex.quote(word)


def _hub(spec: Spec) -> Iterator[str]:
    """The Hub's cache, kept on the node, where a model or rows come from there."""
    named = (spec.model.path, spec.dataset.path if spec.dataset else "/")
    if not all(name.startswith("/") for name in named):
        yield f'"--mount=type=bind,source=$cache,target={HUB_CACHE}"'
        yield f"--env=HF_HOME={HUB_CACHE}"


def _heredoc(name: str, text: str) -> str:
    """Bash that writes one file of the run."""
    mark = "END"
    while mark in text.splitlines():
        mark += "_"
    return f"write {shlex.quote(name)} <<'{mark}'\n{text}{mark}"


def cloud_init(script: str, name: str, place: Place) -> str:
    """User data for a machine that starts one node's script at each boot."""
    values = {
        "VERSION": __version__,
        "RANK": str(place.rank),
        "NODES": str(place.nodes),
        "NAME": name,
        "SCRIPT": _yaml_content(script),
    }
    return fill("cloud-init.yaml", values)


def _yaml_content(text: str) -> str:
    """`content` of a file, readable where YAML can hold it as it is."""
    if NOT_IN_YAML.search(text):
        packed = base64.b64encode(text.encode()).decode()
        return f"encoding: b64\ncontent: {packed}"
    lines = "\n".join(f"  {line}" if line else "" for line in text.split("\n")[:-1])
    return f"content: |\n{lines}"


def compose_file(argv: tuple[str, ...]) -> str:
    """compose.yaml: the same container for `docker compose`."""
    return fill("compose.yaml", {"VERSION": __version__, "COMPOSE": compose_text(argv)})


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template of docker/ with its placeholders replaced; one on its own line keeps indent."""

    def value(found: re.Match[str]) -> str:
        if found[2] is None:
            return values[found[3]]
        return "\n".join(
            f"{found[1]}{line}" if line else "" for line in values[found[2]].split("\n")
        )

    # One pass: a value that looks like a placeholder stays what it is.
    return PLACEHOLDER.sub(value, asset("docker", template).read_text(encoding="utf-8"))
