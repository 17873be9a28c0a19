"""The check of a run's rows: `python -m launcher.train.check`, a plan on standard input.

On standard output: JSON objects, one a line. `progress` while it works, then one `report`
or one `error`. It imports no torch and touches no GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from launcher.errors import ExitCode, Refusal
from launcher.facts.shapes import BadRowError
from launcher.plan.types import Plan, plan_from_json
from launcher.train.data import hold_out, mix, sources_of, weights_of
from launcher.train.lengths import (
    DOUBLE_START,
    ENDED,
    ENDED_CUT,
    FAILED,
    FLAGS,
    LENGTH,
    TRAINED,
    TRAINED_CUT,
    Cut,
    Measure,
    Numbers,
    end_tokens,
    measure_all,
)
from launcher.train.scan import FIRST, SHOWN, Findings, Part, scan
from launcher.train.tokens import IGNORED, Tokeniser, Tokens, without_torch

PERCENTILES = (50, 90, 95, 99)
BARS = 12
EXAMPLE_TOKENS = 400
PACKED_AT_ONCE = 1000  # rows that `datasets.map` hands to TRL's packing together
TELL_SECONDS = 0.25
ODD = ("empty_turn", "order")


class Teller:
    """Writes JSON lines for the one who started this: what is being done, and the end."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.next_time = 0.0
        self.text = ""

    def __call__(self, text: str, done: int = -1, total: int = -1) -> None:
        """Tell a stage; with numbers how far it is, a few times a second."""
        now = time.monotonic()
        if text != self.text:
            self.text, done = text, -1
        if done >= 0 and now < self.next_time:
            return
        self.next_time = now + TELL_SECONDS
        self.write({"progress": {"text": text, "done": done, "total": total}})

    def write(self, value: Mapping[str, Any]) -> None:
        """One line."""
        self.stream.write(json.dumps(value) + "\n")
        self.stream.flush()


def own_output() -> TextIO:
    """Standard output for this module only: what libraries print goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


@dataclass
class Dataset:
    """All rows of a dataset that can be used: sources, numbers, and their order in the run."""

    parts: list[Part]
    numbers: Numbers
    """Of the rows of all parts, one after the other."""
    order: Any
    """Indices of `numbers`, in the order of the run."""

    def part_of(self, row: int) -> tuple[Part, int]:
        """Whose row it is, and which of its own."""
        for part in self.parts:
            if row < len(part.numbers):
                return part, row
            row -= len(part.numbers)
        raise IndexError(row)

    def place(self, row: int) -> str:
        """Where a row lies."""
        part, own = self.part_of(row)
        return part.place(own)

    def places(self, rows: Any) -> list[str]:
        """Where the first of some rows lie."""
        return [self.place(int(row)) for row in rows[:FIRST]]

    def hashes(self) -> Any:
        """A number for each row's content."""
        return np.concatenate([np.frombuffer(part.hashes, dtype=np.uint64) for part in self.parts])


