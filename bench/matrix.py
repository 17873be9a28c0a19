"""Every strategy x method on CPU: runs, is the engine it says, saves, reloads, answers.

Writes docs/matrix.md: `python -m bench.matrix`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench.cells import Cell, Outcome, default_ranks, reload_all, run_cells

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp")
METHODS = ("full", "lora", "qlora", "8bit lora")
ADAPTERS = ("dora", "rslora", "ia3", "prefix_tuning", "prompt_tuning")
SAMPLES = (("samples.prompts", ["What is the capital of France?"]),)
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "matrix.md"


def cells(strategies: tuple[str, ...], methods: tuple[str, ...]) -> list[Cell]:
    """One cell a combination, with samples before and after."""
    found = []
    for method in methods:
        for strategy in strategies:
            name, settings = method, SAMPLES
            if method == "8bit lora":
                name, settings = "lora", (*SAMPLES, ("quantization", "8bit"))
            ranks = default_ranks(strategy)
            label = "8bit" if method == "8bit lora" else ""
            found.append(Cell(strategy, name, ranks, 4, settings, label))
    return found


def verdicts(outcomes: list[Outcome]) -> dict[tuple[str, str], str]:
    """Cell -> what happened, the reload in a fresh process included."""
    runs = [o.run for o in outcomes if o.state == "completed" and o.run]
    answers = reload_all(runs) if runs else {}
    table = {}
    for outcome in outcomes:
        method = "8bit lora" if outcome.cell.label else outcome.cell.method
        key = (outcome.cell.strategy, method)
        if outcome.state == "completed" and outcome.run:
            reloaded = answers[str(outcome.run.path)]
            bad = reloaded.get("error")
            table[key] = f"reload failed: {bad}" if bad else f"ok ({outcome.engine})"
        else:
            table[key] = f"{outcome.state}: {outcome.detail.split(';')[0][:90]}"
    return table


def as_markdown(table: dict[tuple[str, str], str]) -> str:
    """The table, one row a strategy."""
    methods = list(dict.fromkeys(method for _, method in table))
    strategies = list(dict.fromkeys(strategy for strategy, _ in table))
    lines = [
        f"| strategy | {' | '.join(methods)} |",
        f"|---{'|---' * len(methods)}|",
        *(f"| {s} | {' | '.join(table.get((s, m), '') for m in methods)} |" for s in strategies),
    ]
    return "\n".join(lines) + "\n"


INTRO = """# What was run: strategy x method

Made by `python -m bench.matrix` on CPU: real engines under gloo, two ranks (hsdp: four), three
steps of the recipe tiny with a sample before and after. "ok" means: trained, the wrapped model
was the engine in brackets, saved, and the saved model was loaded in a fresh process and
answered. "refused" is the plan's answer, before anything starts. Nothing here ran on a GPU.

"""


def main() -> int:
    """Run all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*METHODS, *ADAPTERS], metavar="METHOD")
    parser.add_argument("--write", action="store_true", help="write docs/matrix.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sftlaunch-matrix-") as folder:
        outcomes = run_cells(cells(STRATEGIES, tuple(options.only)), Path(folder))
        table = verdicts(outcomes)
    text = as_markdown(table)
    sys.stdout.write(text)
    if options.write:
        DOCUMENT.write_text(INTRO + text, encoding="utf-8")
    return int(any(v.startswith(("failed", "reload failed")) for v in table.values()))


if __name__ == "__main__":
    sys.exit(main())
