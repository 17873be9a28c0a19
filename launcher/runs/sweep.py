"""The folder of a sweep: one record, a script for Slurm, and a run directory a run below it.

It knows files, not meaning; each run directory is an ordinary one (`launcher.runs.directory`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.runs.directory import RunDirectory, read_files, restore_files, write_atomic


@dataclass(frozen=True)
class SweepRecord:
    """What sweep.json holds."""

    version: str
    """Of the launcher that made it."""
    spec: Mapping[str, Any]
    """What all runs have in common, as it was said; local paths are absolute."""
    axes: tuple[Mapping[str, Any], ...]
    """Of each axis: key, values, and texts as they were said."""
    runs: tuple[Mapping[str, Any], ...]
    """Of each run: name of its folder, and values by key. Its place is its array task."""
    jobs: tuple[int, ...] = ()
    """Job arrays, the oldest first."""


@dataclass(frozen=True)
class SweepDirectory:
    """Paths of one sweep, and its record."""

    path: Path

    @property
    def file(self) -> Path:
        """The record."""
        return self.path / "sweep.json"

    @property
    def tasks(self) -> Path:
        """Links by array task to the run directories, the only name that Slurm can make up."""
        return self.path / "tasks"

    @property
    def cancelled(self) -> Path:
        """There once no further run shall start."""
        return self.path / "cancelled"

    def exists(self) -> bool:
        """Whether a sweep was planned here."""
        try:
            return self.file.is_file()
        except (OSError, ValueError):  # a path that is too long, or no path
            return False

    @cached_property
    def record(self) -> SweepRecord:
        """The record as it was when it was first asked for."""
        return self.read()

    def read(self) -> SweepRecord:
        """The record as it is now."""
        values = json.loads(self.file.read_text(encoding="utf-8"))
        lists = {name: tuple(values[name]) for name in ("axes", "runs", "jobs")}
        return SweepRecord(**{**values, **lists})

    def write(self, record: SweepRecord) -> None:
        """Write the record."""
        text = json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False)
        write_atomic(self.file, f"{text}\n")

    @property
    def runs(self) -> list[RunDirectory]:
        """All run directories, in order."""
        return [RunDirectory(self.path / run["name"]) for run in self.record.runs]

    def create(self, record: SweepRecord) -> None:
        """Make the folder with its record and links, before any of its runs."""
        self.tasks.mkdir(parents=True, exist_ok=True)
        self.write(record)
        for task, run in enumerate(record.runs):
            link = self.tasks / str(task)
            if not link.is_symlink():
                link.symlink_to(Path("..") / run["name"])

    def snapshot(self) -> dict[str, bytes] | None:
        """The files beside the runs, for `restore`; None where there is no sweep yet."""
        if not self.exists():
            return None
        return read_files(self.path)

    def restore(self, before: Mapping[str, bytes] | None) -> None:
        """Undo what changed beside the runs; a sweep that is new goes with all its runs."""
        if before is None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        restore_files(self.path, before)

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the sweep against another launcher on this machine; false where one holds it."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
        finally:
            os.close(descriptor)


def sweep_of(run: RunDirectory) -> SweepDirectory | None:
    """The sweep that a run directory belongs to."""
    sweep = SweepDirectory(run.path.parent)
    return sweep if sweep.exists() else None


def task_name(job: int, task: int) -> str:
    """Slurm's name of one task of a job array."""
    return f"{job}_{task}"


def compact(tasks: Sequence[int]) -> str:
    """Array tasks as Slurm writes them: 0-4,7."""
    groups: list[list[int]] = []
    for task in sorted(tasks):
        if groups and task == groups[-1][1] + 1:
            groups[-1][1] = task
        else:
            groups.append([task, task])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in groups)
