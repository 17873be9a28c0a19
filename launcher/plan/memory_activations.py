"""What a forward and backward pass adds: saved activations, one layer's peak, the loss.

Terms of `launcher.plan.memory`, whose docstring has the words and the sources.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.plan.memory_state import (
    DTYPE_BYTES,
    FLOAT32,
    FSDP,
    ZERO,
    Sizes,
    adapted_shapes,
    adapter_bytes,
    linear_shapes_of,
    outer_bytes,
    parameter_bytes,
    trained_bytes,
)

if TYPE_CHECKING:
    from launcher.plan.memory_inputs import MemoryInputs

_FUSED_TOKENS = 4096  # trl kernels/chunked_logprob.py TOKEN_CHUNK_SIZE
_FUSED_VOCABULARY = 32768  # trl trainer/utils.py _CHUNKED_LOGPROB_CHUNK_SIZE
_CHUNKS = 8  # torchtune CEWithChunkedOutputLoss num_output_chunks


def saved_activations(inputs: MemoryInputs, sizes: Sizes) -> float:
    """Activations alive after the forward.

    With checkpointing: every layer's input, T x h in the stream's dtype. Without: what
    each layer saves. The final norm adds its float32 input, and the head's input.
    """
    stream = sizes.stream * inputs.hidden_size
    final = sizes.tokens * (FLOAT32 * inputs.hidden_size + 2 * stream)
    if not inputs.gradient_checkpointing:
        return final + inputs.layers * _layer_saved(inputs, sizes)
    if inputs.selective_checkpointing:
        return final + inputs.layers * sizes.tokens * (stream + _selected_bytes(inputs, sizes))
    if inputs.activation_offload:
        return final + 2.0 * sizes.tokens * stream  # one in use, one on its way
    return final + inputs.layers * sizes.tokens * float(stream)


def _selected_bytes(inputs: MemoryInputs, sizes: Sizes) -> float:
    """Bytes a token and layer that selective checkpointing keeps beside the layer's input.

    Attention's output, and half of the matrix products' outputs (torchtitan
    models/common/activation_checkpoint: every second mm is recomputed).
    """
    products = (
        sum(outs * count for _, outs, count in linear_shapes_of(inputs).values()) / inputs.layers
    )
    query = inputs.attention_heads * inputs.head_dim
    return sizes.inner * (query + products / 2) + FLOAT32 * inputs.attention_heads


def _layer_saved(inputs: MemoryInputs, sizes: Sizes) -> float:
    """Bytes that autograd keeps for one decoder layer.

    A token, for s bytes in the stream and c in products:
    norms     2 x (4h float32 copy [s < 4] + s h normalised [norm trained]) (hf LlamaRMSNorm)
    attention c (q + 2 kv) inputs, c q output, 4 heads logsumexp (torch SDPA)
    MLP       3 c m: gate, activated gate, up (hf LlamaMLP)
    inputs of linear modules: see `_linear_inputs`
    torch.compile recomputes elementwise results that no matrix product reads: the
    float32 copies, the activated gate (torch _functorch/partitioners.py,
    `ban_recompute_materialized_backward`).
    """
    hidden, width = inputs.hidden_size, inputs.intermediate_size
    query = inputs.attention_heads * inputs.head_dim
    key = inputs.key_value_heads * inputs.head_dim
    stream, inner = sizes.stream, sizes.inner
    norm = float(stream if inputs.compile else FLOAT32) * hidden
    if inputs.method == "full" and not inputs.compile:
        norm += stream * hidden
    attention = inner * (2 * query + 2 * key) + FLOAT32 * inputs.attention_heads
    mlp = (2 if inputs.compile else 3) * inner * width
    token = 2 * norm + attention + mlp + _linear_inputs(inputs, sizes)
    return sizes.tokens * token + _score_matrix(inputs) + _cast_weights(inputs, sizes)


def _cast_weights(inputs: MemoryInputs, sizes: Sizes) -> float:
    """One layer's weights in the compute dtype, which autocast casts and backward reads.

    Only where float32 weights are computed with under autocast: FSDP's mixed precision
    and DeepSpeed hold the cast copy already (torch aten/src/ATen/autocast_mode.cpp).
    """
    compute = DTYPE_BYTES[inputs.compute_dtype]
    in_place = inputs.strategy in ZERO | FSDP or inputs.quantization is not None
    if in_place or not inputs.autocast or parameter_bytes(inputs) == compute:
        return 0.0
    return sizes.linear / inputs.layers * compute


def _score_matrix(inputs: MemoryInputs) -> float:
    """Eager attention's matrices: scores and their float32 softmax, and its cast (hf)."""
    if inputs.flash_attention:
        return 0.0
    elements = inputs.micro_batch_size * inputs.attention_heads * inputs.sequence_length**2
    return float(elements * (FLOAT32 + 2 + 2))


