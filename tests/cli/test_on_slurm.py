"""`--on slurm` where there is no cluster: the job is shown, and nothing else is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import sftlaunch, tree


@pytest.fixture
def no_slurm(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(bare_machine))
    return bare_machine


@pytest.mark.parametrize("command", [("plan",), ("run", "--dry-run")])
def test_the_whole_script_is_shown(command: tuple[str, ...], no_slurm: Path) -> None:
    done = sftlaunch(*command, "--on=slurm", "--gpus=16", "--nodes=2", "--gpu=h100-80gb")
    assert done.code == 0, done.err
    assert "#SBATCH --nodes=2" in done.out
    files = sftlaunch("plan", "--json", "--on=slurm", "--gpu=h100-80gb").json["files"]
    assert "job.sbatch" in files
    assert "command.sh" not in files
    assert tree(no_slurm) == {}


def test_without_sbatch_nothing_is_written(no_slurm: Path) -> None:
    done = sftlaunch("--on=slurm", "--device=cpu", "--json")
    assert (done.code, done.json["error"]["code"]) == (4, "no_sbatch")
    assert "--dry-run" in done.err
    assert tree(no_slurm) == {}


def test_a_chain_is_not_queued_again(no_slurm: Path) -> None:
    done = sftlaunch("plan", "--on=slurm", "--device=cpu", "--chain=3")
    assert "#SBATCH --no-requeue" in done.out
    assert sftlaunch("plan", "--on=slurm", "--device=cpu", "--chain=1").code == 2
