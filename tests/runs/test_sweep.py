"""The folder of a sweep and its record."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.runs.directory import RunDirectory
from launcher.runs.sweep import SweepDirectory, SweepRecord, compact

RECORD = SweepRecord(
    version="1",
    spec={"model": "m", "rate": 1e-4, "name": "模型 \u2028"},
    axes=({"key": "training.seed", "values": [1, 2], "texts": ["1", "2"]},),
    runs=(
        {"name": "0-seed=1", "values": {"training.seed": 1}},
        {"name": "1-seed=2", "values": {"training.seed": 2}},
    ),
    jobs=(7,),
)


def test_a_record_is_read_back(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path / "sweep")
    assert not sweep.exists()
    sweep.create(RECORD)
    assert sweep.exists()
    assert SweepDirectory(sweep.path).record == RECORD


def test_a_task_leads_to_its_run_also_after_a_move(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path / "sweep")
    sweep.create(RECORD)
    RunDirectory(sweep.runs[1].path).create({"plan.json": "{}"})
    moved = sweep.path.rename(tmp_path / "moved")
    assert (moved / "tasks" / "1" / "plan.json").read_text("utf-8") == "{}"
    sweep = SweepDirectory(moved)
    sweep.create(RECORD)  # again: the links are there
    assert [run.exists() for run in sweep.runs] == [False, True]


def test_one_launcher_holds_a_sweep(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path / "sweep")
    sweep.create(RECORD)
    with sweep.held() as first, SweepDirectory(sweep.path).held() as second:
        assert (first, second) == (True, False)
    with sweep.held() as again:
        assert again


@pytest.mark.parametrize(
    ("tasks", "text"),
    [([0], "0"), (range(6), "0-5"), ([3, 7, 9], "3,7,9"), ([5, 0, 1, 4, 8], "0-1,4-5,8")],
)
def test_tasks_as_slurm_writes_them(tasks: list[int], text: str) -> None:
    assert compact(tasks) == text
