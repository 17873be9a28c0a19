"""Checkpoints that are complete or absent.

A folder `checkpoint-STEP` counts only with its `complete.json`, which is written last and
atomically, after all ranks have written, and which lists every file with its size and
SHA-256. Everything here is plain files; what is in them is `launcher.train.checkpoint`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs.directory import write_atomic

SEAL = "complete.json"
OWN_DIGEST = "sha256_of_this_record"
SET_ASIDE = "set-aside"
NAME = re.compile(r"checkpoint-(\d+)$")
# Hashing releases the GIL; more threads than this only fight for the disk.
HASH_THREADS = 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was sealed."""

    path: Path
    record: Mapping[str, Any]
    """What complete.json says: step, epoch, world, global batch, strategy, versions, files."""

    @property
    def step(self) -> int:
        """Optimizer steps that it holds."""
        return int(self.record["step"])


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be used."""

    name: str
    reason: str


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"checkpoint-{step}"


def checkpoint_folders(root: Path) -> list[Path]:
    """All checkpoint folders, sealed or not, highest step first."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), path) for path in root.iterdir() if (m := NAME.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def digests(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files, which are on the disk when this returns.

    Args:
        folder: the checkpoint.
        names: files, relative to it.
    """
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        # A seal must not reach the disk before what it vouches for.
        os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def seal(folder: Path, record: Mapping[str, Any], files: Mapping[str, Any]) -> Checkpoint:
    """Declare a checkpoint complete; nothing may change in it afterwards.

    Args:
        folder: with all its files written.
        record: step, epoch, world, global_batch_size, strategy, versions.
        files: what `digests` gave, over all ranks.
    """
    full = {**record, "files": dict(sorted(files.items()))}
    full[OWN_DIGEST] = _record_digest(full)
    write_atomic(folder / SEAL, json.dumps(full, indent=1) + "\n")
    return Checkpoint(folder, full)


def _record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a seal without its own digest."""
    kept = {key: value for key, value in record.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def file_names(folder: Path) -> list[str]:
    """All files below a folder, relative to it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def read_seal(folder: Path) -> Checkpoint | Skipped:
    """The checkpoint in a folder, its files' contents not yet looked at."""
    try:
        record = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = record["files"]
        whole = record[OWN_DIGEST] == _record_digest(record)
    except FileNotFoundError:
        return Skipped(folder.name, "its save did not finish (no complete.json)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Skipped(folder.name, "its complete.json cannot be read")
    match = NAME.match(folder.name)
    if not whole or (match and int(match[1]) != record["step"]):
        return Skipped(folder.name, "its complete.json is damaged")
    for name, file in files.items():
        size = _size(folder / name)
        if size != file["bytes"]:
            reason = "is missing" if size is None else f"has {size:,} of {file['bytes']:,} bytes"
            return Skipped(folder.name, f"{name} {reason}")
    return Checkpoint(folder, record)


def check_contents(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> Skipped | None:
    """Hold files' checksums against the seal; None where all agree.

    Args:
        checkpoint: with its seal read.
        names: files to look at; all of them without.
    """
    files = checkpoint.record["files"]
    try:
        found = digests(checkpoint.path, list(files) if names is None else names)
    except OSError as error:
        return Skipped(checkpoint.path.name, f"it cannot be read: {error.strerror}")
    for name, seen in found.items():
        if seen["sha256"] != files[name]["sha256"]:
            return Skipped(checkpoint.path.name, f"{name} is damaged (its checksum differs)")
    return None


def newest_whole(
    root: Path, *, contents: bool = True
) -> tuple[Checkpoint | None, tuple[Skipped, ...]]:
    """The newest checkpoint that can be used, and the newer ones that cannot.

    Args:
        root: the run's checkpoint folder.
        contents: whether checksums are held against the files, which reads them all.
    """
    skipped: list[Skipped] = []
    for folder in checkpoint_folders(root):
        found = whole(folder, contents=contents)
        if isinstance(found, Checkpoint):
            return found, tuple(skipped)
        skipped.append(found)
    return None, tuple(skipped)


def whole(folder: Path, *, contents: bool = True) -> Checkpoint | Skipped:
    """The checkpoint in a folder, or why it cannot be used."""
    found = read_seal(folder)
    if isinstance(found, Skipped):
        return found
    return (check_contents(found) if contents else None) or found


def rotate(
    root: Path, keep: int, protected: Collection[str] = (), newest: int | None = None
) -> list[str]:
    """Remove sealed checkpoints beyond the newest `keep`, and unsealed ones below the newest.

    Args:
        root: the run's checkpoint folder.
        keep: at least 1: the last whole checkpoint is never removed.
        protected: names to keep as well, such as the best one.
        newest: step of the checkpoint that was just sealed; later ones neither count nor go.

    Returns:
        Names that were removed.
    """
    folders = [
        folder for folder in checkpoint_folders(root) if newest is None or _step(folder) <= newest
    ]
    sealed = [folder for folder in folders if isinstance(read_seal(folder), Checkpoint)]
    if not sealed:
        return []
    first = folders.index(sealed[0])
    stay = {folder.name for folder in sealed[: max(keep, 1)]} | set(protected)
    leave = [folder for folder in folders[first:] if folder.name not in stay]
    return remove(leave)


def remove_unsealed(root: Path) -> list[str]:
    """Remove what saves that did not finish have left; nothing can use it."""
    return remove(folder for folder in checkpoint_folders(root) if not (folder / SEAL).is_file())


def set_aside(root: Path, skipped: Iterable[Skipped]) -> None:
    """Move damaged checkpoints out of the way of those to come; nothing is deleted."""
    for one in skipped:
        folder = root / one.name
        if (folder / SEAL).is_file():
            move_aside(folder)


def move_aside(folder: Path) -> Path:
    """Move a checkpoint to `set-aside/` beside it, under a name that is free."""
    aside = folder.parent / SET_ASIDE
    aside.mkdir(exist_ok=True)
    target, number = aside / folder.name, 1
    while target.exists():
        number += 1
        target = aside / f"{folder.name}.{number}"
    return folder.rename(target)


def remove(folders: Iterable[Path]) -> list[str]:
    """Remove checkpoints, seal first: one that is half removed must not look whole."""
    removed = []
    for folder in folders:
        with contextlib.suppress(OSError):
            if folder.is_symlink():
                folder.unlink()
                continue
            (folder / SEAL).unlink(missing_ok=True)
            shutil.rmtree(folder)
            removed.append(folder.name)
    return removed


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def describe(skipped: Iterable[Skipped], say: Callable[[str], object]) -> None:
    """Say which checkpoints were skipped and why."""
    for one in skipped:
        say(f"skipped {one.name}: {one.reason}")
