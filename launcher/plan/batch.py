"""The effective batch: micro x accumulation x data-parallel size, always in sequences.

It solves for what the user left open and refuses what does not divide, with the nearest
values that do.
"""

from __future__ import annotations

from collections.abc import Callable

from launcher.errors import PlanRefused
from launcher.plan.types import Batch

DEFAULT_GLOBAL_BATCH_SIZE = 64
# Where memory is unknown, a micro batch that most GPUs, or a rehearsal's CPU, hold.
UNKNOWN_MEMORY_MICRO_BATCH = 4
CPU_MICRO_BATCH = 16


def default_global_batch_size(data_parallel_size: int) -> int:
    """64 sequences, rounded up to a multiple of the data-parallel size."""
    return -(-DEFAULT_GLOBAL_BATCH_SIZE // data_parallel_size) * data_parallel_size


def solve_batch(
    *,
    global_batch_size: int,
    micro_batch_size: int | None,
    data_parallel_size: int,
    max_length: int,
    fits: Callable[[int], bool | None],
) -> Batch:
    """Solve the accumulation, and the micro batch where it is open.

    Args:
        global_batch_size: sequences per optimizer step over all ranks.
        micro_batch_size: sequences per rank per forward; None to solve it.
        data_parallel_size: ranks that see different data.
        max_length: tokens, for `tokens_per_step`.
        fits: whether a micro batch fits in memory; None where that is unknown.

    Raises:
        PlanRefused: where the sizes do not divide.
    """
    if global_batch_size % data_parallel_size:
        raise _does_not_divide(global_batch_size, data_parallel_size, micro_batch_size or 1)
    per_rank = global_batch_size // data_parallel_size
    micro = micro_batch_size or _largest_micro_batch(per_rank, fits)
    if per_rank % micro:
        raise _does_not_divide(global_batch_size, data_parallel_size, micro)
    return Batch(
        global_batch_size=global_batch_size,
        micro_batch_size=micro,
        gradient_accumulation_steps=per_rank // micro,
        tokens_per_step=global_batch_size * max_length,
    )


def equation(batch: Batch, data_parallel_size: int) -> str:
    """The batch equation with its numbers, as people read it."""
    return (
        f"{batch.global_batch_size} sequences = {batch.micro_batch_size} micro batch"
        f" x {batch.gradient_accumulation_steps} accumulation x {data_parallel_size} data parallel"
    )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _largest_micro_batch(per_rank: int, fits: Callable[[int], bool | None]) -> int:
    """The largest divisor that fits; 1 where none does (the memory check then refuses)."""
    best = 1
    for candidate in divisors(per_rank):
        verdict = fits(candidate)
        if verdict is None:
            verdict = candidate <= UNKNOWN_MEMORY_MICRO_BATCH
        if not verdict:
            break
        best = candidate
    return best


def _does_not_divide(global_batch: int, data_parallel: int, micro: int) -> PlanRefused:
    unit = data_parallel * micro
    below, above = global_batch // unit * unit, -(-global_batch // unit) * unit
    near = f"{below} or {above}" if below else str(above)
    what = f"a global batch of {global_batch} sequences does not divide over {data_parallel} GPUs"
    if micro > 1:
        what += f" x micro batch {micro}"
    fix = f"use --global-batch-size {near}"
    if micro > 1 and global_batch % data_parallel == 0:
        options = [d for d in divisors(global_batch // data_parallel) if d <= 2 * micro]
        fix += f", or --micro-batch-size {' or '.join(map(str, options[-2:]))}"
    return PlanRefused(
        "batch_does_not_divide", what, why=f"{global_batch} is no multiple of {unit}", fix=fix
    )
