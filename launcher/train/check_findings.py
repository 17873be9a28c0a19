"""What is odd about rows that can be used, each with its fix and the first places."""

from __future__ import annotations

from typing import Any

import numpy as np

from launcher.plan.types import Plan
from launcher.train.check_rows import Dataset
from launcher.train.lengths import (
    DOUBLE_START,
    ENDED,
    ENDED_CUT,
    FLAGS,
    TRAINED,
    TRAINED_CUT,
    Cut,
)
from launcher.train.scan import Findings

ODD = ("empty_turn", "order")
Finding = dict[str, Any]


def odd_rows(plan: Plan, cut: Cut, data: Dataset, rows: Any) -> list[Finding]:
    """What is odd about rows that can be used; the table of rules."""
    numbers = data.numbers[rows]
    flags = numbers[:, FLAGS]
    unlabelled = numbers[:, TRAINED_CUT] == 0
    limit = cut.max_length
    _, first, counts = np.unique(data.hashes()[rows], return_index=True, return_counts=True)
    again = np.setdiff1d(np.arange(len(rows)), first) if counts.max(initial=1) > 1 else first[:0]
    ended, kept_end = flags & ENDED > 0, flags & ENDED_CUT > 0
    repeated = np.isin(np.arange(len(rows)), again)
    rules: tuple[tuple[str, Any, str, str], ...] = (
        (
            "no_label",
            unlabelled & (numbers[:, TRAINED] > 0),
            f"no label within {limit} tokens",
            "raise training.max_length, or shorten their prompts",
        ),
        (
            "nothing_trained",
            unlabelled & (numbers[:, TRAINED] == 0),
            "no token to train on",
            "remove them, or use another loss",
        ),
        (
            "no_end_token",
            ~ended,
            "no trained end token at the end: the model may not learn to stop",
            "use a template whose end-of-turn token is the assistant's",
        ),
        (
            "end_cut",
            ended & ~kept_end,
            f"the end token is cut off at {limit} tokens",
            "raise training.max_length",
        ),
        (
            "double_start",
            flags & DOUBLE_START > 0,
            "the start token twice at the beginning",
            "remove it from the rows or from the template",
        ),
        ("duplicate", repeated, "in the data more than once", "remove them, or mean it"),
    )
    return [
        _finding(code, int(mask.sum()), what, fix, data.places(rows[np.flatnonzero(mask)]))
        for code, mask, what, fix in rules
        if mask.any()
    ]


def few_rows(plan: Plan, used: int) -> list[Finding]:
    """Fewer rows than one global batch has."""
    batch = plan.batch.global_batch_size
    if used >= batch:
        return []
    what = f"fewer than one global batch of {batch}"
    fix = "use a smaller --global-batch-size: a step repeats rows otherwise"
    return [_finding("small_dataset", used, what, fix, [])]


def odd_turns(found: Findings) -> list[Finding]:
    """What a person would have to look at in the turns themselves."""
    words = {
        "empty_turn": ("a turn without text", "fill it or remove the row"),
        "order": (
            "turns in an unusual order: a system prompt first, then user and assistant "
            "in turns, the assistant last",
            "correct the roles, or mean it",
        ),
    }
    return [
        _finding(code, found.counts[code], *words[code], found.places[code])
        for code in ODD
        if code in found.counts
    ]


def tokenizer_notes(tokenizer: Any) -> list[Finding]:
    """The padding token, where it is the end token as well."""
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return []
    what = (
        f"padding uses the end token {tokenizer.eos_token}; labels are masked by position, so "
        "that the end token of a row stays trained"
    )
    return [{**_finding("pad_is_end", 0, what, "", []), "level": "note"}]


def leaks(data: Dataset, rows: Any, held: tuple[Dataset, Any] | None) -> list[Finding]:
    """Held-out rows that are trained on too."""
    if held is None:
        return []
    other, indices = held
    mask = np.isin(other.hashes()[indices], data.hashes()[rows])
    if not mask.any():
        return []
    what = "in the held-out data and trained on too: the evaluation flatters"
    places = other.places(indices[np.flatnonzero(mask)])
    return [_finding("leak", int(mask.sum()), what, "remove them from one of the two", places)]


def _finding(code: str, rows: int, what: str, fix: str, places: list[str]) -> Finding:
    return {
        "code": code,
        "level": "warning",
        "rows": rows,
        "message": what,
        "fix": fix,
        "places": places,
    }