def _linear_inputs(inputs: MemoryInputs, sizes: Sizes) -> float:
    """Bytes a token of the linear modules' inputs that a layer saves.

    Full: the inputs of q, k, v (one tensor), of gate and up (one), of down; o's is
    attention's output. A frozen weight needs no input; its adapter does: each adapted
    module casts its own copy to the adapter's dtype, or to the compute dtype under
    autocast (peft lora/layer.py `_cast_input_dtype`), unless it has that dtype already.
    Dropout adds a byte of mask and makes every copy separate. LLM.int8() keeps every
    module's input as well (bnb autograd/_functions.py MatMul8bitLt).
    """
    hidden, width, inner = inputs.hidden_size, inputs.intermediate_size, sizes.inner
    if inputs.method == "full":
        # A float32 stream under autocast is cast for each module: q, k, v, gate, up.
        copies = 5 if inner != sizes.stream else 2
        return float(inner * (copies * hidden + width))
    adapter = DTYPE_BYTES[inputs.compute_dtype] if inputs.autocast else adapter_bytes(inputs)
    cast = adapter_bytes(inputs) != sizes.stream or (inputs.autocast and inner != sizes.stream)
    separate = inputs.lora_dropout > 0 or cast
    mask = 1 if inputs.lora_dropout > 0 else 0
    total = inner * (2.0 * hidden + width) if inputs.quantization == "8bit" else 0.0
    seen: set[int] = set()
    for ins, outs, count in adapted_shapes(inputs).values():
        shared = not separate and ins in seen and outs != hidden
        per_layer = count / inputs.layers
        total += 0.0 if shared else per_layer * ins * (adapter + mask)
        total += per_layer * inputs.lora_rank * adapter
        seen.add(ins)
    return total


def layer_peak(inputs: MemoryInputs, sizes: Sizes) -> float:
    """Bytes that one layer's backward adds to the saved activations.

    Its recomputed activations under checkpointing, and the gradients in flight: two of
    the MLP's width and two of the stream's.
    """
    flight = sizes.tokens * (
        2.0 * sizes.inner * inputs.intermediate_size + 2.0 * sizes.stream * inputs.hidden_size
    )
    recomputed = _layer_saved(inputs, sizes) if inputs.gradient_checkpointing else 0.0
    return recomputed + flight


def dequantized(inputs: MemoryInputs) -> float:
    """The largest linear weight in the compute dtype (bnb MatMul4Bit.backward dequantises it)."""
    if inputs.quantization is None:
        return 0.0
    largest = max(ins * outs for ins, outs, _ in linear_shapes_of(inputs).values())
    return float(largest * DTYPE_BYTES[inputs.compute_dtype])


def loss_bytes(inputs: MemoryInputs, sizes: Sizes) -> float:
    """Bytes of the head and the loss at their peak.

    full_logits: log-softmax 4, its gradient 4, the logits' float32 gradient 4, and the
    logits themselves in the head's dtype; 4 under autocast, since accelerate casts
    outputs to float32 (hf loss_utils.py; torch log_softmax; accelerate
    `convert_outputs_to_fp32`).
    chunked: logits and log-softmax of every chunk stay, the gradients of one chunk;
    compiled, the log-softmax is recomputed and the gradient written in the head's dtype.
    fused: see `_fused_bytes`.
    """
    elements = sizes.tokens * inputs.vocab_size
    kept = FLOAT32 if inputs.autocast else sizes.stream
    if inputs.logits_dtype is not None:
        kept = DTYPE_BYTES[inputs.logits_dtype]
    match inputs.loss_path:
        case "full_logits":
            return elements * (3.0 * FLOAT32 + kept)
        case "chunked" if inputs.compile:
            return elements * (sizes.stream + sizes.stream / _CHUNKS)
        case "chunked":
            return elements * (sizes.stream + FLOAT32 + 2.0 * FLOAT32 / _CHUNKS)
        case _:
            return _fused_bytes(inputs, sizes)


def _fused_bytes(inputs: MemoryInputs, sizes: Sizes) -> float:
    """TRL's fused head (trl kernels/chunked_logprob.py, backward).

    One tile of logits, a tile of the head cast to the compute dtype where it has another,
    the scored positions' hidden states and their float32 gradient; when the head is
    trained, its float32 gradient and the cast of it.
    """
    compute = DTYPE_BYTES[inputs.compute_dtype]
    columns = min(inputs.vocab_size, _FUSED_VOCABULARY)
    tile = min(sizes.tokens, _FUSED_TOKENS) * columns * compute
    cast = columns * inputs.hidden_size * compute if outer_bytes(inputs) != compute else 0
    hidden = sizes.tokens * inputs.hidden_size * (sizes.stream + FLOAT32)
    trained = 0
    if inputs.method == "full":
        in_compute = inputs.strategy in ZERO | FSDP
        trained = sizes.embedding * (FLOAT32 + (compute if in_compute else trained_bytes(inputs)))
    return float(tile + cast + hidden + trained)