class Check:
    """Works through a plan's dataset."""

    def __init__(self, plan: Plan, tell: Teller) -> None:
        assert plan.worker.dataset is not None  # noqa: S101 - refused by the command line
        self.plan, self.settings = plan, plan.worker.dataset
        self.arguments = plan.worker.training_arguments
        self.found, self.found_held = Findings(), Findings()
        self.tell = tell
        self.tokenise: Tokeniser | None = None
        packs = bool(self.arguments.get("packing"))
        keep_end = self.arguments.get("truncation_mode") == "keep_end"
        self.cut = Cut(self.arguments.get("max_length"), keep_end, packs)

    def report(self) -> dict[str, Any]:
        """Everything that `data check --json` prints.

        Raises:
            Refusal: where there is nothing to check.
        """
        started = time.monotonic()
        training, evaluation = sources_of(self.settings)
        parts = [scan(source, self.found, self.tell) for source in training]
        held_part = scan(evaluation, self.found_held, self.tell) if evaluation else None
        report: dict[str, Any] = {
            "dataset": self.settings["path"],
            "format": parts[0].form,
            "loss": self.plan.worker.loss or "by shape",
            "rows": {"read": sum(len(part.numbers) + part.bad for part in parts)},
        }
        usable = [part for part in parts if part.rows is not None]
        if usable:
            report |= self._tokens(usable, held_part)
        report["rows"]["bad"] = self.found.bad
        both = [*parts, *([held_part] if held_part else [])]
        report["bad"] = {
            "rows": self.found.bad + self.found_held.bad,
            "read": sum(len(part.numbers) + part.bad for part in both),
        }
        first = [*self.found.first_bad, *self.found_held.first_bad][:SHOWN]
        report["bad_rows"] = [bad.as_json() for bad in first]
        report["seconds"] = round(time.monotonic() - started, 3)
        return report

    def _tokens(self, parts: list[Part], held_part: Part | None) -> dict[str, Any]:
        from launcher.train.model import load_tokenizer

        self.tell("loading the tokenizer")
        tokenizer = load_tokenizer(self.plan)
        self.tokenise = Tokeniser(self.plan, tokenizer, parts[0].rows[0])
        data = self._measured(parts, weights_of(self.settings), self.found)
        train, share = self._split(data)
        held = share
        if held_part is not None and held_part.rows is not None:
            own = self._measured([held_part], None, self.found_held)
            held = own, own.order
        self.tell("counting")
        used = self._described(data, train)
        told = [*self._warnings(data, train, used), *self._tokenizer_notes()]
        told += self._leaks(data, train, held)
        return {
            **used,
            "loss": self.tokenise.rule(),
            "held_out": self._described(*held) if held else None,
            "findings": told,
            "example": self._example(data, train),
        }

    # --- rows ---

    def _measured(self, parts: list[Part], weights: list[float] | None, into: Findings) -> Dataset:
        """Tokenise all parts, and find the order in which the run takes their rows."""
        import datasets

        assert self.tokenise is not None  # noqa: S101 - made before any row
        ends = end_tokens(self.tokenise.tokenizer)
        measure = Measure(self.tokenise, self.cut, ends, {})
        total = sum(len(part.numbers) for part in parts)
        numbers, indices, offset = [], [], 0
        for part in parts:
            if len(part.rows) != len(part.numbers):
                what = f"{part.source.path}: datasets reads {len(part.rows)} rows of it, "
                raise RuntimeError(what + f"this check {len(part.numbers)}")
            before = offset

            def tell(done: int, before: int = before) -> None:
                self.tell("tokenising", before + done, total)

            found, failed = measure_all(part.rows, measure, tell)
            for row, what, fix in failed:
                into.refuse(part.place(row), BadRowError(what, fix))
            numbers.append(found)
            rows = range(offset, offset + len(found))
            indices.append(datasets.Dataset.from_dict({"row": list(rows)}))
            offset += len(found)
        order = np.array(mix(indices, weights, self.arguments["seed"])["row"][:], dtype=np.int64)
        every = np.concatenate(numbers)
        return Dataset(parts, every, order[every[order, FLAGS] & FAILED == 0])

    def _split(self, data: Dataset) -> tuple[Any, tuple[Dataset, Any] | None]:
        """Rows that are trained on, and the share that is held out."""
        import datasets

        share = self.settings["eval_share"]
        if not share or len(data.order) < 2:  # noqa: PLR2004 - nothing can be split off one
            return data.order, None
        rows = datasets.Dataset.from_dict({"row": data.order})
        train, held = hold_out(rows, None, share, self.arguments["seed"])
        return np.array(train["row"][:]), (data, np.array(held["row"][:]))

    # --- numbers ---

    def _described(self, data: Dataset, rows: Any) -> dict[str, Any]:
        """Counts of some rows of a dataset, with what the run makes of them."""
        numbers = data.numbers[rows]
        length, limit = numbers[:, LENGTH].astype(np.int64), self.cut.max_length
        left = np.minimum(length, limit) if limit else length
        # TRL drops rows without a label before training, but not where it packs.
        dropped = (numbers[:, TRAINED_CUT] == 0) & (not self.cut.packs)
        kept = left[~dropped]
        total, trained = int(kept.sum()), int(numbers[~dropped, TRAINED_CUT].sum())
        return {
            "rows": {
                "read": sum(len(part.numbers) + part.bad for part in data.parts),
                "used": len(kept),
                "without_label": int(dropped.sum()),
            },
            "tokens": {
                "before_truncation": int(length.sum()),
                "used": total,
                "trained": trained,
                "trained_share": _share(trained, total),
            },
            "lengths": _lengths(length),
            "truncation": {
                "max_length": limit,
                "rows": int((left < length).sum()),
                "row_share": _share(int((left < length).sum()), len(length)),
                "token_share": _share(int((length - left).sum()), int(length.sum())),
                "end_cut": int(((numbers[:, FLAGS] & (ENDED | ENDED_CUT)) == ENDED).sum()),
            },
            "padding": self._padding(kept),
            "packing": self._packing(length),
        }

    def _padding(self, lengths: Any) -> dict[str, Any]:
        """Share of padding in the micro batches of one epoch, in an order drawn by the seed."""
        micro = self.plan.batch.micro_batch_size
        found = {"micro_batch_size": micro, "share": 0.0}
        if not len(lengths) or self.arguments.get("padding_free") or self.cut.packs:
            return found
        drawn = np.random.default_rng(self.arguments["seed"]).permutation(lengths)
        multiple = self.arguments.get("pad_to_multiple_of") or 1
        cells = 0
        for start in range(0, len(drawn), micro):
            batch = drawn[start : start + micro]
            cells += len(batch) * (-(-int(batch.max()) // multiple) * multiple)
        return {**found, "share": 1 - _share(int(drawn.sum()), cells)}

    def _packing(self, lengths: Any) -> dict[str, Any] | None:
        """What TRL's own packing would make of rows of these lengths."""
        limit = self.cut.max_length
        if limit is None or not len(lengths):
            return None
        strategy = self.arguments.get("packing_strategy") or "bfd"
        sequences = tokens = 0
        for start in range(0, len(lengths), PACKED_AT_ONCE):
            packed = _packed(lengths[start : start + PACKED_AT_ONCE], limit, strategy)
            sequences += len(packed)
            tokens += int(packed.sum())
        return {
            "planned": self.cut.packs,
            "strategy": strategy,
            "sequences": sequences,
            "utilisation": _share(tokens, sequences * limit),
        }

    # --- findings ---

    def _warnings(self, data: Dataset, rows: Any, used: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What is odd about rows that can be used; the table of rules."""
        numbers = data.numbers[rows]
        flags = numbers[:, FLAGS]
        cut = numbers[:, TRAINED_CUT] == 0
        limit = self.cut.max_length
        batch = self.plan.batch.global_batch_size
        _, first, counts = np.unique(data.hashes()[rows], return_index=True, return_counts=True)
        again = (
            np.setdiff1d(np.arange(len(rows)), first) if counts.max(initial=1) > 1 else first[:0]
        )
        ended, kept_end = flags & ENDED > 0, flags & ENDED_CUT > 0
        repeated = np.isin(np.arange(len(rows)), again)
        rules: tuple[tuple[str, Any, str, str], ...] = (
            (
                "no_label",
                cut & (numbers[:, TRAINED] > 0),
                f"no label within {limit} tokens",
                "raise training.max_length, or shorten their prompts",
            ),
            (
                "nothing_trained",
                cut & (numbers[:, TRAINED] == 0),
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
        found = [
            _finding(code, int(mask.sum()), what, fix, data.places(rows[np.flatnonzero(mask)]))
            for code, mask, what, fix in rules
            if mask.any()
        ]
        found += self._odd_turns()
        if used["rows"]["used"] < batch:
            what = f"fewer than one global batch of {batch}"
            fix = "use a smaller --global-batch-size: a step repeats rows otherwise"
            found.append(_finding("small_dataset", used["rows"]["used"], what, fix, []))
        return found

    def _odd_turns(self) -> list[dict[str, Any]]:
        words = {
            "empty_turn": ("a turn without text", "fill it or remove the row"),
            "order": (
                "turns in an unusual order: a system prompt first, then user and assistant "
                "in turns, the assistant last",
                "correct the roles, or mean it",
            ),
        }
        return [
            _finding(code, self.found.counts[code], *words[code], self.found.places[code])
            for code in ODD
            if code in self.found.counts
        ]

    def _tokenizer_notes(self) -> list[dict[str, Any]]:
        """The padding token, where it is the end token as well."""
        assert self.tokenise is not None  # noqa: S101 - made before any row
        tokenizer = self.tokenise.tokenizer
        if tokenizer.pad_token_id != tokenizer.eos_token_id:
            return []
        what = (
            f"padding uses the end token {tokenizer.eos_token}; labels are masked by position, so "
            "that the end token of a row stays trained"
        )
        return [{**_finding("pad_is_end", 0, what, "", []), "level": "note"}]

    def _leaks(
        self, data: Dataset, rows: Any, held: tuple[Dataset, Any] | None
    ) -> list[dict[str, Any]]:
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

    # --- one row to look at ---

    def _example(self, data: Dataset, rows: Any) -> dict[str, Any] | None:
        """The first row with a label, as the model gets it, in pieces trained and not."""
        assert self.tokenise is not None  # noqa: S101 - made before any row
        labelled = rows[data.numbers[rows, TRAINED_CUT] > 0]
        if not len(labelled):
            return None
        part, own = data.part_of(int(labelled[0]))
        (tokens,) = self.tokenise([part.rows[own]])
        if not isinstance(tokens, Tokens):
            return None
        ids, labels = self.cut(tokens.ids), self.cut(tokens.labels)
        shown, pieces, start = min(len(ids), EXAMPLE_TOKENS), [], 0
        for at in range(1, shown + 1):
            trained = labels[start] != IGNORED
            if at == shown or (labels[at] != IGNORED) is not trained:
                text = self.tokenise.tokenizer.decode(ids[start:at])
                pieces.append({"text": text, "trained": trained, "tokens": at - start})
                start = at
        place = data.place(int(labelled[0]))
        return {"place": place, "pieces": pieces, "tokens": len(ids), "shown_tokens": shown}


def _packed(lengths: Any, limit: int, strategy: str) -> Any:
    """Tokens of each packed sequence, by TRL 1.16's own functions on rows of these lengths."""
    import pyarrow as pa
    from trl import data_utils

    offsets = np.concatenate(([0], np.cumsum(lengths)))
    values = pa.nulls(int(offsets[-1]), pa.int8())
    rows = pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, values)})
    if strategy == "wrapped":
        table = data_utils._pack_wrapped(rows, limit)  # noqa: SLF001 - the public one maps files
    else:
        overflow = "split" if strategy == "bfd_split" else "truncate"
        table = data_utils._pack_bfd(rows, limit, overflow)  # noqa: SLF001
    return np.diff(table["input_ids"].combine_chunks().offsets.to_numpy())


