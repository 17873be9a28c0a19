"""A sweep as people read it: what is common once, and a line a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.plan.make import Planned
from launcher.render.table import table
from launcher.render.text import advice_text, duration, entries, entry, plural

# Different texts of one entry that are shown.
SHOWN_TEXTS = 3
# Values of an axis that are shown.
SHOWN_VALUES = 8
# What the sweep itself says in its own words.
OWN = ("output", "command", "warning")


@dataclass(frozen=True)
class Row:
    """One run of a planned sweep."""

    texts: Sequence[str]
    """Its values, an axis each."""
    folder: str
    planned: Planned
    parameters: int | None
    """Of its base model; None where unknown."""
    rows: int | None
    """Of its dataset; None where unknown."""


def sweep_lines(
    axes: Sequence[tuple[str, Sequence[str]]],
    rows: Sequence[Row],
    jobs: str,
    output: str,
    width: int,
) -> list[str]:
    """The plan of a sweep.

    Args:
        axes: name and values of each.
        rows: the runs, in order.
        jobs: how they are run.
        output: the sweep's folder, as the user named it.
        width: columns of the terminal.
    """
    product = " x ".join(f"{name} {_values(texts)}" for name, texts in axes)
    lines = entry("sweep", f"{plural(len(rows), 'run')}: {product}", width)
    lines += entry("jobs", jobs, width)
    for label, text in _common(rows):
        lines += entry(label, text, width)
    lines += entry("output", f"{output}, a folder a run", width)
    for text, number in _warnings(rows).items():
        where = "" if number == len(rows) else f" ({number} of {plural(len(rows), 'run')})"
        lines += entry("warning", f"{text}{where}", width)
    names = [name for name, _ in axes]
    return [*lines, "", *table(("#", *names, "time", "folder"), _cells(rows))]


def _values(texts: Sequence[str]) -> str:
    if len(texts) <= SHOWN_VALUES:
        return ", ".join(texts)
    return f"{', '.join(texts[: SHOWN_VALUES - 1])}, ... {texts[-1]} ({len(texts):,} values)"


def _common(rows: Sequence[Row]) -> Iterable[tuple[str, str]]:
    """Entries of the runs' plans: once where all agree, the different ones else."""
    found: dict[str, dict[int, list[str]]] = {}
    for number, row in enumerate(rows):
        plan, spec = row.planned.plan, row.planned.spec
        for label, text in entries(plan, spec, row.parameters, row.rows, ""):
            found.setdefault(label, {}).setdefault(number, []).append(text)
    for label, texts in found.items():
        if label in OWN:
            continue
        said = ("; ".join(texts.get(number, ["none"])) for number in range(len(rows)))
        different = list(dict.fromkeys(said))
        text = " | ".join(different[:SHOWN_TEXTS])
        if len(different) > SHOWN_TEXTS:
            text += f" | and {len(different) - SHOWN_TEXTS:,} more"
        yield label, text


def _warnings(rows: Sequence[Row]) -> Counter[str]:
    return Counter(advice_text(advice) for row in rows for advice in row.planned.plan.warnings)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [str(number), *row.texts, _time(row.planned), row.folder] for number, row in enumerate(rows)
    ]


def _time(planned: Planned) -> str:
    time = planned.plan.time
    if time.total_seconds is not None:
        return duration(time.total_seconds)
    return plural(time.steps, "step") if time.steps is not None else "unknown"
