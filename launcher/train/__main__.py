"""One rank: `torchrun ... -m launcher.train RUN_DIRECTORY`.

Reads plan.json and nothing else of the request. What the rank prints goes to its own log
in the run directory; its error, if it has one, to a record that the launcher reads.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from pathlib import Path

from launcher.plan.types import Plan, plan_from_json
from launcher.runs.directory import RunDirectory, write_atomic
from launcher.train.process import finish, rank_of

ATTEMPT_VARIABLE = "SFTLAUNCH_ATTEMPT"
USAGE_EXIT = 2


def main(arguments: list[str]) -> None:
    """Run this rank to its end; leaves by `finish` and so never returns."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m launcher.train RUN_DIRECTORY\n")
        sys.exit(USAGE_EXIT)
    run = RunDirectory(Path(arguments[0]).resolve())
    attempt = int(os.environ.get(ATTEMPT_VARIABLE) or run.read_status().get("attempt") or 1)
    log = open_rank_log(run, attempt)
    try:
        plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
        set_environment(plan, run)
        from launcher.train.session import train

        train(plan, run)
    except BaseException as error:  # noqa: BLE001 - the rank must leave its reason behind
        record_error(run, attempt, error)
        traceback.print_exc()
        finish(130 if isinstance(error, KeyboardInterrupt) else 1)
    finally:
        log.flush()
    finish(0)


def open_rank_log(run: RunDirectory, attempt: int) -> os.PathLike[str] | object:
    """Send this process's output to its rank's log; faulthandler writes stacks there too."""
    path = run.rank_log(attempt, rank_of())
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a", encoding="utf-8", buffering=1)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    faulthandler.enable(stream)
    return stream


def set_environment(plan: Plan, run: RunDirectory) -> None:
    """The engine's variables, where no launcher has set them; before torch is imported.

    `accelerate launch` sets the same ones from accelerate.yaml, and those win.
    """
    for name, value in plan.worker.environment.items():
        os.environ.setdefault(name, value.replace("{run_directory}", str(run.path)))


def record_error(run: RunDirectory, attempt: int, error: BaseException) -> None:
    """Leave type, message and time where the launcher can tell the first failing rank."""
    record = {
        "rank": rank_of(),
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        write_atomic(run.rank_error(attempt, rank_of()), json.dumps(record, indent=1))
    except OSError as failure:  # a full disk must not hide the first error
        sys.stderr.write(f"could not record the error: {failure}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
