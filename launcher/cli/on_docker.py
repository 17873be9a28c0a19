"""What the commands say and ask of a run in a container."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial

import click

from launcher.cli.options import Request
from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.plan.make import Planned
from launcher.plan.types import Plan
from launcher.render.docker import Caller, container_name, default_image, local_paths
from launcher.runs.directory import RunDirectory


def container_caller(planned: Planned, run_directory: str) -> Caller:
    """Who the container runs as, and the image that the spec or `image build` names.

    Raises:
        EnvironmentNotReady: for what this version does not do.
    """
    if planned.spec.docker.hosts or planned.plan.topology.nodes > 1:
        raise EnvironmentNotReady(
            "target",
            "several Docker hosts are not in this version",
            fix="use one node, or --on slurm",
        )
    from launcher.launch import docker

    section, device = planned.spec.docker, planned.plan.topology.device
    image = section.image or default_image(device)
    return docker.caller(image, planned.plan, run_directory, section.user)


def pinned(caller: Caller, plan: Plan) -> Caller:
    """The caller with its image's digest, and with what the daemon asks for.

    Raises:
        EnvironmentNotReady: no daemon, no image, another version in it, files not to be read.
    """
    from launcher.launch import docker
    from launcher.launch.container_user import refuse_unreadable

    image = docker.check(plan, caller.image)
    found = docker.as_daemon_has_it(dataclasses.replace(caller, image=image))
    if found.user != os.getuid():
        refuse_unreadable(local_paths(plan), found.user, (found.group, *found.groups))
    return found


def run_and_follow(
    plan: Plan,
    run: RunDirectory,
    output: str,
    caller: Caller,
    before: Mapping[str, bytes] | None,
    request: Request,
) -> ExitCode:
    """Start the container, and show the run to its end unless asked not to.

    Args:
        plan: the run's, whose command starts the container.
        run: whose files are written.
        output: the run directory as people name it.
        caller: whose it is.
        before: what was there before this command, for the case that nothing is started.
        request: how to print.
    """
    from launcher.cli.follow import follow
    from launcher.launch import docker
    from launcher.launch.container_user import make_ready

    try:
        make_ready(run, caller)
        docker.start(run, plan.command)
    except BaseException:
        run.restore(before)
        raise
    if not request.detach:
        return follow(plan, run, output, request.json, partial(docker.attend, plan, run))
    docker.leave(run)
    click.echo(f"started    container {container_name(str(run.path))}", err=True)
    if request.json:
        click.echo(json.dumps(run.read_status()))
    return ExitCode.DONE


def has_container(run: RunDirectory) -> bool:
    """Whether a run is in a container that runs just now."""
    if not run.read_status().get("docker"):
        return False
    from launcher.launch import docker

    container = docker.look(run)
    return container is not None and container.running


def cancel_container(run: RunDirectory, *, now: bool) -> None:
    """End a run's container, with a checkpoint unless it must be at once."""
    from launcher.launch import docker

    if not now:
        docker.stop(run, docker.patience(run))
    docker.remove(run)
    if now:
        run.update_status(state="failed", error={"message": "cancelled"})
