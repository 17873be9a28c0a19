"""Effects on a Docker daemon: check, start, look, stop. What is decided, is decided elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.launch.docker_client import answer, last_line, no_daemon
from launcher.launch.local import StopSignals, outcome
from launcher.plan.types import Plan, plan_from_json
from launcher.render.docker import VERSION_LABEL, Caller, container_name, stop_seconds
from launcher.render.docker_place import client
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import Failure

ANSWER_SECONDS = 20
START_SECONDS = 300
POLL_SECONDS = 0.5
INFINIBAND = Path("/dev/infiniband")
# What Docker says -> code, what, fix. First match wins; sources: moby's own messages.
REFUSALS = (
    (
        "could not select device driver",
        "no_nvidia_runtime",
        "Docker cannot give GPUs to containers",
        "install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker, "
        "and restart Docker",
    ),
    (
        "bind source path does not exist",
        "mount_missing",
        "a mount's source does not exist where the Docker daemon runs",
        "correct docker.mounts, or put the folder there",
    ),
    (
        "is already in use by container",
        "running",
        "another container of this run is there",
        "stop it: sftlaunch cancel",
    ),
    (
        "no space left on device",
        "disk_space",
        "the Docker daemon's disk is full",
        "make room: docker system df shows what takes it",
    ),
    (
        "port is already allocated",
        "port_in_use",
        "a port that the container asks for is in use",
        "stop what uses it, or take the port out of docker.mounts",
    ),
)


@dataclass(frozen=True)
class Container:
    """A container as the daemon knows it."""

    identity: str
    running: bool
    exit_code: int


def caller(image: str) -> Caller:
    """This process's user, its caches of models and data, and its fast network devices."""
    devices = (str(INFINIBAND),) if INFINIBAND.is_dir() else ()
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    caches = (str(home),) if home.is_dir() else ()
    return Caller(image, os.getuid(), os.getgid(), socket.gethostname(), caches, devices)


def ask(
    argv: Sequence[str], limit_seconds: int = ANSWER_SECONDS
) -> subprocess.CompletedProcess[str]:
    """What the Docker client says.

    Raises:
        EnvironmentNotReady: where there is none, or its daemon does not answer.
    """
    if shutil.which("docker") is None:
        raise EnvironmentNotReady(
            "no_docker",
            "there is no docker on this machine",
            fix="install Docker, or use --on local",
        )
    try:
        done = answer(argv, limit_seconds)
    except subprocess.TimeoutExpired:
        raise no_daemon(argv, f"no answer within {limit_seconds} s") from None
    text = done.stderr.lower()
    if "permission denied" in text and "socket" in text:
        raise EnvironmentNotReady(
            "docker_permission",
            "this user may not talk to the Docker daemon",
            fix="have an administrator add you to the group docker, or use rootless Docker",
        )
    if done.returncode and ("cannot connect" in text or "error during connect" in text):
        raise no_daemon(argv, last_line(done.stderr))
    return done


def check(plan: Plan, image: str, daemon: str | None = None) -> str:
    """Refuse what the daemon would not start; the image by its content.

    Returns:
        The image with a digest or identity that cannot change under the run.

    Raises:
        EnvironmentNotReady: no daemon, no image, or another version of this package in it.
    """
    done = ask([*client(daemon), "image", "inspect", image])
    if done.returncode:
        cpu = "--cpu " if plan.topology.device == "cpu" else ""
        raise EnvironmentNotReady(
            "no_image",
            f"the image {image} is not here",
            why=last_line(done.stderr),
            fix=f"build it (sftlaunch image build {cpu}), fetch it (docker pull {image}), or "
            "set docker.image",
        )
    found: dict[str, Any] = json.loads(done.stdout)[0]
    version = (found["Config"].get("Labels") or {}).get(VERSION_LABEL)
    if version != __version__:
        raise EnvironmentNotReady(
            "image_version",
            f"the image {image} holds sftlaunch {version or 'of no version'}, this is "
            f"{__version__}",
            why="the run would not be the one that was planned",
            fix="build it again: sftlaunch image build",
        )
    digests: list[str] = found.get("RepoDigests") or []
    return digests[0] if digests else str(found["Id"])


def start(run: RunDirectory, argv: Sequence[str], daemon: str | None = None) -> str:
    """Start a run's container, and record it.

    Returns:
        The container's id.

    Raises:
        EnvironmentNotReady: as Docker refuses; nothing is left behind then.
    """
    remove(run, daemon)  # what an earlier attempt has left
    done = ask(argv, START_SECONDS)
    if done.returncode:
        remove(run, daemon)
        raise refused(done.stderr)
    identity = done.stdout.strip()
    run.update_status(state="running", stage="starting", docker={"container": identity})
    return identity


def attend(
    plan: Plan, run: RunDirectory, on_poll: Callable[[], None]
) -> tuple[ExitCode, Failure | None]:
    """Watch a run's container to its end, and remove it.

    Args:
        plan: the run's.
        run: whose container was started.
        on_poll: called about twice a second.

    Returns:
        DONE, RUN_FAILED with the first failing rank's error, or PREEMPTED.
    """
    with StopSignals() as stopping:
        try:
            code = _watch(run, stopping, stop_seconds(plan), on_poll)
        finally:
            remove(run)
    on_poll()
    return outcome(run, code, stopped=stopping.asked)


def _watch(
    run: RunDirectory, stopping: StopSignals, patience: int, on_poll: Callable[[], None]
) -> int:
    asked: threading.Thread | None = None
    while True:
        container = look(run)
        if container is None:
            return 1
        if not container.running:
            return container.exit_code
        if stopping.asked and asked is None:
            asked = threading.Thread(target=stop, args=(run, patience), daemon=True)
            asked.start()
        on_poll()
        time.sleep(POLL_SECONDS)


def refused(text: str) -> EnvironmentNotReady:
    """What Docker says to a container that it does not start, with the fix."""
    for part, code, what, fix in REFUSALS:
        if part in text.lower():
            return EnvironmentNotReady(code, what, why=last_line(text), fix=fix)
    return EnvironmentNotReady(
        "not_started",
        f"the container was not started: {last_line(text)}",
        fix="correct docker: in the spec; docker.sh is what ran",
    )


def look(run: RunDirectory, daemon: str | None = None) -> Container | None:
    """A run's container; None where the daemon does not know it (any more)."""
    done = ask([*client(daemon), "container", "inspect", container_name(str(run.path))])
    if done.returncode:
        return None
    found = json.loads(done.stdout)[0]
    state = found["State"]
    # Between two starts of its restart policy it is not running, and will be.
    return Container(
        found["Id"], bool(state["Running"] or state["Restarting"]), int(state["ExitCode"])
    )


def stop(run: RunDirectory, seconds: int, daemon: str | None = None) -> None:
    """SIGTERM to the launcher inside, SIGKILL after so long; a restart policy does not act."""
    name = container_name(str(run.path))
    ask([*client(daemon), "stop", f"--time={seconds}", name], seconds + ANSWER_SECONDS)


def patience(run: RunDirectory) -> int:
    """Seconds that a run's ranks may take to save and stop."""
    plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    return stop_seconds(plan)


def remove(run: RunDirectory, daemon: str | None = None) -> None:
    """Remove a container that has ended, or that must end now."""
    ask([*client(daemon), "rm", "--force", container_name(str(run.path))])
