"""Effects on a Docker daemon: check, start, look, stop. What is decided, is decided elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.launch.container_user import (
    caches,
    container_user,
    hub_names,
    keep_owner,
    other_groups,
    refuse_unreadable,
)
from launcher.launch.docker_client import NOT_CONNECTED, answer, last_line, no_daemon
from launcher.launch.local import StopSignals, outcome, python_path
from launcher.plan.types import Plan, plan_from_json
from launcher.render.docker import (
    VERSION_LABEL,
    Caller,
    container_name,
    local_paths,
    stop_seconds,
)
from launcher.render.docker_place import client
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import Failure

ANSWER_SECONDS = 20
START_SECONDS = 300
POLL_SECONDS = 0.5
INFINIBAND = Path("/dev/infiniband")
SHOWN_LOG_LINES = 200
# Of a daemon that says so -> the option without which a container could not use the mounts.
DAEMON_OPTIONS = {"name=userns": "--userns=host", "name=selinux": "--security-opt=label=disable"}
ROOTLESS = "name=rootless"
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


def caller(image: str, plan: Plan, run_directory: str, said_user: str | None = None) -> Caller:
    """Whose the run is inside, their caches of models and data, and fast network devices."""
    folder = Path(run_directory)
    user, group = container_user(folder, said_user)
    return Caller(
        image,
        user,
        group,
        socket.gethostname(),
        caches(user, folder, hub_names(plan)),
        (str(INFINIBAND),) if INFINIBAND.is_dir() else (),
        other_groups(user, group),
    )


def as_daemon_has_it(caller: Caller) -> Caller:
    """The caller with what this daemon's own way of naming users asks for."""
    docker = client(caller.place.daemon)
    said = ask([*docker, "info", "--format={{json .SecurityOptions}}"]).stdout
    options = tuple(option for name, option in DAEMON_OPTIONS.items() if name in said)
    if ROOTLESS in said:
        # Root inside is then the user who runs the daemon, and nobody more.
        return replace(caller, user=0, group=0, groups=(), daemon=options)
    return replace(caller, daemon=options)


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
    if done.returncode and NOT_CONNECTED.search(text):
        raise no_daemon(argv, done.stderr)
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


def pinned(plan: Plan, caller: Caller) -> Caller:
    """The caller with its image's digest, and with what its daemon asks for.

    Raises:
        EnvironmentNotReady: no daemon, no image, another version in it, files not to be read.
    """
    image = check(plan, caller.image, caller.place.daemon)
    found = as_daemon_has_it(replace(caller, image=image))
    if found.user != os.getuid():
        refuse_unreadable(local_paths(plan), found.user, (found.group, *found.groups))
    return found


def start(run: RunDirectory, argv: Sequence[str]) -> None:
    """Start a run's container, which `container_user.make_ready` has recorded.

    Raises:
        EnvironmentNotReady: as Docker refuses; nothing is left behind then.
    """
    remove(run)  # what an earlier attempt has left
    done = ask(argv, START_SECONDS)
    if done.returncode:
        remove(run)
        raise refused(done.stderr)


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
        said = ""
        try:
            code = _watch(run, stopping, stop_seconds(plan), on_poll)
        finally:
            said = _keep_log(run)
            remove(run)
    on_poll()
    found = _ended(run, code, stopping.asked, said)
    keep_owner(run.path)
    return found


def see_out(run: RunDirectory) -> None:
    """Wait for the end of a container that nobody watches, and remove it; record how it ended."""
    code = _watch(run, None, 0, lambda: None)
    said = _keep_log(run)
    remove(run)
    _ended(run, code, False, said)
    keep_owner(run.path)


def leave(run: RunDirectory) -> None:
    """Have a process of its own see the container out."""
    subprocess.Popen(
        [sys.executable, "-m", "launcher.launch.attendant", str(run.path)],
        env={**os.environ, "PYTHONPATH": python_path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _watch(
    run: RunDirectory, stopping: StopSignals | None, patience: int, on_poll: Callable[[], None]
) -> int:
    """Wait for the container's end; its exit code."""
    asked: threading.Thread | None = None
    waiting = _wait(run)
    try:
        while True:
            # One client that waits: to ask again and again takes a tenth of a processor.
            if waiting.poll() is not None:
                container = look(run)
                if container is None:
                    return 1
                if not container.running:
                    return container.exit_code
                waiting = _wait(run)  # Docker has started it again
            if stopping is not None and stopping.asked and asked is None:
                asked = threading.Thread(target=stop, args=(run, patience), daemon=True)
                asked.start()
            on_poll()
            time.sleep(POLL_SECONDS)
    finally:
        waiting.kill()
        waiting.wait()


def _wait(run: RunDirectory) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["docker", "wait", container_name(str(run.path))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _keep_log(run: RunDirectory) -> str:
    """Put what the container printed into the run directory, for it goes with the container."""
    name = container_name(str(run.path))
    done = ask(["docker", "logs", f"--tail={SHOWN_LOG_LINES}", name])
    if done.returncode:
        return ""
    said = done.stdout + done.stderr
    with contextlib.suppress(OSError):  # a full disk
        run.container_log.parent.mkdir(parents=True, exist_ok=True)
        run.container_log.write_text(said, encoding="utf-8")
    return said


def _ended(
    run: RunDirectory, code: int, stopped: bool, said: str
) -> tuple[ExitCode, Failure | None]:
    """The outcome; where no rank had begun, the container's own last words."""
    exit_code, failure = outcome(run, code, stopped=stopped)
    if failure is None or failure.rank is not None or not said.strip():
        return exit_code, failure
    if any(run.logs(int(run.read_status()["attempt"])).glob("rank-*.log")):
        return exit_code, failure
    log = str(run.container_log.relative_to(run.path))
    failure = replace(failure, error=f"{failure.error}: {last_line(said)}", log=log)
    with contextlib.suppress(OSError):
        run.update_status(error=failure.as_json())
    return exit_code, failure


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
