"""Dataset samples: every format, every mistake, and counting."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest

from launcher.errors import SpecError
from launcher.facts import dataset
from launcher.facts.dataset import DatasetFacts, probe_dataset

if TYPE_CHECKING:
    from pathlib import Path

_CHAT = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _probe(path: str | Path, columns: dict[str, str] | None = None) -> DatasetFacts:
    facts = probe_dataset(str(path), columns)
    assert facts is not None
    return facts


@pytest.mark.parametrize(
    ("row", "form", "conversational", "characters"),
    [
        ({"text": "abcd"}, "text", False, 4),
        ({"prompt": "ab", "completion": "c"}, "prompt_completion", False, 3),
        ({"prompt": _CHAT[:1], "completion": _CHAT[1:]}, "prompt_completion", True, 5),
        ({"messages": _CHAT, "tools": []}, "messages", True, 5),
        (
            {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "c"}]},
            "conversations",
            True,
            3,
        ),
        ({"conversations": _CHAT}, "conversations", True, 5),
        ({"instruction": "ab", "input": "", "output": "c"}, "alpaca", True, 3),
        ({"input_ids": [1, 2, 3], "text": "x"}, "input_ids", False, 12),
    ],
)
def test_formats(
    tmp_path: Path, row: dict[str, Any], form: str, conversational: bool, characters: int
) -> None:
    facts = _probe(_write(tmp_path / "a.jsonl", [row, row]))
    assert (facts.format, facts.conversational) == (form, conversational)
    assert (facts.rows, facts.sampled_rows, facts.rows_exact) == (2, 2, True)
    assert facts.mean_characters == facts.max_characters == characters
    assert facts.columns == tuple(row)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{oops", "invalid JSON"),
        ("[1]", "must be an object, this is an array"),
        ('{"messages": []}', "`messages` is empty"),
        ('{"messages": {}}', "must be a list"),
        ('{"messages": [1]}', "must be an object"),
        ('{"messages": [{"content": "x"}]}', "no `role`"),
        ('{"messages": [{"role": "user"}]}', "no `content`"),
        ('{"messages": [{"role": "user", "content": 3}]}', "must be a string"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "unknown role 'wizard'"),
        ('{"messages": null}', "`messages` is missing"),
        ('{"text": "x"}', "`messages` is missing"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, line: str, part: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": _CHAT}) + "\n\n" + line + "\n")
    with pytest.raises(SpecError, match=r"a\.jsonl:3") as caught:
        probe_dataset(str(file))
    assert caught.value.code == "dataset_bad_row"
    assert part in caught.value.message


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"text": 3}, "must be a string, this is a number"),
        ({"input_ids": []}, "at least one"),
        ({"input_ids": [1, -2]}, "0 or more"),
        ({"prompt": "x", "completion": _CHAT}, "both must be strings"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "unknown from 'cat'"),
    ],
)
def test_bad_values(tmp_path: Path, row: dict[str, Any], part: str) -> None:
    with pytest.raises(SpecError, match=part):
        probe_dataset(_write(tmp_path / "a.jsonl", [row]))


def test_tool_calls_and_parts_need_no_text(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "abc"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    ]
    assert _probe(_write(tmp_path / "a.jsonl", [{"messages": turns}])).max_characters > 3


def test_unknown_columns_are_listed_and_can_be_mapped(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(SpecError, match="question, answer") as caught:
        probe_dataset(file)
    assert caught.value.code == "dataset_unknown_format"
    assert _probe(file, {"prompt": "question", "completion": "answer"}).format == (
        "prompt_completion"
    )


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        probe_dataset(str(file))
    assert caught.value.code == "dataset_empty"


@pytest.mark.parametrize("path", ["./none", "none.jsonl", "data/none.json", "/none", "a/b/c"])
def test_missing(path: str) -> None:
    with pytest.raises(SpecError) as caught:
        probe_dataset(path)
    assert caught.value.code == "dataset_not_found"


def test_what_cannot_be_sampled_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert probe_dataset("org/name") is None
    assert probe_dataset(str(tmp_path)) is None
    assert probe_dataset(str(tmp_path / "a.parquet")) is None


def test_other_containers(tmp_path: Path) -> None:
    rows = [{"text": "abc"}, {"text": "d"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text('text,n\n"a\nbc",1\nd,2\n')
    (tmp_path / "a.txt").write_text("abc\nd\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.json", "a.csv", "a.txt", "a.jsonl.gz"):
        facts = _probe(tmp_path / name)
        assert (facts.format, facts.rows, facts.sampled_rows) == ("text", 2, 2), name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[{}, 3]"),
        ("a.json", b"[{]"),
        ("a.csv", b"text,n\nx,1,2\n"),
        ("a.csv", b"text,n\nx\n"),
        ("a.txt", b"\xff\xfe\n"),
        ("a.jsonl", b'{"text": "\xff"}\n'),
        ("a.jsonl.gz", b"no gzip"),
    ],
)
def test_broken_containers(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError) as caught:
        probe_dataset(str(tmp_path / name))
    assert caught.value.code == "dataset_bad_row"


def test_large_files_are_sampled_and_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _write(tmp_path / "a.jsonl", [{"text": "x" * (i % 7)} for i in range(5000)])
    assert (_probe(file).rows, _probe(file).sampled_rows) == (5000, 200)
    monkeypatch.setitem(dataset._COUNTED_BYTES, "lines", 100)
    facts = _probe(file)
    assert facts.rows is not None
    assert facts.rows_exact is False
    assert abs(facts.rows / 5000 - 1) < 0.02
