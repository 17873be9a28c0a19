"""Jobs that the controller has forgotten, from Slurm's accounting, where there is any.

The controller keeps a job for minutes after its end (MinJobAge); sacct keeps it for good.
A cluster without accounting answers nothing, and so does this.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import EnvironmentNotReady
from launcher.launch.slurm import ask

# Working directories come last: a name may hold the separator.
FIELDS = "JobIDRaw,State,ExitCode,WorkDir"
SEPARATORS = 3
SINCE = "now-90days"
# State -> what it means to someone who reads it for the first time.
MEANINGS = {
    "BOOT_FAIL": "a node did not come up",
    "CANCELLED": "it was cancelled",
    "DEADLINE": "its deadline has passed",
    "FAILED": "its script failed",
    "NODE_FAIL": "a node died",
    "OUT_OF_MEMORY": "a node's memory was full; ask for more with slurm.directives.mem",
    "PREEMPTED": "it was preempted",
    "TIMEOUT": "its time limit has passed",
}


@dataclass(frozen=True)
class PastJob:
    """A job that is over, as the accounting knows it."""

    number: int
    state: str
    exit_code: str
    folder: str

    @property
    def meaning(self) -> str:
        """Its state in words."""
        return MEANINGS.get(self.state, self.state.lower())


def past_job(number: int) -> PastJob | None:
    """A job by its number; None where there is no accounting, or it knows none."""
    found = _query([f"--jobs={number}"])
    return next((job for job in reversed(found) if job.number == number), None)


def past_jobs_of_name(name: str) -> list[PastJob]:
    """This user's jobs of a name, the oldest first."""
    return _query([f"--name={name}", f"--starttime={SINCE}"])


def _query(options: Sequence[str]) -> list[PastJob]:
    if shutil.which("sacct") is None:
        return []
    argv = ["sacct", "--noheader", "--parsable2", "--allocations", f"--format={FIELDS}", *options]
    try:
        done = ask(argv)
    except EnvironmentNotReady:
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [job for line in lines if (job := _read(line)) is not None]


def _read(line: str) -> PastJob | None:
    parts = line.split("|", SEPARATORS)
    if len(parts) <= SEPARATORS or not parts[0].isdecimal():
        return None
    number, state, exit_code, folder = parts
    # "CANCELLED by 1000"
    return PastJob(int(number), state.split()[0] if state else "", exit_code, folder)
