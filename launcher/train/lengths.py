"""Tokens of whole datasets in numbers: every row's length, trained tokens, end and start.

Rows are tokenised in batches by as many processes as there are cores, and only numbers come
back: memory does not grow with the text.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.facts.shapes import BadRowError
from launcher.train.tokens import IGNORED, Tokeniser, Tokens

BATCH = 128
MOST_PROCESSES = 16
ROWS_A_PROCESS = 1500  # below that a process costs more than it brings
LENGTH, TRAINED, TRAINED_CUT, FLAGS = range(4)
ENDED, ENDED_CUT, DOUBLE_START, FAILED = 1, 2, 4, 8
Numbers = Any  # an int32 array of rows x 4


@dataclass(frozen=True)
class Cut:
    """What truncation leaves of a row."""

    max_length: int | None
    keep_end: bool
    packs: bool
    """Packing cuts at the end, whatever `truncation_mode` says (TRL 1.16)."""

    def __call__(self, tokens: list[int]) -> list[int]:
        """The tokens that are left."""
        if self.max_length is None:
            return tokens
        if self.keep_end and not self.packs:
            return tokens[-self.max_length :]
        return tokens[: self.max_length]


@dataclass(frozen=True)
class Measure:
    """Turns a batch of rows into numbers."""

    tokenise: Tokeniser
    cut: Cut
    ends: frozenset[int]
    """Tokens that end a turn: the end token, and the added ones (TRL 1.16 counts them so)."""
    blanks: dict[int, bool]

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[Numbers, list[tuple[int, str, str]]]:
        """Numbers of each row, and what could not be tokenised with its place in the batch."""
        numbers = np.zeros((len(rows), 4), dtype=np.int32)
        failed = []
        for at, tokens in enumerate(self.tokenise(rows)):
            if isinstance(tokens, BadRowError):
                failed.append((at, str(tokens), tokens.fix))
                numbers[at, FLAGS] = FAILED
            else:
                numbers[at] = self._row(tokens)
        return numbers, failed

    def _row(self, tokens: Tokens) -> tuple[int, int, int, int]:
        ids, labels = tokens.ids, tokens.labels
        trained = len(labels) - labels.count(IGNORED)
        start = self.tokenise.tokenizer.bos_token_id
        flags = DOUBLE_START if start is not None and ids[:2] == [start, start] else 0
        flags |= ENDED if self._ends(labels) else 0
        left = self.cut(labels)
        if len(left) == len(labels):
            return len(ids), trained, trained, flags | (ENDED_CUT if flags & ENDED else 0)
        flags |= ENDED_CUT if self._ends(left) else 0
        return len(ids), trained, len(left) - left.count(IGNORED), flags

    def _ends(self, labels: list[int]) -> bool:
        """Whether the last trained token, white space aside, is an end token."""
        for token in reversed(labels):
            if token == IGNORED or self._blank(token):
                continue
            return token in self.ends
        return False

    def _blank(self, token: int) -> bool:
        if token not in self.blanks:
            self.blanks[token] = not self.tokenise.tokenizer.decode([token]).strip()
        return self.blanks[token]


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn, as TRL 1.16 counts them (is_chat_template_stop_token_trained)."""
    added = set(tokenizer.get_added_vocab().values())
    return frozenset(added | {tokenizer.eos_token_id})


_measure: Measure
_rows: Any


def measure_all(
    rows: Any, measure: Measure, tell: Callable[[int], None], processes: int | None = None
) -> tuple[Numbers, list[tuple[int, str, str]]]:
    """Numbers of every row of a dataset, and what could not be tokenised.

    Args:
        rows: a `datasets.Dataset` in TRL's shapes.
        measure: makes numbers of a batch.
        tell: called with the rows that are done.
        processes: as many as there are cores if None.
    """
    global _measure, _rows  # what a forked worker inherits
    _measure, _rows = measure, rows
    total = len(rows)
    spans = [(at, min(at + BATCH, total)) for at in range(0, total, BATCH)]
    numbers = np.zeros((total, 4), dtype=np.int32)
    failed: list[tuple[int, str, str]] = []
    for (start, stop), (found, refused) in zip(
        spans, _results(spans, processes or _processes(total)), strict=True
    ):
        numbers[start:stop] = found
        failed += [(start + at, what, fix) for at, what, fix in refused]
        tell(stop)
    return numbers, failed


def _processes(rows: int) -> int:
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, MOST_PROCESSES, math.ceil(rows / ROWS_A_PROCESS)))


def _results(spans: list[tuple[int, int]], processes: int) -> Iterator[Any]:
    if processes == 1:
        yield from map(_measure_span, spans)
        return
    # One process a core; threads of the tokenizer would only fight over them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_ignore_interrupt)
    try:
        yield from pool.map(_measure_span, spans, chunksize=4)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl-C is the parent's business, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _measure_span(span: tuple[int, int]) -> tuple[Numbers, list[tuple[int, str, str]]]:
    columns = _rows[span[0] : span[1]]
    names = list(columns)
    batch = [
        dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return _measure(batch)
