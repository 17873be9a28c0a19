"""A dataset's format, size and first mistakes, from a sample of a local file.

Decides which of the trainer's formats a file is in, and refuses rows that training would
choke on. It must not load the `datasets` library, read a whole large file, or open a
network connection; what cannot be sampled lightly is left unknown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from launcher.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import IO

Format = Literal["text", "prompt_completion", "messages", "conversations", "alpaca", "input_ids"]
Row = dict[str, Any]

_SAMPLE_ROWS = 200
_MIB = 2**20
# Counting rows reads the file: 64 MiB of lines take about 50 ms; CSV and gzip are slower.
_COUNTED_BYTES = {"lines": 64 * _MIB, "csv": 4 * _MIB, "gzip": 4 * _MIB, "array": 16 * _MIB}
_CHARACTERS_PER_TOKEN = 4  # the usual rate of English text; used where a row holds tokens
_QUOTED = 60

# Format, the columns that it needs, what one row looks like. Searched in this order.
# Source: TRL 1.16 documentation, "Dataset formats"; alpaca and conversations are turned
# into messages by the launcher.
_FORMATS: tuple[tuple[Format, tuple[str, ...], str], ...] = (
    ("input_ids", ("input_ids",), "input_ids: [1, 2, 3]"),
    ("messages", ("messages",), "messages: [{role, content}, ...]"),
    ("conversations", ("conversations",), "conversations: [{from, value}, ...]"),
    ("prompt_completion", ("prompt", "completion"), "prompt and completion"),
    ("alpaca", ("instruction", "output"), "instruction, output (and input)"),
    ("text", ("text",), "text: a string"),
)

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
_SPEAKERS = _ROLES | {
    "human", "gpt", "chatgpt", "bot", "model", "observation", "function_call", "function_response",
}  # fmt: skip


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
    """Whether rows hold messages with roles, so that a chat template is needed."""

    file_bytes: int
    """Size of the file in bytes, as stored."""


class _BadRowError(Exception):
    """What is wrong with one row; the reader adds where it is."""


def probe_dataset(path: str, columns: Mapping[str, str] | None = None) -> DatasetFacts | None:
    """Facts about a local .jsonl, .json, .csv or .txt file, gzipped or not.

    Args:
        path: a file, a folder, or a Hub name.
        columns: the trainer's column name to the file's own, where they differ.

    Returns:
        The facts; None for a Hub name, a folder, and a file that cannot be sampled
        without the `datasets` library (Parquet, Arrow, a very large JSON array).

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
    kind = _kind(file)
    if file.is_dir() or kind is None:
        return None
    if file.stat().st_size == 0:
        raise _empty(path)
    sample = _sample(file, kind)
    return _describe(path, file, kind, sample, dict(columns or {}))


def _looks_local(path: str) -> bool:
    """Whether a missing path was meant as a file: a Hub name has at most one slash."""
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or _kind(Path(path)) is not None
        or path.endswith((".parquet", ".arrow"))
    )


def _kind(file: Path) -> str | None:
    """How to read a file, by its name: `lines`, `json`, `csv`, `txt`; None for the others."""
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    last = suffixes[-1].lower() if suffixes else ""
    kinds = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".txt": "txt"}
    return kinds.get(last)


def _empty(path: str) -> SpecError:
    return SpecError(
        "dataset_empty",
        f"the dataset {path} has no rows",
        fix="give a file with at least one row",
    )


def _open(file: Path) -> IO[bytes]:
    if file.suffix != ".gz":
        return file.open("rb")
    import gzip  # noqa: PLC0415 - only a compressed file pays for it

    return cast("IO[bytes]", gzip.open(file, "rb"))


def _sample(file: Path, kind: str) -> list[tuple[int, Row]] | None:
    """The first rows with their line (in an array: row) numbers; None where it is too large."""
    readers: dict[str, Callable[[IO[bytes], Path], Iterator[tuple[int, Row]]]] = {
        "lines": _read_lines,
        "json": _read_lines,
        "csv": _read_csv,
        "txt": _read_text,
    }
    if kind == "json" and _is_array(file):
        if file.stat().st_size > _COUNTED_BYTES["array"]:
            return None
        return list(_read_array(file))
    try:
        with _open(file) as stream:
            return list(islice(readers[kind](stream, file), _SAMPLE_ROWS))
    except (EOFError, OSError) as error:  # a gzip stream that was cut short or is none
        raise SpecError(
            "dataset_bad_row",
            f"{file} cannot be read",
            why=str(error),
            fix="write or download the file again",
        ) from None


