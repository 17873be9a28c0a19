"""Start ranks by fork after one import: `python -m launcher.train.agent N RUN...`.

The same ranks as `torchrun --standalone --nproc-per-node=N -m launcher.train RUN`, by the
same elastic agent, but torch, transformers and trl are imported once and not once a rank,
and children of a fork leave without C++ static destruction. CPU runs only: nothing that
is imported may have touched CUDA before a fork, and that is not proven here
(docs/decisions/0002-fork-on-cpu.md). Several runs go one after the other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

from launcher.runs.directory import RunDirectory
from launcher.train.__main__ import read_plan, run_to_end, set_offline
from launcher.train.packages import leave_out_unused
from launcher.train.process import finish

MONITOR_SECONDS = 0.05
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SIGNALLED_EXIT = 128  # as shells count


def run_rank(folder: str) -> None:
    """What each forked rank does."""
    parent = os.getppid()
    run_to_end(RunDirectory(Path(folder)), forked=True)
    if os.getppid() != parent:
        finish(0)  # elastic would wait for word from an agent that is gone


def start(ranks: int, folder: str) -> int:
    """Run one directory's ranks to their end; 0 where all succeeded."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=Path(folder).name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=read_plan(RunDirectory(Path(folder))).worker.limits["max_restarts"],
        monitor_interval=MONITOR_SECONDS,
        start_method="fork",
        # This agent passes stop signals on by itself: elastic would stop listening to ranks
        # that save, and kill them after its shutdown timeout.
        signals_to_handle="SIGQUIT",
    )
    try:
        elastic_launch(config, run_rank)(folder)
    except ChildFailedError as error:
        # The ranks have recorded their own errors; this one only says that there are some.
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def pass_on(number: int, frame: object) -> None:
    """Let the ranks save and stop; before there are any, there is nothing to wait for."""
    children = multiprocessing.active_children()
    if not children:
        sys.exit(SIGNALLED_EXIT + number)
    for pid in (child.pid for child in children if child.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def main(arguments: list[str]) -> int:
    """Import once, then run each directory."""
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    ranks, *folders = arguments
    runs = [RunDirectory(Path(folder)) for folder in folders]
    plans = [read_plan(run) for run in runs]
    set_offline(plans, runs)
    leave_out_unused(plans)
    import launcher.train.session  # noqa: F401 - what the ranks inherit

    # torch leaves an empty error file for each rank in the temporary folder (torch 2.13, spawn).
    with tempfile.TemporaryDirectory(prefix="sftlaunch-agent-") as temporary:
        tempfile.tempdir = temporary
        return max(start(int(ranks), folder) for folder in folders)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
