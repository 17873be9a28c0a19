"""Ranks that cannot say why they ended: stuck ones, killed ones, and unhealthy steps.

The stacks are real: processes of their own are ended by the heartbeat that ranks have.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.directory import RunDirectory
from launcher.runs.failures import LEFT, Failure, find_failure
from tests.support import ROOT

DETAIL = "the ranks exited 1"
# Modules whose paths look like the places in which ranks stand still.
PLACES = {
    "own": "data/loader.py",
    "collective": "torch/distributed/distributed_c10d.py",
    "backward": "torch/autograd/graph.py",
    "agreement": "launcher/train/control.py",
}
STAND = "import time\n\n\ndef stand():\n    time.sleep(60)\n"
STUCK = """
import importlib.util, sys, threading, time
from launcher.train.control import Heartbeat

def load(path):
    spec = importlib.util.spec_from_file_location("place", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

place, helper, before = sys.argv[1:]
sys.stderr.write(before)
sys.stderr.flush()
# A data-loader thread that is busy in the user's own code says nothing about the rank.
threading.Thread(target=load(helper).stand, daemon=True).start()
Heartbeat(0.15).start()
load(place).stand()
"""


def _make_places(folder: Path) -> None:
    """Write every place once, before any process reads one."""
    for name in PLACES.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STAND)


def _stuck(folder: Path, place: str, before: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", STUCK, str(folder / PLACES[place]), str(folder / PLACES["own"])]
    return subprocess.Popen(
        [*argv, before],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a rank that is stuck in each place leaves in its log."""
    folder = tmp_path_factory.mktemp("stuck")
    _make_places(folder)
    wanted = {name: (name, "goes on from checkpoint-4\n") for name in PLACES}
    wanted |= {"silent": ("own", ""), "mid-line": ("own", "Map:  50%")}
    started = {name: _stuck(folder, *how) for name, how in wanted.items()}
    found = {}
    for name, process in started.items():
        found[name] = process.communicate(timeout=30)[1].decode()
        assert process.returncode == 1, found[name]
        assert "Timeout (" in found[name]
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.logs(1).mkdir(parents=True)
    run.launcher_log(1).write_text("torchrun ...\n")
    return run


def find(run: RunDirectory, *, launcher: str = "", **logs: str) -> Failure:
    """The failure of a run with these logs, by `rank_0` and so on."""
    if launcher:
        run.launcher_log(1).write_text(f"torchrun ...\n{launcher}\n")
    for name, text in logs.items():
        run.rank_log(1, int(name.removeprefix("rank_"))).write_text(text)
    return find_failure(run, 1, DETAIL)


def record(run: RunDirectory, rank: int, message: str, kind: str = "RuntimeError") -> None:
    """A rank's own record of its error."""
    values = {
        "rank": rank,
        "time": 100.0 + rank,
        "type": kind,
        "message": message,
        "traceback": f"Traceback (most recent call last):\n  ...\n{kind}: {message}\n",
    }
    run.rank_error(1, rank).write_text(json.dumps(values))


# --- stuck --------------------------------------------------------------------------------


@pytest.mark.parametrize("waiting", ["collective", "backward", "agreement"])
@pytest.mark.parametrize("guilty", [0, 1, 11])
def test_of_stuck_ranks_the_one_that_does_not_wait_is_the_cause(
    waiting: str, guilty: int, run: RunDirectory, stacks: dict[str, str]
) -> None:
    logs = {f"rank_{rank}": stacks[waiting] for rank in (0, 1, 2, 11)}
    logs[f"rank_{guilty}"] = stacks["own"]
    found = find(run, **logs)
    assert found.rank == guilty
    assert f"rank {guilty} stood still" in found.error
    assert found.error.endswith("data/loader.py line 5")
    assert "limits.stuck_after" in found.error
    assert "limits.stuck_after" in found.fix
    assert found.log == f"logs/attempt-1/rank-{guilty}.log"
    assert found.secondary == tuple(rank for rank in (0, 1, 2, 11) if rank != guilty)


def test_where_all_wait_the_first_rank_is_named(run: RunDirectory, stacks: dict[str, str]) -> None:
    found = find(run, rank_0=stacks["collective"], rank_1=stacks["backward"])
    assert (found.rank, found.secondary) == (0, (1,))
    assert "waited for the others" in found.error
    assert "distributed_c10d.py" in found.error


def test_one_rank_s_stacks_are_enough(run: RunDirectory, stacks: dict[str, str]) -> None:
    found = find(run, rank_0="step 3\n", rank_1=stacks["own"])
    assert (found.rank, found.secondary) == (1, ())


def test_the_last_stacks_count(run: RunDirectory, stacks: dict[str, str]) -> None:
    """A rank that was started again writes on into the same log."""
    found = find(run, rank_0=stacks["own"] + stacks["collective"], rank_1=stacks["own"])
    assert (found.rank, found.secondary) == (1, (0,))


def test_words_about_a_timeout_are_no_stacks(run: RunDirectory) -> None:
    text = 'Timeout (s): 30\n  File "data/loader.py", line 3, in read\nKeyError: 3\n'
    found = find(run, rank_0=text)
    assert found.rank is None
    assert found.error == DETAIL


@pytest.mark.parametrize("before", ["silent", "mid-line"])
def test_stacks_are_found_whatever_stands_before_them(
    before: str, run: RunDirectory, stacks: dict[str, str]
) -> None:
    """Ranks other than 0 say nothing before; a progress bar leaves its line open."""
    found = find(run, rank_0=stacks["collective"], rank_1=stacks[before])
    assert found.rank == 1
    assert "stood still" in found.error


def test_a_peer_that_noticed_first_does_not_hide_the_stuck_rank(
    run: RunDirectory, stacks: dict[str, str]
) -> None:
    """The stuck rank's timer fires a moment earlier: its peer then loses the connection."""
    record(run, 1, "[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:5")
    found = find(run, rank_0=stacks["own"])
    assert found.rank == 0
    assert "stood still" in found.error
    assert found.secondary == (1,)


# --- killed -------------------------------------------------------------------------------

ENTRY = """[{index}]:
  time      : 2026-11-21_05:40:2{index}
  host      : node-1.cluster
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 41{rank}) {name}
  error_file: {file}
  traceback : {message}"""
NAMES = {-9: "SIGKILL", -11: "SIGSEGV", -15: "SIGTERM", -6: "SIGABRT"}


def child_failed(codes: dict[int, int], root: int) -> str:
    """ChildFailedError as torch 2.13 prints it; a test below takes torch's own."""
    entries = {}
    for index, (rank, code) in enumerate(codes.items()):
        signal = NAMES.get(code)
        entries[rank] = ENTRY.format(
            index=index,
            rank=rank,
            code=f"{code:<2}",
            name=f" ({signal})" if signal else "",
            file="<N/A>",
            message=f"Signal {-code} ({signal}) received by PID 41{rank}"
            if signal
            else "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html",
        )
    others = "\n".join(text for rank, text in entries.items() if rank != root)
    wide, thin = "=" * 52, "-" * 52
    return (
        f"{wide}\nlauncher.train.agent.run_rank FAILED\n{thin}\nFailures:\n"
        f"{others or '  <NO_OTHER_FAILURES>'}\n{thin}\n"
        f"Root Cause (first observed failure):\n{entries[root]}\n{wide}"
    )


@pytest.mark.parametrize(
    ("codes", "root", "number", "cause"),
    [
        ({0: -9}, 0, 9, "memory ran out"),
        ({0: -15, 1: -9}, 1, 9, "memory ran out"),
        ({0: -15, 1: -15, 2: -15, 13: -9}, 13, 9, "memory ran out"),
        ({0: -11, 1: -15}, 0, 11, "native code"),
        ({0: 1, 1: -6}, 1, 6, "native code"),
    ],
)
def test_a_killed_rank_is_named_with_its_signal(
    codes: dict[int, int], root: int, number: int, cause: str, run: RunDirectory
) -> None:
    found = find(run, launcher=child_failed(codes, root), rank_0="step 3\n")
    assert found.rank == root
    assert found.error == f"it was ended by signal {number}"
    assert cause in found.cause
    assert "dmesg" in found.fix
    assert found.log == f"logs/attempt-1/rank-{root}.log"


def test_the_connections_that_a_killed_rank_cut_are_because_of_it(run: RunDirectory) -> None:
    for rank in (0, 2):
        record(run, rank, "Connection closed by peer [127.0.0.1]:39121")
    found = find(run, launcher=child_failed({0: 1, 1: -9, 2: 1}, 1))
    assert (found.rank, found.secondary) == (1, (0, 2))
    assert "signal 9" in found.error


def test_a_rank_s_own_error_counts_more_than_a_signal(run: RunDirectory) -> None:
    record(run, 0, "CUDA out of memory. Tried to allocate 2.00 GiB", "OutOfMemoryError")
    found = find(run, launcher=child_failed({0: 1, 1: -15}, 0))
    assert found.rank == 0
    assert found.cause == "the GPU's memory is full"


def test_ranks_that_the_agent_ended_are_not_the_cause(run: RunDirectory) -> None:
    found = find(run, launcher=child_failed({0: 1, 1: -15}, 0), rank_0="no words\n")
    assert found.rank is None
    assert found.error == DETAIL


def test_stacks_count_more_than_what_the_agent_saw(
    run: RunDirectory, stacks: dict[str, str]
) -> None:
    found = find(
        run,
        launcher=child_failed({0: 1, 1: -9}, 0),
        rank_0=stacks["own"],
        rank_1=stacks["collective"],
    )
    assert found.rank == 0
    assert "stood still" in found.error


@pytest.mark.engine
@pytest.mark.parametrize(("root", "number"), [(0, 15), (1, 9)])
def test_torch_s_own_words_are_understood(root: int, number: int, run: RunDirectory) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    codes = {0: -15, 1: -9, 2: 1}
    failures = {rank: ProcessFailure(rank, 410 + rank, code, "") for rank, code in codes.items()}
    for rank, failure in failures.items():
        failure.timestamp = 50 if rank == root else 100 + rank
    found = find(run, launcher=str(ChildFailedError("run_rank", failures)))
    assert (found.rank, found.error) == (root, f"it was ended by signal {number}")


# --- unhealthy steps ----------------------------------------------------------------------

UNHEALTHY = (
    "step 12 is unhealthy: loss nan, gradient norm nan: not finite; rows 3, 17 (counted from 0)"
)


@pytest.mark.parametrize("kind", ["UnhealthyStepError", "RuntimeError"])
def test_an_unhealthy_step_is_explained(kind: str, run: RunDirectory) -> None:
    for rank in (0, 1):
        record(run, rank, UNHEALTHY, kind)
    found = find(run)
    assert (found.rank, found.secondary) == (0, (1,))
    assert found.error == f"{kind}: {UNHEALTHY}"
    assert "checkpoints before it are good" in found.cause
    assert "health.policy=skip" in found.fix


def test_a_skipped_step_in_the_log_explains_no_other_failure(run: RunDirectory) -> None:
    record(run, 0, "[Errno 28] No space left on device", "OSError")
    found = find(run, rank_0=f"{UNHEALTHY}; skipped\n")
    assert found.cause == "the disk is full"


def test_a_failure_as_the_status_holds_it(run: RunDirectory) -> None:
    record(run, 1, UNHEALTHY, "UnhealthyStepError")
    values: dict[str, Any] = find(run).as_json()
    assert set(values) == {"rank", "message", "cause", "fix", "log"}
    assert json.loads(json.dumps(values)) == values
    assert values["log"] == "logs/attempt-1/rank-1.log"


# --- ended from outside -------------------------------------------------------------------


def test_where_only_peers_could_write_the_silent_rank_is_the_cause(run: RunDirectory) -> None:
    record(run, 0, "Read error [127.0.0.1]:5784: Connection reset by peer")
    found = find(run, rank_0=f"step 3\n{LEFT}\n", rank_1="step 3\n")
    assert (found.rank, found.secondary) == (1, (0,))
    assert found.error == "it was ended from outside, without a word"
    assert "memory ran out" in found.cause


def test_where_all_left_nobody_is_silent(run: RunDirectory) -> None:
    record(run, 0, "Read error [127.0.0.1]:5784: Connection reset by peer")
    found = find(run, rank_0=f"{LEFT}\n", rank_1=f"{LEFT}\n")
    assert found.rank == 0


@pytest.mark.parametrize(("free", "said"), [(0, True), (2**20, False)])
def test_a_disk_too_full_for_a_record(
    free: int, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(2**30, 2**30 - free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = find_failure(RunDirectory(tmp_path), 1, DETAIL)
    assert (found.cause == "the disk is full") == said
