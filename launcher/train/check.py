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
from typing import Any, TextIO

import numpy as np

from launcher.errors import ExitCode, Refusal
from launcher.facts.shapes import BadRowError
from launcher.plan.types import Plan, plan_from_json
from launcher.train.check_findings import few_rows, leaks, odd_rows, odd_turns, tokenizer_notes
from launcher.train.check_numbers import describe
from launcher.train.check_rows import Dataset
from launcher.train.data import hold_out, mix, sources_of, weights_of
from launcher.train.lengths import (
    FAILED,
    FLAGS,
    TRAINED_CUT,
    Cut,
    Measure,
    end_tokens,
    measure_all,
)
from launcher.train.scan import SHOWN, Findings, Part, scan
from launcher.train.tokens import IGNORED, Tokeniser, Tokens, without_torch

EXAMPLE_TOKENS = 400
TELL_SECONDS = 0.25


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
        used = describe(self.plan, self.cut, data, train)
        told = [
            *odd_rows(self.plan, self.cut, data, train),
            *odd_turns(self.found),
            *few_rows(self.plan, used["rows"]["used"]),
            *tokenizer_notes(tokenizer),
            *leaks(data, train, held),
        ]
        return {
            **used,
            "loss": self.tokenise.rule(),
            "held_out": describe(self.plan, self.cut, *held) if held else None,
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
