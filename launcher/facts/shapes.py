"""The shapes that rows come in: which one it is, what is wrong with a row, what is trained.

The one home of the conversion into the trainer's shapes (`text`, `prompt`/`completion`,
`messages`, `input_ids`): the plan's sample, `data check`, the preparation and the ranks use
it. Plain Python over plain rows; no file is opened here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from launcher.errors import SpecError

Format = Literal["text", "prompt_completion", "messages", "conversations", "alpaca", "input_ids"]
Row = dict[str, Any]

CHARACTERS_PER_TOKEN = 4  # the usual rate of English text; used where a row holds tokens

# Format, the columns that it needs, what one row looks like. Searched in this order.
# Source: TRL 1.16 documentation, "Dataset formats"; alpaca and conversations are turned
# into messages by the launcher.
FORMATS: tuple[tuple[Format, tuple[str, ...], str], ...] = (
    ("input_ids", ("input_ids",), "input_ids: [1, 2, 3]"),
    ("messages", ("messages",), "messages: [{role, content}, ...]"),
    ("conversations", ("conversations",), "conversations: [{from, value}, ...]"),
    ("prompt_completion", ("prompt", "completion"), "prompt and completion"),
    ("alpaca", ("instruction", "output"), "instruction, output (and input)"),
    ("text", ("text",), "text: a string"),
)
_CHAT_EXTRAS = ("tools", "chat_template_kwargs", "images", "image")
# Format -> columns that TRL 1.16 reads. With more than one shape in a row it would take one
# of them by the order of a set, which differs from process to process (is_conversational).
KEPT: dict[Format, tuple[str, ...]] = {
    "input_ids": ("input_ids", "labels", "completion_mask", "assistant_masks"),
    "messages": ("messages", *_CHAT_EXTRAS),
    "conversations": ("conversations", "system", *_CHAT_EXTRAS),
    "prompt_completion": ("prompt", "completion", *_CHAT_EXTRAS),
    "alpaca": ("instruction", "input", "output", "system"),
    "text": ("text",),
}
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
# Who speaks in ShareGPT files -> role. Templates know the roles only.
SPEAKERS = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_SYSTEM = ("system", "developer")
_ANSWERS = ("tool", "function", "ipython")


class BadRowError(Exception):
    """What is wrong with one row, and the fix; the reader adds where it is."""

    def __init__(self, what: str, fix: str = "correct or remove the row") -> None:
        super().__init__(what)
        self.fix = fix


def rename(row: Mapping[str, Any], renames: Mapping[str, str]) -> Row:
    """The row with the trainer's column names: `renames` is ours to the file's."""
    back = {theirs: ours for ours, theirs in renames.items()}
    return {back.get(name, name): value for name, value in row.items()}


def detect(path: str, columns: tuple[str, ...]) -> Format:
    """The first format whose columns are all there.

    Raises:
        SpecError: `dataset_unknown_format`.
    """
    for form, needed, _ in FORMATS:
        if all(name in columns for name in needed):
            return form
    raise SpecError(
        "dataset_unknown_format",
        f"the dataset {path} is in no known format",
        why=f"its columns are {', '.join(columns) or 'none'}; a format needs one of: "
        + "; ".join(words for _, _, words in FORMATS),
        fix="rename the columns, or map them with `dataset.columns`",
        source="https://huggingface.co/docs/trl/dataset_formats",
    )


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row in a trainer's shape holds messages."""
    return "messages" in row or isinstance(row.get("prompt"), list)


# --- conversion -----------------------------------------------------------------------------


def convert(row: Mapping[str, Any], form: Format) -> Row:
    """A row of a format in the trainer's shape, without columns that it does not read."""
    kept = {name: row[name] for name in KEPT[form] if name in row}
    match form:
        case "conversations":
            return _from_conversations(kept)
        case "alpaca":
            return {"messages": _with_system(kept, _from_alpaca(kept))}
        case _:
            return kept


def _from_conversations(row: Row) -> Row:
    """ShareGPT's from/value as role/content; other keys of a turn stay."""
    names = {"from": "role", "value": "content"}
    turns = []
    for turn in row.pop("conversations"):
        named = {names.get(key, key): value for key, value in turn.items() if value is not None}
        turns.append({**named, "role": SPEAKERS[named["role"]]})
    messages = _with_system(row, turns)
    row.pop("system", None)
    return {"messages": messages, **row}


def _from_alpaca(row: Mapping[str, Any]) -> list[Row]:
    """instruction, input, output as a conversation of two turns."""
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]


def _with_system(row: Mapping[str, Any], turns: list[Row]) -> list[Row]:
    """The turns after the system prompt that some files hold in a column of its own."""
    system = row.get("system")
    if not system or turns[0]["role"] in _SYSTEM:
        return turns
    return [{"role": "system", "content": system}, *turns]


# --- what cannot be used --------------------------------------------------------------------


def measure(row: Mapping[str, Any], form: Format) -> tuple[int, bool]:
    """Characters of a row's text, and whether it holds messages.

    Raises:
        BadRowError: where training would choke on the row.
    """
    for name in next(needed for name, needed, _ in FORMATS if name == form):
        if row.get(name) is None:
            raise BadRowError(f"`{name}` is missing, which the format {form} needs")
    match form:
        case "messages":
            return _measure_turns(row["messages"], "messages", "role", "content"), True
        case "conversations":
            return _measure_conversations(row["conversations"]), True
        case "prompt_completion":
            return _measure_pair(row)
        case "alpaca":
            names = ("instruction", "input", "output")
            return sum(_text_length(row, name) for name in names if row.get(name)), True
        case "text":
            return _text_length(row, "text"), False
        case _:
            return _measure_tokens(row["input_ids"]), False


