"""Rows: loaded with `datasets`, renamed, held out. Tokenising is TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import SpecError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(settings: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """Training rows and held-out rows (None without).

    Args:
        settings: the plan's dataset section.
        seed: of the split, where a share is held out.
    """
    rows = _load(settings, settings["path"], settings["split"])
    if settings["eval_path"]:
        return rows, _load(settings, settings["eval_path"], "train")
    if settings["eval_split"]:
        return rows, _load(settings, settings["path"], settings["eval_split"])
    if settings["eval_share"]:
        split = rows.train_test_split(test_size=settings["eval_share"], seed=seed)
        return split["train"], split["test"]
    return rows, None


def _load(settings: Mapping[str, Any], path: str, split: str) -> Any:
    import datasets

    if Path(path).is_file():
        suffixes = [s for s in Path(path).suffixes if s in BUILDERS]
        if not suffixes:
            raise SpecError(
                "dataset_type",
                f"{path}: unknown file type",
                fix=f"use one of {', '.join(BUILDERS)} (also compressed)",
            )
        rows = datasets.load_dataset(BUILDERS[suffixes[0]], data_files=path, split=split)
    else:
        rows = datasets.load_dataset(path, settings["name"], split=split)
    rows = rows.rename_columns({theirs: ours for ours, theirs in settings["columns"].items()})
    if {"instruction", "output"} <= set(rows.column_names):
        rows = rows.map(_from_alpaca, remove_columns=rows.column_names)
    return rows


def row_numbers(rows: Any, prepared: Any) -> list[int] | None:
    """Each prepared row's number among the dataset's rows; None where TRL changed them."""
    if len(rows) != len(prepared):
        return None
    indices = rows._indices  # noqa: SLF001 - a split keeps the original row numbers only here
    return list(range(len(rows))) if indices is None else indices.column(0).to_pylist()


def _from_alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    """instruction, input, output as a conversation of two turns."""
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
    }


def split_answer(row: Mapping[str, Any]) -> tuple[Any, str]:
    """A row's prompt (text or messages) and its reference answer, for exact match."""
    if "messages" in row:
        *prompt, answer = row["messages"]
        return prompt, answer["content"]
    if "prompt" in row:
        completion = row["completion"]
        return row["prompt"], (
            completion if isinstance(completion, str) else completion[-1]["content"]
        )
    raise SpecError(
        "exact_match",
        "evaluation.exact_match needs rows with an answer",
        fix="use messages or prompt/completion rows, or switch evaluation.exact_match off",
    )
