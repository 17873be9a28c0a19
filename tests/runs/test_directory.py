"""Records of a run: whole lines only, and none of steps that are taken again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runs.directory import RunDirectory, append_line, read_lines


def write(path: Path, steps: list[int], end: str = "") -> None:
    """One record a step, and a line that was cut off."""
    for step in steps:
        append_line(path, {"step": step, "loss": 1.5, "text": "模型\n"})
    with path.open("a", encoding="utf-8") as stream:
        stream.write(end)


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_lines(path)]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_records_after_the_step_are_dropped(run: RunDirectory) -> None:
    write(run.metrics, [0, 1, 2, 3, 3, 4, 5])
    write(run.samples, [0, 2, 2, 4])
    before = list(read_lines(run.metrics))
    run.forget_after(3)
    assert steps_of(run.metrics) == [0, 1, 2, 3, 3]
    assert steps_of(run.samples) == [0, 2, 2]
    assert run.read_metrics() == before[:5], "what stays is as it was"


@pytest.mark.parametrize("end", ["{", '{"step": 6, "lo', '{"step": 1, "loss": 2.5}', "\0\0"])
def test_a_cut_off_last_line_is_dropped_too(end: str, run: RunDirectory) -> None:
    write(run.metrics, [1, 2], end)
    run.forget_after(9)
    write(run.metrics, [3])
    assert steps_of(run.metrics) == [1, 2, 3]
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_files_that_are_not_there_are_not_made(run: RunDirectory) -> None:
    run.forget_after(5)
    assert list(run.path.iterdir()) == []


def test_nothing_but_the_records_is_touched(run: RunDirectory) -> None:
    write(run.metrics, [1, 2])
    run.update_status(state="running", step=2)
    run.forget_after(1)
    assert sorted(path.name for path in run.path.iterdir()) == ["metrics.jsonl", "status.json"]
    assert run.read_status()["step"] == 2


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(0, 30), max_size=12),
    step=st.integers(-1, 31),
    end=st.sampled_from(["", '{"step": 1']),
)
def test_what_stays_is_what_came_before(steps: list[int], step: int, end: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        write(run.metrics, steps, end)
        run.forget_after(step)
        kept = [one for one in steps if one <= step]
        assert steps_of(run.metrics) == kept
        before = run.metrics.read_bytes()
        run.forget_after(step)
        assert run.metrics.read_bytes() == before


def test_starting_over_forgets_everything(run: RunDirectory) -> None:
    write(run.metrics, [0, 1, 2], "{")
    run.forget_after(-1)
    assert run.read_metrics() == []


def test_a_line_that_was_cut_off_and_written_on_spoils_no_other(run: RunDirectory) -> None:
    write(run.metrics, [1, 2], '{"step": 3, "lo')
    write(run.metrics, [4, 5])
    assert steps_of(run.metrics) == [1, 2, 5]
    run.forget_after(5)
    assert steps_of(run.metrics) == [1, 2, 5]
    assert run.metrics.read_text(encoding="utf-8").count("\n") == 3
