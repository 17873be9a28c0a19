"""Which run is meant: by path, by name below ./runs, or the newest."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import SpecError
from launcher.runs.directory import RunDirectory

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
    known = ", ".join(str(run.path) for run in known_runs()) or "none below ./runs"
    raise SpecError("run_not_found", f"{name} is no run directory", fix=f"there are: {known}")


def known_runs() -> list[RunDirectory]:
    """Runs below ./runs, the oldest first."""
    plans = sorted(RUNS.glob("*/plan.json"), key=lambda path: path.stat().st_mtime)
    return [RunDirectory(path.parent) for path in plans]
