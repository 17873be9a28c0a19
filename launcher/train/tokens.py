"""Tokens and labels of rows, as TRL makes them, many rows at a time and without torch.

TRL 1.16 asks the tokenizer once a row (SFTTrainer._prepare_dataset, `tokenize_fn` and
`build_labels`); this asks it once a batch with the same arguments. The result is the same,
row by row: tests/train/test_data_shapes.py holds it against TRL for every shape. Packing and
truncation are not done here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import SpecError
from launcher.facts.shapes import BadRowError, is_chat, require_answer
from launcher.plan.types import Plan
from launcher.train.data import loss_arguments

IGNORED = -100
ANSWER = "assistant_masks"
COMPLETION = "completion_mask"
NO_ANSWER = "the chat template marks none of its tokens as the assistant's"
MARKERS_FIX = "use loss: all, or a template with {% generation %} markers"


@dataclass(frozen=True)
class Tokens:
    """A row's tokens before truncation."""

    ids: list[int]
    labels: list[int]
    """The same, -100 where a token is not trained on."""


def usable_rows(plan: Plan, tokenizer: Any) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a row can be tokenised, for a dataset that leaves out what cannot.

    The tokenizer is one of its own: the arguments' tokens and template are set on it.
    """
    made: list[Tokeniser] = []

    def usable(row: Mapping[str, Any]) -> bool:
        if not made:
            made.append(Tokeniser(plan, tokenizer, row))
        return made[0].usable(row)

    return usable


@contextmanager
def without_torch() -> Iterator[None]:
    """Import transformers, TRL and datasets as on a machine without torch: in half the time.

    Tokenizers work without it. What is imported already stays as it is.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import datasets  # noqa: F401
        import transformers
        from transformers import AutoTokenizer  # noqa: F401
        from trl import chat_template_utils  # noqa: F401

        transformers.logging.set_verbosity_error()
        yield
    finally:
        del sys.modules["torch"]


