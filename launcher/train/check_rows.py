"""All rows of a dataset that can be used, and where each lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.train.lengths import Numbers
from launcher.train.scan import FIRST, Part


@dataclass
class Dataset:
    """All rows of a dataset that can be used: sources, numbers, and their order in the run."""

    parts: list[Part]
    numbers: Numbers
    """Of the rows of all parts, one after the other."""
    order: Any
    """Indices of `numbers`, in the order of the run."""

    def part_of(self, row: int) -> tuple[Part, int]:
        """Whose row it is, and which of its own."""
        for part in self.parts:
            if row < len(part.numbers):
                return part, row
            row -= len(part.numbers)
        raise IndexError(row)

    def place(self, row: int) -> str:
        """Where a row lies."""
        part, own = self.part_of(row)
        return part.place(own)

    def places(self, rows: Any) -> list[str]:
        """Where the first of some rows lie."""
        return [self.place(int(row)) for row in rows[:FIRST]]

    def hashes(self) -> Any:
        """A number for each row's content."""
        return np.concatenate([np.frombuffer(part.hashes, dtype=np.uint64) for part in self.parts])
