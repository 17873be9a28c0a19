"""Ranks on this machine: started under torchrun, watched, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.launch.presence import Presence
from launcher.launch.processes import BEFORE_TRAINING, MARK, ask_to_stop, end_all
from launcher.plan.types import Plan
from launcher.render.quote import shell_line
from launcher.render.text import bytes_text
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import Failure, find_failure
from launcher.train.process import STARTED, die_with_parent

POLL_SECONDS = 0.1
# For stragglers after the agent has ended by itself, and for all after a second Ctrl-C.
END_GRACE_SECONDS = 2.0
# Signals that ask for a checkpoint and an end.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def check_environment(plan: Plan, present_gpus: int) -> None:
    """Refuse what this machine cannot start.

    Raises:
        EnvironmentNotReady: too few GPUs, several nodes, or no training packages.
    """
    topology = plan.topology
    if topology.nodes > 1:
        raise EnvironmentNotReady(
            "several_nodes",
            f"{topology.nodes} nodes cannot be started from here",
            fix="use --on slurm, or start the command of `sftlaunch plan` on each node",
        )
    if topology.device == "cuda" and topology.gpus > present_gpus:
        have = f"only {present_gpus}" if present_gpus else "none"
        raise EnvironmentNotReady(
            "no_gpus",
            f"{topology.gpus} GPUs were asked for, there are {have} here",
            fix="use --dry-run to plan for other hardware, --on slurm to run elsewhere, "
            "or --device cpu to rehearse here",
        )
    check_packages(plan)


def check_packages(plan: Plan) -> None:
    """Refuse a machine that lacks what the plan's ranks import.

    Raises:
        EnvironmentNotReady: with what to install.
    """
    from importlib.util import find_spec  # noqa: PLC0415 - only a run pays for it

    needed = ["torch", "transformers", "trl", "accelerate", "datasets"]
    if plan.worker.peft is not None:
        needed.append("peft")
    if plan.worker.model["quantization"] is not None:
        needed.append("bitsandbytes")
    if plan.strategy.startswith("zero"):
        needed.append("deepspeed")
    trackers = plan.worker.training_arguments["report_to"]
    needed += trackers
    missing = [name for name in needed if find_spec(name) is None]
    extra = [name for name in missing if name in trackers]
    if missing:
        raise EnvironmentNotReady(
            "packages",
            f"not installed: {', '.join(missing)}",
            fix=f"pip install 'sftlaunch[train]' {' '.join(extra)}".rstrip(),
        )


def check_space(plan: Plan, run: RunDirectory) -> None:
    """Hold the free space against the checkpoints that the plan predicts.

    Raises:
        EnvironmentNotReady: where they would not fit.
    """
    needed = plan.storage.total_bytes
    if needed is None:
        return
    try:
        there = next(path for path in (run.path, *run.path.parents) if path.is_dir())
        held = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
        disk = shutil.disk_usage(there)
    except OSError:
        return  # a folder that cannot be looked at cannot be written either, which is said then
    free = disk.free + held
    # No size at all: not a disk (/proc), and not for this check to refuse.
    if not disk.total or needed <= free:
        return
    keep = plan.worker.checkpoints["keep"]
    raise EnvironmentNotReady(
        "disk_space",
        f"{keep} checkpoints and the final save need {bytes_text(needed)}, "
        f"{bytes_text(free)} are free for {run.path}",
        why=f"one checkpoint has {bytes_text(plan.storage.checkpoint_bytes or 0)}, "
        "and the next is written before an old one goes",
        fix="use --set checkpoints.keep=1, or --output on another disk",
    )


def launch(
    plan: Plan,
    run: RunDirectory,
    environment: Mapping[str, str],
    on_poll: Callable[[], None],
    argv: Sequence[str] | None = None,
) -> tuple[ExitCode, Failure | None]:
    """Run the plan's command to its end.

    Args:
        plan: with its command.
        run: whose files are written.
        environment: added to this process's own.
        on_poll: called about ten times a second.
        argv: starts the ranks; `start_argv` without it.

    Returns:
        DONE, RUN_FAILED with the first failing rank's error, or PREEMPTED.
    """
    attempt = next_attempt(run)
    run.logs(attempt).mkdir(parents=True, exist_ok=True)
    run.update_status(state="running", attempt=attempt, stage="starting", error=None)
    # The plan may be another at the next attempt: each keeps what it ran.
    shutil.copyfile(run.plan, run.logs(attempt) / "plan.json")
    with StopSignals() as stop, Presence(run) as presence:

        def look() -> None:
            presence.refresh()
            on_poll()

        started = argv or start_argv(plan)
        code = run_ranks(plan, run, attempt, started, environment, stop=stop, on_poll=look)
    on_poll()
    return outcome(run, code, stopped=stop.asked)


def next_attempt(run: RunDirectory) -> int:
    """Number of the attempt that starts now."""
    return int(run.read_status().get("attempt") or 0) + 1


def run_ranks(
    plan: Plan,
    run: RunDirectory,
    attempt: int,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    stop: StopSignals,
    on_poll: Callable[[], None],
    node: int = 0,
) -> int:
    """Run one node's ranks to their end, whatever ends them; returns their agent's exit code."""
    with run.launcher_log(attempt, node).open("ab") as log:
        log.write(f"{shell_line(argv)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            argv,
            env={
                **os.environ,
                **environment,
                "SFTLAUNCH_ATTEMPT": str(attempt),
                MARK: os.path.realpath(run.path),
                STARTED: str(time.time()),
                # Ranks import this very package, also from a checkout.
                "PYTHONPATH": python_path(),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Where this process is killed, the ranks save and stop instead of staying behind.
            preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        patience = float(plan.worker.limits["shutdown_timeout_seconds"])
        return _watch(process, run, stop, patience, on_poll)


def start_argv(plan: Plan) -> list[str]:
    """Argv that starts the planned ranks on this machine.

    The planned torchrun line on GPUs. On CPU the same ranks are forked after one import,
    and a single rank needs no agent (docs/decisions/0002-fork-on-cpu.md).
    """
    *_, run_directory = plan.command
    if plan.strategy == "single" and not plan.worker.limits["max_restarts"]:
        return [sys.executable, "-m", "launcher.train", run_directory]
    if plan.topology.device == "cpu":
        ranks = str(plan.topology.gpus)
        return [sys.executable, "-m", "launcher.train.agent", ranks, run_directory]
    return own_torchrun(plan.command)


def own_torchrun(argv: Sequence[str]) -> list[str]:
    """A torchrun line with the program that stands beside this interpreter."""
    beside = Path(sys.executable).with_name("torchrun")
    return [str(beside) if beside.is_file() else argv[0], *argv[1:]]


def python_path() -> str:
    """PYTHONPATH under which processes import this very package."""
    package_parent = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(part for part in (package_parent, inherited) if part)


def _watch(
    process: subprocess.Popen[bytes],
    run: RunDirectory,
    stop: StopSignals,
    patience: float,
    on_poll: Callable[[], None],
) -> int:
    """Wait for the end. Whatever ends the wait, no process of the run outlives it."""
    forwarded, grace = False, END_GRACE_SECONDS
    try:
        while (code := process.poll()) is None:
            if stop.asked and not forwarded:
                forwarded = True
                ask_to_stop(str(run.path), process.pid)
                # Where the agent gives up before its ranks have saved, they are waited for.
                grace = patience
            on_poll()
            time.sleep(POLL_SECONDS)
        return code
    finally:
        end_all(str(run.path), END_GRACE_SECONDS if stop.at_once else grace)
        process.wait()


class StopSignals:
    """Takes over the signals that ask for a stop, while the ranks run.

    The first one is passed on to the ranks, which save and stop; more of the same kind say
    nothing new, but a second Ctrl-C ends all at once. Around several runs, one of these hears
    what those within it were asked.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = False
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.asked = True
        around = getattr(self._before.get(number), "__self__", None)
        if isinstance(around, StopSignals):
            around.asked = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self.at_once = True
            raise KeyboardInterrupt


