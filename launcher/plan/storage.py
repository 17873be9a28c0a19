"""Bytes on disk, and the time that writing them may take."""

from __future__ import annotations

import math

from launcher.plan.memory import MemoryInputs
from launcher.plan.memory_state import DTYPE_BYTES, FLOAT32, adapter_parameters, optimizer_row
from launcher.plan.types import Storage

# torchrun's own 30 s cuts a checkpoint short; two minutes hold the small ones.
LEAST_SHUTDOWN_SECONDS = 120
# A slow shared file system; checksums and the gather are in it.
BYTES_PER_SECOND = 100_000_000
# Steps in flight when the signal comes, and a margin over estimated or measured times.
STEPS_BEFORE_STOP = 2
MARGIN = 3


def forecast_storage(inputs: MemoryInputs | None, keep: int) -> Storage:
    """Size of one checkpoint, of the final save, and of all that is kept.

    Trainable parameters and optimizer state are saved whole, each once, however many
    ranks there are; ZeRO saves float32 masters. Adapters are saved a second time as PEFT
    loads them.
    """
    if inputs is None:
        return Storage(None, None, None)
    full = inputs.method == "full"
    count = inputs.parameters if full else adapter_parameters(inputs)
    width = DTYPE_BYTES[inputs.parameter_dtype if full else inputs.adapter_dtype]
    saved = FLOAT32 if inputs.strategy.startswith("zero") else width
    _, of_width, fixed, _, _ = optimizer_row(inputs)
    final = count * width
    checkpoint = round(count * (saved + of_width * saved + fixed)) + (0 if full else final)
    return Storage(checkpoint, final, (keep + 1) * checkpoint + final)


def shutdown_timeout_seconds(
    storage: Storage, seconds_per_step: float | None, measured_save_seconds: float | None = None
) -> int:
    """Seconds between a stop signal and the end of patience with the ranks.

    Args:
        storage: predicted sizes, for a save that was not measured yet.
        seconds_per_step: predicted; None where unknown.
        measured_save_seconds: what an earlier checkpoint of the run took.
    """
    save = measured_save_seconds
    if save is None:
        save = (storage.checkpoint_bytes or 0) / BYTES_PER_SECOND
    steps = STEPS_BEFORE_STOP * (seconds_per_step or 0.0)
    return max(LEAST_SHUTDOWN_SECONDS, math.ceil(MARGIN * (save + steps)))
