"""What all ranks agree on, once a step: whether to stop, and whether the step is healthy.

The agreement is one small all-reduce on the CPU (gloo, also beside NCCL), so that no rank
ever saves or stops alone: a rank that entered a collective save by itself would hang.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launcher.train.process import STARTED

# SIGUSR2: what torchrun passes on in a Slurm job (slurm/job.sbatch).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# torchrun forwards the terminal's own Ctrl-C within milliseconds; a person's second one
# comes later.
SAME_SIGNAL_SECONDS = 1.0
SIBLING_POLL_SECONDS = 1.0
# Time for a rank whose peer is gone to fail by itself, and to say why.
ORPHAN_GRACE_SECONDS = 5.0
# How far apart the stuck-rank timer is set again, at most; it may fire earlier by so much.
MOST_BEAT_SECONDS = 1.0
BEAT_SHARE = 0.1


class StoppedBeforeTraining(BaseException):
    """A stop was asked for while there was nothing to save yet."""


class EvaluationStopped(Exception):  # noqa: N818 - nothing went wrong
    """A stop was asked for in an evaluation; raised on all ranks at the same batch."""


class StopRequest:
    """Whether this rank was asked to stop, by signal or by the clock."""

    def __init__(self, stop_after_seconds: float | None = None) -> None:
        self.reason: str | None = None
        self.training = False
        self._first_interrupt: float | None = None
        self._stop_after = stop_after_seconds
        # From the launch on, not from this process's start: imports and restarts count.
        started = float(os.environ.get(STARTED) or time.time())
        self._deadline = None if stop_after_seconds is None else started + stop_after_seconds
        self._siblings: dict[int, int] = {}
        self._wakeup: socket.socket | None = None
        self._armed = False

    def install(self) -> None:
        """Take over the stop signals; only the main thread may.

        They are noticed by a thread as well: the main one may be deep in a collective that
        never ends, because a peer is gone.
        """
        receiving, sending = socket.socketpair()
        sending.setblocking(False)
        signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
        self._wakeup, self._armed = sending, True
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        threading.Thread(target=self._watch, args=(receiving,), daemon=True).start()

    def disarm(self) -> None:
        """From here on nothing needs saving, and peers may be gone."""
        self._armed = False

    def watch_siblings(self, processes: list[tuple[str, int]]) -> None:
        """Remember the ranks on this host, as (host name, process id)."""
        here = socket.gethostname()
        self._siblings = {
            pid: _started(pid) for host, pid in processes if host == here and pid != os.getpid()
        }

    @property
    def wanted(self) -> bool:
        """Whether this rank wants to stop after its step."""
        if self._deadline is not None and time.time() >= self._deadline and not self.reason:
            self.reason = f"--stop-after {self._stop_after:g} s"
        return self.reason is not None

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt > SAME_SIGNAL_SECONDS:
                raise KeyboardInterrupt
        if self.reason is None:
            self.reason = signal.Signals(number).name
        if not self.training and self._armed:
            self._armed = False  # once: the next signal must not break into the clean-up
            raise StoppedBeforeTraining(self.reason)

    def _watch(self, receiving: socket.socket) -> None:
        """After a stop signal: leave a collective that a dead sibling will never join."""
        while not set(receiving.recv(64)) & set(STOP_SIGNALS):
            pass
        gone_since: float | None = None
        while True:
            time.sleep(SIBLING_POLL_SECONDS)
            gone = [pid for pid, start in self._siblings.items() if _started(pid) != start]
            if not gone or not self._armed:
                gone_since = None
                continue
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > ORPHAN_GRACE_SECONDS:
                _leave(f"ranks with process ids {gone} are gone, this one cannot go on")


def _started(pid: int) -> int:
    """Start time of a running process in clock ticks; 0 for one that has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def _leave(why: str) -> NoReturn:
    """End this process from any thread, with its stacks in the log."""
    sys.stderr.write(f"{why}\n")
    faulthandler.dump_traceback(all_threads=True)
    sys.stderr.flush()
    os._exit(1)


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step's gradients are there."""

    stop: bool
    loss: float
    """Mean over ranks, as it is logged."""
    grad_norm: float
    finite: bool


class Ranks:
    """The ranks' side channel."""

    def __init__(self, stop: StopRequest) -> None:
        import torch.distributed as dist

        self.stop = stop
        self.world, self.rank = 1, 0
        self.group: Any = None
        if dist.is_available() and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")
            self.world, self.rank = dist.get_world_size(), dist.get_rank()
        stop.watch_siblings(self.gather((socket.gethostname(), os.getpid())))

    def agree(self, loss: float, grad_norm: float) -> Agreement:
        """One all-reduce of four numbers; every rank gets the same answer."""
        import torch

        finite = _is_finite(loss) and _is_finite(grad_norm)
        values = torch.tensor(
            [float(self.stop.wanted), float(not finite), loss, grad_norm], dtype=torch.float64
        )
        if self.group is not None:
            torch.distributed.all_reduce(values, group=self.group)
        stop, bad, total, norm = values.tolist()
        return Agreement(stop > 0, total / self.world, norm / self.world, finite=not bad)

    def stop_wanted(self) -> bool:
        """Whether any rank was asked to stop; one all-reduce of one number."""
        import torch

        wanted = torch.tensor(float(self.stop.wanted))
        if self.group is not None:
            torch.distributed.all_reduce(wanted, group=self.group)
        return bool(wanted)

    def stop_reasons(self) -> list[str]:
        """Why ranks were asked to stop, those that were."""
        return [reason for reason in self.gather(self.stop.reason) if reason]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def wait(self) -> None:
        """A barrier."""
        self.gather(None)

    def limit_collectives(self, seconds: float) -> None:
        """Let every later collective fail after so many seconds."""
        if self.group is None:
            return
        from datetime import timedelta

        from torch.distributed import distributed_c10d as c10d

        for group in list(c10d._world.pg_map):  # noqa: SLF001 - there is no public list
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)  # noqa: SLF001


def _is_finite(value: float) -> bool:
    return value - value == 0.0


class Heartbeat:
    """Ends a rank that makes no progress, with the stacks of all its threads in its log.

    faulthandler's timer is a C thread: it fires also where Python is stuck.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.armed = False
        # Setting the timer starts a thread (0.2 ms): not at every micro batch.
        self._interval = min(MOST_BEAT_SECONDS, limit_seconds * BEAT_SHARE)
        self._next = 0.0

    def start(self) -> None:
        """From now on progress is expected."""
        self.armed = True
        self._next = 0.0
        self.beat()

    def beat(self, at_least_seconds: float = 0.0) -> None:
        """Progress was made; the next is due within the limit, or within so many seconds."""
        now = time.monotonic()
        if not self.armed or (now < self._next and not at_least_seconds):
            return
        # After what may take longer, the next sign of life sets the usual limit again at once.
        self._next = now if at_least_seconds else now + self._interval
        limit = max(self.limit_seconds, at_least_seconds)
        faulthandler.dump_traceback_later(limit, exit=True)

    def stop(self) -> None:
        """Nothing is waited for any more."""
        self.armed = False
        faulthandler.cancel_dump_traceback_later()
