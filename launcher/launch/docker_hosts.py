"""Docker daemons elsewhere as a run's nodes: started and ended together.

Each is asked by Docker's own transport (`docker --host`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.launch import docker
from launcher.launch.container_user import keep_owner, make_ready
from launcher.launch.docker_client import each, naming
from launcher.launch.docker_watch import End, Together, Watched
from launcher.launch.local import StopSignals, outcome
from launcher.plan.types import Plan
from launcher.render.docker import container_name, stop_seconds
from launcher.render.docker_nodes import Nodes
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import Failure


def start(run: RunDirectory, nodes: Nodes, argvs: Sequence[Sequence[str]]) -> None:
    """Start all containers, the first node's first.

    Raises:
        EnvironmentNotReady: as one of the daemons refuses; none is left running then.
    """
    daemons = [caller.place.daemon for caller in nodes.callers]
    make_ready(run, nodes.callers[0], daemons)
    remove(run, daemons)  # what an earlier attempt has left
    try:
        _start_one(daemons[0], argvs[0])
        others = list(zip(daemons, argvs, strict=True))[1:]
        if others:
            each(lambda item: _start_one(*item), others)
    except BaseException:
        remove(run, daemons)
        raise


def _start_one(daemon: str | None, argv: Sequence[str]) -> None:
    with naming(daemon):
        done = docker.ask(argv, docker.START_SECONDS)
        if done.returncode:
            raise docker.refused(done.stderr)


def daemons_of(run: RunDirectory) -> list[str | None]:
    """Where a run's containers were started; nothing for a run that was not in one."""
    record = run.read_status().get("docker")
    return list(record.get("hosts") or [None]) if record else []


def any_running(run: RunDirectory) -> bool:
    """Whether a container of the run runs on one of its hosts.

    Raises:
        EnvironmentNotReady: a host does not answer.
    """
    daemons = daemons_of(run)
    found = each(lambda daemon: docker.look(run, daemon), daemons) if daemons else []
    return any(container is not None and container.running for container in found)


def stop(run: RunDirectory, daemons: Sequence[str | None], seconds: int) -> None:
    """Ask all containers to save and stop; back when they have ended."""

    def one(daemon: str | None) -> None:
        # A host that is gone has nothing to stop; the others must hear of it all the same.
        with contextlib.suppress(EnvironmentNotReady):
            docker.stop(run, seconds, daemon)

    each(one, daemons)


def remove(run: RunDirectory, daemons: Sequence[str | None]) -> list[str | None]:
    """Remove all containers; returns the hosts that could not be asked."""

    def one(daemon: str | None) -> bool:
        try:
            docker.remove(run, daemon)
        except EnvironmentNotReady:
            return False
        return True

    return [d for d, done in zip(daemons, each(one, daemons), strict=True) if not done]


def attend(
    plan: Plan, run: RunDirectory, on_poll: Callable[[], None]
) -> tuple[ExitCode, Failure | None]:
    """Watch all containers of a run to their end, and remove them.

    Where one ends badly the others are ended, too; a stop reaches all of them.

    Args:
        plan: the run's.
        run: whose containers were started.
        on_poll: called a few times a second.

    Returns:
        DONE, RUN_FAILED with the first failing rank's error, or PREEMPTED.
    """
    with StopSignals() as stopping:
        bad, left = _to_the_end(run, stop_seconds(plan), stopping, on_poll)
    on_poll()
    return _judge(run, bad, left, stopped=stopping.asked)


def see_out(run: RunDirectory) -> None:
    """The same where nobody watches; how it ended is recorded."""
    bad, left = _to_the_end(run, docker.patience(run), None, lambda: None)
    _judge(run, bad, left, stopped=False)


def _to_the_end(
    run: RunDirectory, patience: int, stopping: StopSignals | None, on_poll: Callable[[], None]
) -> tuple[End | None, list[str | None]]:
    """The first bad end, and the hosts on which a container may be left."""
    daemons = daemons_of(run)
    watched = [Watched(run, rank, daemon) for rank, daemon in enumerate(daemons)]
    left: list[str | None] = []
    try:
        bad = Together(watched, patience, partial(stop, run)).watch(stopping, on_poll)
    finally:
        for one in watched:
            one.close()
        left = remove(run, daemons)
    return bad, left


def _judge(
    run: RunDirectory, bad: End | None, left: list[str | None], *, stopped: bool
) -> tuple[ExitCode, Failure | None]:
    seen = [bad.words] if bad else []
    if left:
        names = " and ".join(map(str, left))
        name = container_name(str(run.path))
        seen.append(f"{names} cannot be asked, a container may be left there: {name}")
    found = outcome(run, bad.code if bad else 0, stopped=stopped, seen="; ".join(seen))
    keep_owner(run.path)
    return found
