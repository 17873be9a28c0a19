"""What the batch script of a Slurm job asks: `python -m launcher.launch.slurm_job VERB RUN`.

`begin RUN` prints the number of the attempt that starts now, or nothing where the run must
not go on. `prepared RUN` prints yes where its rows are ready. `end RUN CODE [preparation]`
prints done, requeue, next or stop. `refuse RUN REASON` records why no ranks were started,
`unprepared RUN CODE` that a preparation job has failed. It runs beside the ranks, outside any
container, without torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.launch.requeue import (
    FINAL,
    Action,
    Attempt,
    Decision,
    End,
    Rules,
    Traces,
    decide,
    may_begin,
    tell_end,
)
from launcher.plan.types import plan_from_json
from launcher.render.sbatch import may_requeue
from launcher.runs.checkpoints import newest_whole
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import find_failure
from launcher.runs.prepared import LOG as PREPARE_LOG
from launcher.runs.prepared import preparation_error, up_to_date
from launcher.spec.load import load_spec

UNHEALTHY = "UnhealthyStepError"
SCANCEL_SECONDS = 30


def begin(run: RunDirectory, job: Mapping[str, str]) -> str:
    """Number of the attempt that starts now; empty where there is nothing to go on with."""
    record = run.read_status()
    attempts = [_closed(run, attempt) for attempt in read_attempts(record)]
    name = _name(record, job)
    rules = read_rules(run, record, name)
    if record.get("state") == "completed":
        return ""
    why = may_begin(of_submission(attempts, record), rules)
    if why is not None:
        _write(run, attempts, Decision(Action.STOP, why))
        return ""
    number = int(record.get("attempt") or 0) + 1
    attempts.append(Attempt(number, name, int(job.get("SLURM_RESTART_COUNT") or 0), _step(run)))
    run.logs(number).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.plan, run.logs(number) / "plan.json")
    run.update_status(
        state="running",
        attempt=number,
        stage="starting",
        error=None,
        attempts=[as_json(attempt) for attempt in attempts],
        slurm={**record.get("slurm", {}), "job": name},
    )
    return str(number)


def prepared(run: RunDirectory, job: Mapping[str, str]) -> str:
    """Whether the rows that the ranks need are there, as anything or nothing."""
    plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    return "yes" if plan.worker.dataset is None or up_to_date(plan, run) else ""


def unprepared(run: RunDirectory, job: Mapping[str, str], code: str) -> str:
    """Record that the preparation job failed, and let no other job of the run wait for it."""
    error = preparation_error(run, f"it ended with exit code {code}")
    run.update_status(state="failed", stage=FINAL[End.UNPREPARED].reason, error=error)
    _cancel(run.read_status().get("slurm", {}).get("jobs", []))
    return ""


def end(run: RunDirectory, job: Mapping[str, str], code: str, at: str = "ranks") -> str:
    """What the batch script does now.

    Args:
        run: the run.
        job: this process's environment.
        code: exit code of what has ended.
        at: what that was, ranks or preparation.
    """
    record = run.read_status()
    attempts = read_attempts(record)
    last = attempts[-1]
    # torchrun's own restarts count on from the attempt that the job began.
    number = max(last.number, int(record.get("attempt") or 0))
    traces = _traces(run, record, last, number)
    if at == "preparation":
        # Its step ends at once, at times before the batch shell has heard of a signal.
        log = _read(run.path / PREPARE_LOG)
        traces = dataclasses.replace(traces, unprepared=True, log=traces.log + log)
    attempts[-1] = dataclasses.replace(last, to_step=_step(run), end=tell_end(traces))
    name = _name(record, job)
    rules = read_rules(run, record, name)
    decision = decide(of_submission(attempts, record), rules)
    if attempts[-1].end in (End.CRASH, End.UNHEALTHY):
        failure = find_failure(run, number, f"the ranks ended with exit code {code}")
        run.update_status(error=failure.as_json())
    elif attempts[-1].end is End.UNPREPARED:
        run.update_status(error=preparation_error(run, f"it ended with exit code {code}"))
    _write(run, attempts, decision)
    if decision.action in (Action.DONE, Action.STOP):
        _drop_chain(record, name)
    return decision.action.value


def refuse(run: RunDirectory, job: Mapping[str, str], reason: str) -> str:
    """Record why no ranks were started."""
    attempts = read_attempts(run.read_status())
    attempts[-1] = dataclasses.replace(attempts[-1], to_step=_step(run), end=End.CRASH)
    error = {"rank": None, "message": reason, "cause": "", "fix": "", "log": ""}
    run.update_status(error=error)
    _write(run, attempts, Decision(Action.STOP, reason))
    return ""


def read_attempts(record: Mapping[str, Any]) -> list[Attempt]:
    """The attempts that a status record holds."""
    return [
        Attempt(**{**values, "end": End(values["end"]) if values["end"] else None})
        for values in record.get("attempts", [])
    ]


def as_json(attempt: Attempt) -> dict[str, Any]:
    """An attempt as status.json holds it."""
    values = dataclasses.asdict(attempt)
    return {**values, "end": attempt.end.value if attempt.end else None}


def of_submission(attempts: list[Attempt], record: Mapping[str, Any]) -> list[Attempt]:
    """Those of the jobs that the last submission queued: a resume counts from nothing."""
    jobs = record.get("slurm", {}).get("jobs", [])
    return [attempt for attempt in attempts if attempt.job in jobs]


def read_rules(run: RunDirectory, record: Mapping[str, Any], job: int | str) -> Rules:
    """What the run's resolved spec allows."""
    slurm = load_spec(run.spec).spec.slurm
    jobs = record.get("slurm", {}).get("jobs", [])
    return Rules(
        max_requeues=slurm.max_requeues,
        may_requeue=may_requeue(slurm),
        chained=job in jobs[:-1],
    )


