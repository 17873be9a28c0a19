"""Docker daemons elsewhere as a run's nodes: looked at beforehand, started and ended together.

Each is asked by Docker's own transport (`docker --host`). No file is sent: a run directory, a
model and rows lie where every host sees them under the same path, which is checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import EnvironmentNotReady, ExitCode, SpecError
from launcher.launch import docker
from launcher.launch.container_user import keep_owner, make_ready
from launcher.launch.docker_client import end, last_line, no_daemon
from launcher.launch.local import StopSignals, outcome
from launcher.plan.types import Plan
from launcher.render.docker import Caller, container_name, stop_seconds
from launcher.render.docker_nodes import Nodes, check_argv
from launcher.render.docker_place import client
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import Failure
from launcher.spec.schema import Spec

Item = TypeVar("Item")
Result = TypeVar("Result")
CHECK_SECONDS = 60
POLL_SECONDS = 0.2
# For the other nodes to fail by themselves and say why, once one has ended badly.
PEER_GRACE_SECONDS = 40.0
# What they get between SIGTERM and SIGKILL then: there is nothing that they could save.
NO_CHECKPOINT_SECONDS = 5
# A host that does not answer for so long is gone.
LOST_SECONDS = 60.0
ASK_AGAIN_SECONDS = 5.0
REVISION_LABEL = "org.opencontainers.image.revision"
ERROR = "error: "  # what the program inside writes before it ends
ENDED_WELL = (ExitCode.DONE, ExitCode.PREEMPTED)


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
    _refuse_same(callers, _each(_identity, callers))
    pinned = _each(lambda caller: _pinned(plan, caller), callers)
    _refuse_builds(callers, _each(_revision, pinned))
    with _token(run.path) as (folder, token):
        found = _each(lambda caller: _look_inside(plan, spec, caller, folder, token), pinned)
    return Nodes(
        tuple(
            _judged(plan, run, caller, seen, token)
            for caller, seen in zip(pinned, found, strict=True)
        )
    )


def _each(action: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """An action on all hosts at one time; the first host's refusal is raised."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(action, items))


@contextlib.contextmanager
def _naming(daemon: str | None, fixes: dict[str, str] | None = None) -> Iterator[None]:
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
    with _naming(daemon, {"no_image": bring, "image_version": bring}):
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
    with _naming(daemon, {"mount_missing": "copy it there under the same path"}):
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
            _each(lambda item: _start_one(*item), others)
    except BaseException:
        remove(run, daemons)
        raise


def _start_one(daemon: str | None, argv: Sequence[str]) -> None:
    with _naming(daemon):
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
    found = _each(lambda daemon: docker.look(run, daemon), daemons) if daemons else []
    return any(container is not None and container.running for container in found)


def stop(run: RunDirectory, daemons: Sequence[str | None], seconds: int) -> None:
    """Ask all containers to save and stop; back when they have ended."""

    def one(daemon: str | None) -> None:
        # A host that is gone has nothing to stop; the others must hear of it all the same.
        with contextlib.suppress(EnvironmentNotReady):
            docker.stop(run, seconds, daemon)

    _each(one, daemons)


def remove(run: RunDirectory, daemons: Sequence[str | None]) -> list[str | None]:
    """Remove all containers; returns the hosts that could not be asked."""

    def one(daemon: str | None) -> bool:
        try:
            docker.remove(run, daemon)
        except EnvironmentNotReady:
            return False
        return True

    return [d for d, done in zip(daemons, _each(one, daemons), strict=True) if not done]


@dataclass(frozen=True)
class End:
    """How one node's container ended."""

    code: int
    words: str = ""
    """What is known about a bad end, one line."""


