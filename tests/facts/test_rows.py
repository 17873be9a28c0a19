"""Rows of files with their places, and the rules for one row."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from typing import TYPE_CHECKING, Any

import pytest

from launcher.errors import SpecError
from launcher.facts import rows
from launcher.facts.rows import kind_of, read_rows
from launcher.facts.shapes import BadRowError, convert, oddities, require_answer
from launcher.facts.usable import RowCheck, checked_rows

if TYPE_CHECKING:
    from pathlib import Path

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM, TOOL = {"role": "system", "content": "s"}, {"role": "tool", "content": "3"}
CHAT = {"messages": [USER, ANSWER]}


def read(file: Path) -> list[tuple[int, Any]]:
    """Number of each row with the row, or with what is wrong."""
    return [
        (one.number, str(one.error) if one.row is None else one.row)
        for one in read_rows(file, kind_of(file) or "")
    ]


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "invalid JSON"),
        (b"[1]", "must be an object"),
        (b'{"a": NaN}', "NaN is no JSON value"),
        (b'{"a": "\xff"}', "not valid UTF-8 at byte 8"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "invalid JSON"),
    ],
)
def test_reading_goes_on_behind_a_line_that_is_no_row(
    tmp_path: Path, line: bytes, words: str
) -> None:
    file = written(tmp_path, "a.jsonl", b'{"n": 1}\n\n' + line + b'\n{"n": 2}')
    first, (number, what), last = read(file)
    assert (first, last) == ((1, {"n": 1}), (4, {"n": 2}))
    assert number == 3
    assert words in what


def test_a_huge_line_is_skipped_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LONGEST_LINE_BYTES", 1000)
    for size in (999, 1000, 1001, 5_000_000):
        long = b'{"n": "' + b"x" * (size - 10) + b'"}\n'
        assert len(long) == size
        file = written(tmp_path, "a.jsonl", b'{"n": 1}\n' + long + b'{"n": 2}\n')
        _, (number, found), last = read(file)
        assert (number, last) == (2, (3, {"n": 2}))
        assert ("longer than" in found) is (size > 1000), size


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_lines(tmp_path: Path, compress: Any) -> None:
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    content = compress(b'\xef\xbb\xbf{"n": 1}\n{"n": 2}\n')
    assert read(written(tmp_path, f"a.jsonl.{suffix}", content)) == [(1, {"n": 1}), (2, {"n": 2})]
    broken = written(tmp_path, f"b.jsonl.{suffix}", content[:-12])
    with pytest.raises(SpecError, match="cannot be read"):
        read(broken)


def test_csv_goes_on_behind_a_bad_row(tmp_path: Path) -> None:
    file = written(tmp_path, "a.csv", b'\xef\xbb\xbftext,n\n"a\nb",1\nx\n\xff,3\ny,4\n')
    found = read(file)
    assert [number for number, _ in found] == [3, 4, 5, 6]
    assert found[0][1] == {"text": "a\nb", "n": "1"}
    assert "fewer" in found[1][1]
    assert "UTF-8" in found[2][1]
    assert found[3][1] == {"text": "y", "n": "4"}
    assert read(written(tmp_path, "a.tsv", b"text\tn\na,b\t1\n")) == [
        (2, {"text": "a,b", "n": "1"})
    ]


def test_rows_of_an_array_have_numbers(tmp_path: Path) -> None:
    file = written(tmp_path, "a.json", b'[{"text": "a"},\n 3, {"text": 4}]')
    check = RowCheck("text", {})
    found = [
        (number, error and str(error)) for number, _, _, error in checked_rows(file, "json", check)
    ]
    assert found[0] == (1, None)
    assert "must be an object" in (found[1][1] or "")
    assert "must be a string" in (found[2][1] or "")


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("text", {"text": "a", "id": 1}, {"text": "a"}),
        ("input_ids", {"input_ids": [1], "attention_mask": [1]}, {"input_ids": [1]}),
        ("messages", {**CHAT, "prompt": "x", "tools": "[]"}, {**CHAT, "tools": "[]"}),
        (
            "conversations",
            {
                "conversations": [
                    {"from": "human", "value": "a", "weight": None},
                    {"from": "gpt", "value": "b"},
                    {"from": "observation", "value": "3"},
                ],
                "system": "s",
            },
            {"messages": [SYSTEM, USER, ANSWER, TOOL]},
        ),
        ("conversations", {"conversations": [USER, ANSWER]}, CHAT),
        (
            "alpaca",
            {"instruction": "a", "input": "b", "output": "c", "system": ""},
            {
                "messages": [
                    {"role": "user", "content": "a\n\nb"},
                    {"role": "assistant", "content": "c"},
                ]
            },
        ),
        ("alpaca", {"instruction": "a", "input": None, "output": "b"}, CHAT),
    ],
)
def test_conversion(form: Any, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert convert(row, form) == expected


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([USER, ANSWER], []),
        ([SYSTEM, USER, ANSWER, USER, ANSWER], []),
        ([USER, {"role": "assistant", "tool_calls": [{}]}, TOOL, TOOL, ANSWER], []),
        ([USER, USER, ANSWER], ["order"]),
        ([ANSWER, USER, ANSWER], ["order"]),
        ([USER, ANSWER, USER], ["order"]),
        ([USER, SYSTEM, ANSWER], ["order"]),
        ([SYSTEM], ["order"]),
        ([USER, TOOL, ANSWER], ["order"]),
        ([USER, {**ANSWER, "content": " \n"}], ["empty_turn"]),
    ],
)
def test_odd_conversations(turns: list[Any], found: list[str]) -> None:
    assert oddities({"messages": turns}) == found
    if len(turns) > 1:
        assert oddities({"prompt": turns[:1], "completion": turns[1:]}) == found


def test_an_answer_is_needed_only_where_it_is_trained_on() -> None:
    for row in ({"messages": [USER]}, {"prompt": [SYSTEM], "completion": [USER]}):
        with pytest.raises(BadRowError, match="no turn of the assistant"):
            require_answer(row, "assistant")
        require_answer(row, "all")
    require_answer({"text": "x"}, "assistant")


def test_one_dataset_holds_text_or_messages() -> None:
    check = RowCheck("prompt_completion", {"completion": "answer"})
    assert check({"prompt": "a", "answer": "b"}) == {"prompt": "a", "completion": "b"}
    with pytest.raises(BadRowError, match="the row holds messages, the rows before it text"):
        check({"prompt": [USER], "answer": [ANSWER]})
    json.dumps(check({"prompt": "a", "answer": "b"}))
