"""How a Slurm job goes on after its ranks have ended: a pure decision over its attempts.

It knows records, not Slurm: what is asked of the cluster is `launcher.launch.slurm_job`'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from launcher.runs.failures import KILLED

# Attempts in a row that may end where they began.
IDLE_ATTEMPTS = 2
# What slurmstepd and srun say of it.
NODE_FAILED = re.compile(r"DUE TO NODE FAILURE|srun: error: Node failure on")
# Where the number of restarts stands in a signal's line.
RESTARTS = 2


class End(str, Enum):
    """How an attempt ended."""

    COMPLETED = "completed"
    TIMEOUT = "timeout"
    PREEMPTED = "preempted"
    NODE_FAILURE = "node_failure"
    CRASH = "crash"
    UNHEALTHY = "unhealthy"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    UNPREPARED = "unprepared"
    """The rows could not be made ready; no rank was started."""


class Action(str, Enum):
    """What the batch script does now; its words are those of slurm/job.sbatch."""

    DONE = "done"
    REQUEUE = "requeue"
    NEXT = "next"
    """Leave it to the next job of the chain."""
    STOP = "stop"


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks."""

    number: int
    job: int | str
    """Its number; of an array's task ARRAY_TASK."""
    restart: int
    from_step: int
    """Step of the newest whole checkpoint when it began."""
    to_step: int | None = None
    """The same at its end; None while it runs, or where nobody saw its end."""
    end: End | None = None

    @property
    def idle(self) -> bool:
        """Whether it left nothing behind that a next one could start from."""
        return self.to_step is not None and self.to_step <= self.from_step


@dataclass(frozen=True)
class Rules:
    """What the spec allows."""

    max_requeues: int
    may_requeue: bool
    chained: bool
    """Whether another job of the chain waits."""


@dataclass(frozen=True)
class Decision:
    """What to do, and why, as people read it."""

    action: Action
    reason: str


# Ends after which going on would be wrong, whatever the rules say.
FINAL = {
    End.COMPLETED: Decision(Action.DONE, "the run is complete"),
    End.CANCELLED: Decision(Action.STOP, "it was cancelled"),
    End.STOPPED: Decision(Action.STOP, "its own limit (limits.stop_after) was reached"),
    End.UNHEALTHY: Decision(Action.STOP, "the same step would be unhealthy again"),
    End.UNPREPARED: Decision(Action.STOP, "the preparation failed"),
}


@dataclass(frozen=True)
class Traces:
    """What an attempt has left behind."""

    state: str | None
    """What the ranks recorded: completed, preempted, ..."""
    stage: str
    """Their last words on what they did."""
    signals: Sequence[str]
    """What the batch script was sent: signal, job state and restarts at that moment."""
    log: str
    """What Slurm itself said, in the attempt's launcher.log."""
    restart: int
    """Restarts of the job when the attempt began."""
    cancelled: bool
    """Whether the launcher's own cancel asked for the end."""
    unhealthy: bool
    """Whether a rank recorded an unhealthy step."""
    unprepared: bool = False
    """Whether it was the preparation that ended."""


def tell_end(traces: Traces) -> End:
    """How an attempt ended.

    A job that Slurm ends is COMPLETING whatever the reason; but preempted, or with a dead
    node, it was queued again at that same moment and counts one restart more (Slurm 22.05).
    """
    terms = [signal.split() for signal in traces.signals if signal.startswith("TERM")]
    warned = any(signal.startswith("USR1") for signal in traces.signals)
    queued_again = any(int(term[2]) > traces.restart for term in terms if len(term) > RESTARTS)
    in_grace = any("RUNNING" in term for term in terms)
    table = (
        (traces.state == "completed", End.COMPLETED),
        (traces.cancelled, End.CANCELLED),
        (NODE_FAILED.search(traces.log) is not None, End.NODE_FAILURE),
        (queued_again or in_grace or "DUE TO PREEMPTION" in traces.log, End.PREEMPTED),
        ("DUE TO TIME LIMIT" in traces.log, End.TIMEOUT),
        (bool(terms), End.CANCELLED),
        (warned, End.TIMEOUT),
        (traces.unprepared, End.UNPREPARED),
        (traces.unhealthy, End.UNHEALTHY),
        (traces.state == "preempted" and "--stop-after" in traces.stage, End.STOPPED),
        # The others are told to stop, and do, where one was killed.
        (KILLED.search(traces.log) is not None, End.CRASH),
        # A stop that reached the ranks alone, past the batch script.
        (traces.state == "preempted", End.PREEMPTED),
    )
    return next((end for holds, end in table if holds), End.CRASH)


def decide(attempts: Sequence[Attempt], rules: Rules) -> Decision:
    """What follows the last attempt, whose end is known.

    Args:
        attempts: of this submission, oldest first.
        rules: what is allowed.
    """
    last = attempts[-1]
    if last.end in FINAL:
        return FINAL[last.end]
    refused = _refused(attempts, rules.max_requeues)
    if refused:
        return Decision(Action.STOP, refused)
    why = last.end.value.replace("_", " ") if last.end else "an end that nobody saw"
    if rules.may_requeue:
        return Decision(Action.REQUEUE, f"{why}: queued again")
    if rules.chained:
        return Decision(Action.NEXT, f"{why}: the next job of the chain goes on")
    return Decision(Action.STOP, f"{why}, and slurm.requeue is off")


def may_begin(attempts: Sequence[Attempt], rules: Rules) -> str | None:
    """Why a job that Slurm itself has started again must not train; None where it may.

    Args:
        attempts: of this submission so far, their ends known or lost.
        rules: what is allowed.
    """
    if not attempts:
        return None
    last = attempts[-1]
    if last.end in FINAL:
        return FINAL[last.end].reason
    return _refused(attempts, rules.max_requeues)


def _refused(attempts: Sequence[Attempt], max_requeues: int) -> str | None:
    if len(attempts) > max_requeues:
        return f"it has been started {len(attempts)} times (slurm.max_requeues {max_requeues})"
    recent = attempts[-IDLE_ATTEMPTS:]
    if len(recent) == IDLE_ATTEMPTS and all(attempt.idle for attempt in recent):
        return f"no progress in its last {IDLE_ATTEMPTS} attempts"
    return None
