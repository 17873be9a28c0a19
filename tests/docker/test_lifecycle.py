"""Runs in real containers: killed, stopped, starved of disk, and to their end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.runs.checkpoints import newest_whole
from launcher.runs.directory import RunDirectory
from tests.docker.conftest import Contained, Launch, recipe, sft
from tests.docker.engine import Engine

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]
SAME_CURVE = 1e-5
STEPS = 24
PREEMPTED = 75
DISK_MB = 40


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> dict[int, float]:
    """The curve of one process outside that nobody disturbed."""
    output = tmp_path_factory.mktemp("alone") / "run"
    done = sft(*recipe(STEPS), "--gpus=1", f"--output={output}")
    assert done.returncode == 0, done.stderr
    return Contained(RunDirectory(output), engine).losses


def same_curve(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst < SAME_CURVE


def owners(folder: Path) -> set[tuple[int, int]]:
    return {(p.lstat().st_uid, p.lstat().st_gid) for p in (folder, *folder.rglob("*"))}


def test_killed_then_stopped_then_resumed_as_another_user(
    launch: Launch, uninterrupted: dict[int, float]
) -> None:
    """Docker starts what was killed again; what was stopped stays so; the curve is the same."""
    one = launch(
        "--set=docker.restarts=2",
        "--set=checkpoints.every_steps=2",
        "--set=training.dataloader_num_workers=2",
        steps=STEPS,
    )
    one.until_step(5)
    assert one.inspect("{{.HostConfig.ReadonlyRootfs}} {{.Config.User}}") == "true 1000:1000"
    first = int(one.inspect("{{.State.Pid}}"))
    identity = Path(f"/proc/{first}/status").read_text()
    assert "Uid:\t1000\t1000\t1000\t1000" in identity
    assert "CapEff:\t0000000000000000" in identity
    assert "NoNewPrivs:\t1" in identity
    os.kill(first, signal.SIGKILL)
    one.until("the second attempt", lambda: one.status["attempt"] == 2)
    one.until("a step after the kill", lambda: max(one.losses, default=0) >= 9)
    assert one.status["resumed_from"].startswith("checkpoint-")
    assert "running" in sft("status", str(one.run.path)).stdout
    assert sft("logs", str(one.run.path)).returncode == 0

    codes: list[str] = []
    waiting = threading.Thread(target=lambda: codes.append(one.engine.docker("wait", one.name)))
    waiting.start()
    stopped = subprocess.run(["docker", "stop", one.name], capture_output=True, check=False)
    waiting.join()
    assert stopped.returncode == 0, stopped.stderr
    one.until_gone("preempted")
    assert codes == [str(PREEMPTED)]
    assert one.saved == max(one.losses) < STEPS
    assert owners(one.run.path) == {(1000, 1000)}
    assert "step" in one.run.container_log.read_text()

    done = sft("resume", str(one.run.path), "--on=docker", "--set=docker.user=4321:4322")
    assert done.returncode == 0, done.stderr
    assert not one.there()
    assert one.status["attempt"] == 3
    assert owners(one.run.final) == {(4321, 4322)}
    same_curve(one.losses, uninterrupted)


def test_ctrl_c_then_cancel(launch: Launch) -> None:
    one = launch("--strategy=fsdp", steps=10_000, watch=True)
    one.until_step(3)
    assert one.process is not None
    # As a terminal sends it: to the launcher and to every client that it has started.
    os.killpg(one.process.pid, signal.SIGINT)
    code, words = one.wait()
    assert code == PREEMPTED, words
    assert "is whole; go on with: sftlaunch resume" in words
    assert (one.there(), one.status["state"]) == (False, "preempted")
    saved = one.saved
    assert saved >= 3

    again = sft("resume", str(one.run.path), "--on=docker", "--detach")
    assert again.returncode == 0, again.stderr
    one.until_step(saved + 2)
    twice = sft("resume", str(one.run.path), "--on=docker")
    assert twice.returncode == 4
    assert "is running" in twice.stderr
    done = sft("cancel", str(one.run.path))
    assert done.returncode == 0, done.stderr
    assert "is whole" in done.stdout
    assert (one.there(), one.status["state"]) == (False, "preempted")
    assert one.saved > saved


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={DISK_MB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(launch: Launch, small_disk: Path) -> None:
    one = launch("--set=checkpoints.every_steps=6", steps=200, watch=True, folder=small_disk)
    one.until("a checkpoint", lambda: one.saved >= 6)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(DISK_MB * 2**20))
    code, words = one.wait()
    assert code == 1, words
    errors = [line for line in words.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, words
    assert "the disk is full" in words
    assert not one.there()
    filler.unlink()
    newest, _ = newest_whole(one.run.checkpoints)
    assert newest is not None
    assert newest.step >= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--strategy=zero2",), ("--strategy=zero3", "--offload=optimizer")]
)
def test_deepspeed_trains_without_a_compiler(launch: Launch, flags: tuple[str, ...]) -> None:
    one = launch(*flags, steps=4, watch=True)
    code, words = one.wait()
    assert code == 0, words
    assert (one.there(), sorted(one.losses)) == (False, [1, 2, 3, 4])


@pytest.mark.slow
def test_a_kill_without_restarts_is_a_failure_that_resumes(launch: Launch) -> None:
    """Nobody watches: the record says how it ended, and the container is gone."""
    one = launch("--set=checkpoints.every_steps=2", steps=12)
    one.until("a checkpoint", lambda: one.saved >= 4)
    os.kill(int(one.inspect("{{.State.Pid}}")), signal.SIGKILL)
    one.until_gone("failed")
    assert one.status["error"]["message"]
    done = sft("resume", str(one.run.path), "--on=docker")
    assert done.returncode == 0, done.stderr
    assert sorted(one.losses) == list(range(1, 13))
