"""What the commands say and ask of a run in a container."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial

import click

from launcher.cli.options import Request
from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.plan.make import Planned
from launcher.plan.types import Plan
from launcher.render.docker import Caller, container_name, default_image
from launcher.runs.directory import RunDirectory


def container_caller(planned: Planned) -> Caller:
    """This user, and the image that the spec names or that `image build` makes.

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

    device = planned.plan.topology.device
    return docker.caller(planned.spec.docker.image or default_image(device))


def pinned(caller: Caller, plan: Plan) -> Caller:
    """The caller with its image's digest.

    Raises:
        EnvironmentNotReady: no daemon, no image, another version in it.
    """
    from launcher.launch import docker

    return dataclasses.replace(caller, image=docker.check(plan, caller.image))


def run_and_follow(
    plan: Plan,
    run: RunDirectory,
    output: str,
    argv: tuple[str, ...],
    before: Mapping[str, bytes] | None,
    request: Request,
) -> ExitCode:
    """Start the container, and show the run to its end unless asked not to.

    Args:
        plan: the run's.
        run: whose files are written.
        output: the run directory as people name it.
        argv: starts the container.
        before: what was there before this command, for the case that nothing is started.
        request: how to print.
    """
    from launcher.cli.follow import follow
    from launcher.launch import docker

    try:
        docker.start(run, argv)
    except BaseException:
        run.restore(before)
        raise
    if not request.detach:
        return follow(plan, run, output, request.json, partial(docker.attend, plan, run))
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
