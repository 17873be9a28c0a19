"""Whether a spec still describes the run that a checkpoint came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.spec.schema import Spec

# Keys that may change on the way: where it runs, how often it reports, how it is kept.
# A trailing dot means the whole section.
FREE = (
    "batch.micro_batch_size",
    "checkpoints.",
    "docker.",
    "evaluation.",
    "hardware.",
    "health.",
    "limits.",
    "model.attn_implementation",
    "model.path",  # compared apart: another folder may hold the same model
    "offload",
    "output",
    "samples.",
    "slurm.",
    "strategy",
    "trackers",
    "training.dataloader_num_workers",
    "training.gradient_checkpointing",
    "training.logging_steps",
)


def differences(old: Spec, new: Spec) -> list[tuple[str, Any, Any]]:
    """Keys that make it another run, with both values.

    Args:
        old: resolved, of the run that there is.
        new: resolved, of what was asked for.
    """
    before, after = dict(_leaves(old.model_dump())), dict(_leaves(new.model_dump()))
    found = [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE)
    ]
    if _name(old.model.path) != _name(new.model.path):
        found.append(("model.path", old.model.path, new.model.path))
    return found


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
