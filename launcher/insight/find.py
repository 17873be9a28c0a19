"""Which run is meant: by path, by name below ./runs, or the newest."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import SpecError
from launcher.runs.directory import RunDirectory
from launcher.runs.sweep import SweepDirectory

RUNS = Path("runs")


def find_run(name: str | None) -> RunDirectory:
    """The run that a path or name means; the newest below ./runs without one.

    Raises:
        SpecError: where there is none; lists what there is.
    """
    if name is None:
        runs = known_runs()
        if not runs:
            raise SpecError("no_runs", "there are no runs below ./runs", fix="name a run directory")
        return runs[-1]
    for path in (Path(name), RUNS / name):
        run = RunDirectory(path)
        if run.exists():
            return run
        _refuse_sweep(SweepDirectory(path))
    known = ", ".join(str(run.path) for run in known_runs()) or "none below ./runs"
    raise SpecError("run_not_found", f"{name} is no run directory", fix=f"there are: {known}")


def find_sweep(name: str | None) -> SweepDirectory | None:
    """The sweep that a path or a name below ./runs means; None where it means something else."""
    if name is None:
        return None
    found = (SweepDirectory(path) for path in (Path(name), RUNS / name))
    return next((sweep for sweep in found if sweep.exists()), None)


def _refuse_sweep(sweep: SweepDirectory) -> None:
    if sweep.exists():
        runs = sweep.runs
        raise SpecError(
            "is_sweep",
            f"{sweep.path} is a sweep of {len(runs)} runs",
            fix=f"name one of them, such as {runs[0].path}",
        )


def known_sweeps() -> list[SweepDirectory]:
    """Sweeps below ./runs, by name."""
    found = (SweepDirectory(path) for path in sorted(RUNS.glob("*")))
    return [sweep for sweep in found if sweep.exists()]


def known_runs() -> list[RunDirectory]:
    """Runs below ./runs, the oldest first."""
    plans = sorted(RUNS.glob("*/plan.json"), key=lambda path: path.stat().st_mtime)
    return [RunDirectory(path.parent) for path in plans]
