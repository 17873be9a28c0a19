"""Ranks on this machine: started under torchrun, watched, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.launch.processes import MARK, end_all
from launcher.plan.types import Plan
from launcher.render.quote import shell_line
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import Failure, find_failure

POLL_SECONDS = 0.1
# After a stop was asked for, and for stragglers after the agent has ended by itself.
STOP_GRACE_SECONDS = 30.0
END_GRACE_SECONDS = 2.0


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
    _check_packages(plan)


def _check_packages(plan: Plan) -> None:
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


def launch(
    plan: Plan,
    run: RunDirectory,
    environment: Mapping[str, str],
    on_poll: Callable[[], None],
) -> tuple[ExitCode, Failure | None]:
    """Run the plan's command to its end.

    Args:
        plan: with its command.
        run: whose files are written.
        environment: added to this process's own.
        on_poll: called about ten times a second.

    Returns:
        DONE, RUN_FAILED with the first failing rank's error, or PREEMPTED.
    """
    attempt = int(run.read_status().get("attempt") or 0) + 1
    run.logs(attempt).mkdir(parents=True, exist_ok=True)
    run.update_status(state="running", attempt=attempt, stage="starting", error=None)
    argv = start_argv(plan)
    with run.launcher_log(attempt).open("ab") as log, _stop_signals():
        log.write(f"{shell_line(argv)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            argv,
            env={
                **os.environ,
                **environment,
                "SFTLAUNCH_ATTEMPT": str(attempt),
                MARK: str(run.path),
                # Ranks import this very package, also from a checkout.
                "PYTHONPATH": _python_path(),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = _watch(process, run, on_poll)
    on_poll()
    return _outcome(run, attempt, code)


def start_argv(plan: Plan) -> list[str]:
    """Argv that starts the planned ranks on this machine.

    The planned torchrun line on GPUs. On CPU the same ranks are forked after one import,
    and a single rank needs no agent (docs/decisions/0002-fork-on-cpu.md).
    """
    *_, run_directory = plan.command
    if plan.strategy == "single":
        return [sys.executable, "-m", "launcher.train", run_directory]
    if plan.topology.device == "cpu":
        ranks = str(plan.topology.gpus)
        return [sys.executable, "-m", "launcher.train.agent", ranks, run_directory]
    beside = Path(sys.executable).with_name("torchrun")
    program = str(beside) if beside.is_file() else plan.command[0]
    return [program, *plan.command[1:]]


def _python_path() -> str:
    package_parent = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(part for part in (package_parent, inherited) if part)


def _watch(process: subprocess.Popen[bytes], run: RunDirectory, on_poll: Callable[[], None]) -> int:
    """Wait for the end. Whatever ends the wait, no process of the run outlives it."""
    grace = STOP_GRACE_SECONDS
    try:
        while (code := process.poll()) is None:
            on_poll()
            time.sleep(POLL_SECONDS)
        grace = END_GRACE_SECONDS
        return code
    finally:
        end_all(str(run.path), grace)
        process.wait()


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop a run as Ctrl-C does, instead of orphaning its ranks."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(run: RunDirectory, attempt: int, code: int) -> tuple[ExitCode, Failure | None]:
    """What happened, by what the ranks recorded; torchrun's exit code is only a hint."""
    state = run.read_status().get("state")
    if code == 0 and state == "completed":
        return ExitCode.DONE, None
    if state == "preempted":
        return ExitCode.PREEMPTED, None
    detail = f"the ranks were ended by signal {-code}" if code < 0 else f"the ranks exited {code}"
    if code == 0:
        detail = "the ranks ended before the run was complete"
    failure = find_failure(run, attempt, detail)
    run.update_status(state="failed", error=failure.as_json())
    return ExitCode.RUN_FAILED, failure
