"""Where the runs of a sweep stand, from their records and from what Slurm said of their jobs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from launcher.runs.directory import ON_THE_WAY, STATES, RunDirectory
from launcher.runs.sweep import SweepDirectory

# Of metrics.jsonl, from its end: some twenty lines.
TAIL_BYTES = 8192


class LiveJob(Protocol):
    """What is asked of a job that is not over."""

    @property
    def state(self) -> str:
        """Slurm's word for it."""

    @property
    def pending(self) -> bool:
        """Whether it waits."""


@dataclass(frozen=True)
class RunState:
    """One run of a sweep."""

    index: int
    name: str
    run: RunDirectory
    values: Mapping[str, Any]
    state: str
    """One of STATES; by its job where it has one."""
    stage: str
    step: int | None
    max_steps: int | None
    loss: float | None
    eval_loss: float | None
    error: str | None
    job: str | None
    """Number of its job where that is not over."""
    lost: bool
    """Whether its job ended without a word in the record."""

    def as_json(self) -> dict[str, Any]:
        """As `status --json` has it."""
        hidden = ("run", "lost")
        values = {name: value for name, value in vars(self).items() if name not in hidden}
        return {**values, "run": str(self.run.path)}


def run_states(sweep: SweepDirectory, live: Mapping[str, LiveJob] | None) -> list[RunState]:
    """All runs in order.

    Args:
        sweep: with its record.
        live: jobs that are not over, by number; None where nobody could be asked.
    """
    return [
        _state(index, run, said["values"], live)
        for index, (run, said) in enumerate(zip(sweep.runs, sweep.record.runs, strict=True))
    ]


def count_states(states: Sequence[RunState]) -> dict[str, int]:
    """How many runs are in each state, in the order of STATES, without the empty ones."""
    found = Counter(one.state for one in states)
    return {state: found[state] for state in STATES if found[state]}


def _state(
    index: int, run: RunDirectory, values: Mapping[str, Any], live: Mapping[str, LiveJob] | None
) -> RunState:
    record = run.read_status()
    state = str(record.get("state") or "planned")
    jobs = [str(job) for job in record.get("slurm", {}).get("jobs", [])]
    job = next((name for name in jobs if live and name in live), None)
    if job is not None and live and state != "completed":
        state = "queued" if live[job].pending else "running"
    gone = live is not None and bool(jobs) and job is None
    last = last_metrics(run)
    error = record.get("error")
    return RunState(
        index=index,
        name=run.path.name,
        run=run,
        values=values,
        state=state,
        stage=str(record.get("stage") or ""),
        step=max(record.get("step") or 0, last.get("step") or 0) or None,
        max_steps=record.get("max_steps"),
        loss=last.get("loss"),
        eval_loss=last.get("eval_loss"),
        error=str(error.get("message")) if isinstance(error, dict) else None,
        job=job,
        lost=gone and state in ON_THE_WAY,
    )


def last_metrics(run: RunDirectory) -> dict[str, Any]:
    """The last value of each metric, from the file's end."""
    try:
        with run.metrics.open("rb") as stream:
            start = max(0, stream.seek(0, 2) - TAIL_BYTES)
            stream.seek(start)
            lines = stream.read().split(b"\n")
    except FileNotFoundError:
        return {}
    # The first line may have lost its beginning, the last one its end.
    found: dict[str, Any] = {}
    for line in lines[1 if start else 0 : -1]:
        try:
            found |= {key: value for key, value in json.loads(line).items() if value is not None}
        except ValueError:
            continue
    return found
