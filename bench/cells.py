"""Run many small trainings on CPU, real engines and all, and collect what they left.

A cell is one training of the recipe tiny's model. Cells with the same number of ranks share
one start of the fork agent, so that the training packages are imported once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.assets import asset
from launcher.errors import Refusal
from launcher.facts.probe import probe
from launcher.plan.make import make_plan
from launcher.render.files import run_files, with_files
from launcher.render.torchrun import launch_environment
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import find_failure
from launcher.spec.load import Override, load_spec

RECIPE = asset("recipes", "tiny", "sft.yaml")
# What makes a cell short and quiet; a cell's own settings come after.
SHORT: dict[str, Any] = {
    "hardware.device": "cpu",
    "batch.global_batch_size": 16,
    "training.max_steps": 3,
    "training.warmup_steps": 0,
    "evaluation.exact_match": False,
    "samples.prompts": [],
    "samples.max_new_tokens": 8,
}


@dataclass(frozen=True)
class Cell:
    """One training."""

    strategy: str
    method: str
    ranks: int = 1
    micro: int | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    resume_from: str | None = None
    """A checkpoint of another cell's run, whose folder is there by the time this one starts."""

    @property
    def name(self) -> str:
        """Folder of the cell's run."""
        size = f"{self.ranks}x{self.micro or 'auto'}"
        return "-".join(part for part in (self.strategy, self.method, size, self.label) if part)


@dataclass
class Outcome:
    """What a cell left behind."""

    cell: Cell
    state: str
    """completed, failed or refused."""
    detail: str = ""
    engine: str = ""
    losses: list[float] = field(default_factory=list)
    run: RunDirectory | None = None


def default_ranks(strategy: str) -> int:
    """The fewest ranks that mean something."""
    return {"single": 1, "hsdp": 4}.get(strategy, 2)


def run_cells(cells: Iterable[Cell], folder: Path, timeout: float = 1800) -> list[Outcome]:
    """Plan and run all cells below `folder`; their order is kept.

    Args:
        cells: with distinct names.
        folder: for the run directories; made here.
        timeout: seconds for all cells of one number of ranks.
    """
    outcomes: list[Outcome] = []
    groups: dict[int, list[str]] = {}
    environment: dict[int, dict[str, str]] = {}
    for cell in cells:
        try:
            run, variables = prepare(cell, folder)
        except Refusal as refusal:
            outcomes.append(Outcome(cell, "refused", str(refusal)))
            continue
        outcomes.append(Outcome(cell, "planned", run=run))
        groups.setdefault(cell.ranks, []).append(str(run.path))
        environment[cell.ranks] = variables
    for ranks, folders in groups.items():
        _start(ranks, folders, environment[ranks], folder, timeout)
    for outcome in outcomes:
        _collect(outcome)
    return outcomes


def reload_all(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Load every final model in one fresh process and let it answer: path -> answer or error."""
    argv = [sys.executable, "-m", "bench.reload", *(str(run.path) for run in runs)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=900)
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def prepare(cell: Cell, folder: Path) -> tuple[RunDirectory, dict[str, str]]:
    """Plan a cell and write its run directory; also the environment its ranks start in."""
    values = {
        **SHORT,
        "strategy": cell.strategy,
        "method": cell.method,
        "hardware.gpus": cell.ranks,
        **({"batch.micro_batch_size": cell.micro} if cell.micro else {}),
        **dict(cell.settings),
    }
    overrides = [Override(key, value, key) for key, value in values.items()]
    loaded = load_spec(RECIPE, overrides)
    facts = probe(loaded.spec)
    path = folder / cell.name
    plan = with_files(make_plan(loaded.spec, facts), str(path), facts.cpu_count)
    worker = dataclasses.replace(plan.worker, resume_from=cell.resume_from)
    plan = dataclasses.replace(plan, worker=worker)
    run = RunDirectory(path)
    run.create(run_files(plan))
    run.update_status(state="planned", attempt=1)
    return run, launch_environment(plan.topology, facts.cpu_count)


def _start(
    ranks: int, folders: list[str], variables: dict[str, str], folder: Path, timeout: float
) -> None:
    argv = [sys.executable, "-m", "launcher.train.agent", str(ranks), *folders]
    with (folder / f"agent-{ranks}.log").open("ab") as log:
        subprocess.run(
            argv,
            env={**os.environ, **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )


def _collect(outcome: Outcome) -> None:
    if outcome.run is None:
        return
    status = outcome.run.read_status()
    outcome.state = status.get("state", "planned")
    outcome.engine = status.get("engine", "")
    outcome.losses = [m["loss"] for m in outcome.run.read_metrics() if "loss" in m]
    if outcome.state != "completed":
        outcome.detail = find_failure(outcome.run, 1, "no record").error
        outcome.state = "failed"