def _is_array(file: Path) -> bool:
    try:
        with _open(file) as stream:
            return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except (EOFError, OSError):
        return False


def _read_lines(stream: IO[bytes], file: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON Lines file; blank lines are skipped, as `datasets` does."""
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield number, _parse_object(line, f"{file}:{number}")


def _parse_object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise _bad_row(where, f"invalid JSON: {reason}") from None
    if not isinstance(row, dict):
        raise _bad_row(where, f"a row must be an object, this is {_type_name(row)}")
    return row


def _read_array(file: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON array, all of them: an array cannot be read in part."""
    try:
        with _open(file) as stream:
            values = json.loads(stream.read())
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise _bad_row(f"{file}:{line}", f"invalid JSON: {error}") from None
    for number, row in enumerate(values, start=1):
        if not isinstance(row, dict):
            why = f"a row must be an object, this is {_type_name(row)}"
            raise _bad_row(f"{file} row {number}", why)
        yield number, row


def _read_csv(stream: IO[bytes], file: Path) -> Iterator[tuple[int, Row]]:
    import codecs  # noqa: PLC0415 - only a CSV file pays for them
    import csv  # noqa: PLC0415

    reader = csv.DictReader(codecs.iterdecode(stream, "utf-8-sig"))
    try:
        for row in reader:
            if None in row or None in row.values():
                raise _bad_row(
                    f"{file}:{reader.line_num}",
                    f"the header names {len(reader.fieldnames or ())} columns, this row has "
                    f"{'more' if None in row else 'fewer'}",
                )
            yield reader.line_num, dict(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise _bad_row(f"{file}:{reader.line_num + 1}", str(error)) from None


def _read_text(stream: IO[bytes], file: Path) -> Iterator[tuple[int, Row]]:
    """One row a line, as `load_dataset("text")` reads it."""
    for number, line in enumerate(stream, start=1):
        try:
            yield number, {"text": line.decode("utf-8").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise _bad_row(f"{file}:{number}", str(error)) from None


def _bad_row(where: str, why: str) -> SpecError:
    return SpecError(
        "dataset_bad_row",
        f"{where}: {why}",
        fix="correct or remove the row",
    )


def _type_name(value: Any) -> str:
    """A JSON value's type in JSON's own words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _describe(
    path: str,
    file: Path,
    kind: str,
    sample: list[tuple[int, Row]] | None,
    renames: dict[str, str],
) -> DatasetFacts | None:
    """Facts from the sampled rows, each of which is checked."""
    if sample is None:
        return None
    if not sample:
        raise _empty(path)
    rows = [(number, _rename(row, renames)) for number, row in sample]
    names = tuple(dict.fromkeys(name for _, row in rows for name in row))
    form = _detect(path, names)
    lengths = []
    conversational = form in {"messages", "conversations"}
    for number, row in rows:
        try:
            characters, is_chat = _measure(row, form)
        except _BadRowError as error:
            raise _bad_row(f"{file}:{number}", str(error)) from None
        lengths.append(characters)
        conversational = conversational or is_chat
    count, exact = _count_rows(file, kind, sample)
    return DatasetFacts(
        path=path,
        format=form,
        rows=count,
        rows_exact=exact,
        sampled_rows=len(rows),
        mean_characters=sum(lengths) / len(lengths),
        max_characters=max(lengths),
        columns=names,
        conversational=conversational,
        file_bytes=file.stat().st_size,
    )


def _rename(row: Row, renames: dict[str, str]) -> Row:
    """The row with the trainer's column names: `renames` is ours to the file's."""
    back = {theirs: ours for ours, theirs in renames.items()}
    return {back.get(name, name): value for name, value in row.items()}


def _detect(path: str, columns: tuple[str, ...]) -> Format:
    """The first format whose columns are all there."""
    for form, needed, _ in _FORMATS:
        if all(name in columns for name in needed):
            return form
    raise SpecError(
        "dataset_unknown_format",
        f"the dataset {path} is in no known format",
        why=f"its columns are {', '.join(columns) or 'none'}; a format needs one of: "
        + "; ".join(words for _, _, words in _FORMATS),
        fix="rename the columns, or map them with `dataset.columns`",
        source="https://huggingface.co/docs/trl/dataset_formats",
    )


def _measure(row: Row, form: Format) -> tuple[int, bool]:
    """Characters of a row's text, and whether it holds messages; raises `_BadRowError`."""
    for name in next(needed for name, needed, _ in _FORMATS if name == form):
        if row.get(name) is None:
            raise _BadRowError(f"`{name}` is missing, which the format {form} needs")
    match form:
        case "messages":
            return _measure_turns(row["messages"], "messages", "role", "content", _ROLES), True
        case "conversations":
            return _measure_conversations(row["conversations"]), True
        case "prompt_completion":
            return _measure_pair(row)
        case "alpaca":
            names = ("instruction", "input", "output")
            return sum(_text_length(row, name) for name in names if row.get(name)), False
        case "text":
            return _text_length(row, "text"), False
        case _:
            return _measure_tokens(row["input_ids"]), False


def _text_length(row: Row, name: str) -> int:
    value = row[name]
    if not isinstance(value, str):
        raise _BadRowError(f"`{name}` must be a string, this is {_type_name(value)}")
    return len(value)


def _measure_tokens(value: Any) -> int:
    if not isinstance(value, list) or not value:
        raise _BadRowError("`input_ids` must be a list of token numbers with at least one in it")
    if not all(isinstance(token, int) and token >= 0 for token in value):
        raise _BadRowError("`input_ids` must hold token numbers of 0 or more")
    return len(value) * _CHARACTERS_PER_TOKEN


def _measure_pair(row: Row) -> tuple[int, bool]:
    """Prompt and completion: both strings, or both lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if type(prompt) is not type(completion):
        raise _BadRowError(
            f"`prompt` is {_type_name(prompt)} and `completion` is {_type_name(completion)}; "
            "both must be strings, or both lists of messages"
        )
    if not isinstance(prompt, list):
        return _text_length(row, "prompt") + _text_length(row, "completion"), False
    total = 0
    for name in ("prompt", "completion"):
        total += _measure_turns(row[name], name, "role", "content", _ROLES)
    return total, True


def _measure_conversations(turns: Any) -> int:
    """`from` and `value` of ShareGPT; some files have `role` and `content` under this name."""
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and "role" in first:
        return _measure_turns(turns, "conversations", "role", "content", _SPEAKERS)
    return _measure_turns(turns, "conversations", "from", "value", _SPEAKERS)


def _measure_turns(turns: Any, name: str, who: str, what: str, known: frozenset[str]) -> int:
    """Characters of a list of messages, each of which is checked."""
    if not isinstance(turns, list):
        raise _BadRowError(f"`{name}` must be a list, this is {_type_name(turns)}")
    if not turns:
        raise _BadRowError(f"`{name}` is empty")
    return sum(
        _measure_turn(turn, f"{name}[{index}]", who, what, known)
        for index, turn in enumerate(turns)
    )


def _measure_turn(turn: Any, where: str, who: str, what: str, known: frozenset[str]) -> int:
    """Characters of one message."""
    if not isinstance(turn, dict):
        raise _BadRowError(f"`{where}` must be an object, this is {_type_name(turn)}")
    if who not in turn:
        raise _BadRowError(f"`{where}` has no `{who}`; it has {', '.join(turn) or 'nothing'}")
    if turn[who] not in known:
        names = ", ".join(sorted(known))
        raise _BadRowError(f"`{where}` has the unknown {who} {turn[who]!r}; known: {names}")
    content = turn.get(what)
    if isinstance(content, str):
        return len(content)
    if content is None and turn.get("tool_calls"):
        return len(json.dumps(turn["tool_calls"]))
    if isinstance(content, list):
        return sum(len(str(part.get("text", ""))) for part in content if isinstance(part, dict))
    if content is None:
        raise _BadRowError(f"`{where}` has no `{what}`")
    raise _BadRowError(f"`{where}.{what}` must be a string, this is {_type_name(content)}")


def _count_rows(file: Path, kind: str, sample: list[tuple[int, Row]]) -> tuple[int | None, bool]:
    """Rows of the file and whether they were counted; estimated from bytes where it is large."""
    if len(sample) < _SAMPLE_ROWS or (kind == "json" and _is_array(file)):
        return len(sample), True
    zipped = file.suffix == ".gz"
    size = file.stat().st_size
    limit = _COUNTED_BYTES["gzip" if zipped else "csv" if kind == "csv" else "lines"]
    if size <= limit:
        return _count_all(file, kind), True
    if zipped:
        return None, False
    with file.open("rb") as stream:
        head = sum(len(line) for line in islice(stream, sample[-1][0]))
    return max(len(sample), round(size * len(sample) / head)), False


def _count_all(file: Path, kind: str) -> int:
    """Rows of a file that is small enough to be read."""
    with _open(file) as stream:
        if kind == "csv":
            return sum(1 for _ in _read_csv(stream, file))
        if kind == "txt":
            return sum(1 for _ in stream)
        return sum(1 for line in stream if line.strip())
