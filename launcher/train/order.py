"""Which rows each optimizer step sees: the same ones on any number of ranks.

Every epoch is a seeded order of all rows, cut into global batches. The last batch of an
epoch is filled up with rows whose labels are masked, so that each row counts exactly once
an epoch whatever the number of ranks; they add nothing to the loss, which is a mean over
unmasked tokens of the global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

IGNORED_LABEL = -100
# Rows of a larger dataset that its digest is made of, evenly spread over it.
DIGESTED_ROWS = 4096
TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks")


class GlobalBatchOrder(Sampler[int]):  # type: ignore[misc]
    """Row numbers of one epoch, in whole global batches.

    Args:
        rows: number of rows.
        global_batch_size: sequences per optimizer step.
        seed: of the shuffle.
        shuffle: False keeps the rows in order.
    """

    def __init__(self, rows: int, global_batch_size: int, seed: int, *, shuffle: bool) -> None:
        self.rows, self.global_batch_size = rows, global_batch_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.rows // self.global_batch_size)

    def __len__(self) -> int:
        return self.steps * self.global_batch_size

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        for position in range(len(self)):
            yield order[position % self.rows]

    def order(self, epoch: int) -> list[int]:
        """All rows once, in an epoch's order."""
        if not self.shuffle:
            return list(range(self.rows))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        found: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return found

    def step_rows(self, step: int) -> list[int]:
        """Rows of an optimizer step, counted from 0; without the filling."""
        epoch, step_in_epoch = divmod(step, self.steps)
        start = step_in_epoch * self.global_batch_size
        return self.order(epoch)[start : start + self.global_batch_size]

    def row_at(self, step: int, place: int) -> int:
        """Row at a place in an optimizer step's global batch, filling included."""
        epoch, step_in_epoch = divmod(step, self.steps)
        position = step_in_epoch * self.global_batch_size + place
        return self.order(epoch)[position % self.rows]

    def filling(self, step: int) -> int:
        """How many sequences of an optimizer step are only there to fill it."""
        start = step % self.steps * self.global_batch_size
        return max(0, start + self.global_batch_size - self.rows)


def rows_digest(prepared: Any) -> str:
    """SHA-256 of prepared rows, in their order: of all, or of so many from first to last.

    Args:
        prepared: a `datasets.Dataset` of tokens.
    """
    count = len(prepared)
    if count > DIGESTED_ROWS:
        chosen = [i * (count - 1) // (DIGESTED_ROWS - 1) for i in range(DIGESTED_ROWS)]
        prepared = prepared.select(chosen)
    digest = hashlib.sha256(str(count).encode())
    for name in TOKEN_COLUMNS:
        if name in prepared.column_names:
            digest.update(name.encode())
            for row in prepared.with_format("numpy")[name]:
                digest.update(len(row).to_bytes(8, "big") + row.astype("int64").tobytes())
    return digest.hexdigest()


def positions(micro_step: int, rank: int, world: int, micro_batch_size: int) -> range:
    """Places in its global batch of a micro batch's sequences (accelerate deals them so)."""
    start = (micro_step * world + rank) * micro_batch_size
    return range(start, start + micro_batch_size)


def mask_filling(
    batches: Iterable[Any],
    *,
    real: int,
    rank: int,
    world: int,
    micro_batch_size: int,
    length_of: Callable[[int], int] | None = None,
) -> Iterator[Any]:
    """Micro batches with the labels of all sequences beyond the real ones masked.

    Args:
        batches: this rank's micro batches of one optimizer step, in order.
        real: sequences of the global batch that count.
        rank: this rank.
        world: number of ranks.
        micro_batch_size: sequences in a micro batch.
        length_of: tokens of the sequence at a place in the global batch, for collators that
            lay all sequences of a micro batch end to end (padding-free: labels of 1 x tokens).
    """
    for micro_step, batch in enumerate(batches):
        places = positions(micro_step, rank, world, micro_batch_size)
        labels = batch["labels"]
        if len(labels) < micro_batch_size and length_of is not None:
            kept = sum(length_of(place) for place in places if place < real)
            labels[:, kept:] = IGNORED_LABEL
        else:
            labels[[place >= real for place in places]] = IGNORED_LABEL
        yield batch
