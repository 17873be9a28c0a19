"""What the commands say and ask of a run in a container."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import click

from launcher.cli.on_hosts import on_hosts, refuse_without_hosts
from launcher.cli.options import Request
from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.plan.make import Planned
from launcher.plan.types import Plan
from launcher.render.docker import Caller, container_name, default_image, docker_argv
from launcher.render.docker_nodes import Nodes
from launcher.runs.directory import RunDirectory
from launcher.spec.schema import Spec

if TYPE_CHECKING:
    from launcher.cli.follow import Ended


def container_caller(planned: Planned, run_directory: str) -> Caller | Nodes:
    """Who the containers run as, and the image that the spec or `image build` names.

    Raises:
        SpecError: hosts that do not match the nodes.
    """
    from launcher.launch import docker

    section, topology = planned.spec.docker, planned.plan.topology
    image = section.image or default_image(topology.device)
    caller = docker.caller(image, planned.plan, run_directory, section.user)
    return on_hosts(planned.spec, run_directory, topology.nodes, caller)


def checked(target: Caller | Nodes, planned: Planned, run: RunDirectory) -> Caller | Nodes:
    """The target with its image's digest, and with what its daemon asks for.

    Raises:
        Refusal: no daemon, no image, another version in it, files not to be read, or what a
            host does not see.
    """
    if isinstance(target, Nodes):
        from launcher.launch.docker_ready import ready

        refuse_without_hosts(target)
        return ready(planned.plan, planned.spec, run, target)
    from launcher.launch.docker import pinned

    return pinned(planned.plan, target)


def run_and_follow(
    plan: Plan,
    run: RunDirectory,
    output: str,
    target: Caller | Nodes,
    before: Mapping[str, bytes] | None,
    *,
    spec: Spec,
    request: Request,
) -> ExitCode:
    """Start the containers, and show the run to its end unless asked not to.

    Args:
        plan: the run's, whose command starts the first container.
        run: whose files are written.
        output: the run directory as people name it.
        target: whose they are.
        before: what was there before this command, for the case that nothing is started.
        spec: resolved.
        request: how to print.
    """
    from launcher.cli.follow import follow
    from launcher.launch import docker

    try:
        attend = _start(plan, run, target, spec)
    except BaseException:
        run.restore(before)
        raise
    if not request.detach:
        return follow(plan, run, output, request.json, attend)
    docker.leave(run)
    click.echo(f"started    container {container_name(str(run.path))}", err=True)
    if request.json:
        click.echo(json.dumps(run.read_status()))
    return ExitCode.DONE


def _start(
    plan: Plan, run: RunDirectory, target: Caller | Nodes, spec: Spec
) -> Callable[..., Ended]:
    """Start the containers; returns what attends them to their end."""
    from launcher.launch import docker, docker_hosts
    from launcher.launch.container_user import make_ready

    if isinstance(target, Nodes):
        argvs = [docker_argv(plan, spec, str(run.path), caller) for caller in target.callers]
        docker_hosts.start(run, target, argvs)
        return partial(docker_hosts.attend, plan, run)
    make_ready(run, target)
    docker.start(run, plan.command)
    return partial(docker.attend, plan, run)


def refuse_in_container(run: RunDirectory) -> None:
    """Refuse to start a run whose container runs.

    Raises:
        EnvironmentNotReady: with how to stop it.
    """
    try:
        running = has_container(run)
    except EnvironmentNotReady:
        return  # a host that is gone must not keep the run from going on elsewhere
    if running:
        raise EnvironmentNotReady(
            "running",
            f"{run.path} is running in a container",
            why="two attempts would overwrite each other",
            fix="wait for its end (sftlaunch status shows it), or stop it: sftlaunch cancel",
        )


def has_container(run: RunDirectory) -> bool:
    """Whether a run is in a container that runs just now."""
    if not run.read_status().get("docker"):
        return False
    from launcher.launch import docker_hosts

    return docker_hosts.any_running(run)


def cancel_container(run: RunDirectory, *, now: bool) -> None:
    """End a run's containers, with a checkpoint unless it must be at once."""
    from launcher.launch import docker, docker_hosts

    daemons = docker_hosts.daemons_of(run)
    if not now:
        docker_hosts.stop(run, daemons, docker.patience(run))
    docker_hosts.remove(run, daemons)
    if now:
        run.update_status(state="failed", error={"message": "cancelled"})
