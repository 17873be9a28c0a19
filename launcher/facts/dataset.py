"""A dataset's format, size and first mistakes, from a sample of a local file.

Decides which of the trainer's formats a file is in, and refuses rows that training would
choke on. It must not load the `datasets` library, read a whole large file, or open a
network connection; what cannot be sampled lightly is left unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import SpecError
from launcher.facts.rows import (
    COMPRESSED,
    MIB,
    Read,
    is_array,
    kind_of,
    lines_of,
    open_rows,
    place,
    read_rows,
)
from launcher.facts.shapes import BadRowError, Format, detect, measure, rename

if TYPE_CHECKING:
    from collections.abc import Mapping

_SAMPLE_ROWS = 200
# Counting rows reads the file: 64 MiB of lines take about 50 ms; CSV and gzip are slower.
_COUNTED_BYTES = {"lines": 64 * MIB, "csv": 4 * MIB, "zipped": 4 * MIB, "array": 16 * MIB}


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What a sample of one file says about it."""

    path: str
    """The path as the user gave it."""

    format: Format
    """Which of the trainer's formats the rows are in."""

    rows: int | None
    """Rows in the file; None where neither counting nor estimating was cheap."""

    rows_exact: bool
    """Whether `rows` was counted; False where it was estimated from bytes."""

    sampled_rows: int
    """Rows that were read and checked, from the beginning of the file."""

    mean_characters: float
    """Mean characters of trained text in a sampled row; 4 a token for `input_ids`."""

    max_characters: int
    """Most characters of trained text in a sampled row."""

    columns: tuple[str, ...]
    """Columns of the sampled rows, in order of appearance, after renaming."""

    conversational: bool
    """Whether rows are, or become, messages with roles: a chat template is needed."""

    file_bytes: int
    """Size of the file in bytes, as stored."""

    folder: bool = False
    """Whether it is one file of a folder: its rows are not all."""


def probe_dataset(
    path: str, columns: Mapping[str, str] | None = None, *, drop_bad: bool = False
) -> DatasetFacts | None:
    """Facts about a local .jsonl, .json, .csv, .tsv or .txt file, compressed or not, or a folder.

    Args:
        path: a file, a folder, or a Hub name.
        columns: the trainer's column name to the file's own, where they differ.
        drop_bad: go on behind a row that cannot be used; the run leaves it out.

    Returns:
        The facts; None for a Hub name, and a file that cannot be sampled
        without the `datasets` library (Parquet, Arrow, .zst, a very large JSON array).

    Raises:
        SpecError: `dataset_not_found`, `dataset_empty`, `dataset_bad_row`,
            `dataset_unknown_format`.
    """
    file = Path(path).expanduser()
    if not file.exists():
        if _looks_local(path):
            raise SpecError(
                "dataset_not_found",
                f"the dataset {path} does not exist",
                why=f"it was looked for at {file.absolute()}",
                fix="correct `dataset`, or give a Hub name like `organisation/name`",
            )
        return None
    if file.is_dir():
        return _probe_folder(path, file, columns or {}, drop_bad=drop_bad)
    kind = kind_of(file)
    if kind is None or file.suffix.lower() == ".zst":
        return None
    if file.stat().st_size == 0:
        raise _empty(path)
    sample = _sample(file, kind)
    return _describe(path, file, kind, sample, dict(columns or {}), drop_bad)


def _probe_folder(
    path: str, folder: Path, columns: Mapping[str, str], *, drop_bad: bool
) -> DatasetFacts | None:
    """Facts of the first file that rows are trained on; their number is unknown.

    Which files belong to a split is the business of `datasets`: none is guessed here but
    that a name with `train` in it is one.
    """
    files = sorted(path for path in folder.rglob("*") if _is_sampled(path, folder))
    named = [file for file in files if "train" in file.name.lower()]
    for file in (named or files)[:1]:
        found = probe_dataset(str(file), columns, drop_bad=drop_bad)
        return found and replace(found, path=path, rows=None, rows_exact=False, folder=True)
    return None


def _is_sampled(file: Path, folder: Path) -> bool:
    """A file of rows; JSON in a folder may also be its description, and is left alone."""
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    return not hidden and kind_of(file) not in (None, "json", "txt") and file.is_file()


