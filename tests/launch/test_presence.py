"""The sign that a launcher leaves for other machines."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launcher.errors import EnvironmentNotReady
from launcher.launch.presence import STALE_SECONDS, Presence, refuse_elsewhere
from launcher.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create({"plan.json": "{}"})
    return run


def test_a_run_on_another_machine_is_refused(run: RunDirectory) -> None:
    run.presence.write_text("node-7 4711\n")
    with pytest.raises(EnvironmentNotReady, match="is running on node-7"):
        refuse_elsewhere(run)
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".clock")] == []


def test_a_sign_that_is_not_kept_fresh_says_nothing(run: RunDirectory) -> None:
    run.presence.write_text("node-7 4711\n")
    past = time.time() - STALE_SECONDS - 1
    os.utime(run.presence, (past, past))
    refuse_elsewhere(run)


@pytest.mark.parametrize("text", ["", "\n"])
def test_a_sign_that_cannot_be_read_says_nothing(text: str, run: RunDirectory) -> None:
    run.presence.write_text(text)
    refuse_elsewhere(run)


def test_one_s_own_sign_is_for_others(run: RunDirectory) -> None:
    with Presence(run):
        assert run.presence.read_text().split()[1] == str(os.getpid())
        refuse_elsewhere(run)
    assert not run.presence.exists()


def test_a_full_disk_is_not_for_a_sign_to_report(run: RunDirectory) -> None:
    run.presence.mkdir()  # what cannot be written, also by root
    with Presence(run):
        pass
