"""Names and records of a run directory; every write that matters is atomic.

It knows files, not meaning: what a state implies is decided by those who read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATES = ("planned", "queued", "running", "preempted", "failed", "completed")
# Of a run that waits in Slurm, or that somebody runs.
ON_THE_WAY = ("queued", "running")
NOT_OVER = ("planned", *ON_THE_WAY)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` so that a reader sees the old file or the whole new one.

    Args:
        path: of the file.
        text: all of it.
        durable: whether it is on the disk before this returns; a thousand such waits add up.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as one line, in one write."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole JSON lines of a file that may still be written; a cut-off last line is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                # A line that a kill cut off may have been followed by another.
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def read_files(folder: Path) -> dict[str, bytes]:
    """Name: content of all files at the top of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def restore_files(folder: Path, before: Mapping[str, bytes]) -> None:
    """Make the files at the top of a folder those that `read_files` found."""
    for path in [path for path in folder.iterdir() if path.is_file()]:
        if path.name not in before:
            path.unlink()
    for name, content in before.items():
        (folder / name).write_bytes(content)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def plan(self) -> Path:
        """The plan that every rank reads."""
        return self.path / "plan.json"

    @property
    def spec(self) -> Path:
        """The resolved spec, every value explicit."""
        return self.path / "spec.yaml"

    @property
    def status(self) -> Path:
        """State, attempt, step, error."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Generations at fixed prompts."""
        return self.path / "samples.jsonl"

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's configuration (ZeRO only)."""
        return self.path / "deepspeed.json"

    @property
    def checkpoints(self) -> Path:
        """Intermediate checkpoints."""
        return self.path / "checkpoints"

    @property
    def prepared(self) -> Path:
        """Tokenised rows; whole only with their record (`launcher.runs.prepared`)."""
        return self.path / "prepared"

    @property
    def final(self) -> Path:
        """The trained adapter or model, and its tokenizer."""
        return self.path / "final"

    def logs(self, attempt: int) -> Path:
        """Folder of one attempt's logs."""
        return self.path / "logs" / f"attempt-{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """What one rank printed."""
        return self.logs(attempt) / f"rank-{rank}.log"

    def launcher_log(self, attempt: int, node: int = 0) -> Path:
        """What torchrun itself printed; nodes whose launchers do not share one have their own."""
        return self.logs(attempt) / ("launcher.log" if node == 0 else f"launcher-{node}.log")

    def rank_error(self, attempt: int, rank: int) -> Path:
        """A rank's own error, written by it as it fails."""
        return self.logs(attempt) / f"rank-{rank}.error.json"

    def signals(self, attempt: int) -> Path:
        """What a batch script was sent: a line each, the signal and the job's state."""
        return self.logs(attempt) / "signals"

    @property
    def container_log(self) -> Path:
        """The last lines that a container printed, which is removed at its end."""
        return self.container_log_of(0)

    def container_log_of(self, node: int) -> Path:
        """The same of one of several nodes."""
        return self.path / "logs" / ("container.log" if node == 0 else f"container-{node}.log")

    @property
    def presence(self) -> Path:
        """Host and process id of the launcher, which keeps it fresh while ranks run."""
        return self.path / ".running"

    @property
    def cancelled(self) -> Path:
        """There while the run is asked to save and not to go on."""
        return self.path / "cancelled"

    def exists(self) -> bool:
        """Whether a run was planned here."""
        try:
            return self.plan.is_file()
        except OSError:  # a path that is too long
            return False

    def create(self, files: Mapping[str, str], *, durable: bool = True) -> None:
        """Make the folder and write its files, plan.json last."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in sorted(files, key=lambda name: (name == "plan.json", name)):
            write_atomic(self.path / name, files[name], durable=durable)
            if name.endswith(".sh"):
                (self.path / name).chmod(0o755)

    def snapshot(self) -> dict[str, bytes] | None:
        """The files at the top of the folder, for `restore`; None where there is no run yet."""
        if not self.exists():
            return None
        return read_files(self.path)

    def restore(self, before: Mapping[str, bytes] | None) -> None:
        """Undo `create`: what was not there goes, what was there is as it was."""
        if before is None:
            self._remove_all_but_prepared()
            return
        restore_files(self.path, before)

    def _remove_all_but_prepared(self) -> None:
        """Rows may have been prepared before there was a run."""
        for path in self.path.iterdir():
            if path.is_dir() and path != self.prepared:
                shutil.rmtree(path)
            elif not path.is_dir():
                path.unlink()
        if not self.prepared.exists():
            self.path.rmdir()

    def read_status(self) -> dict[str, Any]:
        """The status record; `{}` where there is none yet."""
        try:
            record: dict[str, Any] = json.loads(self.status.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return record

    def update_status(self, *, durable: bool = True, **changes: Any) -> dict[str, Any]:
        """Merge `changes` into the status record and write it."""
        state = changes.get("state")
        if state is not None and state not in STATES:
            raise ValueError(f"unknown state {state!r}; one of {STATES}")
        record = {**self.read_status(), **changes}
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_atomic(self.status, text, durable=durable)
        return record

    def forget_after(self, step: int) -> None:
        """Drop records of steps that a resumed run will take again."""
        for path in (self.metrics, self.samples):
            if not path.is_file():
                continue
            kept = [record for record in read_lines(path) if record["step"] <= step]
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            write_atomic(path, "".join(lines))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl."""
        return list(read_lines(self.metrics))
