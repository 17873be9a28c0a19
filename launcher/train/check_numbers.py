"""Counts, lengths, padding and packing of rows that were measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from launcher.plan.types import Plan
from launcher.train.check_rows import Dataset
from launcher.train.lengths import ENDED, ENDED_CUT, FLAGS, LENGTH, TRAINED_CUT, Cut

PERCENTILES = (50, 90, 95, 99)
BARS = 12
PACKED_AT_ONCE = 1000  # rows that `datasets.map` hands to TRL's packing together


def describe(plan: Plan, cut: Cut, data: Dataset, rows: Any) -> dict[str, Any]:
    """Counts of some rows of a dataset, with what the run makes of them."""
    numbers = data.numbers[rows]
    length, limit = numbers[:, LENGTH].astype(np.int64), cut.max_length
    left = np.minimum(length, limit) if limit else length
    # TRL drops rows without a label before training, but not where it packs.
    dropped = (numbers[:, TRAINED_CUT] == 0) & (not cut.packs)
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
        "padding": _padding(plan, cut, kept),
        "packing": _packing(plan, cut, length),
    }


def _padding(plan: Plan, cut: Cut, lengths: Any) -> dict[str, Any]:
    """Share of padding in the micro batches of one epoch, in an order drawn by the seed."""
    micro = plan.batch.micro_batch_size
    found = {"micro_batch_size": micro, "share": 0.0}
    if not len(lengths) or plan.worker.training_arguments.get("padding_free") or cut.packs:
        return found
    drawn = np.random.default_rng(plan.worker.training_arguments["seed"]).permutation(lengths)
    multiple = plan.worker.training_arguments.get("pad_to_multiple_of") or 1
    cells = 0
    for start in range(0, len(drawn), micro):
        batch = drawn[start : start + micro]
        cells += len(batch) * (-(-int(batch.max()) // multiple) * multiple)
    return {**found, "share": 1 - _share(int(drawn.sum()), cells)}


def _packing(plan: Plan, cut: Cut, lengths: Any) -> dict[str, Any] | None:
    """What TRL's own packing would make of rows of these lengths."""
    limit = cut.max_length
    if limit is None or not len(lengths):
        return None
    strategy = plan.worker.training_arguments.get("packing_strategy") or "bfd"
    sequences = tokens = 0
    for start in range(0, len(lengths), PACKED_AT_ONCE):
        packed = _packed(lengths[start : start + PACKED_AT_ONCE], limit, strategy)
        sequences += len(packed)
        tokens += int(packed.sum())
    return {
        "planned": cut.packs,
        "strategy": strategy,
        "sequences": sequences,
        "utilisation": _share(tokens, sequences * limit),
    }


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
