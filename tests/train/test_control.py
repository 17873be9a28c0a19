"""Stop requests, agreement and heartbeats, in processes that really get the signals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.train.control import STOP_SIGNALS, StopRequest
from launcher.train.process import STARTED
from tests.support import ROOT

PRELUDE = """
import os, select, signal, socket, subprocess, sys, threading, time
from launcher.train import control
from launcher.train.control import Heartbeat, StoppedBeforeTraining, StopRequest

def wait(seconds=None):
    "Until standard input is closed."
    return select.select([sys.stdin], [], [], seconds)[0]
"""
# A rank that says when it was asked to stop, and ends as its standard input does.
RANK = """
stop = StopRequest()
stop.install()
stop.training = "training" in sys.argv
if "disarmed" in sys.argv:
    stop.disarm()
said = None
try:
    print("ready")
    while not wait(0.01):
        if stop.wanted and said is None:
            said = stop.reason
            print("wanted", said)
    print("done", stop.reason)
except StoppedBeforeTraining as request:
    print("stopped", request)
except KeyboardInterrupt:
    print("interrupted")
"""


class Child:
    """A process whose lines are read one by one."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", PRELUDE + script, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """Its next line; empty at its end."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.03)  # signals of one kind that are pending together are one

    def finish(self) -> tuple[str, str]:
        """Close its input; what it then printed, on both streams."""
        out, err = self.process.communicate(timeout=30)
        return out.strip(), err


@contextmanager
def started(script: str, *arguments: str) -> Iterator[Child]:
    """A process that is ready, and ended whatever happens."""
    child = Child(script, *arguments)
    try:
        assert child.line() == "ready", child.process.communicate()
        yield child
    finally:
        child.process.kill()
        child.process.communicate()


# --- before training ----------------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_training_ends_the_rank(number: signal.Signals) -> None:
    with started(RANK) as child:
        child.send(number)
        assert child.line() == f"stopped {number.name}"
        assert child.finish() == ("", "")
        assert child.process.returncode == 0


def test_where_nothing_needs_saving_a_signal_interrupts_nothing() -> None:
    with started(RANK, "disarmed") as child:
        child.send(signal.SIGTERM)
        assert child.line() == "wanted SIGTERM"
        assert child.finish() == ("done SIGTERM", "")


CLEAN_UP = """
stop = StopRequest()
stop.install()
try:
    print("ready")
    wait()
except StoppedBeforeTraining as request:
    print("cleaning up")
    wait()
    print("cleaned up", request)
"""


def test_a_second_signal_does_not_interrupt_the_clean_up() -> None:
    """An agent asks again, and so does the kernel when the agent dies (die_with_parent)."""
    with started(CLEAN_UP) as child:
        child.send(signal.SIGTERM)
        assert child.line() == "cleaning up"
        child.send(signal.SIGTERM)
        assert child.finish() == ("cleaned up SIGTERM", "")


# --- while training -----------------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_training_is_a_wish(number: signal.Signals) -> None:
    with started(RANK, "training") as child:
        child.send(number)
        assert child.line() == f"wanted {number.name}"
        assert child.finish() == (f"done {number.name}", "")
        assert child.process.returncode == 0


@pytest.mark.parametrize(
    "more",
    [(signal.SIGTERM,) * 4, (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)],
)
def test_the_first_request_stands_and_more_change_nothing(more: tuple[signal.Signals, ...]) -> None:
    with started(RANK, "training") as child:
        child.send(signal.SIGTERM)
        assert child.line() == "wanted SIGTERM"
        child.send(*more)
        assert child.finish() == ("done SIGTERM", "")


def test_one_ctrl_c_that_comes_twice_does_not_interrupt() -> None:
    """From the terminal, and again from torchrun within milliseconds."""
    with started(RANK, "training") as child:
        child.send(signal.SIGINT)
        assert child.line() == "wanted SIGINT"
        child.send(signal.SIGINT, signal.SIGINT)
        assert child.finish() == ("done SIGINT", "")


def test_a_second_ctrl_c_ends_at_once() -> None:
    with started(RANK, "training") as child:
        child.send(signal.SIGINT)
        assert child.line() == "wanted SIGINT"
        time.sleep(1.2)
        child.send(signal.SIGTERM)
        child.send(signal.SIGINT)
        assert child.line() == "interrupted"


# --- the clock ----------------------------------------------------------------------------


def test_stop_after_is_by_the_clock() -> None:
    stop = StopRequest(0.2)
    assert not stop.wanted
    assert stop.reason is None
    time.sleep(0.21)
    assert stop.wanted
    assert stop.reason == "--stop-after 0.2 s"


@pytest.mark.parametrize(("seconds_ago", "wanted"), [(100.0, True), (1.0, False)])
def test_the_clock_starts_with_the_launch(
    seconds_ago: float, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is started again has no more time than the first."""
    monkeypatch.setenv(STARTED, str(time.time() - seconds_ago))
    assert StopRequest(50).wanted == wanted


