"""Runs on a real cluster: through preemption, time limits, dead ranks, and to their end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.slurm.cluster import Cluster, command, with_environment
from tests.slurm.conftest import Queued, sft
from tests.support import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
Launch = Callable[..., Queued]
SAME_CURVE = 1e-5
STEPS = 24
URGENT = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 4")
# A file system that takes its time: each fsync of a save, and what the whole save then takes.
FSYNC, SLOW_SAVE = 0.4, 4.0
SIGNAL_APART = 0.5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of one process that nobody disturbed."""
    from launcher.runs.directory import RunDirectory
    from tests.slurm.conftest import SHORT

    output = tmp_path_factory.mktemp("alone") / "run"
    settings = (*SHORT, f"training.max_steps={STEPS}")
    done = sft(
        str(ROOT / "recipes" / "tiny" / "sft.yaml"),
        "--gpus=1",
        "--device=cpu",
        f"--output={output}",
        *(f"--set={setting}" for setting in settings),
    )
    assert done.returncode == 0, done.stderr
    return Queued(RunDirectory(output)).losses


def same_curve(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst < SAME_CURVE


def test_two_nodes_train_as_one_process_does(
    launch: Launch, uninterrupted: dict[int, float]
) -> None:
    queued = launch(steps=STEPS)
    queued.until_over("completed")
    assert queued.ends == ["completed"]
    assert queued.status["engine"] == "FSDP2"
    same_curve(queued.losses, uninterrupted)


def test_preempted_it_saves_and_goes_on_by_itself(
    launch: Launch, uninterrupted: dict[int, float]
) -> None:
    queued = launch(steps=STEPS)
    queued.until_step(7)
    urgent = command("sbatch", "--parsable", *URGENT)
    queued.until("the end of the attempt", lambda: queued.ends[0] is not None)
    saved = queued.saved
    assert saved >= 7
    assert urgent
    queued.until_over("completed")
    assert queued.ends == ["preempted", "completed"]
    assert [attempt["from_step"] for attempt in queued.status["attempts"]] == [0, saved]
    same_curve(queued.losses, uninterrupted)


def test_preempted_while_a_save_takes_seconds(launch: Launch) -> None:
    """Slurm tells all processes, more than once; nobody may leave before the seal."""
    slow = f"export PYTHONPATH={ROOT / 'bench' / 'inject'}:$PYTHONPATH BENCH_SLOW_FSYNC={FSYNC}"
    queued = launch(f"--set=slurm.before=[{json.dumps(slow)}]", steps=10_000)
    queued.until_step(3)
    command("sbatch", *URGENT)
    queued.until("the signal", lambda: queued.run.signals(1).is_file())
    told = time.monotonic()
    # More of the same, as a cluster with a grace time sends them.
    for _ in range(3):
        time.sleep(SIGNAL_APART)
        mine = with_environment(f"SFTLAUNCH_RUN={queued.run.path}")
        for pid in set(mine) & set(with_environment("SLURM_STEP_ID=0")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    queued.until("the end of the attempt", lambda: queued.ends[0] is not None)
    assert time.monotonic() - told > SLOW_SAVE, "the save was not slow, so nothing is shown"
    saved = queued.saved
    assert (queued.ends[0], saved >= 3) == ("preempted", True), queued.told()
    queued.until("the next attempt", lambda: len(queued.ends) == 2)
    assert queued.status["attempts"][1]["from_step"] == saved


@pytest.mark.slow
def test_the_time_limit_twice(launch: Launch, uninterrupted: dict[int, float]) -> None:
    queued = launch("--set=slurm.time_limit=10m", steps=STEPS)
    for step in (4, 12):
        queued.until_step(step)
        # What --signal=B:USR1@T sends, at a moment of ours.
        subprocess.run(["scancel", "-b", "-s", "USR1", str(queued.job)], check=True)
        number = len(queued.ends)
        queued.until("a next attempt", lambda number=number: len(queued.ends) > number)
    queued.until_over("completed")
    assert queued.ends == ["timeout", "timeout", "completed"]
    same_curve(queued.losses, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_time_limit_twice(launch: Launch) -> None:
    """Slurm's own clock, which counts minutes: warned ahead of each limit, saved, queued again."""
    queued = launch(
        "--set=slurm.time_limit=1m", "--set=checkpoints.every_steps=5000", steps=100_000
    )
    queued.until("two limits", lambda: len(queued.ends) == 3, seconds=300)
    queued.until_step(queued.saved + 1)
    assert sft("cancel", str(queued.job)).returncode == 0
    assert queued.ends == ["timeout", "timeout", "cancelled"]
    attempts = queued.status["attempts"]
    for before, after in itertools.pairwise(attempts):
        assert before["from_step"] < before["to_step"] == after["from_step"]
    # No step was taken twice or left out: each limit was met with a checkpoint.
    assert sorted(queued.losses) == list(range(1, max(queued.losses) + 1))


@pytest.mark.slow
def test_the_number_of_requeues_is_bounded(launch: Launch) -> None:
    queued = launch("--set=slurm.max_requeues=1", steps=400)
    for step in (2, 4):
        queued.until_step(step)
        subprocess.run(["scancel", "-b", "-s", "USR1", str(queued.job)], check=True)
        if step == 2:
            queued.until("a next attempt", lambda: len(queued.ends) == 2)
            queued.until_step(queued.saved + 1)
    queued.until_over("preempted")
    assert queued.ends == ["timeout", "timeout"]
    assert "max_requeues" in queued.status["stage"]
    assert queued.saved >= 4


def test_a_killed_rank_and_a_torn_newest_checkpoint(launch: Launch) -> None:
    """The job tries again by itself, from the checkpoint before, and says which it skipped."""
    queued = launch("--set=checkpoints.every_steps=2", steps=12)
    queued.until("two checkpoints", lambda: queued.saved >= 4)
    queued.freeze()
    torn = queued.tear_newest()
    queued.kill_rank(1)
    queued.thaw()
    queued.until_over("completed")
    assert queued.ends == ["crash", "completed"]
    first, second = queued.status["attempts"]
    assert first["to_step"] == second["from_step"] == torn - 2
    assert queued.status["resumed_from"] == f"checkpoint-{torn - 2}"
    assert any(f"checkpoint-{torn}" in note for note in queued.status["notes"])
    assert sorted(queued.losses) == list(range(1, 13))


@pytest.mark.slow
def test_a_dead_node_is_told_from_a_preemption(launch: Launch, cluster: Cluster) -> None:
    queued = launch("--set=checkpoints.every_steps=2", steps=12)
    queued.until_step(5)
    # The one that does not hold the batch script; where that dies, nothing can be written down.
    batch = command("squeue", "--noheader", f"--jobs={queued.job}", "--format=%B")
    (other,) = [name for name in cluster.names if name != batch]
    cluster.crash(other)
    queued.until("the next attempt in the queue", lambda: queued.ends[0] is not None)
    cluster.start_node(other)
    queued.until_over("completed")
    assert queued.ends == ["node_failure", "completed"]
    assert queued.status["attempts"][1]["from_step"] >= 4


@pytest.mark.slow
def test_without_progress_it_is_not_queued_again(launch: Launch) -> None:
    queued = launch(steps=400)
    for number in (1, 2):
        queued.until(
            "ranks", lambda number=number: len(queued.ends) == number and len(queued.ranks()) == 2
        )
        queued.kill_rank(0)
    queued.until_over("failed")
    assert queued.ends == ["crash", "crash"]
    assert "no progress" in queued.status["stage"]
    assert queued.status["error"]["message"]


@pytest.mark.slow
def test_cancelled_with_a_checkpoint_and_resumed(launch: Launch) -> None:
    queued = launch(steps=10_000)
    queued.until_step(3)
    told = sft("status", str(queued.job), "--json")
    assert f'"number": {queued.job}' in told.stdout, told.stderr
    done = sft("cancel", str(queued.job))
    assert done.returncode == 0, done.stderr
    assert "is whole" in done.stdout
    assert (queued.status["state"], queued.ends) == ("preempted", ["cancelled"])
    saved = queued.saved
    assert saved >= 3
    again = sft("resume", str(queued.run.path), "--on=slurm", "--detach")
    assert again.returncode == 0, again.stderr
    queued.until_step(saved + 2)
    assert sft("cancel", str(queued.run.path), "--no-checkpoint").returncode == 0
    assert queued.ends == ["cancelled", "cancelled"]


@pytest.mark.slow
def test_a_chain_goes_on_where_requeue_is_off(launch: Launch) -> None:
    queued = launch("--chain=3", "--set=slurm.requeue=false", steps=12)
    first, second, third = queued.status["slurm"]["jobs"]
    queued.until_step(4)
    subprocess.run(["scancel", "-b", "-s", "USR1", str(first)], check=True)
    queued.until("its end", lambda: queued.ends == ["timeout", "completed"])
    assert [attempt["job"] for attempt in queued.status["attempts"]] == [first, second]
    queued.until(
        "the end of the chain",
        lambda: "CANCELLED" in command("scontrol", "show", "job", "-o", str(third)),
    )


def test_two_jobs_share_a_node(launch: Launch) -> None:
    both = [launch(name=name, nodes=1, steps=4) for name in ("one", "two")]
    for queued in both:
        queued.until_over("completed")


def test_a_bare_scancel_is_no_preemption(launch: Launch) -> None:
    queued = launch(steps=10_000)
    queued.until_step(2)
    subprocess.run(["scancel", str(queued.job)], check=True)
    queued.until_over("preempted")
    assert queued.ends == ["cancelled"]
    assert queued.saved >= 2