def _looks_local(path: str) -> bool:
    """Whether a missing path was meant as a file: a Hub name has at most one slash."""
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or kind_of(Path(path)) is not None
        or path.endswith((".parquet", ".arrow"))
    )


def _empty(path: str) -> SpecError:
    return SpecError(
        "dataset_empty",
        f"the dataset {path} has no rows",
        fix="give a file with at least one row",
    )


def _is_array(file: Path, kind: str) -> bool:
    return kind == "json" and is_array(file)


def _sample(file: Path, kind: str) -> list[Read] | None:
    """The first rows; None where the file is one array that is too large to be read now."""
    array = _is_array(file, kind)
    if array and file.stat().st_size > _COUNTED_BYTES["array"]:
        return None
    return list(islice(read_rows(file, kind), None if array else _SAMPLE_ROWS))


def place_kind(file: Path, kind: str) -> str:
    """What `place` needs to know: rows of an array have no lines of their own."""
    return "array" if _is_array(file, kind) else kind


def bad_row(where: str, error: BadRowError) -> SpecError:
    """A row that cannot be used."""
    return SpecError("dataset_bad_row", f"{where}: {error}", fix=error.fix)


def _describe(
    path: str,
    file: Path,
    kind: str,
    sample: list[Read] | None,
    renames: dict[str, str],
    drop_bad: bool,
) -> DatasetFacts | None:
    """Facts from the sampled rows, each of which is checked."""
    if sample is None:
        return None
    if not sample:
        raise _empty(path)
    shown = place_kind(file, kind)
    unread = next((read for read in sample if read.error is not None), None)
    if unread is not None and unread.error is not None and not drop_bad:
        raise bad_row(place(file, shown, unread.number), unread.error)
    rows = [rename(read.row, renames) for read in sample if read.row is not None]
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    form = detect(path, names) if rows else None
    lengths, refused = [], None
    conversational = form in {"messages", "conversations", "alpaca"}
    for read in sample:
        try:
            characters, is_chat = _measure(read, form, renames)
        except BadRowError as error:
            refused = refused or bad_row(place(file, shown, read.number), error)
            if not drop_bad:
                raise refused from None
            continue
        lengths.append(characters)
        conversational = conversational or is_chat
    if form is None or not lengths:
        assert refused is not None  # noqa: S101 - there are rows, and all are bad
        raise refused
    count, exact = _count_rows(file, kind, sample)
    return DatasetFacts(
        path=path,
        format=form,
        rows=count,
        rows_exact=exact,
        sampled_rows=len(lengths),
        mean_characters=sum(lengths) / len(lengths),
        max_characters=max(lengths),
        columns=names,
        conversational=conversational,
        file_bytes=file.stat().st_size,
    )


def _measure(read: Read, form: Format | None, renames: dict[str, str]) -> tuple[int, bool]:
    if read.row is None or form is None:
        raise read.error or BadRowError("it cannot be read")
    return measure(rename(read.row, renames), form)


def _count_rows(file: Path, kind: str, sample: list[Read]) -> tuple[int | None, bool]:
    """Rows of the file and whether they were counted; estimated from bytes where it is large."""
    if len(sample) < _SAMPLE_ROWS or _is_array(file, kind):
        return len(sample), True
    zipped = file.suffix.lower() in COMPRESSED
    size = file.stat().st_size
    limit = _COUNTED_BYTES["zipped" if zipped else "csv" if kind == "csv" else "lines"]
    if size <= limit:
        return _count_all(file, kind), True
    if zipped:
        return None, False
    with file.open("rb") as stream:
        head = sum(len(line or b"") for _, line in islice(lines_of(stream), sample[-1].number))
    return max(len(sample), round(size * len(sample) / max(head, 1))), False


def _count_all(file: Path, kind: str) -> int:
    """Rows of a file that is small enough to be read."""
    if kind in ("csv", "tsv"):
        return sum(1 for _ in read_rows(file, kind))
    with open_rows(file) as stream:
        lines = lines_of(stream)
        return sum(1 for _, line in lines if kind == "txt" or line is None or line.strip())
