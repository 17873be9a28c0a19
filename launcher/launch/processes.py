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

from launcher.runs.directory import RunDirectory

MARK = "SFTLAUNCH_RUN"
POLL_SECONDS = 0.05
# Stages in which an attempt has nothing yet that is not in a checkpoint.
BEFORE_TRAINING = (
    "starting",
    "looking for a checkpoint",
    "loading the model",
    "preparing",
    "loading the checkpoint",
)


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


def ask_to_stop(run_directory: str, agent: int | None = None) -> None:
    """Ask a run to save and stop; it takes the time that it takes.

    Args:
        run_directory: of the run.
        agent: the process that passes a stop on to ranks; without it, all of them are asked.
    """
    others = members(run_directory) if agent is None else [agent]
    _signal(training_ranks(run_directory) or others, signal.SIGTERM)


def training_ranks(run_directory: str) -> list[int]:
    """Ranks under torchrun that have something to save; none for ranks that were forked.

    They are asked themselves: torchrun would end them after its shutdown timeout, or at its
    third signal, whether they have saved or not. Once they have left, it ends by itself.
    Before they train it must hear of a stop, or it would start them again.
    """
    if RunDirectory(Path(run_directory)).read_status().get("stage") in BEFORE_TRAINING:
        return []
    ranks = {pid for pid in members(run_directory) if _has_rank(pid)}
    # Data-loader workers are children of a rank.
    return [pid for pid in ranks if _parent(pid) not in ranks]


def end_all(run_directory: str, grace_seconds: float) -> None:
    """Ask every process of a run to stop, and end those that have not within the grace."""
    _signal(members(run_directory), signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while members(run_directory) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    _signal(members(run_directory), signal.SIGKILL)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _has_rank(pid: int) -> bool:
    try:
        return b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _parent(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])