def type_name(value: Any) -> str:
    """A JSON value's type in JSON's own words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _text_length(row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    if not isinstance(value, str):
        raise BadRowError(f"`{name}` must be a string, this is {type_name(value)}")
    return len(value)


def _measure_tokens(value: Any) -> int:
    if not isinstance(value, list) or not value:
        raise BadRowError("`input_ids` must be a list of token numbers with at least one in it")
    if not all(isinstance(token, int) and token >= 0 for token in value):
        raise BadRowError("`input_ids` must hold token numbers of 0 or more")
    return len(value) * CHARACTERS_PER_TOKEN


def _measure_pair(row: Mapping[str, Any]) -> tuple[int, bool]:
    """Prompt and completion: both strings, or both lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if type(prompt) is not type(completion):
        raise BadRowError(
            f"`prompt` is {type_name(prompt)} and `completion` is {type_name(completion)}; "
            "both must be strings, or both lists of messages"
        )
    if not isinstance(prompt, list):
        return _text_length(row, "prompt") + _text_length(row, "completion"), False
    total = 0
    for name in ("prompt", "completion"):
        total += _measure_turns(row[name], name, "role", "content")
    return total, True


def _measure_conversations(turns: Any) -> int:
    """`from` and `value` of ShareGPT; some files have `role` and `content` under this name."""
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and "role" in first:
        return _measure_turns(turns, "conversations", "role", "content")
    return _measure_turns(turns, "conversations", "from", "value")


def _measure_turns(turns: Any, name: str, who: str, what: str) -> int:
    """Characters of a list of messages, each of which is checked."""
    if not isinstance(turns, list):
        raise BadRowError(f"`{name}` must be a list, this is {type_name(turns)}")
    if not turns:
        raise BadRowError(f"`{name}` is empty")
    known = SPEAKERS if name == "conversations" else ROLES
    return sum(
        _measure_turn(turn, f"{name}[{index}]", who, what, known)
        for index, turn in enumerate(turns)
    )


def _measure_turn(
    turn: Any, where: str, who: str, what: str, known: Mapping[str, str] | frozenset[str]
) -> int:
    """Characters of one message."""
    if not isinstance(turn, dict):
        raise BadRowError(f"`{where}` must be an object, this is {type_name(turn)}")
    speaker = turn.get(who)
    if speaker is None:
        raise BadRowError(f"`{where}` has no `{who}`; it has {', '.join(turn) or 'nothing'}")
    if not isinstance(speaker, str) or speaker not in known:
        names = ", ".join(sorted(known))
        raise BadRowError(
            f"`{where}` has the unknown {who} {speaker!r}; known: {names}",
            "use one of these, or remove the row",
        )
    content = turn.get(what)
    if isinstance(content, str):
        return len(content)
    if content is None and turn.get("tool_calls"):
        return len(json.dumps(turn["tool_calls"], default=str))
    if isinstance(content, list):
        return sum(len(str(part.get("text", ""))) for part in content if isinstance(part, dict))
    if content is None:
        raise BadRowError(f"`{where}` has no `{what}`")
    raise BadRowError(f"`{where}.{what}` must be a string, this is {type_name(content)}")


def require_answer(row: Mapping[str, Any], loss: str | None) -> None:
    """Refuse a conversation without a turn to train on.

    Args:
        row: in the trainer's shape.
        loss: the rule; only `assistant` needs such a turn.

    Raises:
        BadRowError: where TRL 1.16 would end the run ("no assistant tokens").
    """
    if loss != "assistant" or not is_chat(row):
        return
    if not any(turn["role"] == "assistant" for turn in turns_of(row)):
        raise BadRowError(
            "no turn of the assistant, which `loss: assistant` trains on",
            "add an answer, or remove the row",
        )


# --- what can be used and should not be ------------------------------------------------------


def turns_of(row: Mapping[str, Any]) -> list[Row]:
    """All messages of a conversation in the trainer's shape."""
    if "messages" in row:
        return list(row["messages"])
    return [*row["prompt"], *row["completion"]]


def oddities(row: Mapping[str, Any]) -> list[str]:
    """Codes of what is unusual in a row in the trainer's shape: `empty_turn`, `order`."""
    found = []
    if is_chat(row):
        turns = turns_of(row)
        if any(_is_blank(turn.get("content")) and not turn.get("tool_calls") for turn in turns):
            found.append("empty_turn")
        if _out_of_order([turn["role"] for turn in turns]):
            found.append("order")
    elif any(_is_blank(row.get(name, "-")) for name in ("text", "completion")):
        found.append("empty_turn")
    return found


def _is_blank(content: Any) -> bool:
    return content is None or (isinstance(content, str) and not content.strip())


def _out_of_order(roles: list[str]) -> bool:
    """System prompt first, then user and assistant in turns, the assistant last.

    The results of tools stand between two turns of the assistant.
    """
    while roles and roles[0] in _SYSTEM:
        roles = roles[1:]
    if not roles or roles[0] != "user" or roles[-1] != "assistant":
        return True
    return any(not _may_follow(before, after) for before, after in pairwise(roles))


def _may_follow(before: str, after: str) -> bool:
    if before == "user":
        return after == "assistant"
    if before == "assistant":
        return after == "user" or after in _ANSWERS
    if before in _SYSTEM:
        return False
    return after == "assistant" or after in _ANSWERS
