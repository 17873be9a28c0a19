"""Which run or sweep is meant: by path or name, or by what Slurm knows of its jobs."""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.errors import SpecError
from launcher.insight.find import find_run, find_sweep
from launcher.runs.directory import RunDirectory
from launcher.runs.sweep import SweepDirectory


def which_run(name: str | None) -> RunDirectory:
    """The run that a path, a name or a job number means, from any directory.

    Raises:
        SpecError: where there is none.
    """
    try:
        return find_run(name)
    except SpecError:
        if name is None or shutil.which("squeue") is None:
            raise
        from launcher.launch.slurm_array import TASK, run_of_task

        if TASK.fullmatch(name):
            found = run_of_task(name)
        else:
            found = _run_of_job(int(name)) if name.isdecimal() else _run_of_name(name)
        if found is None:
            raise
        return found


def which_sweep(name: str | None) -> SweepDirectory | None:
    """The sweep that a path, a name or an array's job number means, from any directory."""
    found = find_sweep(name)
    if found is not None or name is None or shutil.which("squeue") is None or "/" in name:
        return found
    from launcher.launch.slurm_array import sweep_of_job, sweep_of_name

    return sweep_of_job(int(name)) if name.isdecimal() else sweep_of_name(name)


def _run_of_job(number: int) -> RunDirectory | None:
    """By a job's number, also one that only the accounting remembers."""
    from launcher.launch.accounting import past_job
    from launcher.launch.slurm import run_of_job

    found = run_of_job(number)
    past = past_job(number) if found is None else None
    return _there(past.folder) if past is not None else found


def _run_of_name(name: str) -> RunDirectory | None:
    """By a run's name, which its jobs have, too."""
    from launcher.launch.accounting import past_jobs_of_name
    from launcher.launch.slurm import run_of_name

    found = run_of_name(name)
    if found is not None:
        return found
    past = (_there(job.folder) for job in reversed(past_jobs_of_name(name)))
    return next((run for run in past if run is not None), None)


def _there(folder: str) -> RunDirectory | None:
    run = RunDirectory(Path(folder))
    return run if run.exists() else None
