"""Rows of local files with the place of each: read line by line, in bounded memory.

Reads JSON Lines, JSON arrays, CSV and text, compressed or not, as `datasets` does; Parquet
and Arrow are its own business. A row that cannot be read is given as its error, so that the
reader may go on behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from launcher.errors import SpecError
from launcher.facts.shapes import BadRowError, Row, type_name

MIB = 2**20
# A longer line is no row: 32 MiB of text are some eight million tokens.
LONGEST_LINE_BYTES = 32 * MIB
LARGEST_ARRAY_BYTES = 512 * MIB
KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BOM = b"\xef\xbb\xbf"
_UTF8 = "save the file as UTF-8, for example with iconv"


@dataclass(frozen=True)
class Read:
    """One row, or why there is none."""

    number: int
    """Of its line, the first one being 1; of the row in a JSON array."""
    row: Row | None
    error: BadRowError | None = None


def kind_of(file: Path) -> str | None:
    """How to read a file, by its name: a value of `KINDS`; None for the others."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in COMPRESSED]
    return KINDS.get(suffixes[-1]) if suffixes else None


def place(file: Path | str, kind: str | None, number: int) -> str:
    """Where a row is, as people name it."""
    by_line = kind is not None and kind != "array"
    return f"{file}:{number}" if by_line else f"{file} row {number}"


def open_rows(file: Path) -> IO[bytes]:
    """The file's own bytes, whatever it is compressed with."""
    match file.suffix.lower():
        case ".gz":
            import gzip  # noqa: PLC0415 - only a compressed file pays for it

            return cast("IO[bytes]", gzip.open(file, "rb"))
        case ".bz2":
            import bz2  # noqa: PLC0415

            return bz2.open(file, "rb")
        case ".xz":
            import lzma  # noqa: PLC0415

            return lzma.open(file, "rb")
        case _:
            return file.open("rb")


def is_array(file: Path, opener: Any = open_rows) -> bool:
    """Whether a .json file is one array, not objects in lines."""
    with opener(file) as stream:
        return bool(stream.read(4096).lstrip(_BOM + b" \t\r\n").startswith(b"["))


def read_rows(file: Path, kind: str, opener: Any = open_rows) -> Iterator[Read]:
    """Every row of a file, good or bad, in its order.

    Args:
        file: the file.
        kind: a value of `KINDS`.
        opener: how its bytes are read; `open_rows` knows no .zst, which needs a package.

    Raises:
        SpecError: where the file as a whole cannot be read.
    """
    import lzma  # noqa: PLC0415 - its error is no OSError
    import zlib  # noqa: PLC0415

    try:
        if kind == "json" and is_array(file, opener):
            yield from _read_array(file, opener)
            return
        with opener(file) as stream:
            yield from _READERS[kind](stream)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise SpecError(
            "dataset_bad_row",
            f"{file} cannot be read",
            why=str(error),
            fix="write or download the file again",
        ) from None


def lines_of(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers; None for one that is too long to be read."""
    number = 0
    while line := stream.readline(LONGEST_LINE_BYTES):
        number += 1
        if len(line) < LONGEST_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MIB)
        yield number, None


def _too_long() -> BadRowError:
    return BadRowError(
        f"the line is longer than {LONGEST_LINE_BYTES // MIB} MiB",
        "split or remove the row; one row is one line",
    )


def _read_lines(stream: IO[bytes]) -> Iterator[Read]:
    """Rows of a JSON Lines file; blank lines are skipped, as `datasets` does."""
    for number, line in lines_of(stream):
        if line is None:
            yield Read(number, None, _too_long())
        elif (text := line.removeprefix(_BOM) if number == 1 else line).strip():
            yield _read_object(number, text)


def _read_object(number: int, line: bytes) -> Read:
    try:
        row = _DECODER.decode(line.decode("utf-8"))
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return Read(number, None, BadRowError(f"not valid UTF-8 at byte {error.start + 1}", _UTF8))
    except UnicodeEncodeError:
        return Read(number, None, BadRowError("invalid JSON: half of a surrogate pair"))
    except RecursionError:
        return Read(number, None, BadRowError("invalid JSON: too deeply nested"))
    except ValueError as error:
        return Read(number, None, BadRowError(f"invalid JSON: {error}"))
    return _checked(number, row)


def _checked(number: int, row: Any) -> Read:
    if isinstance(row, dict):
        return Read(number, row)
    why = f"a row must be an object, this is {type_name(row)}"
    return Read(number, None, BadRowError(why))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _read_array(file: Path, opener: Any) -> Iterator[Read]:
    """Rows of a JSON array, which cannot be read in part."""
    with opener(file) as stream:
        text = stream.read(LARGEST_ARRAY_BYTES + 1)
    if len(text) > LARGEST_ARRAY_BYTES:
        raise SpecError(
            "dataset_large_array",
            f"{file} is one JSON array of more than {LARGEST_ARRAY_BYTES // MIB} MiB",
            why="an array must be read at once",
            fix="write it as JSON Lines, for example with jq -c '.[]'",
        )
    try:
        values = _DECODER.decode(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _broken(file, 1 + text[: error.start].count(b"\n"), "not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _broken(file, getattr(error, "lineno", 1), f"invalid JSON: {error}") from None
    for number, row in enumerate(values, start=1):
        yield _checked(number, row)


def _broken(file: Path, line: int, why: str) -> SpecError:
    return SpecError("dataset_bad_row", f"{file}:{line}: {why}", fix="correct the file")


def _read_csv(stream: IO[bytes], delimiter: str = ",") -> Iterator[Read]:
    import csv  # noqa: PLC0415 - only a CSV file pays for it

    csv.field_size_limit(LONGEST_LINE_BYTES)
    reader = csv.DictReader(_decoded(stream), delimiter=delimiter)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Read(reader.line_num, None, BadRowError(str(error)))
            continue
        if row is None:
            return
        wrong = _csv_error(row, len(reader.fieldnames or ()))
        yield Read(reader.line_num, None if wrong else dict(row), wrong)


def _csv_error(row: Mapping[Any, Any], columns: int) -> BadRowError | None:
    """What is wrong with a row of CSV."""
    if None in row or None in row.values():
        count = "more" if None in row else "fewer"
        return BadRowError(f"the header names {columns} columns, this row has {count}")
    try:
        "".join(row.values()).encode("utf-8")
    except UnicodeEncodeError:  # a byte that was none of UTF-8 is half of a surrogate pair
        return BadRowError("not valid UTF-8", _UTF8)
    return None


def _read_tsv(stream: IO[bytes]) -> Iterator[Read]:
    return _read_csv(stream, "\t")


def _decoded(stream: IO[bytes]) -> Iterator[str]:
    for number, line in lines_of(stream):
        if line is None:
            too_long = _too_long()
            raise SpecError("dataset_bad_row", f"line {number}: {too_long}", fix=too_long.fix)
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")


def _read_text(stream: IO[bytes]) -> Iterator[Read]:
    """One row a line, as `load_dataset("text")` reads it."""
    for number, line in lines_of(stream):
        if line is None:
            yield Read(number, None, _too_long())
            continue
        try:
            yield Read(number, {"text": line.decode("utf-8").rstrip("\r\n")})
        except UnicodeDecodeError as error:
            why = f"not valid UTF-8 at byte {error.start + 1}"
            yield Read(number, None, BadRowError(why, _UTF8))


_READERS = {
    "lines": _read_lines,
    "json": _read_lines,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "txt": _read_text,
}
