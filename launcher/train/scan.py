"""First look at every row of a dataset: which can be used, where each lies, what is odd.

Text files are read line by line before `datasets` sees them, so that a bad row is named by
file and line and a huge one is never held in memory.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.facts.rows import is_array, kind_of, place
from launcher.facts.shapes import BadRowError, Row, detect, oddities, rename
from launcher.facts.usable import RowCheck, checked_rows
from launcher.train.data import (
    Source,
    files_of,
    is_text,
    load_source,
    open_any,
    raw_rows,
    row_check,
)

SHOWN = 10
FIRST = 5
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    place: str
    what: str
    fix: str

    def as_json(self) -> dict[str, str]:
        """As the report holds it."""
        return {"place": self.place, "what": self.what, "fix": self.fix}


@dataclass
class Findings:
    """What was found so far: counts, and the first places of each kind."""

    bad: int = 0
    first_bad: list[Bad] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def refuse(self, where: str, error: BadRowError) -> None:
        """Count a row that cannot be used."""
        self.bad += 1
        if len(self.first_bad) < SHOWN:
            self.first_bad.append(Bad(where, str(error), error.fix))

    def note(self, code: str, where: str) -> None:
        """Count a row that can be used and is odd."""
        self.counts[code] = self.counts.get(code, 0) + 1
        first = self.places.setdefault(code, [])
        if len(first) < FIRST:
            first.append(where)


@dataclass
class Part:
    """The rows of one source that can be used, in TRL's shape."""

    source: Source
    form: str = ""
    rows: Any = None
    """A `datasets.Dataset`; None where no row can be used."""
    bad: int = 0
    numbers: array[int] = field(default_factory=lambda: array("q"))
    """Each row's line."""
    owners: array[int] = field(default_factory=lambda: array("l"))
    """Each row's file, as a place in `files`."""
    files: list[tuple[str, str | None]] = field(default_factory=list)
    """Name and kind (`launcher.facts.rows.place`)."""
    hashes: array[int] = field(default_factory=lambda: array("Q"))

    def place(self, row: int) -> str:
        """Where a row lies."""
        name, kind = self.files[self.owners[row]]
        return place(name, kind, self.numbers[row])

    def keep(self, number: int, shaped: Row) -> None:
        """Remember a row that can be used."""
        self.numbers.append(number)
        self.owners.append(len(self.files) - 1)
        text = json.dumps(shaped, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little"))


def scan(source: Source, found: Findings, tell: Progress) -> Part:
    """Look at every row of a source, then load those that can be used.

    Raises:
        SpecError: where the source as a whole cannot be read.
    """
    _, files = files_of(source)
    part = Part(source)
    rows = None if is_text(files) else raw_rows(source, drop_bad=False)
    for where, shaped, error in (
        _text_rows(part, files) if rows is None else _loaded_rows(part, rows)
    ):
        tell("reading rows", len(part.numbers))
        if shaped is None:
            part.bad += 1
            found.refuse(where, error or BadRowError("it cannot be read"))
            continue
        for code in oddities(shaped):
            found.note(code, where)
    if len(part.numbers):
        tell("loading rows", -1)
        part.rows = load_source(source, drop_bad=part.bad > 0)
    return part


_Seen = tuple[str, "Row | None", "BadRowError | None"]


def _text_rows(part: Part, files: list[Path]) -> Iterator[_Seen]:
    check = row_check(part.source, files)
    part.form = check.form
    for file in files:
        kind = kind_of(file) or ""
        shown = "array" if kind == "json" and is_array(file, open_any) else kind
        part.files.append((str(file), shown))
        for number, _, shaped, error in checked_rows(file, kind, check, open_any):
            if shaped is not None:
                part.keep(number, shaped)
            yield place(file, shown, number), shaped, error


def _loaded_rows(part: Part, rows: Any) -> Iterator[_Seen]:
    """Rows that only `datasets` can read: a bad one has a number and no line."""
    columns = part.source.columns
    names = tuple(rename(dict.fromkeys(rows.column_names), columns))
    check = RowCheck(detect(part.source.path, names), columns)
    part.form = check.form
    part.files.append((part.source.path, None))
    for number, row in enumerate(rows, start=1):
        where = place(part.source.path, None, number)
        try:
            shaped = check(_plain(row))
        except BadRowError as error:
            yield where, None, error
            continue
        part.keep(number, shaped)
        yield where, shaped, None


def _plain(row: Mapping[str, Any]) -> Row:
    return dict(row)
