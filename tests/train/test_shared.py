"""Ranks that do not see the first one's folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.directory import RunDirectory
from launcher.train import shared
from launcher.train.shared import FolderNotSharedError, check_shared


class Channel:
    """The ranks' side channel between threads of one process."""

    def __init__(self, rank: int, world: int, box: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self.box, self.barrier = rank, world, box, barrier

    def gather(self, value: Any) -> list[Any]:
        self.box[self.rank] = value
        self.barrier.wait()
        found = list(self.box)
        self.barrier.wait()
        return found

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]

    def wait(self) -> None:
        self.gather(None)


def _check(folders: list[Path]) -> Iterator[BaseException | None]:
    barrier, box = threading.Barrier(len(folders)), [None] * len(folders)
    for folder in folders:
        folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(len(folders)) as pool:
        futures = [
            pool.submit(check_shared, RunDirectory(folder), Channel(i, len(folders), box, barrier))
            for i, folder in enumerate(folders)
        ]
        yield from [future.exception() for future in futures]


def test_one_folder_for_all(tmp_path: Path) -> None:
    assert list(_check([tmp_path / "run"] * 3)) == [None] * 3
    assert list((tmp_path / "run").iterdir()) == []


def test_all_ranks_hear_of_the_one_that_sees_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "PATIENCE_SECONDS", 0.2)
    errors = list(_check([tmp_path / "run", tmp_path / "run", tmp_path / "other"]))
    assert [type(error) for error in errors] == [FolderNotSharedError] * 3
    assert "cannot see" in str(errors[0])
