"""Containers on several hosts, waited for and ended together."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.launch import docker
from launcher.launch.docker_client import end, last_line
from launcher.launch.local import StopSignals
from launcher.render.docker import container_name
from launcher.render.docker_place import client
from launcher.runs.directory import RunDirectory

POLL_SECONDS = 0.2
# A connection over ssh may be dead and say nothing: each container is looked at so often.
LOOK_SECONDS = 30.0
ASK_AGAIN_SECONDS = 5.0
# A host that does not answer for so long, while others do, is gone.
LOST_SECONDS = 60.0
# For the other nodes to fail by themselves and say why, once one has ended badly.
PEER_GRACE_SECONDS = 40.0
# What they get between SIGTERM and SIGKILL then: there is nothing that they could save.
NO_CHECKPOINT_SECONDS = 5
ERROR = "error: "  # what the program inside writes before it ends
ENDED_WELL = (ExitCode.DONE, ExitCode.PREEMPTED)


@dataclass(frozen=True)
class End:
    """How one node's container ended."""

    code: int
    words: str = ""
    """What is known about a bad end, one line."""

    @property
    def bad(self) -> bool:
        """Whether the others cannot go on without it."""
        return self.code not in ENDED_WELL


class Watched:
    """One node's container, watched by a thread: a host that is silent keeps nobody waiting."""

    def __init__(self, run: RunDirectory, rank: int, daemon: str | None) -> None:
        self.run, self.rank, self.daemon = run, rank, daemon
        self.name = container_name(str(run.path))
        self.end: End | None = None
        self.silent_since: float | None = None
        """Since when its host has not answered."""
        self._closed = threading.Event()
        self._waiting: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def where(self) -> str:
        """This node in a message."""
        return f"node {self.rank}" + (f" ({self.daemon})" if self.daemon else "")

    def lost(self, heard_since: float) -> bool:
        """Whether its host has been silent for too long while others answered."""
        since = self.silent_since
        if self.end is not None or since is None:
            return False
        return time.monotonic() - max(since, heard_since) > LOST_SECONDS

    def give_up(self) -> None:
        """Its host is gone."""
        self.end = End(1, f"{self.where} does not answer any more")

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        if self._waiting is not None:
            end(self._waiting)

    def _watch(self) -> None:
        while not self._closed.is_set() and self.end is None:
            self._wait()
            try:
                found = self._look()
            except EnvironmentNotReady:
                self.silent_since = self.silent_since or time.monotonic()
                self._closed.wait(ASK_AGAIN_SECONDS)
                continue
            self.silent_since = None
            self.end = self.end or found

    def _wait(self) -> None:
        """Until the container ends, its connection breaks, or it is time to look again."""
        if self._waiting is None or self._waiting.poll() is not None:
            self._waiting = subprocess.Popen(
                [*client(self.daemon), "wait", self.name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._waiting.wait(LOOK_SECONDS)

    def _look(self) -> End | None:
        """The container itself: `wait` also ends at a restart, which goes on."""
        found = docker.look(self.run, self.daemon)
        if found is None:
            return End(1, f"the container of {self.where} is gone")
        if found.running:
            return None
        said = self._keep_log()
        code = found.exit_code
        return End(code, self._words(code, said) if End(code).bad else "")

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


class Together:
    """Several containers that end together."""

    def __init__(
        self,
        watched: Sequence[Watched],
        patience: int,
        stop: Callable[[Sequence[str | None], int], None],
    ) -> None:
        """Begin to watch.

        Args:
            watched: one a node.
            patience: seconds that a checkpoint may take.
            stop: asks containers on these hosts to end within so many seconds.
        """
        self.watched, self.patience, self.stop = watched, patience, stop
        self.stopping = False
        self.heard_since: float | None = None
        """Since when some host has answered."""

    def watch(self, asked: StopSignals | None, on_poll: Callable[[], None]) -> End | None:
        """Wait for all; returns the first bad end."""
        first: End | None = None
        since: float | None = None
        while any(one.end is None for one in self.watched):
            stopped = asked is not None and asked.asked
            self._give_up(stopped)
            ended = [one.end for one in self.watched if one.end is not None]
            since = since or (time.monotonic() if ended else None)
            first = first or self._bad(ended)
            if stopped:
                self._stop(self.patience)
            elif since is not None:
                grace = PEER_GRACE_SECONDS if first else float(self.patience)
                if time.monotonic() - since > grace:
                    self._stop(NO_CHECKPOINT_SECONDS)
            on_poll()
            time.sleep(POLL_SECONDS)
        return first or self._bad([one.end for one in self.watched if one.end is not None])

    def _give_up(self, stopped: bool) -> None:
        """Hosts that are lost, unless none answers: then it is this machine that is cut off."""
        heard = any(one.end is not None or one.silent_since is None for one in self.watched)
        if not heard and not stopped:
            self.heard_since = None
            return
        self.heard_since = self.heard_since or time.monotonic()
        for one in self.watched:
            if one.lost(self.heard_since):
                one.give_up()

    def _bad(self, ends: Sequence[End]) -> End | None:
        return next((one for one in ends if one.bad), None)

    def _stop(self, seconds: int) -> None:
        if not self.stopping:
            self.stopping = True
            daemons = [one.daemon for one in self.watched if one.end is None]
            threading.Thread(target=self.stop, args=(daemons, seconds), daemon=True).start()
