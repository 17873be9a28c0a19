"""Everything that a plan needs to know about the world, gathered once, before any decision."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from launcher.facts.catalogue import GpuSpec, find_gpu, match_gpu
from launcher.facts.dataset import DatasetFacts, probe_dataset
from launcher.facts.gpus import Gpu, probe_gpus
from launcher.facts.model import ModelFacts, probe_model
from launcher.spec.schema import DatasetSpec, Spec


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is there."""

    gpus: tuple[Gpu, ...]
    """GPUs of this machine."""

    gpu: GpuSpec | None
    """GPU that is planned for: the one named, else the one that is here."""

    model: ModelFacts | None
    """None for a Hub model that is not in the cache."""

    dataset: DatasetFacts | None
    """None without a dataset, or for one on the Hub."""

    held_out: DatasetFacts | None
    """The file of held-out rows, where one is named."""

    cpu_count: int
    """Processors that this process may use."""


def probe(spec: Spec) -> Facts:
    """Look at GPUs, model, dataset and processors.

    Raises:
        SpecError: for a model or dataset that is named and unusable.
    """
    gpus = probe_gpus()
    data = spec.dataset
    return Facts(
        gpus=gpus,
        gpu=_planned_gpu(spec, gpus),
        model=probe_model(spec.model.path, spec.model.revision),
        dataset=_training_rows(data) if data else None,
        held_out=_held_out(data) if data and data.eval_path else None,
        cpu_count=len(os.sched_getaffinity(0)),
    )


def _training_rows(data: DatasetSpec) -> DatasetFacts | None:
    """Facts of the first source, with the rows of all of them.

    By weight it ends with the source that is used up first: the rows are unknown then.
    """
    drop = bool(data.drop_bad)
    first = probe_dataset(data.path, data.columns, drop_bad=drop)
    if not data.sources:
        return first
    further = (
        probe_dataset(more.path, more.columns or data.columns, drop_bad=drop)
        for more in data.sources
    )
    parts = [first, *further]
    weighted = data.weight or any(more.weight for more in data.sources)
    known = [part.rows for part in parts if part is not None and part.rows is not None]
    rows = sum(known) if len(known) == len(parts) and not weighted else None
    exact = all(part is not None and part.rows_exact for part in parts)
    return first and replace(first, rows=rows, rows_exact=exact)


def _held_out(data: DatasetSpec) -> DatasetFacts | None:
    assert data.eval_path is not None  # noqa: S101 - the caller has looked
    return probe_dataset(data.eval_path, data.columns, drop_bad=bool(data.drop_bad))


def _planned_gpu(spec: Spec, gpus: tuple[Gpu, ...]) -> GpuSpec | None:
    named = find_gpu(spec.hardware.gpu) if spec.hardware.gpu else None
    if spec.hardware.device == "cpu":
        return None
    if named or not gpus:
        return named
    return match_gpu(gpus[0].name)
