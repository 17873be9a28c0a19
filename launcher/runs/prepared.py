"""Prepared rows of a run: where they lie, for which inputs they hold, whether they are whole.

`launcher.train.prepare` writes them, ranks read them, and job scripts ask for them without
torch. A folder without its record, or with another size in it, does not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.plan.types import Plan
from launcher.runs.directory import RunDirectory
from launcher.runs.failures import match

RECORD = "complete.json"
LOG = "logs/prepare.log"
ERROR = "logs/prepare.error.json"
# What ranks run under once everything is here: nothing may be looked up on the Hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# `SFTConfig` fields that decide what becomes of a row (TRL 1.16, SFTTrainer._prepare_dataset
# and what its constructor decides for it).
FIELDS = (
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "dataset_text_field",
    "eos_token",
    "eval_packing",
    "max_length",
    "packing",
    "packing_strategy",
    "pad_token",
    "padding_free",
    "seed",
    "shuffle_dataset",
    "truncation_mode",
)
# Files of a model folder that no row depends on.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def settings_of(plan: Plan) -> dict[str, Any]:
    """What the prepared rows depend on, as far as a plan says it."""
    worker = plan.worker
    arguments = worker.training_arguments
    settings = {
        "dataset": worker.dataset,
        "model": {key: worker.model[key] for key in ("path", "revision", "trust_remote_code")},
        "training": {name: arguments[name] for name in FIELDS if name in arguments},
        "exact_match": worker.evaluation["exact_match"],
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def sources_of(settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """Local files that the rows come from -> size in bytes and time of the last change."""
    data, model = settings["dataset"] or {}, settings["model"]
    template = settings["training"].get("chat_template_path")
    found = {
        str(path): path
        for name in (data.get("path"), data.get("eval_path"), template, *_further(data))
        for path in _files(name)
    }
    found |= {str(path): path for path in _files(model["path"]) if not path.name.endswith(WEIGHTS)}
    return {
        name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in sorted(found.items())
    }


def _further(data: Mapping[str, Any]) -> Iterator[str]:
    yield from (more["path"] for more in data.get("sources") or ())


def _files(name: str | None) -> Iterator[Path]:
    if not name:
        return
    path = Path(name)
    yield from [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file())


def read_record(run: RunDirectory) -> dict[str, Any] | None:
    """The record of whole prepared rows; None without them."""
    try:
        record: dict[str, Any] = json.loads((run.prepared / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (run.prepared / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return record if sizes == record["files"] else None


def usable(plan: Plan, run: RunDirectory) -> bool:
    """Whether ranks may train on what is there."""
    record = read_record(run)
    return record is not None and record["settings"] == settings_of(plan)


def up_to_date(plan: Plan, run: RunDirectory) -> bool:
    """Whether preparing again would make the same rows: no source has changed, either."""
    record = read_record(run)
    if record is None or record["settings"] != settings_of(plan):
        return False
    return bool(record["sources"] == sources_of(record["settings"]))


def only_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared rows, and no run yet."""
    return folder.is_dir() and [path.name for path in folder.iterdir()] == ["prepared"]


def preparation_error(run: RunDirectory, detail: str) -> dict[str, Any]:
    """Why a preparation failed, for status.json, with the exit code that it asks for.

    Args:
        run: the run.
        detail: what its starter saw, where the preparation could not write anything down.
    """
    try:
        record = json.loads((run.path / ERROR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {"message": detail, "fix": "", "exit_code": 1, "traceback": _tail(run)}
    known = match(f"{record['message']}\n{record['traceback']}")
    return {
        "rank": None,
        "message": f"the preparation failed: {' '.join(record['message'].split())}",
        "cause": known.cause if known and not record["fix"] else "",
        "fix": record["fix"] or (known.fix if known else ""),
        "log": LOG,
        "exit_code": record["exit_code"],
    }


def _tail(run: RunDirectory) -> str:
    path = run.path / LOG
    return path.read_text(encoding="utf-8", errors="replace")[-2000:] if path.is_file() else ""
