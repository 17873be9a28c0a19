"""A sweep's folder, with a run directory a run: all of it, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from launcher.cli.refusals import unwritable
from launcher.cli.sweep.types import DecidedSweep, SweptRun
from launcher.render.files import run_files
from launcher.render.slurm import SCRIPT
from launcher.runs.checkpoints import remove_unsealed
from launcher.runs.directory import write_atomic


@contextlib.contextmanager
def written(decided: DecidedSweep, left: Sequence[int]) -> Iterator[None]:
    """The sweep's folder with all that was decided; undone where what follows fails.

    Raises:
        SpecError: where it cannot be written.
    """
    sweep = decided.sweep
    runs = [decided.runs[place] for place in left]
    fresh = not sweep.exists()
    jobs = () if fresh else sweep.read().jobs
    own = sweep.snapshot()
    before = {} if fresh else {one.run: one.run.snapshot() for one in runs}
    try:
        _write(decided, runs, jobs)
        yield
    except BaseException as error:
        sweep.restore(own)
        for run, files in before.items():
            if run.path.exists():
                run.restore(files)
        if isinstance(error, OSError):
            raise unwritable(decided.output, error) from None
        raise


def _write(decided: DecidedSweep, runs: Sequence[SweptRun], jobs: tuple[int, ...]) -> None:
    sweep = decided.sweep
    sweep.create(dataclasses.replace(decided.record, jobs=jobs))
    if decided.script is not None:
        write_atomic(sweep.path / SCRIPT, decided.script)
    for one in runs:
        remove_unsealed(one.run.checkpoints)  # what a full disk has left makes room
        # Not durable: nothing is lost with a run that has not begun, and resume writes it again.
        durable = one.run.exists()
        one.run.create(run_files(one.planned.plan), durable=durable)
        if decided.script is None:  # Slurm's says that it is queued
            one.run.update_status(durable=durable, state="planned", error=None, notes=[])