def test_a_signal_s_reason_is_not_replaced_by_the_clock() -> None:
    stop = StopRequest(0.001)
    stop.reason = "SIGTERM"
    time.sleep(0.01)
    assert stop.wanted
    assert stop.reason == "SIGTERM"


def test_without_a_limit_nobody_wants_to_stop() -> None:
    assert not StopRequest().wanted
    assert not StopRequest(1e6).wanted


# --- a sibling that is gone ---------------------------------------------------------------

ORPHAN = """
control.SIBLING_POLL_SECONDS, control.ORPHAN_GRACE_SECONDS = 0.02, 0.1
sibling = subprocess.Popen(["sleep", "30"])
stop = StopRequest()
stop.install()
stop.training = True
here = socket.gethostname()
stop.watch_siblings([(here, sibling.pid), (here, os.getpid()), ("another-host", 1)])
if "disarmed" in sys.argv:
    stop.disarm()
if "alone" in sys.argv:
    sibling.kill()
print("ready")
try:
    def collective_that_never_ends():
        wait(float(sys.argv[1]))
    if "signal" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    collective_that_never_ends()
    print("stayed")
finally:
    sibling.kill()
"""


def test_only_a_stopping_rank_whose_sibling_is_gone_leaves() -> None:
    """The others go on: a live sibling will come, and without a stop the error is its own."""
    cases = [
        (("signal", "alone"), False),
        (("signal",), True),
        (("alone",), True),
        (("signal", "alone", "disarmed"), True),
    ]
    waits = {True: "0.4", False: "20"}  # long enough to see that it does leave, when busy too
    children = [Child(ORPHAN, waits[stays], *arguments) for arguments, stays in cases]
    for child, (arguments, stays) in zip(children, cases, strict=True):
        lines = [child.line(), child.line()]
        _, err = child.finish()
        assert lines == ["ready", "stayed" if stays else ""], (arguments, err)
        assert child.process.returncode == (0 if stays else 1)
        assert ("are gone, this one cannot go on" in err) != stays
        assert ("collective_that_never_ends" in err) != stays, "its stacks are in the log"


# --- the heartbeat ------------------------------------------------------------------------

STUCK = """
def stuck_here():
    "In C, with the interpreter's lock: no Python thread runs any more."
    pow(3, 10**8, 10**8 + 7)
    sum(range(10**11))

print("ready")
heart = Heartbeat(0.4)
heart.start()
# A save had more time; one sign of life after it, and the usual limit holds again.
heart.beat(at_least_seconds=30)
heart.beat()
stuck_here()
"""
ALIVE = """
print("ready")
beat = Heartbeat(0.6)
beat.start()
until = time.monotonic() + 0.8
while time.monotonic() < until:
    beat.beat()
    time.sleep(0.01)
beat.stop()
short = Heartbeat(0.05)
short.beat()  # nothing is expected before the start
time.sleep(0.15)
short.limit_seconds = 5
short.start()
short.limit_seconds = 0.05
short.beat(at_least_seconds=30)
time.sleep(0.15)
short.stop()
short.beat()
time.sleep(0.15)
print("alive")
"""


@pytest.fixture(scope="module")
def hearts() -> Iterator[tuple[Child, Child]]:
    """A rank that is stuck, and one that lives meanwhile."""
    with started(ALIVE) as alive, started(STUCK) as stuck:
        yield stuck, alive


def test_a_stuck_rank_ends_with_its_stacks(hearts: tuple[Child, Child]) -> None:
    stuck, _ = hearts
    begin = time.monotonic()
    out, err = stuck.finish()
    assert time.monotonic() - begin < 10, "the limit, on a busy machine"
    assert stuck.process.returncode == 1
    assert out == ""
    assert "Timeout (0:00:00.4" in err
    assert "in stuck_here" in err


def test_a_rank_that_makes_progress_lives(hearts: tuple[Child, Child]) -> None:
    _, alive = hearts
    assert alive.finish() == ("alive", "")
    assert alive.process.returncode == 0