def outcome(
    run: RunDirectory, code: int, *, stopped: bool, seen: str = ""
) -> tuple[ExitCode, Failure | None]:
    """What happened, by what the ranks recorded; torchrun's exit code is only a hint.

    Args:
        run: whose ranks have ended.
        code: of their agent.
        stopped: whether they were asked to stop.
        seen: what the launcher saw, where that says more than the exit code.
    """
    status = run.read_status()
    state, attempt = status.get("state"), int(status["attempt"])
    if state == "completed" and run.final.is_dir():
        return ExitCode.DONE, None  # torchrun exits 1 after any SIGTERM, also one that came late
    if state == "preempted" and (stopped or find_failure(run, attempt, "").rank is None):
        return ExitCode.PREEMPTED, None
    if stopped and status.get("stage") in BEFORE_TRAINING:
        run.update_status(state="preempted", stage="stopped before training")
        return ExitCode.PREEMPTED, None
    detail = f"the ranks were ended by signal {-code}" if code < 0 else f"the ranks exited {code}"
    if code == 0:
        detail = "the ranks ended before the run was complete"
    failure = find_failure(run, attempt, seen or detail)
    with contextlib.suppress(OSError):  # a full disk must not hide the failure
        run.update_status(state="failed", error=failure.as_json())
    return ExitCode.RUN_FAILED, failure