class Tokeniser:
    """Makes rows of one dataset into tokens.

    Args:
        plan: of the run.
        tokenizer: the model's own, with a padding token (launcher.train.model).
        first: the dataset's first row, from which TRL decides what the others are.

    Raises:
        SpecError: where TRL would end the run before its first row.
    """

    def __init__(self, plan: Plan, tokenizer: Any, first: Mapping[str, Any]) -> None:
        own = plan.worker.training_arguments
        arguments = {**own, **loss_arguments(plan, first)}
        self.tokenizer = tokenizer
        self.text_field = arguments.get("dataset_text_field") or "text"
        self.assistant_only = bool(arguments.get("assistant_only_loss"))
        completion_only = arguments.get("completion_only_loss")
        if completion_only is None:
            completion_only = "prompt" in first and "completion" in first
        self.completion_only = bool(completion_only)
        self.chat = is_chat(first)
        if "image" in first or "images" in first:
            raise SpecError(
                "images",
                "the rows hold images, and this version trains on text",
                fix="remove the columns image and images",
            )
        _set_tokens(tokenizer, arguments)
        self.template = self._training_template() if self.chat else None

    def _training_template(self) -> str | None:
        """The template that TRL takes instead of the model's own; None where it takes that."""
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        if not self.tokenizer.chat_template:
            raise SpecError(
                "no_chat_template",
                "the rows hold messages, and the tokenizer has no chat template",
                fix="use the model's instruct variant, or set training.chat_template_path",
            )
        if not self.assistant_only or has_generation_markers(self.tokenizer.chat_template):
            return None
        try:
            template: str | None = get_training_chat_template(self.tokenizer)
        except ValueError:
            raise SpecError(
                "no_generation_markers",
                "loss: assistant needs a chat template that marks the assistant's turns",
                why="the model's own does not, and TRL knows no such variant of it",
                fix=MARKERS_FIX,
                source="TRL 1.16 get_training_chat_template",
            ) from None
        return template

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Tokens | BadRowError]:
        """Tokens of each row, or what is wrong with it."""
        try:
            return list(self._batch(rows))
        except Exception as error:
            if len(rows) == 1:
                return [self._refused(rows[0], error)]
            half = len(rows) // 2
            return [*self(rows[:half]), *self(rows[half:])]

    def usable(self, row: Mapping[str, Any]) -> bool:
        """Whether a row can be tokenised."""
        return isinstance(self([row])[0], Tokens)

    def rule(self) -> str:
        """The loss in the spec's words."""
        if self.assistant_only:
            return "assistant"
        return "completion" if self.completion_only else "all"

    def _refused(self, row: Mapping[str, Any], error: Exception) -> BadRowError:
        if isinstance(error, BadRowError):
            return error
        try:
            require_answer(row, self.rule())
        except BadRowError as refused:
            return refused
        what = " ".join(str(error).split())[:200] or type(error).__name__
        if self.chat:
            return BadRowError(f"the chat template refuses it: {what}")
        return BadRowError(f"it cannot be tokenised: {what}")

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Tokens]:
        for columns in self._columns(rows):
            yield Tokens(columns["input_ids"], self._labels(columns))

    def _labels(self, columns: Mapping[str, Any]) -> list[int]:
        if columns.get("labels") is not None:
            return list(columns["labels"])
        names = [COMPLETION] if self.completion_only and COMPLETION in columns else []
        names += [ANSWER] if ANSWER in columns else []
        ids = columns["input_ids"]
        match [columns[name] for name in names]:
            case []:
                return list(ids)
            case [mask]:
                pairs = zip(ids, mask, strict=False)
                return [token if kept else IGNORED for token, kept in pairs]
            case masks:
                every = zip(ids, *masks, strict=False)
                return [token if all(kept) else IGNORED for token, *kept in every]

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        if "input_ids" in rows[0]:
            return iter(rows)
        if not self.chat:
            return self._text(rows)
        return self._conversations(rows)

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        name = "prompt" if "prompt" in rows[0] else None
        if name is None:
            texts = [self._ended(row[self.text_field]) for row in rows]
            yield from ({"input_ids": ids} for ids in self.tokenizer(text=texts)["input_ids"])
            return
        whole = [row["prompt"] + self._ended(row["completion"]) for row in rows]
        prompts = self.tokenizer(text=[row["prompt"] for row in rows])["input_ids"]
        yield from map(_with_completion, prompts, self.tokenizer(text=whole)["input_ids"])

    def _ended(self, text: str) -> str:
        end: str = self.tokenizer.eos_token
        return text if text.endswith(end) else text + end

    def _conversations(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Rows of equal tools and template arguments are rendered together."""
        start = 0
        keys = [_template_arguments(row) for row in rows]
        for at in range(1, len(rows) + 1):
            if at == len(rows) or keys[at] != keys[start]:
                yield from self._rendered(rows[start:at], keys[start])
                start = at

    def _rendered(
        self, rows: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
    ) -> Iterator[Mapping[str, Any]]:
        if "messages" in rows[0]:
            for columns in self._apply([row["messages"] for row in rows], arguments):
                yield self._with_answer(columns)
            return
        whole = self._apply([[*row["prompt"], *row["completion"]] for row in rows], arguments)
        prompts = self.tokenizer.apply_chat_template(
            [row["prompt"] for row in rows],
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            **arguments,
        )["input_ids"]
        for prompt, columns in zip(prompts, whole, strict=True):
            yield self._with_answer({**columns, **_with_completion(prompt, columns["input_ids"])})

    def _apply(self, conversations: list[Any], arguments: Mapping[str, Any]) -> Iterator[Any]:
        found = self.tokenizer.apply_chat_template(
            conversations,
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=self.assistant_only,
            **arguments,
        )
        names = [name for name in ("input_ids", ANSWER) if name in found]
        for values in zip(*(found[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))

    def _with_answer(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        if ANSWER in columns and 1 not in columns[ANSWER]:
            raise ValueError(NO_ANSWER)
        return columns


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs", {}))}


def _with_completion(prompt: list[int], whole: list[int]) -> dict[str, Any]:
    """The completion begins where the two diverge (TRL 1.16, common_prefix_length)."""
    length = 0
    for token, other in zip(prompt, whole, strict=False):
        if token != other:
            break
        length += 1
    return {"input_ids": whole, COMPLETION: [0] * length + [1] * (len(whole) - length)}


def _set_tokens(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Template, end and padding token that the arguments name, as SFTTrainer sets them."""
    if arguments.get("eos_token"):
        tokenizer.eos_token = arguments["eos_token"]
    path = arguments.get("chat_template_path")
    if path and Path(path).is_file() and path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path:
        from transformers import AutoTokenizer

        other = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = other.get_chat_template()
        known = tokenizer.get_vocab()
        added = other.added_tokens_decoder.values()
        tokenizer.add_tokens([token for token in added if token.content not in known])
        tokenizer.eos_token = other.eos_token
    if tokenizer.eos_token is None:
        raise SpecError(
            "no_end_token",
            "the tokenizer has no end token",
            why="a model that never sees one does not stop",
            fix="set training.eos_token",
        )
    tokenizer.pad_token = arguments.get("pad_token") or tokenizer.pad_token or tokenizer.eos_token
