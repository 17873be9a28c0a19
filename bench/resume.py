"""A resumed run's curve against the uninterrupted one, also on other ranks and strategies.

Every run here trains the recipe tiny's model in float32 with global batch 16 over rows that
do not divide into whole batches, so that an epoch's end lies in the way. A resumed run
starts from another run's checkpoint and is compared step by step with one uninterrupted
process. Writes docs/resume.md: `python -m bench.resume --write`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cells import Cell, Outcome, default_ranks, run_cells
from bench.parity import uneven_rows

STEPS = 12
EVERY = 3
GLOBAL_BATCH = 16
# Two epochs of 6 steps: the last batch of each holds 8 rows.
ROWS = 88
SAME_WORLD_BOUND = 1e-6
OTHER_WORLD_BOUND = 1e-5
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp")
CHAINS = {
    "ddp": (("single", 1), ("ddp", 2), ("ddp", 4), ("ddp", 2)),
    "fsdp": (("single", 1), ("fsdp", 2), ("fsdp", 4), ("fsdp", 2)),
    "zero2": (("single", 1), ("zero2", 2), ("zero2", 4), ("zero2", 2)),
    "zero3": (("single", 1), ("zero3", 2), ("zero3", 4), ("zero3", 2)),
}
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "resume.md"


@dataclass(frozen=True)
class Resumed:
    """One resumed run and how far it strays."""

    method: str
    path: str
    """Strategy x ranks of each stage."""
    outcome: Outcome
    difference: float | None
    bound: float

    @property
    def good(self) -> bool:
        """Whether the curve is the same."""
        return self.difference is not None and self.difference <= self.bound


def settings(rows: Path) -> tuple[tuple[str, object], ...]:
    """Two epochs at a decaying learning rate."""
    return (
        ("dataset.path", str(rows)),
        ("dataset.eval_path", None),
        ("training.max_steps", STEPS),
        ("training.learning_rate", 1e-3),
        ("checkpoints.every_steps", EVERY),
        ("checkpoints.keep", STEPS),
        ("batch.global_batch_size", GLOBAL_BATCH),
    )


class Lab:
    """Runs cells below one folder and compares them with the reference of their method."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = settings(uneven_rows(folder / "rows.jsonl", ROWS))
        self.references: dict[str, list[float]] = {}

    def start(self, method: str, strategies: Sequence[str]) -> None:
        """The uninterrupted runs: the reference, and every strategy's checkpoints."""
        outcomes = run_cells(
            [self.cell(s, method, default_ranks(s)) for s in strategies], self.folder
        )
        self.references[method] = outcomes[0].losses

    def cell(
        self, strategy: str, method: str, ranks: int, label: str = "", source: str | None = None
    ) -> Cell:
        """A run; from the checkpoint `source` where there is one."""
        return Cell(strategy, method, ranks, 4, self.settings, label, source)

    def checkpoint(self, cell: Cell, step: int) -> str:
        """Where a run's checkpoint of a step is."""
        return str(self.folder / cell.name / "checkpoints" / f"checkpoint-{step}")

    def compare(self, outcome: Outcome, step: int, path: str, bound: float) -> Resumed:
        """A run resumed at a step against the reference."""
        method = outcome.cell.method
        wanted = self.references[method][step:]
        same = len(outcome.losses) == len(wanted)
        pairs = zip(outcome.losses, wanted, strict=True) if same else ()
        difference = max(abs(a - b) for a, b in pairs) if same else None
        return Resumed(method, path, outcome, difference, bound)

    def same_world(self, method: str, strategies: Sequence[str]) -> list[Resumed]:
        """Each strategy resumed on as many ranks."""
        step = EVERY
        cells = [
            self.cell(s, method, n, "same", self.checkpoint(self.cell(s, method, n), step))
            for s in strategies
            for n in [default_ranks(s)]
        ]
        return [
            self.compare(o, step, f"{o.cell.strategy} x {o.cell.ranks}", SAME_WORLD_BOUND)
            for o in run_cells(cells, self.folder)
        ]

    def other_strategies(self, method: str, pairs: Sequence[tuple[str, str]]) -> list[Resumed]:
        """From one strategy's checkpoint to another strategy."""
        step = 2 * EVERY
        cells = {
            self.cell(
                new,
                method,
                default_ranks(new),
                f"from-{old}",
                self.checkpoint(self.cell(old, method, default_ranks(old)), step),
            ): f"{old} x {default_ranks(old)} -> {new} x {default_ranks(new)}"
            for old, new in pairs
        }
        outcomes = run_cells(list(cells), self.folder)
        return [self.compare(o, step, cells[o.cell], OTHER_WORLD_BOUND) for o in outcomes]

    def chain(self, method: str, stages: Sequence[tuple[str, int]], name: str) -> list[Resumed]:
        """1 -> 2 -> 4 -> 2 ranks, each stage from the one before."""
        before = self.cell(*_reordered(stages[0], method))
        path = f"{stages[0][0]} x {stages[0][1]}"
        found = []
        for number, (strategy, ranks) in enumerate(stages[1:], 1):
            step = number * EVERY
            label = f"{name}-{number}"
            cell = self.cell(strategy, method, ranks, label, self.checkpoint(before, step))
            path += f" -> {ranks}"
            outcome = run_cells([cell], self.folder)[0]
            found.append(self.compare(outcome, step, f"{path} ({strategy})", OTHER_WORLD_BOUND))
            before = cell
        return found


def _reordered(stage: tuple[str, int], method: str) -> tuple[str, str, int]:
    strategy, ranks = stage
    return strategy, method, ranks


def circle(strategies: Sequence[str]) -> list[tuple[str, str]]:
    """Every strategy once as the source and once as the target."""
    return list(zip(strategies, (*strategies[1:], strategies[0]), strict=True))


def as_markdown(rows: Sequence[Resumed]) -> str:
    """One line a resumed run."""
    lines = ["| method | from -> to (strategy x ranks) | largest difference |", "|---|---|---|"]
    for row in rows:
        detail = row.outcome.detail or f"{len(row.outcome.losses)} losses, {row.outcome.state}"
        shown = f"{row.difference:.1e}" if row.difference is not None else detail[:160]
        lines.append(f"| {row.method} | {row.path} | {shown} |")
    return "\n".join(lines) + "\n"


INTRO = f"""# A resumed run goes on as if it had never stopped

Made by `python -m bench.resume --write` on CPU: real engines under gloo, float32, global batch
{GLOBAL_BATCH}, {STEPS} steps over {ROWS} rows of very different lengths (two epochs, whose last
batches are not full). Each line is the largest difference of any later step's loss from one
uninterrupted process. Bounds: {SAME_WORLD_BOUND:.0e} on as many ranks, {OTHER_WORLD_BOUND:.0e}
on another number of ranks or under another strategy.

"""


def main() -> int:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=["full", "lora"])
    parser.add_argument("--write", action="store_true", help="write docs/resume.md")
    options = parser.parse_args()
    rows: list[Resumed] = []
    with tempfile.TemporaryDirectory(prefix="sftlaunch-resume-") as folder:
        lab = Lab(Path(folder))
        for method in options.methods:
            lab.start(method, STRATEGIES)
            rows += lab.same_world(method, STRATEGIES)
            rows += lab.other_strategies(method, circle(STRATEGIES))
            for name, stages in CHAINS.items():
                rows += lab.chain(method, stages, name)
    text = as_markdown(rows)
    sys.stdout.write(text)
    if options.write:
        DOCUMENT.write_text(INTRO + text, encoding="utf-8")
    return int(not all(row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
