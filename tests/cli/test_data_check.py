"""`data check` as it is used: what it counts, what it refuses and how, what a terminal sees."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.facts.rows import LONGEST_LINE_BYTES
from tests.support import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
MODEL = ROOT / "recipes" / "tiny" / "model"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris"}
CHAT = {"messages": [QUESTION, ANSWER]}


def chat(number: int) -> dict[str, Any]:
    """A conversation that no other number gives."""
    return {"messages": [{**QUESTION, "content": f"What is {number} + 1?"}, ANSWER]}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def check(file: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, on a model with a real tokenizer."""
    return subprocess.run(
        command(file, *flags),
        capture_output=True,
        text=True,
        check=False,
        env=environ(file.parent, **environment),
    )


def command(file: Path, *flags: str) -> list[str]:
    start = [sys.executable, "-m", "launcher", "data", "check"]
    fixed = [f"--model={MODEL}", f"--dataset={file}", "--device=cpu"]
    (file.parent / "sft.yaml").write_text(f"model: {MODEL}\n", encoding="utf-8")
    return [*start, str(file.parent / "sft.yaml"), *fixed, *flags]


def environ(folder: Path, **more: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    return {**os.environ, **own, "COLUMNS": "100", **more}


def report(file: Path, *flags: str) -> dict[str, Any]:
    """What `--json` prints."""
    done = check(file, "--json", *flags)
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "exit": done.returncode}