def _lengths(length: Any) -> dict[str, Any]:
    """Mean, percentiles and a histogram with edges at round numbers."""
    if not len(length):
        return {"mean": 0.0, "min": 0, "max": 0, "histogram": []}
    top = int(length.max())
    step = _round_up(max(1, -(-top // BARS)))
    counts = np.bincount((length - (length > 0)) // step, minlength=1)
    return {
        "mean": round(float(length.mean()), 2),
        "min": int(length.min()),
        "max": top,
        **{f"p{at}": int(np.percentile(length, at)) for at in PERCENTILES},
        "histogram": [
            {"from": at * step + 1, "to": (at + 1) * step, "rows": int(count)}
            for at, count in enumerate(counts)
        ],
    }


def _round_up(number: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if size * factor >= number:
                return size * factor
        size *= 10


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def _finding(code: str, rows: int, what: str, fix: str, places: list[str]) -> dict[str, Any]:
    return {
        "code": code,
        "level": "warning",
        "rows": rows,
        "message": what,
        "fix": fix,
        "places": places,
    }


def _error(error: Exception) -> dict[str, Any]:
    if isinstance(error, Refusal):
        return {**error.as_json(), "exit_code": int(error.exit_code)}
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = " ".join(str(error).split())
    offline = isinstance(error, ConnectionError)
    return {
        "code": "unreachable" if offline else "check",
        "message": f"{type(error).__name__}: {said}",
        "fix": "check where there is a network, or name a local file" if offline else "",
        "source": "",
        "exit_code": int(ExitCode.ENVIRONMENT if offline else ExitCode.BAD_SPEC),
    }


def main() -> int:
    """Check; the report or the error goes to standard output."""
    plan = plan_from_json(json.load(sys.stdin))
    tell = Teller(own_output())
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        tell("starting")
        with without_torch():
            import datasets
        datasets.disable_progress_bars()
        tell.write({"report": Check(plan, tell).report()})
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        traceback.print_exc()
        tell.write({"error": _error(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
