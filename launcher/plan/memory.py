"""The GPU memory that one training step needs, by a closed form.

Decides nothing about a run: it turns a model's shape and a run's settings into bytes a
GPU. It must not read files or the machine, and it fits no constant to a measurement:
each term below is a tensor that the stack allocates, with the place that allocates it.
`tests/plan/test_memory.py` holds the result against published measurements.

A step has four moments at which memory may be highest; the estimate is the largest:

    loss       all saved activations, and the loss's own buffers
    backward   all saved activations, and one layer's recomputation and gradients
    end        the first layer's backward, when every gradient is there
    step       parameters, gradients, optimizer state and the optimizer's temporaries

Words: T tokens of a micro batch (micro batch size x sequence length), h hidden size,
q all query heads, kv all key heads, m MLP width, V vocabulary, L layers, N shards.
Sources: "hf" transformers 5.23 modeling_llama.py, "trl" trl 1.16, "peft" 0.21 (tuners/lora),
"bnb" bitsandbytes 0.50, "ds" DeepSpeed 0.19, "torch" 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.plan.memory_activations import dequantized, layer_peak, loss_bytes, saved_activations
from launcher.plan.memory_inputs import MemoryInputs
from launcher.plan.memory_state import (
    FLOAT32,
    MIB,
    SHARDED,
    ZERO,
    Sizes,
    derive_sizes,
    fixed_parts,
    optimizer_row,
    root_gradients,
    trained_bytes,
)

if TYPE_CHECKING:
    from launcher.facts.model import ModelFacts

__all__ = ["MemoryEstimate", "MemoryInputs", "context_bytes", "estimate_memory", "memory_inputs"]

# Reserved over allocated: what the caching allocator keeps beside live tensors.
# plain and fragmented (quantised or sharded): middle, highest. Source: published.csv's rows
# that report both (1.04-1.09 and 1.06-1.27).
_RESERVED = {False: (1.06, 1.09), True: (1.12, 1.27)}
# What a process holds outside the allocator: CUDA's context with the loaded kernels, and
# NCCL's channels. Assumed; published.csv shows 0.137 GiB of context on a T4 with fp16.
_CONTEXT_BYTES = 512 * MIB
_NCCL_BYTES = 512 * MIB
_MODEL_ERROR = 0.10  # how far a single estimate of allocated memory may be off, either way


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest GPU."""

    peak_allocated_bytes: int
    """Peak of live tensors (`torch.cuda.max_memory_allocated`); the sum of `parts`."""

    peak_reserved_bytes: int
    """Peak that the caching allocator holds (`torch.cuda.max_memory_reserved`)."""

    low_bytes: int
    """Least reserved memory to expect."""

    high_bytes: int
    """Most of the card to expect in use, CUDA's context and NCCL included; a run fits where
    this does."""

    parts: dict[str, int]
    """Bytes at the highest moment: parameters, gradients, optimizer, activations, logits,
    communication, workspace."""


def memory_inputs(model: ModelFacts, **settings: Any) -> MemoryInputs:
    """The inputs for a probed model; `settings` are the other fields of `MemoryInputs`."""
    return MemoryInputs(
        **model.dimensions(),
        parameters=model.parameters,
        tie_word_embeddings=model.tie_word_embeddings,
        linear_shapes=model.linear_shapes,
        **settings,
    )


def estimate_memory(inputs: MemoryInputs) -> MemoryEstimate:
    """Peak memory of one training step on the fullest GPU.

    Takes tens of microseconds. See the module's docstring for the four moments.
    """
    sizes = derive_sizes(inputs)
    fixed = fixed_parts(inputs, sizes)
    moments = (
        _loss_moment(inputs, sizes, fixed),
        _backward_moment(inputs, sizes, fixed),
        _end_moment(inputs, sizes, fixed),
        _step_moment(inputs, sizes, fixed),
    )
    highest = max(moments, key=lambda moment: sum(moment.values()))
    parts = {name: int(value) for name, value in highest.items()}
    allocated = sum(parts.values())
    fragmented = inputs.quantization is not None or sizes.shards > 1
    middle, most = _RESERVED[fragmented]
    return MemoryEstimate(
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=int(allocated * middle),
        low_bytes=int(allocated * (1 - _MODEL_ERROR)),
        high_bytes=int(allocated * most * (1 + _MODEL_ERROR / 2)) + context_bytes(inputs),
        parts=parts,
    )


def context_bytes(inputs: MemoryInputs) -> int:
    """Bytes of the card that a process holds outside the caching allocator."""
    return _CONTEXT_BYTES + (_NCCL_BYTES if inputs.gpus > 1 else 0)


def _loss_moment(inputs: MemoryInputs, sizes: Sizes, fixed: dict[str, float]) -> dict[str, float]:
    """The loss: saved activations and the loss's buffers; earlier micro batches' gradients."""
    kept = fixed["gradients"] if inputs.gradient_accumulation_steps > 1 else 0.0
    return {
        **fixed,
        "gradients": kept,
        "activations": saved_activations(inputs, sizes),
        "logits": loss_bytes(inputs, sizes),
    }


def _backward_moment(
    inputs: MemoryInputs, sizes: Sizes, fixed: dict[str, float]
) -> dict[str, float]:
    """The last layer's backward: saved activations, its recomputation and its gradients."""
    share = 1.0 if inputs.gradient_accumulation_steps > 1 else 1.0 / inputs.layers
    head_gradient = 0.0
    if inputs.method == "full":
        head_gradient = sizes.embedding * trained_bytes(inputs) / sizes.shards
    return {
        **fixed,
        "gradients": min(fixed["gradients"], fixed["gradients"] * share + head_gradient),
        "activations": saved_activations(inputs, sizes) + layer_peak(inputs, sizes),
        "communication": fixed["communication"] + root_gradients(inputs, sizes.embedding),
        "workspace": fixed["workspace"] + dequantized(inputs),
    }


def _end_moment(inputs: MemoryInputs, sizes: Sizes, fixed: dict[str, float]) -> dict[str, float]:
    """The first layer's backward: every gradient, and one layer's activations."""
    layer_input = sizes.tokens * inputs.hidden_size * sizes.stream
    outer = sizes.embedding + sizes.head
    return {
        **fixed,
        "activations": layer_input + layer_peak(inputs, sizes),
        "communication": fixed["communication"] + root_gradients(inputs, outer),
        "workspace": fixed["workspace"] + dequantized(inputs),
    }


def _step_moment(inputs: MemoryInputs, sizes: Sizes, fixed: dict[str, float]) -> dict[str, float]:
    """The optimizer's step: its temporaries; DeepSpeed's float32 copy of its gradients."""
    temporary = optimizer_row(inputs)[3] * trained_bytes(inputs)
    if inputs.strategy in ZERO:
        temporary = float(FLOAT32)  # ds stage_1_and_2.py: single_grad_partition in float32
    if inputs.offload != "none":
        temporary = 0.0
    shards = sizes.shards if SHARDED[inputs.strategy][2] else 1
    communication = fixed["communication"] if inputs.strategy == "ddp" else 0.0
    return {
        **fixed,
        "communication": communication,
        "workspace": fixed["workspace"] + temporary * sizes.trainable / shards,
    }
