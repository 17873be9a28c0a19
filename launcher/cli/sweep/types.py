"""A sweep that is decided: its runs, and what printing and launching need of them."""

from __future__ import annotations

from dataclasses import dataclass

from launcher import __version__
from launcher.facts.probe import Facts
from launcher.plan.make import Planned
from launcher.runs.directory import RunDirectory
from launcher.runs.sweep import SweepDirectory, SweepRecord
from launcher.spec.load import Source
from launcher.spec.sweep import Axis, Combination


@dataclass(frozen=True)
class SweptRun:
    """One run, decided."""

    combination: Combination
    run: RunDirectory
    planned: Planned
    """With all files but plan.json."""
    facts: Facts


@dataclass(frozen=True)
class DecidedSweep:
    """All runs, with what printing and launching need."""

    sweep: SweepDirectory
    output: str
    """Its folder, as people name it."""
    axes: tuple[Axis, ...]
    common: Source
    """What all runs have in common, as it was said."""
    runs: tuple[SweptRun, ...]
    recipe: str | None
    script: str | None
    """The job array's, where it goes to Slurm."""

    @property
    def record(self) -> SweepRecord:
        """For sweep.json."""
        return SweepRecord(
            version=__version__,
            spec=self.common.data,
            axes=tuple(
                {"key": axis.key, "values": list(axis.values), "texts": list(axis.texts)}
                for axis in self.axes
            ),
            runs=tuple(
                {
                    "name": one.combination.name,
                    "values": {o.key: o.value for o in one.combination.overrides},
                }
                for one in self.runs
            ),
        )
