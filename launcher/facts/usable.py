"""Which rows of a file can be used: one rule for the check, the run and the plan's sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.facts.rows import Read, open_rows, read_rows
from launcher.facts.shapes import (
    BadRowError,
    Format,
    Row,
    convert,
    detect,
    is_chat,
    measure,
    rename,
)

SAMPLE_ROWS = 200


class RowCheck:
    """Takes rows of one format and gives them in the trainer's shape."""

    def __init__(self, form: Format, renames: Mapping[str, str]) -> None:
        self.form, self.renames = form, renames
        self._chat: bool | None = None

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """The row in the trainer's shape.

        Raises:
            BadRowError: where training would choke on it.
        """
        named = rename(row, self.renames)
        measure(named, self.form)
        shaped = convert(named, self.form)
        chat = is_chat(shaped)
        if self._chat is None:
            self._chat = chat
        if chat is not self._chat:
            kinds = {True: "messages", False: "text"}
            raise BadRowError(
                f"the row holds {kinds[chat]}, the rows before it {kinds[not chat]}",
                "keep one of the two in a dataset",
            )
        return shaped


def format_of(path: str, reads: Iterator[Read], renames: Mapping[str, str]) -> Format | None:
    """The format that the first rows are in; None without a row that can be read.

    Raises:
        SpecError: `dataset_unknown_format`.
    """
    first = [rename(read.row, renames) for read in islice(reads, SAMPLE_ROWS) if read.row]
    names = tuple(dict.fromkeys(name for row in first for name in row))
    return detect(path, names) if first else None


def checked_rows(
    file: Path, kind: str, check: RowCheck, opener: Any = open_rows
) -> Iterator[tuple[int, Row, Row | None, BadRowError | None]]:
    """Every row of a file: its number, as read, in the trainer's shape, or what is wrong.

    Args:
        file: the file.
        kind: how to read it (`launcher.facts.rows.KINDS`).
        check: of all files of the dataset.
        opener: how the file's bytes are read.
    """
    for read in read_rows(file, kind, opener):
        if read.row is None:
            yield read.number, {}, None, read.error
            continue
        try:
            yield read.number, read.row, check(read.row), None
        except BadRowError as error:
            yield read.number, read.row, None, error
