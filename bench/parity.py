"""The same curve whatever the split: losses of every strategy and layout against one process.

float32, the same data and order, global batch 16, ten steps. Writes docs/parity.md:
`python -m bench.parity --write`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from bench.cells import Cell, Outcome, run_cells

STEPS = 10
GLOBAL_BATCH = 16
# (ranks, micro batch); accumulation follows from the global batch.
SINGLE = ((1, 16), (1, 4))
PAIRS = ((2, 2), (2, 4))
FOURS = ((4, 1),)
SHARDED = ("ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1")
QLORA = ("ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1")
# Livelier than the defaults for full and LoRA, the default for QLoRA.
LEARNING_RATES = {"full": 1e-3, "lora": 1e-3, "qlora": 2e-4}
BOUNDS = {"full": 1e-5, "lora": 1e-5, "qlora": 1e-3}
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "parity.md"


def uneven_rows(path: Path, rows: int = 400) -> Path:
    """Conversations of very different lengths: answers of 1 to 40 words."""
    rng = random.Random(7)
    words = [
        "red",
        "green",
        "blue",
        "seven",
        "eight",
        "nine",
        "paris",
        "rome",
        "cat",
        "dog",
        "house",
        "tree",
    ]
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(rows):
            answer = " ".join(rng.choices(words, k=rng.choice((1, 2, 5, 40))))
            messages = [
                {"role": "user", "content": f"Say: {rng.choice(words)}"},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path


def settings(method: str, rows: Path | None) -> tuple[tuple[str, object], ...]:
    """Ten steps at a constant learning rate."""
    common: tuple[tuple[str, object], ...] = (
        ("training.max_steps", STEPS),
        ("training.learning_rate", LEARNING_RATES[method]),
        ("training.lr_scheduler_type", "constant"),
        ("dataset.eval_path", None),
        ("batch.global_batch_size", GLOBAL_BATCH),
    )
    return (*common, ("dataset.path", str(rows))) if rows else common


def cells(methods: tuple[str, ...], uneven: Path | None, *, small: bool) -> list[Cell]:
    """The grid; `small` leaves one layout a strategy."""
    found: list[Cell] = []
    for method in methods:
        for rows, label in ((None, ""), (uneven, "uneven")):
            if label and (uneven is None or method == "qlora"):
                continue
            layouts = [("single", *layout) for layout in SINGLE]
            pairs = PAIRS[1:] if small or method == "qlora" or label else PAIRS
            fours = () if small or method == "qlora" or label else FOURS
            names = QLORA if method == "qlora" else SHARDED
            layouts += [(name, *layout) for name in names for layout in (*pairs, *fours)]
            if method != "qlora" and not small:
                layouts.append(("hsdp", 4, 1))
            found += [
                Cell(strategy, method, ranks, micro, settings(method, rows), label)
                for strategy, ranks, micro in layouts
            ]
    return found


def differences(outcomes: list[Outcome]) -> list[tuple[Outcome, float | None]]:
    """Each run's largest loss difference, at any step, from its single-process reference."""
    references = {
        (o.cell.method, o.cell.label): o.losses
        for o in outcomes
        if o.cell.strategy == "single" and o.cell.micro == GLOBAL_BATCH
    }
    found = []
    for outcome in outcomes:
        reference = references[outcome.cell.method, outcome.cell.label]
        same = len(outcome.losses) == len(reference) == STEPS
        pairs = zip(outcome.losses, reference, strict=True) if same else ()
        found.append((outcome, max(abs(a - b) for a, b in pairs) if same else None))
    return found


def within(outcome: Outcome, difference: float | None) -> bool:
    """Whether a run keeps its bound."""
    return difference is not None and difference <= BOUNDS[outcome.cell.method]


def as_markdown(rows: list[tuple[Outcome, float | None]]) -> str:
    """One line a run."""
    lines = [
        "| method | rows | strategy | engine | ranks x micro x accumulation | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for outcome, difference in rows:
        cell = outcome.cell
        micro = cell.micro or 1
        layout = f"{cell.ranks} x {micro} x {GLOBAL_BATCH // (cell.ranks * micro)}"
        shown = f"{difference:.1e}" if difference is not None else outcome.detail[:80]
        lines.append(
            f"| {cell.method} | {cell.label or 'recipe'} | {cell.strategy} | {outcome.engine} "
            f"| {layout} | {shown} |"
        )
    return "\n".join(lines) + "\n"


INTRO = """# The same curve on any number of ranks

Made by `python -m bench.parity --write` on CPU: real engines under gloo, float32, the same data
in the same order, global batch 16, ten steps at learning rate 1e-3 (QLoRA: 2e-4). Each line is
the largest difference of any step's loss from the single-process run 1 x 16 x 1 of the same
method and rows. Bounds: 1e-5 for full and LoRA, 1e-3 for QLoRA. "uneven" rows have answers of 1
to 40 words. Packing is not in the table: it is refused where nothing isolates documents.

"""


def main() -> int:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=["full", "lora", "qlora"])
    parser.add_argument("--write", action="store_true", help="write docs/parity.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sftlaunch-parity-") as folder:
        uneven = uneven_rows(Path(folder) / "uneven.jsonl")
        grid = cells(tuple(options.methods), uneven, small=False)
        rows = differences(run_cells(grid, Path(folder)))
    text = as_markdown(rows)
    sys.stdout.write(text)
    if options.write:
        DOCUMENT.write_text(INTRO + text, encoding="utf-8")
    return int(not all(within(*row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