# --- the ranks' agreement -----------------------------------------------------------------

TWO_RANKS = """
import json
from pathlib import Path
import torch.distributed as dist
import torch.multiprocessing as processes
from launcher.train.control import Ranks

folder = Path(sys.argv[1])

def view(agreement):
    return [agreement.stop, agreement.finite, str(agreement.loss), str(agreement.grad_norm)]

def rank_main(rank):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    stop = StopRequest()
    stop.install()
    stop.training = True
    ranks = Ranks(stop)
    nan, inf = float("nan"), float("inf")
    seen = {"pid": os.getpid(), "siblings": list(stop._siblings)}
    steps = {
        "healthy": [(2.0, 1.0), (4.0, 3.0)],
        "nan in rank 1": [(2.0, 1.0), (nan, 1.0)],
        "infinite gradient in rank 0": [(2.0, inf), (2.0, 1.0)],
        "infinities that cancel": [(inf, 1.0), (-inf, 1.0)],
    }
    for name, values in steps.items():
        seen[name] = view(ranks.agree(*values[rank]))
    seen["gather"] = ranks.gather({"rank": rank})
    seen["from_first"] = ranks.from_first(f"of rank {rank}")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    seen["wanted"] = stop.wanted
    seen["stop in rank 1"] = view(ranks.agree(2.0, 1.0))
    seen["still"] = view(ranks.agree(2.0, 1.0))
    ranks.wait()
    ranks.limit_collectives(0.3)
    failed = folder / "failed"
    while rank == 1 and not failed.exists():
        time.sleep(0.02)
    if rank == 0:
        begin = time.monotonic()
        try:
            ranks.agree(2.0, 1.0)
        except RuntimeError as error:
            seen["alone"] = [type(error).__name__, time.monotonic() - begin]
        failed.touch()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)

alone = Ranks(StopRequest())
seen = {"healthy": view(alone.agree(2.0, 1.0)), "gather": alone.gather(5)}
seen |= {"from_first": alone.from_first(5), "nan": view(alone.agree(float("nan"), 1.0))}
alone.wait()
alone.limit_collectives(1.0)
(folder / "one.json").write_text(json.dumps(seen))
processes.start_processes(rank_main, nprocs=2, start_method="fork")
print("ready")
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a single rank saw, and each of two under gloo."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with started(TWO_RANKS, str(folder)) as child:
        child.finish()
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.engine
def test_ranks_see_the_same_numbers(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["0"]["healthy"] == seen["1"]["healthy"] == [False, True, "3.0", "2.0"]
    for rank in ("0", "1"):
        assert seen[rank]["gather"] == [{"rank": 0}, {"rank": 1}]
        assert seen[rank]["from_first"] == "of rank 0"


@pytest.mark.engine
@pytest.mark.parametrize(
    "step", ["nan in rank 1", "infinite gradient in rank 0", "infinities that cancel"]
)
def test_what_is_not_finite_in_one_rank_is_known_to_all(
    step: str, seen: dict[str, dict[str, Any]]
) -> None:
    for rank in ("0", "1"):
        stop, finite, loss, norm = seen[rank][step]
        assert not stop
        assert not finite
        assert not (math.isfinite(float(loss)) and math.isfinite(float(norm)))


@pytest.mark.engine
def test_where_one_rank_wants_to_stop_all_do(seen: dict[str, dict[str, Any]]) -> None:
    assert [seen[rank]["wanted"] for rank in ("0", "1")] == [False, True]
    for rank in ("0", "1"):
        assert seen[rank]["stop in rank 1"] == [True, True, "2.0", "1.0"]
        assert seen[rank]["still"] == [True, True, "2.0", "1.0"]


@pytest.mark.engine
def test_ranks_of_a_host_know_each_other(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["0"]["siblings"] == [seen["1"]["pid"]]
    assert seen["1"]["siblings"] == [seen["0"]["pid"]]


@pytest.mark.engine
def test_a_collective_that_a_rank_never_joins_fails_at_the_limit(
    seen: dict[str, dict[str, Any]],
) -> None:
    name, seconds = seen["0"]["alone"]
    assert name in ("RuntimeError", "DistBackendError")
    assert 0.2 < seconds < 10


@pytest.mark.engine
def test_a_single_rank_agrees_with_itself(seen: dict[str, dict[str, Any]]) -> None:
    one = seen["one"]
    assert one["healthy"] == [False, True, "2.0", "1.0"]
    assert one["nan"][1] is False
    assert (one["gather"], one["from_first"]) == ([5], 5)
