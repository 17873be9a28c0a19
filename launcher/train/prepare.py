"""Rows made ready once, before any rank: `python -m launcher.train.prepare RUN [-]`.

It fetches what is on the Hub, lets TRL tokenise, mask and pack, and writes the result as
Arrow files into `prepared/` of the run directory. It reads plan.json there, or with `-` a
plan from standard input. One process, without GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ExitCode, Refusal
from launcher.plan.types import Plan, plan_from_json
from launcher.runs.directory import RunDirectory, write_atomic
from launcher.runs.prepared import (
    ERROR,
    RECORD,
    read_record,
    settings_of,
    sources_of,
    up_to_date,
)
from launcher.train.packages import leave_out_unused

TRAIN, EVALUATION, HELD_OUT = "train", "evaluation", "held_out"
ROW_NUMBER = "row_number"
# What reaches the model (TRL 1.16, SFTTrainer._set_signature_columns_if_needed).
KEPT = ("input_ids", "labels", "seq_lengths")
# Files of a Hub repository that transformers does not load.
UNUSED = ("*.pth", "original/*", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.tflite", "*.ot")


@dataclass(frozen=True)
class Rows:
    """What a trainer is given."""

    train: Any
    evaluation: Any
    """None without."""
    held_out: Any
    """The evaluation rows as they were written, for exact match; None without."""
    prepared: bool = False
    """Whether they are tokens already."""
    numbers: list[int] | None = None
    """Each prepared row's number in the dataset; None where TRL has dropped some."""


def prepare(plan: Plan, run: RunDirectory) -> dict[str, Any]:
    """Make a run's rows ready, unless they are; returns their record.

    Raises:
        Refusal: for rows that cannot be used. Whatever else the Hub or TRL raises.
    """
    if up_to_date(plan, run):
        record = read_record(run)
        assert record is not None  # noqa: S101 - that is what up to date means
        return record
    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
    leave_out_unused([plan])
    started = time.monotonic()
    settings = settings_of(plan)
    # Looked at before they are read: a file that changes meanwhile is prepared again.
    sources = sources_of(settings)
    _say(run, "fetching the model")
    fetch_model(plan.worker.model)
    _say(run, "loading rows")
    parts = make_rows(plan, lambda: _say(run, "tokenising"))
    _say(run, "writing")
    record = {
        "settings": settings,
        "sources": sources,
        "rows": {name: len(part) for name, part in parts.items()},
        "tokens": _tokens(parts[TRAIN]),
        "seconds": round(time.monotonic() - started, 3),
    }
    whole = _write(run, parts, record)
    _say(run, "done")
    return whole


def fetch_model(model: Mapping[str, Any]) -> None:
    """Bring a model of the Hub into its cache, whole; a local folder is left alone."""
    if Path(model["path"]).is_dir():
        return
    from huggingface_hub import constants, list_repo_files, snapshot_download

    unused = list(UNUSED)
    if not constants.HF_HUB_OFFLINE:
        files = list_repo_files(model["path"], revision=model["revision"])
        if any(name.endswith(".safetensors") for name in files):
            unused.append("*.bin")
    snapshot_download(model["path"], revision=model["revision"], ignore_patterns=unused)


def make_rows(plan: Plan, on_loaded: Any) -> dict[str, Any]:
    """Parts of the data as the trainer would make them from the dataset itself.

    TRL's own trainer does it, around a model of a few parameters: what it decides from the
    template, the columns and the arguments is decided by it, here as in a rank.
    """
    from trl import SFTConfig, SFTTrainer

    from launcher.train.data import load_rows, loss_arguments, row_numbers
    from launcher.train.model import load_tokenizer
    from launcher.train.tokens import usable_rows

    assert plan.worker.dataset is not None  # noqa: S101 - refused before the launch
    arguments = plan.worker.training_arguments
    usable = usable_rows(plan, load_tokenizer(plan))
    rows, held_out = load_rows(plan.worker.dataset, arguments["seed"], usable)
    on_loaded()
    known = {**settings_of(plan)["training"], "dataset_num_proc": arguments.get("dataset_num_proc")}
    known |= loss_arguments(plan, rows.column_names)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=_small_model(),
            args=SFTConfig(output_dir=folder, use_cpu=True, bf16=False, report_to=[], **known),
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=load_tokenizer(plan),
        )
    train = _kept(trainer.train_dataset)
    numbers = row_numbers(rows, trainer.train_dataset)
    parts = {TRAIN: train if numbers is None else train.add_column(ROW_NUMBER, numbers)}
    if held_out is not None:
        parts[EVALUATION] = _kept(trainer.eval_dataset)
    if held_out is not None and plan.worker.evaluation["exact_match"]:
        parts[HELD_OUT] = held_out
    return parts


