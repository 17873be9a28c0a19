"""Tokens and labels of every shape of rows: ours are TRL's, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
MODEL = ROOT / "recipes" / "tiny" / "model"
# Templates that TRL ships without generation markers, and replaces for loss: assistant.
TEMPLATES = ("qwen3", "qwen2_5", "llama3", "gemma", "phi3", "glm4moe", "qwen3_instruct_2507")

WORDS = ("What", "is", "the", "capital", "of", "France", "and", "plural", "thief", "please", "sort")


def text(number: int, length: int = 6) -> str:
    """Some words that differ from row to row."""
    return " ".join(WORDS[(number * 3 + at) % len(WORDS)] for at in range(length)) + f" {number}"


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def dialogue(number: int) -> list[dict[str, Any]]:
    """One to three questions, with a system prompt now and then."""
    turns = [turn("system", "Answer in a word.")] if number % 3 == 0 else []
    for at in range(1 + number % 3):
        turns += [turn("user", text(number + at)), turn("assistant", text(number, 1 + at))]
    return turns


def shared(number: int) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[t["role"]], "value": t["content"]} for t in dialogue(number)]


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}},
}
OTHER = {
    "type": "function",
    "function": {"name": "find", "parameters": {"properties": {"name": {"type": "string"}}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}


def with_tools(number: int) -> dict[str, Any]:
    turns = [
        turn("user", text(number)),
        {"role": "assistant", "tool_calls": [CALL]} if number % 2 else turn("assistant", "Let me."),
        turn("tool", "4", name="add"),
        turn("assistant", text(number, 2)),
    ]
    return {"messages": turns, "tools": [TOOL, OTHER][: 1 + number % 2]}


SHAPES: dict[str, Any] = {
    "text": lambda n: {"text": text(n, 4 + n % 9), "source": "web"},
    "prompt_completion": lambda n: {"prompt": text(n) + ": ", "completion": text(n, 3)},
    "prompt_completion_messages": lambda n: {
        "prompt": dialogue(n)[:-1],
        "completion": dialogue(n)[-1:],
    },
    "messages": lambda n: {"messages": dialogue(n), "id": n},
    "messages_and_prompt": lambda n: {"messages": dialogue(n), "prompt": text(n)},
    "tools": with_tools,
    "tools_as_text": lambda n: {**with_tools(n), "tools": json.dumps([TOOL])},
    "conversations": lambda n: {"conversations": shared(n)},
    "conversations_with_system": lambda n: {"conversations": shared(n), "system": "Be brief."},
    "alpaca": lambda n: {"instruction": text(n), "input": text(n, n % 3), "output": text(n, 2)},
    "input_ids": lambda n: {"input_ids": list(range(5, 10 + n))},
    "labels": lambda n: {
        "input_ids": list(range(5, 10 + n)),
        "labels": [-100, -100, *range(7, 10 + n)],
    },
    "template_arguments": lambda n: {
        "messages": dialogue(n),
        "chat_template_kwargs": {"enable_thinking": bool(n % 2)},
    },
}


def make_plan(path: Path, **values: Any) -> Any:
    from launcher.facts.probe import probe
    from launcher.plan.make import make_plan as make
    from launcher.spec.schema import Spec

    training = {"max_length": 60, **values.pop("training", {})}
    dataset = {"path": str(path), **values.pop("dataset", {})}
    spec = Spec.model_validate(
        {
            "model": {"path": str(MODEL)},
            "hardware": {"device": "cpu", "gpus": 1},
            "dataset": dataset,
            "training": training,
            **values,
        }
    )
    return make(spec, probe(spec)).plan


def shipped(template: str) -> str:
    """A chat template that TRL ships."""
    import trl

    return str(Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja")


def written(folder: Path, shape: str, rows: int = 24) -> Path:
    file = folder / f"{shape}.jsonl"
    lines = (json.dumps(SHAPES[shape](number)) + "\n" for number in range(rows))
    file.write_text("".join(lines), encoding="utf-8")
    return file


def of_trl(plan: Any) -> list[tuple[list[int], list[int]]]:
    """What the run's own preparation makes: SFTTrainer's rows."""
    from launcher.train.prepare import make_rows

    rows = make_rows(plan, lambda: None)["train"]
    return list(zip(rows["input_ids"], rows["labels"], strict=True))


def of_ours(plan: Any, batch: int = 7) -> list[tuple[list[int], list[int]]]:
    """The same by the check: batches, cut as planned, rows without a label dropped."""
    from launcher.train.data import load_rows
    from launcher.train.lengths import Cut
    from launcher.train.model import load_tokenizer
    from launcher.train.tokens import Tokeniser, Tokens

    arguments = plan.worker.training_arguments
    rows, _ = load_rows(plan.worker.dataset, arguments["seed"])
    tokenise = Tokeniser(plan, load_tokenizer(plan), rows[0])
    keep_end = arguments.get("truncation_mode") == "keep_end"
    cut = Cut(arguments["max_length"], keep_end, packs=False)
    found = []
    for start in range(0, len(rows), batch):
        for tokens in tokenise([rows[at] for at in range(start, min(start + batch, len(rows)))]):
            assert isinstance(tokens, Tokens), tokens
            ids, labels = cut(tokens.ids), cut(tokens.labels)
            if any(label != -100 for label in labels):
                found.append((ids, labels))
    return found


def assert_same(plan: Any) -> list[tuple[list[int], list[int]]]:
    theirs = of_trl(plan)
    ours = of_ours(plan)
    assert len(ours) == len(theirs) > 0
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one == other, row
    return ours


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_labels_are_those_of_trl(tmp_path: Path, shape: str) -> None:
    training = {}
    if "tools" in shape:
        training = {"chat_template_path": shipped("qwen3"), "max_length": 512}
    found = assert_same(make_plan(written(tmp_path, shape), training=training))
    trained = sum(label != -100 for _, labels in found for label in labels)
    everything = sum(len(ids) for ids, _ in found)
    assert (trained == everything) is (shape in ("text", "input_ids"))


@pytest.mark.parametrize("loss", ["all", "assistant", "completion"])
@pytest.mark.parametrize("shape", ["messages", "prompt_completion_messages"])
def test_every_loss(tmp_path: Path, shape: str, loss: str) -> None:
    if (shape, loss) == ("messages", "completion"):
        pytest.skip("refused by the plan")
    plan = make_plan(written(tmp_path, shape), loss=loss)
    assert_same(plan)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_trl_ships(tmp_path: Path, template: str) -> None:
    """TRL swaps in a variant with markers: so do we, and the end of the turn is trained."""
    file = tmp_path / "rows.jsonl"
    turns = [[t for t in dialogue(n) if t["role"] != "system"] for n in range(24)]
    file.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns), encoding="utf-8")
    training = {"chat_template_path": shipped(template), "max_length": 400}
    found = assert_same(make_plan(file, training=training))
    assert any(-100 in labels for _, labels in found)


@pytest.mark.filterwarnings("default:The `'keep_end'` truncation:FutureWarning")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_and_rows_that_it_leaves_without_a_label(tmp_path: Path, mode: str) -> None:
    training = {"max_length": 24, "truncation_mode": mode}
    found = assert_same(make_plan(written(tmp_path, "messages"), training=training))
    assert all(len(ids) <= 24 for ids, _ in found)
    assert len(found) < 24 or mode == "keep_end"


def _parquet(file: Path) -> Path:
    import datasets

    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    rows.to_parquet(str(file.with_suffix(".parquet")))
    return file.with_suffix(".parquet")


@pytest.mark.parametrize("shape", ["messages", "conversations", "prompt_completion", "text"])
def test_the_same_from_parquet_where_the_plan_cannot_look(tmp_path: Path, shape: str) -> None:
    """The loss is that of the shape here, too."""
    file = written(tmp_path, shape)
    plan = make_plan(_parquet(file))
    assert plan.worker.loss is None
    assert assert_same(plan) == of_ours(make_plan(file))


def test_cells_of_csv_are_text_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    cells = [("007", "NA"), ("1.0", "null"), ("what,\nnow", ""), ("3", "4")]
    lines = [f'"{prompt}","{completion}"\n' for prompt, completion in cells]
    file.write_text("question,answer\n" + "".join(lines), encoding="utf-8")
    columns = {"prompt": "question", "completion": "answer"}
    from launcher.train.data import load_rows

    plan = make_plan(file, dataset={"columns": columns})
    rows, _ = load_rows(plan.worker.dataset, 42)
    assert list(zip(rows["prompt"], rows["completion"], strict=True)) == cells
    assert_same(plan)


def test_a_folder_a_json_array_and_a_named_split(tmp_path: Path) -> None:
    from launcher.train.data import load_rows

    folder = tmp_path / "rows"
    folder.mkdir()
    for name, start in (("train-a", 0), ("train-b", 10), ("test", 20)):
        rows = [SHAPES["messages"](number) for number in range(start, start + 10)]
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    plan = make_plan(folder, dataset={"eval_split": "test"})
    train, held_out = load_rows(plan.worker.dataset, 42)
    assert (len(train), len(held_out)) == (20, 10)
    assert held_out[0]["messages"] == SHAPES["messages"](20)["messages"]
    assert_same(plan)


def test_bad_rows_are_left_out_of_the_run_as_of_the_check(tmp_path: Path) -> None:
    file = written(tmp_path, "messages")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    bad = ["{\n", '{"messages": []}\n', '{"messages": [{"role": "user", "content": "x"}]}\n']
    dirty = tmp_path / "dirty.jsonl"
    dirty.write_text("".join([*lines[:5], bad[0], *lines[5:9], *bad[1:], *lines[9:]]), "utf-8")
    plan = make_plan(dirty, dataset={"drop_bad": True})
    assert of_trl(plan) == of_ours(make_plan(file)) == of_trl(make_plan(file))


def test_sources_are_mixed_the_same_way_every_time(tmp_path: Path) -> None:
    from launcher.train.data import load_rows

    one, two = written(tmp_path, "messages"), written(tmp_path, "conversations", 12)

    def order(seed: int, **weights: Any) -> list[str]:
        more = {"path": str(two), "weight": weights.get("more")}
        own = {"sources": [more], "weight": weights.get("own")}
        plan = make_plan(one, dataset=own)
        rows, _ = load_rows(plan.worker.dataset, seed)
        return [row[-1]["content"] for row in rows["messages"]]

    assert len(order(1)) == 36
    mixed = order(1, own=3.0, more=1.0)
    assert mixed == order(1, own=3.0, more=1.0) != order(2, own=3.0, more=1.0)
    assert len(set(mixed)) <= len(mixed) < 36