def written(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def test_what_is_counted(tmp_path: Path) -> None:
    rows = [chat(number) for number in range(40)]
    empty = {"messages": [QUESTION, {**ANSWER, "content": ""}]}
    swapped = {"messages": [ANSWER, QUESTION, ANSWER]}
    long = {"messages": [{**QUESTION, "content": "the capital of " * 100}, ANSWER]}
    file = written(tmp_path, "a.jsonl", jsonl(*rows, chat(3), empty, swapped, long))
    found = report(file, "--set=training.max_length=64", "--global-batch-size=4")
    assert found["exit"] == 0
    assert (found["format"], found["loss"]) == ("messages", "assistant")
    assert found["rows"] == {"read": 44, "used": 43, "without_label": 1, "bad": 0}
    codes = {one["code"]: one for one in found["findings"]}
    assert set(codes) == {"no_label", "end_cut", "duplicate", "empty_turn", "order"}
    expected = {"no_label": 44, "duplicate": 41, "empty_turn": 42, "order": 43, "end_cut": 44}
    for code, line in expected.items():
        assert codes[code]["rows"] == 1
        assert codes[code]["places"] == [f"{file}:{line}"]
        assert codes[code]["fix"]
    tokens = found["tokens"]
    assert 0 < tokens["trained"] < tokens["used"] < tokens["before_truncation"]
    assert sum(bar["rows"] for bar in found["lengths"]["histogram"]) == 44
    assert found["truncation"]["rows"] == 1
    assert 0 < found["padding"]["share"] < 1
    assert 0.5 < found["packing"]["utilisation"] <= 1
    trained = "".join(p["text"] for p in found["example"]["pieces"] if p["trained"])
    assert trained == "Paris<|im_end|>"


# --- rows that cannot be used -----------------------------------------------------------------

BAD: list[tuple[str, bytes, str]] = [
    ("broken JSON", b'{"messages": [', "invalid JSON"),
    ("no object", b"[1, 2]", "must be an object, this is an array"),
    ("not UTF-8", b'{"messages": "\xff\xfe"}', "not valid UTF-8 at byte"),
    ("a number", b'{"messages": NaN}', "NaN is no JSON value"),
    ("half a pair", jsonl({"messages": [QUESTION, {**ANSWER, "content": "\ud800"}]}), "surrogate"),
    ("no content", jsonl({"messages": [QUESTION, {"role": "assistant"}]}), "has no `content`"),
    ("an unknown role", jsonl({"messages": [{**QUESTION, "role": "wizard"}]}), "unknown role"),
    ("no turns", jsonl({"messages": []}), "`messages` is empty"),
    ("another type", jsonl({"messages": "text"}), "must be a list, this is a string"),
    ("a number as content", jsonl({"messages": [{**QUESTION, "content": 3}]}), "must be a string"),
    ("null", jsonl({"messages": None}), "`messages` is missing"),
    ("another shape", jsonl({"text": "some text"}), "`messages` is missing"),
    ("nobody answers", jsonl({"messages": [QUESTION]}), "no turn of the assistant"),
    ("a huge line", b"x" * (LONGEST_LINE_BYTES + 16 * 2**20), "longer than 32 MiB"),
]


def test_every_bad_row_is_named_with_its_line_and_fix(tmp_path: Path) -> None:
    good = b"".join(jsonl(chat(number)) for number in range(4))
    lines = [content.rstrip(b"\n") + b"\n" for _, content, _ in BAD]
    file = written(tmp_path, "a.jsonl", good + b"".join(lines) + jsonl(chat(4)))
    done = check(file)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    _, _, said = done.stderr.partition("error: ")
    first, *named, more = said.splitlines()
    assert first.startswith(f"{len(BAD)} of {len(BAD) + 5} rows cannot be used; ")
    assert "dataset.drop_bad=true" in first
    assert len(named) == 10
    assert more == f"  and {len(BAD) - 10} more"
    by_place = {line.split(": ")[0].strip(): line for line in named}
    for at, (name, _, words) in enumerate(BAD[:10], start=5):
        line = by_place[f"{file}:{at}"]
        assert words in line, name
        assert ";" in line, f"{name}: no fix"
    assert "5 are trained on" in done.stdout


def test_bad_rows_as_json(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", jsonl(chat(0), {"messages": [QUESTION]}))
    found = report(file)
    assert found["exit"] == 2
    assert found["error"]["code"] == "bad_rows"
    (bad,) = found["bad_rows"]
    assert bad["place"] == f"{file}:2"
    assert "no turn of the assistant" in bad["what"]
    assert bad["fix"]
    assert found["tokens"]["used"] > 0


def test_bad_rows_can_be_dropped_by_the_check_and_by_the_spec(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", jsonl(chat(0)) + b"{\n" + jsonl(chat(1)))
    for flag in ("--drop-bad", "--set=dataset.drop_bad=true"):
        done = check(file, flag)
        assert done.returncode == 0, done.stderr
        assert "1 cannot be used, 2 are trained on" in done.stdout
        assert f"{file}:2" in done.stderr


def test_a_template_that_refuses_one_row(tmp_path: Path) -> None:
    template = (MODEL / "chat_template.jinja").read_text(encoding="utf-8")
    strict = tmp_path / "strict.jinja"
    refuse = "{%- if messages[0].content == 'no' %}{{ raise_exception('not this') }}{%- endif %}"
    strict.write_text(refuse + template, encoding="utf-8")
    odd = {"messages": [{**QUESTION, "content": "no"}, ANSWER]}
    file = written(tmp_path, "a.jsonl", jsonl(*(chat(n) for n in range(9)), odd, chat(9)))
    found = report(file, f"--set=training.chat_template_path={strict}")
    assert found["exit"] == 2
    (bad,) = found["bad_rows"]
    assert bad["place"] == f"{file}:10"
    assert "the chat template refuses it: not this" in bad["what"]


# --- whole files --------------------------------------------------------------------------------

FILES: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"", "has no rows"),
    ("blank.jsonl", b"\n \n", "has no rows"),
    ("cut.jsonl.gz", gzip.compress(jsonl(*map(chat, range(99))))[:-20], "cannot be read"),
    ("none.jsonl.xz", b"no xz", "cannot be read"),
    ("columns.jsonl", jsonl({"question": "a", "answer": "b"}), "no known format"),
    ("cut.json", b'[{"text": "a"}, {"te', "invalid JSON"),
    ("broken.parquet", b"PAR1", "arquet"),
]


@pytest.mark.parametrize(("name", "content", "words"), FILES, ids=[file[0] for file in FILES])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    done = check(written(tmp_path, name, content))
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert words in errors[0]
    assert "Traceback" not in done.stderr


def test_a_byte_order_mark_one_row_and_a_small_dataset(tmp_path: Path) -> None:
    found = report(written(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + jsonl(CHAT)))
    assert (found["exit"], found["rows"]["used"]) == (0, 1)
    (small,) = found["findings"]
    assert small["code"] == "small_dataset"
    assert "global batch" in small["message"]


def test_columns_of_mixed_types_that_are_not_read_do_no_harm(tmp_path: Path) -> None:
    rows = [{**chat(0), "id": 1}, {**chat(1), "id": "two"}, {**chat(2), "id": [3]}]
    assert report(written(tmp_path, "a.jsonl", jsonl(*rows)))["rows"]["used"] == 3


def test_compressed_files_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    written(folder, "train-1.jsonl.gz", gzip.compress(jsonl(*map(chat, range(10)))))
    written(folder, "train-2.jsonl.xz", lzma.compress(jsonl(*map(chat, range(10, 20))) + b"7\n"))
    written(folder, "test.jsonl", jsonl(*map(chat, range(20, 25))))
    found = report(folder, "--set=dataset.eval_split=test", "--drop-bad")
    assert (found["rows"]["used"], found["loss"], found["exit"]) == (20, "assistant", 0)
    assert found["held_out"]["rows"]["used"] == 5
    assert found["bad_rows"][0]["place"].endswith("train-2.jsonl.xz:11")


def test_a_compression_that_datasets_has_no_package_for(tmp_path: Path) -> None:
    import pyarrow as pa

    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        stream.write(jsonl(*map(chat, range(30))))
    found = report(tmp_path / "a.jsonl.zst")
    assert (found["rows"]["used"], found["loss"], found["exit"]) == (30, "assistant", 0)


def test_sources_and_a_held_out_share(tmp_path: Path) -> None:
    one = written(tmp_path, "a.jsonl", jsonl(*map(chat, range(30))))
    two = written(tmp_path, "b.jsonl", jsonl(*map(chat, range(20, 60))) + b"{\n")
    more = f"--set=dataset.sources=[{{path: {two}}}]"
    found = report(one, more, "--set=dataset.eval_share=0.2", "--drop-bad")
    assert found["rows"]["read"] == 71
    assert (found["rows"]["used"], found["held_out"]["rows"]["used"]) == (56, 14)
    assert found["bad_rows"][0]["place"] == f"{two}:41"
    codes = {one["code"] for one in found["findings"]}
    assert {"duplicate", "leak"} <= codes


# --- the terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 200])
def test_numbers_fit_the_terminal_without_colour_in_a_pipe(tmp_path: Path, columns: int) -> None:
    file = written(tmp_path, "a.jsonl", jsonl(*map(chat, range(30))))
    done = check(file, COLUMNS=str(columns))
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    numbers, example = done.stdout.split("example ")
    assert "[[Paris<|im_end|>]]" in example
    plain = [line for line in numbers.splitlines() if str(file) not in line]
    assert max(map(len, plain)) <= columns
    assert "#" in numbers


@pytest.mark.parametrize("no_color", ["", "1"])
def test_trained_tokens_are_green_on_a_terminal(tmp_path: Path, no_color: str) -> None:
    import pexpect

    file = written(tmp_path, "a.jsonl", jsonl(*map(chat, range(30))))
    first, *rest = command(file)
    environment = environ(tmp_path, NO_COLOR=no_color)
    out = pexpect.run(" ".join([first, *rest]), env=environment, timeout=120, encoding="utf-8")
    expected = "[[Paris<|im_end|>]]" if no_color else "\x1b[32mParis<|im_end|>\x1b[0m"
    assert expected in out
    assert ("\x1b" in out) is not bool(no_color)


def test_ctrl_c_leaves_cleanly(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", jsonl(*(chat(n) for n in range(60_000))))
    process = subprocess.Popen(
        command(file),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ(tmp_path),
        start_new_session=True,
    )
    assert process.stderr is not None
    seen = process.stderr.readline()  # it says something after two seconds
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert seen
    assert process.returncode == 1, err
    assert "interrupted" in err
    assert "Traceback" not in err
    mine = [p for p in Path("/proc").glob("[0-9]*") if _names(p, str(tmp_path))]
    assert mine == []


def _names(process: Path, text: str) -> bool:
    try:
        return text.encode() in (process / "environ").read_bytes()
    except OSError:
        return False