def _closed(run: RunDirectory, attempt: Attempt) -> Attempt:
    """An earlier attempt whose end nobody wrote down: the job was killed, or its node died."""
    if attempt.end is not None:
        return attempt
    traces = _traces(run, {}, attempt, attempt.number)
    silent = not traces.signals and "DUE TO" not in traces.log
    found = End.NODE_FAILURE if silent else tell_end(traces)
    return dataclasses.replace(attempt, to_step=_step(run), end=found)


def _traces(run: RunDirectory, record: Mapping[str, Any], attempt: Attempt, last: int) -> Traces:
    """What an attempt has left; `last` is the number of its last restart by torchrun."""
    return Traces(
        state=record.get("state"),
        stage=str(record.get("stage") or ""),
        signals=_read(run.signals(attempt.number)).splitlines(),
        log=_read(run.launcher_log(attempt.number)),
        restart=attempt.restart,
        cancelled=bool(record) and run.cancelled.exists(),
        unhealthy=_unhealthy(run, last),
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _unhealthy(run: RunDirectory, number: int) -> bool:
    paths = run.logs(number).glob("rank-*.error.json")
    return any(json.loads(path.read_text("utf-8"))["type"] == UNHEALTHY for path in paths)


def _step(run: RunDirectory) -> int:
    """Step of the newest whole checkpoint; 0 without one."""
    newest, _ = newest_whole(run.checkpoints, contents=False)
    return newest.step if newest else 0


def _write(run: RunDirectory, attempts: list[Attempt], decision: Decision) -> None:
    state = _state(decision.action, attempts[-1])
    run.update_status(
        state=state,
        stage=decision.reason,
        attempts=[as_json(attempt) for attempt in attempts],
    )


def _state(action: Action, last: Attempt) -> str:
    if action is Action.DONE:
        return "completed"
    if action is not Action.STOP:
        return "preempted"
    # What can be resumed is not lost; a crash has its error to look at.
    return "failed" if last.end in (End.CRASH, End.UNHEALTHY, End.UNPREPARED) else "preempted"


def _drop_chain(record: Mapping[str, Any], job: int | str) -> None:
    """Jobs of the chain that have nothing to do any more."""
    jobs = record.get("slurm", {}).get("jobs", [])
    _cancel(jobs[jobs.index(job) + 1 :] if job in jobs else [])


def _cancel(jobs: Sequence[int | str]) -> None:
    if jobs:
        subprocess.run(["scancel", *map(str, jobs)], check=False, timeout=SCANCEL_SECONDS)


def _name(record: Mapping[str, Any], job: Mapping[str, str]) -> int | str:
    """This job as the run's record names it: a task of an array by array and task."""
    # A job that was queued from inside an array may have inherited the variables.
    task = f"{job.get('SLURM_ARRAY_JOB_ID')}_{job.get('SLURM_ARRAY_TASK_ID')}"
    return task if task in record.get("slurm", {}).get("jobs", []) else int(job["SLURM_JOB_ID"])


VERBS: dict[str, Callable[..., str]] = {
    "begin": begin,
    "end": end,
    "prepared": prepared,
    "refuse": refuse,
    "unprepared": unprepared,
}


def main(arguments: list[str]) -> None:
    """Print one verb's answer."""
    verb, folder, *rest = arguments
    answer = VERBS[verb](RunDirectory(Path(folder)), os.environ, *rest)
    sys.stdout.write(f"{answer}\n" if answer else "")


if __name__ == "__main__":
    main(sys.argv[1:])
