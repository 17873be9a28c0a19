"""Rows: loaded with `datasets`, renamed, brought into TRL's shapes, held out, mixed.

Tokenising is TRL's. What becomes of a row is decided in `launcher.facts.shapes`; here it is
done to whole datasets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from launcher.errors import SpecError
from launcher.facts.rows import COMPRESSED, kind_of, open_rows, read_rows
from launcher.facts.shapes import KEPT, BadRowError, Format, Row, convert, detect
from launcher.facts.usable import RowCheck, checked_rows, format_of
from launcher.plan.types import Plan

# Ending -> `datasets`' builder.
BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
CONVERTED: tuple[Format, ...] = ("conversations", "alpaca")
COPIES = "sftlaunch"


@dataclass(frozen=True)
class Source:
    """One place that rows come from."""

    path: str
    name: str | None
    split: str
    columns: Mapping[str, str]


def load_rows(
    settings: Mapping[str, Any],
    seed: int,
    usable: Callable[[Mapping[str, Any]], bool] | None = None,
) -> tuple[Any, Any]:
    """Training rows and held-out rows (None without).

    Args:
        settings: the plan's dataset section.
        seed: of the split, where a share is held out, and of the mixture.
        usable: whether a row can be tokenised; asked only with `drop_bad`.
    """
    rows, held_out = load_parts(settings, seed)
    if settings.get("drop_bad") and usable is not None:
        rows = rows.filter(usable)
        held_out = None if held_out is None else held_out.filter(usable)
    return hold_out(rows, held_out, settings["eval_share"], seed)


def load_parts(settings: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """All training rows, before a share is held out, and the held-out rows of their own."""
    drop = bool(settings.get("drop_bad"))
    training, evaluation = sources_of(settings)
    rows = mix([load_source(one, drop_bad=drop) for one in training], weights_of(settings), seed)
    return rows, load_source(evaluation, drop_bad=drop) if evaluation else None


def loss_arguments(plan: Plan, columns: Collection[str]) -> dict[str, bool]:
    """The loss by the shape of the rows, where the plan could not look at them.

    The same rule as the plan's own (launcher.plan.defaults, LOSS_BY_FORMAT).

    Args:
        plan: of the run.
        columns: of rows in TRL's shapes.
    """
    if plan.worker.loss is not None:
        return {}
    if "messages" in columns:
        return {"assistant_only_loss": True}
    return {"completion_only_loss": "completion" in columns}


def hold_out(rows: Any, held_out: Any, share: float | None, seed: int) -> tuple[Any, Any]:
    """Training and held-out rows, a share of the rows where one is asked for."""
    if not share:
        return rows, held_out
    split = rows.train_test_split(test_size=share, seed=seed)
    return split["train"], split["test"]


def sources_of(settings: Mapping[str, Any]) -> tuple[list[Source], Source | None]:
    """Where training rows come from, and the held-out ones where they have a place."""
    columns = settings["columns"]
    first = Source(settings["path"], settings["name"], settings["split"], columns)
    training = [first]
    for more in settings.get("sources") or ():
        own = more["columns"] or columns
        training.append(Source(more["path"], more["name"], more["split"], own))
    if settings["eval_path"]:
        return training, Source(settings["eval_path"], None, "train", columns)
    if settings["eval_split"]:
        return training, Source(first.path, first.name, settings["eval_split"], columns)
    return training, None


def weights_of(settings: Mapping[str, Any]) -> list[float] | None:
    """Weight of each source; None where all rows of all are taken."""
    more = settings.get("sources") or ()
    weights = [settings.get("weight"), *(one["weight"] for one in more)]
    if all(weight is None for weight in weights):
        return None
    return [1.0 if weight is None else weight for weight in weights]


def mix(parts: list[Any], weights: list[float] | None, seed: int) -> Any:
    """Several sources as one: all rows one after the other, or drawn by weight.

    With weights it ends where the first source has no row left: no row comes twice.
    """
    import datasets

    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return datasets.concatenate_datasets(parts)
    total = sum(weights)
    return datasets.interleave_datasets(
        parts,
        probabilities=[weight / total for weight in weights],
        seed=seed,
        stopping_strategy="first_exhausted",
    )


# --- one source -----------------------------------------------------------------------------


def load_source(source: Source, *, drop_bad: bool) -> Any:
    """A source's rows in TRL's shapes."""
    rows = raw_rows(source, drop_bad=drop_bad)
    names = {theirs: ours for ours, theirs in source.columns.items() if theirs != ours}
    rows = rows.rename_columns({name: names[name] for name in rows.column_names if name in names})
    form = detect(source.path, tuple(rows.column_names))
    rows = rows.select_columns([name for name in rows.column_names if name in KEPT[form]])
    if drop_bad and not is_text(files_of(source)[1]):
        check = RowCheck(form, {})
        rows = rows.filter(lambda row: _passes(check, row))
    if form in CONVERTED:
        rows = rows.map(_convert, fn_kwargs={"form": form}, remove_columns=rows.column_names)
    return rows


def raw_rows(source: Source, *, drop_bad: bool) -> Any:
    """A source's rows as they lie there; with `drop_bad`, of text files the good ones only."""
    import datasets

    builder, files = files_of(source)
    if builder is None:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    if drop_bad and is_text(files):
        builder, files = "json", _good_copies(source, files)
    else:
        files = [_readable(file) for file in files]
    return datasets.load_dataset(
        builder,
        data_files=[str(file) for file in files],
        split="train",
        **_builder_options(builder, files),
    )