def _small_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def _kept(rows: Any) -> Any:
    return rows.select_columns([name for name in KEPT if name in rows.column_names])


def _tokens(rows: Any) -> int:
    import pyarrow.compute as pc

    lists = rows.with_format("arrow")
    return sum(
        pc.sum(pc.list_value_length(lists[start : start + 10_000]["input_ids"])).as_py()
        for start in range(0, len(rows), 10_000)
    )


def _write(run: RunDirectory, parts: Mapping[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """All parts and then the record into a folder aside, which takes its name at the end."""
    run.path.mkdir(parents=True, exist_ok=True)
    for left in run.path.glob(".prepared.*"):
        shutil.rmtree(left)  # of one that was ended
    aside = run.path / f".prepared.{os.getpid()}"
    for name, part in parts.items():
        part.save_to_disk(aside / name)
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    whole = {**record, "files": {str(p.relative_to(aside)): p.stat().st_size for p in files}}
    write_atomic(aside / RECORD, json.dumps(whole, indent=1) + "\n")
    if run.prepared.exists():
        run.prepared.rename(run.path / f".prepared.old.{os.getpid()}")
    aside.rename(run.prepared)
    for left in run.path.glob(".prepared.*"):
        shutil.rmtree(left)
    return whole


def read_rows(run: RunDirectory) -> Rows:
    """The prepared rows of a run."""
    import datasets

    def part(name: str) -> Any:
        folder = run.prepared / name
        return datasets.load_from_disk(str(folder)) if folder.is_dir() else None

    train, numbers = part(TRAIN), None
    if ROW_NUMBER in train.column_names:
        numbers = train[ROW_NUMBER][:]
        train = train.remove_columns(ROW_NUMBER)
    return Rows(train, part(EVALUATION), part(HELD_OUT), prepared=True, numbers=numbers)


def _say(run: RunDirectory, text: str) -> None:
    sys.stderr.write(f"{text}\n")
    if run.exists():
        run.update_status(stage=f"preparing: {text}")


def _record_error(run: RunDirectory, error: BaseException) -> None:
    """Leave the error where the job script and the launcher find it."""
    if isinstance(error, Refusal):
        told = {"message": error.message, "fix": error.fix, "exit_code": int(error.exit_code)}
    else:
        told = {"message": _words(error), "fix": "", "exit_code": int(ExitCode.RUN_FAILED)}
    record = {**told, "traceback": "".join(traceback.format_exception(error))}
    path = run.path / ERROR
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record, indent=1))


def _words(error: BaseException) -> str:
    """The error that others were raised from: `datasets` only says that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def main(arguments: list[str]) -> int:
    """Prepare, print the record; an error is recorded and printed."""
    folder, *source = arguments
    run = RunDirectory(Path(folder))
    text = sys.stdin.read() if source else run.plan.read_text(encoding="utf-8")
    plan = plan_from_json(json.loads(text))
    # Tokenising needs no GPU, and one that it touched would be missed by nobody but the ranks.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with contextlib.suppress(FileNotFoundError):
        (run.path / ERROR).unlink()
    try:
        record = prepare(plan, run)
    except Exception as error:
        _record_error(run, error)
        traceback.print_exc()
        return int(ExitCode.RUN_FAILED)
    sys.stdout.write(json.dumps({k: record[k] for k in ("rows", "tokens", "seconds")}) + "\n")
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
