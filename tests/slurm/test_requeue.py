"""How a job goes on: the decision table, without a cluster."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.launch.requeue import Action, Attempt, End, Rules, Traces, decide, may_begin, tell_end

REQUEUE = Rules(max_requeues=20, may_requeue=True, chained=False)
OFF = Rules(max_requeues=20, may_requeue=False, chained=False)
ROOT_CAUSE = "Root Cause (first observed failure):\n  rank  : 0\n  exitcode : -9 (pid: 1)"
CHAIN = Rules(max_requeues=20, may_requeue=False, chained=True)


def attempts(*steps: int, end: End = End.TIMEOUT) -> list[Attempt]:
    """Attempts that end at these steps, each begun where the one before ended."""
    starts = [0, *steps]
    return [
        Attempt(number, 7, number - 1, starts[number - 1], step, end)
        for number, step in enumerate(steps, 1)
    ]


@pytest.mark.parametrize("end", [End.TIMEOUT, End.PREEMPTED, End.NODE_FAILURE, End.CRASH])
@pytest.mark.parametrize(
    ("rules", "action"),
    [(REQUEUE, Action.REQUEUE), (CHAIN, Action.NEXT), (OFF, Action.STOP)],
)
def test_it_goes_on_as_the_rules_allow(end: End, rules: Rules, action: Action) -> None:
    assert decide(attempts(5, end=end), rules).action is action


@pytest.mark.parametrize("rules", [REQUEUE, CHAIN, OFF])
@pytest.mark.parametrize(
    ("end", "action"),
    [
        (End.COMPLETED, Action.DONE),
        (End.CANCELLED, Action.STOP),
        (End.STOPPED, Action.STOP),
        (End.UNHEALTHY, Action.STOP),
        (End.UNPREPARED, Action.STOP),
    ],
)
def test_some_ends_are_final(end: End, action: Action, rules: Rules) -> None:
    assert decide(attempts(5, end=end), rules).action is action
    assert may_begin(attempts(5, end=end), rules) is not None


@pytest.mark.parametrize(
    ("steps", "goes_on"),
    [
        ((0,), True),
        ((0, 0), False),
        ((0, 5), True),
        ((5, 5), True),
        ((5, 5, 5), False),
        ((5, 5, 6), True),
        ((5, 9, 9, 9), False),
    ],
)
def test_two_attempts_without_progress_are_enough(steps: tuple[int, ...], goes_on: bool) -> None:
    found = attempts(*steps, end=End.CRASH)
    assert (decide(found, REQUEUE).action is Action.REQUEUE) == goes_on
    assert (may_begin(found, REQUEUE) is None) == goes_on


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_requeues_are_counted(limit: int) -> None:
    rules = Rules(max_requeues=limit, may_requeue=True, chained=False)
    allowed = attempts(*range(1, limit + 1))
    if allowed:
        assert decide(allowed, rules).action is Action.REQUEUE
    over = attempts(*range(1, limit + 2))
    assert decide(over, rules).action is Action.STOP
    assert "max_requeues" in (may_begin(over, rules) or "")


def test_the_first_attempt_always_begins() -> None:
    assert may_begin([], Rules(max_requeues=0, may_requeue=False, chained=False)) is None


@pytest.mark.parametrize(
    ("state", "signals", "extra", "end"),
    [
        ("completed", ["USR1 RUNNING 0"], {}, End.COMPLETED),
        ("preempted", ["USR1 RUNNING 0"], {}, End.TIMEOUT),
        ("preempted", ["USR1 RUNNING 0"], {"cancelled": True}, End.CANCELLED),
        # As Slurm 22.05 answers: cancelled, preempted, preempted with a grace time.
        ("preempted", ["TERM COMPLETING 0"], {}, End.CANCELLED),
        ("preempted", ["TERM COMPLETING 1"], {}, End.PREEMPTED),
        ("preempted", ["TERM COMPLETING 1"], {"restart": 1}, End.CANCELLED),
        ("preempted", ["TERM RUNNING 0"], {}, End.PREEMPTED),
        ("running", ["TERM COMPLETING 1"], {"log": "DUE TO NODE FAILURE"}, End.NODE_FAILURE),
        ("running", [], {"log": "srun: error: Node failure on n2"}, End.NODE_FAILURE),
        ("preempted", [], {"log": ROOT_CAUSE}, End.CRASH),
        ("preempted", ["USR1 RUNNING 0"], {"log": ROOT_CAUSE}, End.TIMEOUT),
        ("running", ["USR1 RUNNING 0", "TERM COMPLETING 0"], {}, End.CANCELLED),
        (
            "running",
            ["USR1 RUNNING 0", "TERM COMPLETING 0"],
            {"log": "CANCELLED AT x DUE TO TIME LIMIT ***"},
            End.TIMEOUT,
        ),
        ("preempted", ["TERM"], {}, End.CANCELLED),
        ("preempted", [], {}, End.PREEMPTED),
        ("preempted", [], {"stage": "stopped by --stop-after 60 s"}, End.STOPPED),
        ("running", [], {}, End.CRASH),
        ("running", [], {"unhealthy": True}, End.UNHEALTHY),
        (None, [], {}, End.CRASH),
        ("running", [], {"unprepared": True}, End.UNPREPARED),
        # A preemption or a limit while it prepares is told by the signal.
        ("running", ["TERM COMPLETING 1"], {"unprepared": True}, End.PREEMPTED),
        ("running", ["USR1 RUNNING 0"], {"unprepared": True}, End.TIMEOUT),
        ("running", [], {"unprepared": True, "log": "DUE TO PREEMPTION ***"}, End.PREEMPTED),
    ],
)
def test_ends_are_told_apart(
    state: str | None, signals: list[str], extra: dict[str, Any], end: End
) -> None:
    blank = Traces(state, "", signals, "", 0, cancelled=False, unhealthy=False)
    assert tell_end(dataclasses.replace(blank, **extra)) is end
