"""Who runs a run, seen from other machines: a file that its launcher keeps fresh.

On one machine the processes themselves tell (launcher.launch.processes). A folder that
several machines share needs more, or two of them would write over each other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

from launcher.errors import EnvironmentNotReady
from launcher.runs.directory import RunDirectory

REFRESH_SECONDS = 10.0
# A launcher that has not refreshed its file for so long is gone.
STALE_SECONDS = 60.0


class Presence:
    """This launcher's sign in the run directory, for as long as it runs the ranks."""

    def __init__(self, run: RunDirectory) -> None:
        self.path = run.presence
        self._next = 0.0

    def __enter__(self) -> Presence:
        self.refresh()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()

    def refresh(self) -> None:
        """Write the sign again, now and then. A full disk is not for this to report."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REFRESH_SECONDS
        with contextlib.suppress(OSError):
            self.path.write_text(f"{socket.gethostname()} {os.getpid()}\n", encoding="utf-8")


def refuse_elsewhere(run: RunDirectory) -> None:
    """Refuse a run that another machine's launcher runs.

    Raises:
        EnvironmentNotReady: with the machine's name.
    """
    host = running_elsewhere(run)
    if host is None:
        return
    raise EnvironmentNotReady(
        "running",
        f"{run.path} is running on {host}",
        why="two attempts would overwrite each other",
        fix=f"wait for its end, or stop it there: sftlaunch cancel {run.path}; where {host} is "
        f"gone, try again in {STALE_SECONDS:.0f} s",
    )


def running_elsewhere(run: RunDirectory) -> str | None:
    """Name of another machine whose launcher runs this run just now; None where there is none."""
    try:
        host = run.presence.read_text(encoding="utf-8").split()[0]
        age = _file_clock(run.path) - run.presence.stat().st_mtime
    except (OSError, IndexError):
        return None
    return host if host != socket.gethostname() and age < STALE_SECONDS else None


def _file_clock(folder: Path) -> float:
    """The time that the folder's file system gives a file now: a server's clock may differ."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
        return Path(file.name).stat().st_mtime