def is_text(files: list[Path]) -> bool:
    """Whether these are files that can be read row by row, with a line number for each."""
    return bool(files) and all(map(kind_of, files))


def files_of(source: Source) -> tuple[str | None, list[Path]]:
    """The builder and the local files of a source; None and nothing for a Hub name.

    In a folder `datasets` says which files belong to a split.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        return _builder_of(path), [path]
    if not path.is_dir():
        return None, []
    found = _folder(str(path), source.name)
    if source.split not in found[1]:
        raise SpecError(
            "dataset_split",
            f"{source.path} has no split {source.split}",
            fix=f"use dataset.split: there are {', '.join(found[1])}",
        )
    files = [Path(name) for name in found[1][source.split]]
    builders = {_builder_of(file) for file in files}
    return (builders.pop() if len(builders) == 1 else found[0]), files


def _folder(path: str, name: str | None) -> tuple[str, dict[str, list[str]]]:
    """A folder's builder, and its files by split."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(path, name)
        return builder.name, {
            str(split): [str(file) for file in files]
            for split, files in builder.config.data_files.items()
        }
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise SpecError(
            "dataset_folder",
            f"{path} holds no rows that can be loaded",
            why=" ".join(str(error).split())[:200],
            fix=f"put files of one type there: {', '.join(BUILDERS)}",
        ) from None


def _builder_of(file: Path) -> str:
    endings = [s.lower() for s in file.suffixes if s.lower() not in COMPRESSED]
    if not endings or endings[-1] not in BUILDERS:
        raise SpecError(
            "dataset_type",
            f"{file}: unknown file type",
            fix=f"use one of {', '.join(BUILDERS)} (also compressed)",
        )
    return BUILDERS[endings[-1]]


def _builder_options(builder: str, files: list[Path]) -> dict[str, Any]:
    """CSV cells are text, as they are written: pandas makes numbers of some and nulls of `NA`."""
    if builder != "csv":
        return {}
    import csv

    import datasets

    separator = "\t" if ".tsv" in files[0].suffixes else ","
    with open_any(files[0]) as stream:
        lines = (line.decode("utf-8-sig", "replace") for line in stream)
        header = next(csv.reader(lines, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": separator, "features": features, "na_filter": False}


def _passes(check: RowCheck, row: Mapping[str, Any]) -> bool:
    try:
        check(row)
    except BadRowError:
        return False
    return True


def _convert(row: Mapping[str, Any], form: Format) -> Row:
    return convert(row, form)


# --- copies that `datasets` can read ----------------------------------------------------------


def open_any(file: Path) -> IO[bytes]:
    """A file's own bytes, .zst too: the decoder of pyarrow needs no further package."""
    if file.suffix.lower() != ".zst":
        return open_rows(file)
    import io

    import pyarrow as pa

    return cast("IO[bytes]", io.BufferedReader(pa.input_stream(str(file), compression="zstd")))


def _readable(file: Path) -> Path:
    """The file, or a copy without a compression that `datasets` has no package for."""
    from importlib.util import find_spec

    if file.suffix.lower() != ".zst" or find_spec("zstandard"):
        return file

    def unpack(target: Path) -> None:
        import shutil

        with open_any(file) as stream, target.open("wb") as out:
            shutil.copyfileobj(stream, out)

    return _copy([file], "unpacked", file.with_suffix("").suffix, unpack)


def _good_copies(source: Source, files: list[Path]) -> list[Path]:
    """The rows that can be used, of each file, as JSON Lines."""
    check = row_check(source, files)

    def write_good(target: Path) -> None:
        with target.open("w", encoding="utf-8") as out:
            for file in files:
                for _, row, shaped, _ in checked_rows(file, kind_of(file) or "", check, open_any):
                    if shaped is not None:
                        out.write(json.dumps(row, ensure_ascii=False) + "\n")

    return [_copy(files, f"good {sorted(source.columns.items())}", ".jsonl", write_good)]


def row_check(source: Source, files: list[Path]) -> RowCheck:
    """The check of a source's rows, from what its first file begins with.

    Raises:
        SpecError: in no known format, or without a row that can be read.
    """
    reads = (read for file in files for read in read_rows(file, kind_of(file) or "", open_any))
    form = format_of(source.path, islice(reads, 10_000), source.columns)
    if form is None:
        raise SpecError(
            "dataset_empty",
            f"the dataset {source.path} has no row that can be read",
            fix="give a file with at least one row",
        )
    return RowCheck(form, source.columns)


def _copy(files: list[Path], what: str, suffix: str, write: Callable[[Path], None]) -> Path:
    """A copy in the cache of `datasets`, made once for these files as they are now."""
    import datasets

    stats = [(str(file.absolute()), *_stamp(file)) for file in files]
    key = hashlib.sha256(json.dumps([what, stats]).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / COPIES
    target = folder / f"{key}{suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{key}.")
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        aside.rename(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
    return target


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


# --- afterwards -----------------------------------------------------------------------------


def row_numbers(rows: Any, prepared: Any) -> list[int] | None:
    """Each prepared row's number among the dataset's rows; None where TRL changed them."""
    if len(rows) != len(prepared):
        return None
    indices = rows._indices  # noqa: SLF001 - a split keeps the original row numbers only here
    return list(range(len(rows))) if indices is None else indices.column(0).to_pylist()


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
