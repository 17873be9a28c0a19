"""The process that a rank is: its number, and how it leaves."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

# When the launcher started this attempt, in seconds since the epoch.
STARTED = "SFTLAUNCH_STARTED"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rank_of() -> int:
    """This process's rank; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, so that no rank is left behind.

    The rank then saves and stops as for any other SIGTERM. Linux only; elsewhere nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def held_back(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Let signals wait; processes that are started meanwhile never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def finish(code: int) -> NoReturn:
    """Run the exit handlers, flush, and leave without C++ static destruction.

    About one gloo DDP run in six aborted there (`terminate called without an active
    exception`, exit -6) after all work was done: a detached communication thread outlives
    the objects it uses. Everything that must be written has been written by then.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - the only way to run handlers before os._exit
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
