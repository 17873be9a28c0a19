"""The runs of a sweep as one job array: queued, and followed until none of its jobs is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from launcher.cli.follow import StatusLine
from launcher.cli.on_slurm import LOOKS_PER_QUESTION, POLL_SECONDS, followed, settle
from launcher.cli.options import Request
from launcher.cli.sweep.state import counts_text, end_of, show_states
from launcher.cli.sweep.types import DecidedSweep
from launcher.cli.sweep.write import written
from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.insight.sweep import run_states
from launcher.render.text import plural
from launcher.runs.directory import ON_THE_WAY
from launcher.runs.sweep import SweepDirectory

if TYPE_CHECKING:
    from launcher.launch.slurm_array import Task


def submit_and_follow(decided: DecidedSweep, left: Sequence[int], request: Request) -> ExitCode:
    """Write the runs, queue them, and show the sweep to its end unless asked not to."""
    from launcher.launch.slurm_array import submit_array

    sweep, slurm = decided.sweep, decided.runs[0].planned.spec.slurm
    with written(decided, left):
        fresh = SweepDirectory(sweep.path)
        job = submit_array(fresh, left, slurm.array_throttle)
    click.echo(
        f"queued     job array {job} of {plural(len(left), 'run')}; sftlaunch status {job}",
        err=True,
    )
    if request.detach:
        if request.json:
            show_states(fresh, as_json=True)
        return ExitCode.DONE
    return end_of(fresh, request.json) if follow_jobs(fresh, job) else ExitCode.DONE


def follow_jobs(sweep: SweepDirectory, job: int) -> bool:
    """Follow a sweep to its end, unless the user has seen enough: its jobs go on then."""
    return followed("job array", job, partial(_follow, sweep))


def _follow(sweep: SweepDirectory) -> None:
    """Show a sweep's progress until none of its jobs is left."""
    from launcher.launch.slurm_array import live_tasks

    line, looks = StatusLine(), 0
    live: Mapping[str, Task] = live_tasks()
    while True:
        states = run_states(sweep, live)
        line.show(counts_text(states))
        over = not any(one.job for one in states)
        if over:
            break
        looks += 1
        waits = any(one.run.read_status().get("state") in ON_THE_WAY for one in states if one.job)
        time.sleep(POLL_SECONDS)
        if looks % LOOKS_PER_QUESTION == 0 or not waits:
            # A controller that is down for a while ends no sweep.
            with contextlib.suppress(EnvironmentNotReady):
                live = live_tasks()
    line.close()
    for one in states:
        if one.lost:
            settle(one.run)
