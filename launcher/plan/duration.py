"""How many steps a run takes, and about how long.

Decides nothing about a run: it counts floating-point operations and bytes on the wire and
divides them by what the catalogue says. It must not read files or the machine. What it
cannot know (no dataset, no GPU) is None. The time is rough (a factor of 1.5 either way):
data loading, evaluation, saving and a slow network are not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.facts.catalogue import GpuSpec

_CHARACTERS_PER_TOKEN = 4.0  # English text with today's vocabularies
_WIRE_BYTES = 2  # parameters and gradients travel in bfloat16
_NODE_LINK = 50e9  # bytes per second and GPU between nodes: one 400 Gb/s adapter a GPU
_BASIS = "estimate: catalogue"

# Share of the dense rate that training reaches, by the GPU's rate: the faster the card,
# the harder its matrix units are to feed.
# least FLOP/s, share, source
_EFFICIENCY: tuple[tuple[float, float, str], ...] = (
    (2e15, 0.28, "assumed: below the row beneath"),
    (7e14, 0.35, "torchtitan benchmarks/llama3_h100_202412: 33 to 39% on 8B, 8 H100"),
    (2.5e14, 0.45, "A100: llm-foundry scripts/train/benchmarking; not measured with TRL"),
    (0.0, 0.50, "assumed: matrix products dominate on slower cards"),
)

# Longer time of what surrounds the matrix products.
# quantisation: factor, source
_QUANTIZATION: dict[str | None, tuple[float, str]] = {
    None: (1.0, "none"),
    "nf4": (1.3, "assumed: every weight is dequantised before each product"),
    "8bit": (1.8, "assumed: mixed-precision decomposition of each product"),
}

# Times that the whole model (in bytes on the wire) passes each GPU's link in a micro
# batch, and those that the trained parameters do in a step.
# strategy: gathers a micro batch, reductions a step; source: ZeRO, arXiv:1910.02054
_TRAFFIC: dict[str, tuple[int, int]] = {
    "single": (0, 0),
    "ddp": (0, 2),
    "zero1": (0, 2),
    "zero2": (0, 2),
    "zero3": (2, 1),
    "fsdp": (2, 1),
    "fsdp1": (2, 1),
    "hsdp": (2, 2),
}


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Steps and time of a run; None where a fact is missing."""

    steps: int | None
    """Optimizer steps."""

    seconds_per_step: float | None
    """Seconds of one optimizer step."""

    total_seconds: float | None
    """Seconds of all steps, without evaluation and saving."""

    basis: str
    """Where the numbers are from, or which fact is missing."""


def count_sequences(
    rows: int, mean_characters: float, sequence_length: int, *, packing: bool
) -> tuple[int, float]:
    """Sequences an epoch, and mean tokens of one, from a dataset's sample.

    Packing fills every sequence; without it a row is a sequence, truncated to the length.
    A length of 0 means no limit.
    """
    tokens = max(1.0, mean_characters / _CHARACTERS_PER_TOKEN)
    if packing and sequence_length > 0:
        return max(1, math.ceil(rows * tokens / sequence_length)), float(sequence_length)
    return rows, min(tokens, float(sequence_length)) if sequence_length > 0 else tokens


def count_steps(
    sequences: int | None, global_batch_size: int, epochs: float, max_steps: int | None
) -> int | None:
    """Optimizer steps; the last, smaller batch of an epoch counts as one, as in the trainer."""
    if max_steps is not None and max_steps > 0:
        return max_steps
    if sequences is None:
        return None
    return max(1, math.ceil(epochs * math.ceil(sequences / global_batch_size)))


def flops_per_token(
    *,
    compute_parameters: int,
    layers: int,
    attention_width: int,
    tokens_per_sequence: float,
    trains_all: bool,
    gradient_checkpointing: bool,
) -> float:
    """Floating-point operations a token of one training step, recomputation included.

    Forward 2N, gradients of activations 2N, of weights 2N (only where all are trained);
    causal attention 2 x length x width a layer forward, twice that backward; with
    checkpointing one more forward. Source: PaLM, arXiv:2204.02311, appendix B, with the
    causal half.
    """
    forward = 2.0 * compute_parameters
    attention = 2.0 * tokens_per_sequence * attention_width * layers
    passes = 3 if trains_all else 2
    recomputed = forward + attention if gradient_checkpointing else 0.0
    return passes * forward + 3 * attention + recomputed


def estimate_duration(
    *,
    gpu: GpuSpec | None,
    gpus: int,
    nodes: int = 1,
    strategy: str,
    quantization: str | None,
    global_batch_size: int,
    micro_batch_size: int,
    sequences: int | None,
    tokens_per_sequence: float | None,
    epochs: float,
    max_steps: int | None,
    parameters: int | None,
    trained_parameters: int | None,
    flops: float | None,
) -> Duration:
    """Steps and seconds of a run.

    `sequences` and `tokens_per_sequence` are from `count_sequences`, `flops` (a token) from
    `flops_per_token`, `parameters` those of the base model, `trained_parameters` those
    whose gradients travel. None stands for what is unknown.
    """
    steps = count_steps(sequences, global_batch_size, epochs, max_steps)
    if gpu is None or flops is None or tokens_per_sequence is None:
        facts = {"dataset": tokens_per_sequence, "model": flops, "GPU": gpu}
        missing = ", ".join(name for name, value in facts.items() if value is None)
        return Duration(
            steps=steps, seconds_per_step=None, total_seconds=None, basis=f"unknown: {missing}"
        )
    operations = flops * global_batch_size * tokens_per_sequence / gpus
    compute = operations * _QUANTIZATION[quantization][0] / _reached_flops(gpu)
    micro_batches = max(1, round(global_batch_size / (micro_batch_size * gpus)))
    wire = _wire_bytes(strategy, gpus, parameters, trained_parameters, micro_batches)
    seconds = max(compute, wire / _link(gpu, nodes))  # collectives run beside the products
    total = None if steps is None else steps * seconds
    return Duration(steps=steps, seconds_per_step=seconds, total_seconds=total, basis=_BASIS)


def _reached_flops(gpu: GpuSpec) -> float:
    """FLOP/s that training reaches on a GPU."""
    return gpu.bf16_flops * next(row[1] for row in _EFFICIENCY if gpu.bf16_flops >= row[0])


def _link(gpu: GpuSpec, nodes: int) -> float:
    """Bytes per second of the slowest link that a collective passes."""
    return gpu.link_bandwidth if nodes == 1 else min(gpu.link_bandwidth, _NODE_LINK)


def _wire_bytes(
    strategy: str,
    gpus: int,
    parameters: int | None,
    trained_parameters: int | None,
    micro_batches: int,
) -> float:
    """Bytes that pass one GPU's link in a step."""
    if gpus == 1:
        return 0.0
    gathers, reductions = _TRAFFIC[strategy]
    moved = gathers * (parameters or 0) * micro_batches + reductions * (trained_parameters or 0)
    return float(_WIRE_BYTES * moved)
