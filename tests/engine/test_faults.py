"""Runs that are disturbed go on from where they were: a slice of bench.faults."""

from __future__ import annotations

import os

import pytest

from bench.faults import Setting, disturb, fill_disk, reference

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
SETTING = Setting("fsdp", "lora")
SLICE = (
    "SIGKILL one rank in a save",
    "SIGKILL the launcher",
    "SIGTERM all ranks twice",
    "SIGUSR1 one rank",
    "flipped bit",
    "NaN in one rank",
    "one rank hangs",
    "SIGKILL one rank, --max-restarts 1",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return reference(SETTING, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", SLICE)
def test_nothing_is_lost(fault, undisturbed, tmp_path) -> None:
    result = disturb(fault, SETTING, tmp_path, SLICE.index(fault), undisturbed)
    assert result.good, result


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root to mount")
def test_a_full_disk_loses_nothing(undisturbed, tmp_path) -> None:
    result = fill_disk(SETTING, tmp_path, 1, undisturbed)
    assert result.good, result
