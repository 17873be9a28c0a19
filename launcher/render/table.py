"""Aligned columns, for commands that show many runs."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_ROWS = 40


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned to the left; long tables are cut, and say so."""
    shown = rows[:SHOWN_ROWS]
    widths = [max(len(row[at]) for row in (header, *shown)) for at in range(len(header))]
    lines = [
        "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
        for row in (header, *shown)
    ]
    if len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown):,} more; --json has all of them")
    return lines
