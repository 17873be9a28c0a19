"""The processes of a run, found by a mark in their environment, and how they are ended.

torchrun gives each rank a session of its own (torch 2.13, subprocess_handler), so neither
a process group nor a tree finds them all once their parent is gone; the mark does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "SFTLAUNCH_RUN"
POLL_SECONDS = 0.05


def members(run_directory: str) -> list[int]:
    """Processes of this user that were started for a run, without this one."""
    # One name for a folder that is reached through a link, too.
    mark = f"{MARK}={os.path.realpath(run_directory)}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def ask_to_stop(run_directory: str) -> None:
    """Ask every process of a run to save and stop; it takes the time that it takes."""
    _signal(members(run_directory), signal.SIGTERM)


def end_all(run_directory: str, grace_seconds: float) -> None:
    """Ask every process of a run to stop, and end those that have not within the grace."""
    ask_to_stop(run_directory)
    deadline = time.monotonic() + grace_seconds
    while members(run_directory) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    _signal(members(run_directory), signal.SIGKILL)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
