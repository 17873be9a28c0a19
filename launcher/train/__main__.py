"""One rank: `torchrun ... -m launcher.train RUN_DIRECTORY`.

Reads plan.json and nothing else of the request. What the rank prints goes to its own log
in the run directory; its error, if it has one, to a record that the launcher reads.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import ExitCode
from launcher.plan.types import Plan, plan_from_json
from launcher.runs.directory import RunDirectory, write_atomic
from launcher.runs.failures import LEFT
from launcher.runs.prepared import OFFLINE, usable
from launcher.train.control import StoppedBeforeTraining, StopRequest
from launcher.train.health import UnhealthyStepError
from launcher.train.packages import leave_out_unused
from launcher.train.process import die_with_parent, finish, rank_of

ATTEMPT_VARIABLE = "SFTLAUNCH_ATTEMPT"
RESTART_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
USAGE_EXIT = 2
INTERRUPTED_EXIT = 130


def main(arguments: list[str]) -> None:
    """Run this rank to its end; leaves by `finish` and so never returns."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m launcher.train RUN_DIRECTORY\n")
        sys.exit(USAGE_EXIT)
    try:
        run_to_end(RunDirectory(Path(arguments[0]).resolve()))
    except KeyboardInterrupt:
        finish(INTERRUPTED_EXIT)
    except StoppedBeforeTraining:
        finish(ExitCode.PREEMPTED)
    except BaseException:
        finish(1)
    finish(0)


def run_to_end(run: RunDirectory, *, forked: bool = False) -> None:
    """Train as the run's plan says; an error is recorded for the launcher, then raised.

    Args:
        run: the run directory.
        forked: whether the training packages were imported before this process was made,
            so that its environment could not be set ahead of them.
    """
    attempt = attempt_of(run)
    open_rank_log(run, attempt)
    die_with_parent()
    if rank_of() == 0:
        run.update_status(attempt=attempt)
    try:
        plan = read_plan(run)
        stop = StopRequest(plan.worker.limits["stop_after_seconds"])
        stop.install()
        refuse_to_repeat(run, attempt)
        check_start(plan, forked)
        set_environment(plan, run)
        leave_out_unused([plan])
        from launcher.train.session import train

        train(plan, run, stop)
    except StoppedBeforeTraining as request:
        # An agent stops the others like this, too, where one rank has failed.
        if not any(run.logs(attempt).glob("rank-*.error.json")):
            run.update_status(state="preempted", stage=f"stopped by {request} before training")
        raise
    except BaseException as error:
        record_error(run, attempt, error)
        traceback.print_exc()
        raise
    finally:
        # In its log: a rank without it was ended from outside.
        sys.stderr.write(f"{LEFT}\n")
        sys.stdout.flush()
        sys.stderr.flush()


def attempt_of(run: RunDirectory) -> int:
    """Number of this start of the ranks: torchrun's restarts count on from the launch."""
    first = os.environ.get(ATTEMPT_VARIABLE) or run.read_status().get("attempt") or 1
    return int(first) + int(os.environ.get(RESTART_VARIABLE, "0"))


def refuse_to_repeat(run: RunDirectory, attempt: int) -> None:
    """A step that was unhealthy would be so again: do not spend restarts on it.

    Raises:
        UnhealthyStepError: with the earlier attempt's own words.
    """
    if not int(os.environ.get(RESTART_VARIABLE, "0")):
        return
    for path in run.logs(attempt - 1).glob("rank-*.error.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["type"] == UnhealthyStepError.__name__:
            raise UnhealthyStepError(record["message"])


def read_plan(run: RunDirectory) -> Plan:
    """The run's plan, as it was decided before the launch."""
    return plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))


def check_start(plan: Plan, forked: bool) -> None:
    """A fork after CUDA was touched hangs or crashes, so GPU ranks are never forked.

    Raises:
        RuntimeError: where a GPU plan reached the fork agent.
    """
    if forked and plan.topology.device != "cpu":
        raise RuntimeError("ranks on GPUs are started by torchrun, not by fork")


def open_rank_log(run: RunDirectory, attempt: int) -> None:
    """Send this process's output to its rank's log; faulthandler writes stacks there too."""
    path = run.rank_log(attempt, rank_of())
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a", encoding="utf-8", buffering=1)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    faulthandler.enable(sys.stderr)


def set_environment(plan: Plan, run: RunDirectory) -> None:
    """The engine's variables, where no launcher has set them; before torch is imported.

    `accelerate launch` sets the same ones from accelerate.yaml, and those win.
    """
    for name, value in plan.worker.environment.items():
        os.environ.setdefault(name, value.replace("{run_directory}", str(run.path)))
    set_offline([plan], [run])
    # DeepSpeed runs `ninja`, which pip put beside this Python: not on PATH where the virtual
    # environment was not activated. One that is on PATH wins.
    folders = (os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts"))
    os.environ["PATH"] = os.pathsep.join(folders)


def set_offline(plans: Sequence[Plan], runs: Sequence[RunDirectory]) -> None:
    """Look nothing up on the Hub where everything was fetched before; ahead of all imports."""
    if all(usable(plan, run) for plan, run in zip(plans, runs, strict=True)):
        os.environ.update(OFFLINE)


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
