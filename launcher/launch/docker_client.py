"""Docker's client as a process: its answer within a limit, and what it says when there is none."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from launcher.errors import EnvironmentNotReady

Item = TypeVar("Item")
Result = TypeVar("Result")
HOST_OPTION = "--host="
HELP = ("See 'docker", "Run 'docker")
NOT_CONNECTED = re.compile(r"cannot connect|error during connect", re.IGNORECASE)
# Where Docker repeats what ssh said, after much about itself.
SSH_SAID = "stderr="


def answer(argv: Sequence[str], limit_seconds: float) -> subprocess.CompletedProcess[str]:
    """What a client says.

    It has a session of its own: ssh, by which it reaches another machine, cannot ask at the
    terminal for a password then, and ends with it where time is up.

    Raises:
        subprocess.TimeoutExpired: where it has not ended by then.
    """
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=limit_seconds)
        except BaseException:
            end(process)
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def end(process: subprocess.Popen[str]) -> None:
    """End a client and its ssh."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def no_daemon(argv: Sequence[str], said: str) -> EnvironmentNotReady:
    """No daemon answers, and how to find out why.

    Args:
        argv: of the client.
        said: all that it said.
    """
    lines = [line for line in said.splitlines() if NOT_CONNECTED.search(line)]
    why = last_line(lines[0] if lines else said)
    daemon = argv[1].removeprefix(HOST_OPTION) if argv[1].startswith(HOST_OPTION) else None
    if daemon is None:
        where = os.environ.get("DOCKER_HOST", "this machine")
        fix = "start it (systemctl start docker), or correct DOCKER_HOST"
    else:
        where = daemon
        fix = f"this must work without a password: docker --host {daemon} version"
    return EnvironmentNotReady(
        "docker_down",
        f"the Docker daemon of {where} does not answer",
        why=why.rpartition(SSH_SAID)[2],
        fix=fix,
    )


def last_line(text: str) -> str:
    """What an output says at its end, without Docker's pointer to its help."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(HELP)]
    return " ".join((useful or lines or ["no output"])[-1].split())


def each(action: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """An action on all hosts at one time; the first host's refusal is raised."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(action, items))


@contextlib.contextmanager
def naming(daemon: str | None, fixes: dict[str, str] | None = None) -> Iterator[None]:
    """A refusal with the host's name, and with a fix that holds there."""
    try:
        yield
    except EnvironmentNotReady as refusal:
        if daemon is None or daemon in refusal.what:
            raise
        raise EnvironmentNotReady(
            refusal.code,
            f"Docker host {daemon}: {refusal.what}",
            why=refusal.why,
            fix=(fixes or {}).get(refusal.code, refusal.fix),
            source=refusal.source,
        ) from None