class Watched:
    """One node's container, waited for by a client of its own: no polling over ssh."""

    def __init__(self, run: RunDirectory, rank: int, daemon: str | None) -> None:
        self.run, self.rank, self.daemon = run, rank, daemon
        self.name = container_name(str(run.path))
        self.end: End | None = None
        self._silent_since: float | None = None
        self._again = 0.0
        self._waiting: subprocess.Popen[str] | None = self._wait()

    @property
    def where(self) -> str:
        """This node in a message."""
        return f"node {self.rank}" + (f" ({self.daemon})" if self.daemon else "")

    def _wait(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*client(self.daemon), "wait", self.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def poll(self) -> End | None:
        """How it ended, once it has."""
        if self.end is not None or time.monotonic() < self._again:
            return self.end
        if self._waiting is not None:
            if self._waiting.poll() is None:
                return None
            self._waiting.communicate()
            self._waiting = None
        self.end = self._look()
        return self.end

    def _look(self) -> End | None:
        """The container itself: `wait` also ends with the connection, or at a restart."""
        try:
            found = docker.look(self.run, self.daemon)
        except EnvironmentNotReady as refusal:
            return self._silent(refusal)
        self._silent_since = None
        if found is None:
            return End(1, f"the container of {self.where} is gone")
        if found.running:
            self._waiting = self._wait()
            return None
        said = self._keep_log()
        code = found.exit_code
        return End(code, "" if code in ENDED_WELL else self._words(code, said))

    def _silent(self, refusal: EnvironmentNotReady) -> End | None:
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        self._again = now + ASK_AGAIN_SECONDS
        if now - self._silent_since < LOST_SECONDS:
            return None
        return End(1, f"{refusal.what}: {self.where} is lost")

    def _keep_log(self) -> str:
        """Put what the container printed into the run directory, for it goes with it."""
        argv = [*client(self.daemon), "logs", f"--tail={docker.SHOWN_LOG_LINES}", self.name]
        try:
            done = docker.ask(argv)
        except EnvironmentNotReady:
            return ""
        said = done.stdout + done.stderr
        path = self.run.container_log_of(self.rank)
        with contextlib.suppress(OSError):  # a full disk
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(said, encoding="utf-8")
        return said

    def _words(self, code: int, said: str) -> str:
        """The program's own error line, or the last one."""
        lines = [line for line in said.splitlines() if line.startswith(ERROR)]
        own = lines[-1].removeprefix(ERROR) if lines else f"it exited {code}: {last_line(said)}"
        return f"{self.where}: {own}"

    def close(self) -> None:
        """Wait no longer."""
        if self._waiting is not None:
            end(self._waiting)


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
        bad = _Together(run, watched, patience).watch(stopping, on_poll)
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


class _Together:
    """Several containers that end together."""

    def __init__(self, run: RunDirectory, watched: Sequence[Watched], patience: int) -> None:
        self.run, self.watched, self.patience = run, watched, patience
        self.stopper: threading.Thread | None = None

    def watch(self, stopping: StopSignals | None, on_poll: Callable[[], None]) -> End | None:
        """Wait for all; returns the first bad end."""
        first: End | None = None
        since: float | None = None
        while any(one.poll() is None for one in self.watched):
            ended = [one.end for one in self.watched if one.end is not None]
            if ended and since is None:
                since = time.monotonic()
            bad = next((end for end in ended if end.code not in ENDED_WELL), None)
            first = first or bad
            if stopping is not None and stopping.asked:
                self._stop(self.patience)
            elif since is not None:
                grace = PEER_GRACE_SECONDS if bad else float(self.patience)
                if time.monotonic() - since > grace:
                    self._stop(NO_CHECKPOINT_SECONDS)
            on_poll()
            time.sleep(POLL_SECONDS)
        ends = [one.end for one in self.watched if one.end is not None]
        return first or next((end for end in ends if end.code not in ENDED_WELL), None)

    def _stop(self, seconds: int) -> None:
        if self.stopper is None:
            daemons = [one.daemon for one in self.watched if one.end is None]
            argv = (self.run, daemons, seconds)
            self.stopper = threading.Thread(target=stop, args=argv, daemon=True)
            self.stopper.start()
