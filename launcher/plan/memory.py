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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.facts.model import ModelFacts

Method = Literal["full", "lora", "qlora", "8bit-lora"]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp"]
LossPath = Literal["fused", "chunked", "full_logits"]
Offload = Literal["none", "optimizer", "all"]
Quantization = Literal["nf4", "8bit"]
Dtype = Literal["float32", "bfloat16", "float16"]

_MIB = 2**20
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# State bytes a parameter for an optimizer that keeps its state in the parameter's dtype
# (b bytes), and its temporary bytes a parameter during the step. First match wins.
# name part, states of b bytes, states of fixed bytes, temporaries of b bytes, source
_OPTIMIZERS: tuple[tuple[str, float, float, float, str], ...] = (
    ("8bit", 0, 2 * (1 + 4 / 256), 0, "bnb optim: two uint8 states, a float32 scale per 256"),
    ("adamw_bnb", 0, 2 * (1 + 4 / 256), 0, "bnb optim: two uint8 states"),
    ("4bit", 0, 2 * (0.5 + 4 / 128), 0, "torchao low_bit_optim"),
    ("adafactor", 0, 0.05, 1, "hf Adafactor: row and column statistics, one update"),
    ("lion", 1, 0, 0, "bnb Lion: one state"),
    ("sgd", 0, 0, 0, "torch SGD without momentum"),
    ("fused", 2, 0, 0, "torch fused AdamW: in place"),
    ("apex", 2, 0, 0, "apex FusedAdam: in place"),
    ("adamw", 2, 0, 1, "torch AdamW foreach: one parameter-sized temporary"),
    ("", 2, 0, 1, "unknown optimizer: taken as AdamW"),
)

# Strategy: what is divided by the shards.
# name: (parameters, gradients, optimizer state), source
_SHARDED: dict[str, tuple[bool, bool, bool]] = {
    "single": (False, False, False),
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp": (True, True, True),
    "fsdp1": (True, True, True),
    "hsdp": (True, True, True),
}
_ZERO = frozenset({"zero1", "zero2", "zero3"})
_FSDP = frozenset({"fsdp", "fsdp1", "hsdp"})

_NF4_BLOCK = 64  # bnb functional.quantize_4bit: weights that share an absmax
_NF4_SECOND_BLOCK = 256  # bnb: absmaxes that share one in double quantisation
_FUSED_TOKENS = 4096  # trl kernels/chunked_logprob.py TOKEN_CHUNK_SIZE
_FUSED_VOCABULARY = 32768  # trl trainer/utils.py _CHUNKED_LOGPROB_CHUNK_SIZE
_CHUNKS = 8  # torchtune CEWithChunkedOutputLoss num_output_chunks
_WORKSPACE_BYTES = 32 * _MIB  # torch CUDABlas: cuBLAS workspace on Hopper; 8 MiB before it
_ZERO3_LIVE_PARAMETERS = 1_000_000_000  # ds stage3_max_live_parameters
_FLOAT32 = 4

# Reserved over allocated: what the caching allocator keeps beside live tensors.
# plain and fragmented (quantised or sharded): middle, highest. Source: published.csv's rows
# that report both (1.04-1.09 and 1.06-1.27).
_RESERVED = {False: (1.06, 1.09), True: (1.12, 1.27)}
# What a process holds outside the allocator: CUDA's context with the loaded kernels, and
# NCCL's channels. Assumed; published.csv shows 0.137 GiB of context on a T4 with fp16.
_CONTEXT_BYTES = 512 * _MIB
_NCCL_BYTES = 512 * _MIB
_MODEL_ERROR = 0.10  # how far a single estimate of allocated memory may be off, either way


@dataclass(frozen=True, kw_only=True)
class MemoryInputs:
    """Everything that the estimate depends on, in plain numbers and names."""

    layers: int
    """Decoder layers."""

    hidden_size: int
    """Width of the residual stream."""

    intermediate_size: int
    """Width of the MLP that one token passes."""

    attention_heads: int
    """Query heads."""

    key_value_heads: int
    """Key heads, equal to value heads."""

    head_dim: int
    """Width of one head."""

    vocab_size: int
    """Rows of the embedding."""

    parameters: int
    """All parameters of the model without adapters; a tied head counted once."""

    tie_word_embeddings: bool = False
    """Whether the head is the embedding."""

    linear_shapes: Mapping[str, tuple[int, int, int]] | None = None
    """Name: inputs, outputs, modules in the whole model; those of a Llama where None."""

    method: Method = "full"
    """What is trained: every parameter, or low-rank adapters on a plain or quantised base."""

    strategy: Strategy = "single"
    """How state is spread over GPUs."""

    gpus: int = 1
    """GPUs of the whole run (the data-parallel size)."""

    shard_size: int | None = None
    """GPUs that share one copy under `hsdp`; all of them where None."""

    micro_batch_size: int = 1
    """Sequences a GPU passes at once."""

    sequence_length: int = 2048
    """Tokens of a sequence, padding included."""

    gradient_accumulation_steps: int = 1
    """Micro batches before a step; more than one keeps gradients during the forward."""

    gradient_checkpointing: bool = True
    """Whether layers keep only their input and are recomputed."""

    selective_checkpointing: bool = False
    """Whether layers keep the attention and every second matrix product (torchtitan's `op`)
    and recompute the rest; matters only where `gradient_checkpointing` is True."""

    activation_offload: bool = False
    """Whether checkpointed layer inputs wait in host memory."""

    loss_path: LossPath = "fused"
    """`fused`: TRL's fused head; `chunked`: logits kept, loss in 8 chunks; `full_logits`."""

    logits_dtype: Dtype | None = None
    """Dtype of the logits that stay through the loss; None: float32 under autocast, else the
    head's. Models of transformers before 4.45 cast theirs to float32 always."""

    parameter_dtype: Dtype = "bfloat16"
    """Dtype that parameters are stored in (the base's, where it is not quantised)."""

    embedding_dtype: Dtype | None = None
    """Dtype of embedding, norms and head, where it differs (PEFT's k-bit preparation)."""

    compute_dtype: Dtype = "bfloat16"
    """Dtype of matrix products under autocast, FSDP's mixed precision or DeepSpeed."""

    autocast: bool = True
    """Whether the forward runs under torch.autocast (`bf16: true` of the trainer)."""

    adapter_dtype: Dtype = "float32"
    """Dtype of LoRA's weights."""

    optimizer: str = "adamw_torch_fused"
    """The trainer's `optim` name."""

    lora_rank: int = 16
    """Rank of the adapters."""

    lora_targets: tuple[str, ...] | None = None
    """Names of adapted modules among `linear_shapes`; all of them where None."""

    lora_dropout: float = 0.0
    """Dropout before the adapters; more than 0 keeps a mask and a copy of each input."""

    quantization: Quantization | None = None
    """How the frozen base's linear modules are stored."""

    double_quantization: bool = True
    """Whether NF4's scales are quantised too."""

    compile: bool = False
    """Whether torch.compile fuses elementwise operations."""

    offload: Offload = "none"
    """What waits in host memory: optimizer state, or parameters too."""

    flash_attention: bool = True
    """Whether attention keeps no score matrix (SDPA's fused kernels, FlashAttention)."""


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


class _Sizes(NamedTuple):
    """Counts and bytes that several terms share."""

    tokens: int
    linear: int
    embedding: int
    head: int
    rest: int
    adapters: int
    trainable: int
    shards: int
    stored: float
    layer_stored: float
    stream: int
    inner: int


def memory_inputs(model: ModelFacts, **settings: Any) -> MemoryInputs:
    """The inputs for a probed model; `settings` are the other fields of `MemoryInputs`."""
    return MemoryInputs(
        layers=model.layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        attention_heads=model.attention_heads,
        key_value_heads=model.key_value_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        parameters=model.parameters,
        tie_word_embeddings=model.tie_word_embeddings,
        linear_shapes=model.linear_shapes,
        **settings,
    )


def estimate_memory(inputs: MemoryInputs) -> MemoryEstimate:
    """Peak memory of one training step on the fullest GPU.

    Takes tens of microseconds. See the module's docstring for the four moments.
    """
    sizes = _sizes(inputs)
    fixed = _fixed_parts(inputs, sizes)
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


def llama_linear_shapes(inputs: MemoryInputs) -> dict[str, tuple[int, int, int]]:
    """The linear modules of a Llama of the given shape: name to inputs, outputs, modules."""
    hidden, width, count = inputs.hidden_size, inputs.intermediate_size, inputs.layers
    query = inputs.attention_heads * inputs.head_dim
    key = inputs.key_value_heads * inputs.head_dim
    return {
        "q_proj": (hidden, query, count),
        "k_proj": (hidden, key, count),
        "v_proj": (hidden, key, count),
        "o_proj": (query, hidden, count),
        "gate_proj": (hidden, width, count),
        "up_proj": (hidden, width, count),
        "down_proj": (width, hidden, count),
    }


def adapter_parameters(inputs: MemoryInputs) -> int:
    """Parameters of the LoRA adapters: rank x (inputs + outputs) for every adapted module."""
    if inputs.method == "full":
        return 0
    return sum(
        count * inputs.lora_rank * (ins + outs) for ins, outs, count in _targets(inputs).values()
    )


def _shapes(inputs: MemoryInputs) -> Mapping[str, tuple[int, int, int]]:
    return inputs.linear_shapes or llama_linear_shapes(inputs)


def _targets(inputs: MemoryInputs) -> dict[str, tuple[int, int, int]]:
    """The adapted modules."""
    shapes = _shapes(inputs)
    names = inputs.lora_targets
    return {name: row for name, row in shapes.items() if names is None or name in names}


def _sizes(inputs: MemoryInputs) -> _Sizes:
    linear = sum(ins * outs * count for ins, outs, count in _shapes(inputs).values())
    embedding = inputs.vocab_size * inputs.hidden_size
    head = 0 if inputs.tie_word_embeddings else embedding
    rest = max(0, inputs.parameters - linear - embedding - head)
    adapters = adapter_parameters(inputs)
    stored = _stored_bytes(inputs, linear, embedding + head, rest)
    outside = (embedding + head) * _outer_bytes(inputs)
    return _Sizes(
        tokens=inputs.micro_batch_size * inputs.sequence_length,
        linear=linear,
        embedding=embedding,
        head=head,
        rest=rest,
        adapters=adapters,
        trainable=inputs.parameters if inputs.method == "full" else adapters,
        shards=_shards(inputs),
        stored=stored,
        layer_stored=(stored - outside) / inputs.layers,
        stream=_stream_bytes(inputs),
        inner=_DTYPE_BYTES[inputs.compute_dtype] if inputs.autocast else _stream_bytes(inputs),
    )


def _shards(inputs: MemoryInputs) -> int:
    """GPUs that one copy of the sharded state is spread over."""
    if inputs.strategy in {"single", "ddp"}:
        return 1
    if inputs.strategy == "hsdp" and inputs.shard_size:
        return inputs.shard_size
    return max(1, inputs.gpus)


def _parameter_bytes(inputs: MemoryInputs) -> int:
    """Bytes of a stored parameter; DeepSpeed casts the model to the compute dtype (ds engine)."""
    if inputs.strategy in _ZERO:
        return _DTYPE_BYTES[inputs.compute_dtype]
    return _DTYPE_BYTES[inputs.parameter_dtype]


def _outer_bytes(inputs: MemoryInputs) -> int:
    """Bytes of a parameter of the embedding, the norms and the head."""
    if inputs.embedding_dtype is not None:
        return _DTYPE_BYTES[inputs.embedding_dtype]
    return _parameter_bytes(inputs)


def _stream_bytes(inputs: MemoryInputs) -> int:
    """Bytes of an element of the residual stream: the embedding's dtype as it is computed with."""
    if inputs.strategy in _ZERO | _FSDP:
        return _DTYPE_BYTES[inputs.compute_dtype]
    return _outer_bytes(inputs)


def quantized_bytes(inputs: MemoryInputs) -> float:
    """Bytes of a weight in a quantised linear module, with its scales.

    NF4: half a byte, and a float32 absmax per 64 weights; with double quantisation a
    uint8 per 64 and a float32 per 64 x 256: 4.127 bits (bnb; QLoRA, arXiv:2305.14314, 3).
    LLM.int8(): one byte, and a float32 per output row, which is under 0.1%.
    """
    if inputs.quantization == "8bit":
        return 1.0
    if inputs.double_quantization:
        return 0.5 + 1 / _NF4_BLOCK + _FLOAT32 / (_NF4_BLOCK * _NF4_SECOND_BLOCK)
    return 0.5 + _FLOAT32 / _NF4_BLOCK


def _stored_bytes(inputs: MemoryInputs, linear: int, outer: int, rest: int) -> float:
    """Bytes of the whole base model as stored, before sharding."""
    if inputs.quantization is None:
        weights = linear * float(_parameter_bytes(inputs))
    else:
        weights = linear * quantized_bytes(inputs)
    return weights + (outer + rest) * _outer_bytes(inputs)


def _adapter_bytes(inputs: MemoryInputs) -> int:
    if inputs.strategy in _ZERO:
        return _DTYPE_BYTES[inputs.compute_dtype]
    return _DTYPE_BYTES[inputs.adapter_dtype]


def _trained_bytes(inputs: MemoryInputs) -> int:
    """Bytes of a trainable parameter, and of its gradient."""
    return _parameter_bytes(inputs) if inputs.method == "full" else _adapter_bytes(inputs)


def _optimizer_row(inputs: MemoryInputs) -> tuple[str, float, float, float, str]:
    return next(row for row in _OPTIMIZERS if row[0] in inputs.optimizer.lower())


def _fixed_parts(inputs: MemoryInputs, sizes: _Sizes) -> dict[str, float]:
    """Parts that stay for the whole step, and the whole gradients.

    parameters: base as stored + adapters, over N where sharded.
    gradients: trainable x their dtype, over N where sharded.
    optimizer: states x trainable, over N where sharded. DeepSpeed keeps float32 master
    weights and states (ds zero/stage_1_and_2.py single_partition_of_fp32_groups).
    """
    parameters_sharded, gradients_sharded, optimizer_sharded = _SHARDED[inputs.strategy]
    trained = _trained_bytes(inputs)
    parameters = sizes.stored + sizes.adapters * _adapter_bytes(inputs)
    gradients = float(sizes.trainable * trained)
    _, own, fixed, _, _ = _optimizer_row(inputs)
    is_zero = inputs.strategy in _ZERO
    state_bytes = _FLOAT32 * own + fixed + _FLOAT32 if is_zero else trained * own + fixed
    optimizer = sizes.trainable * state_bytes
    on_host = inputs.offload != "none"
    return {
        "parameters": _resident(inputs, parameters, sizes.shards if parameters_sharded else 1),
        "gradients": 0.0
        if on_host and inputs.strategy in _ZERO | _FSDP
        else gradients / (sizes.shards if gradients_sharded else 1),
        "optimizer": 0.0 if on_host else optimizer / (sizes.shards if optimizer_sharded else 1),
        "activations": 0.0,
        "logits": 0.0,
        "communication": _communication(inputs, sizes),
        "workspace": float(_WORKSPACE_BYTES),
    }


def _resident(inputs: MemoryInputs, parameters: float, shards: int) -> float:
    """Bytes of stored parameters on the GPU; FSDP offloads them with the optimizer."""
    in_fsdp = inputs.strategy in _FSDP and inputs.offload != "none"
    return 0.0 if inputs.offload == "all" or in_fsdp else parameters / shards


def _communication(inputs: MemoryInputs, sizes: _Sizes) -> float:
    """Buffers of the collectives that live through forward and backward.

    ddp: gradient buckets, a copy of the gradients (torch Reducer, no bucket view).
    zero1, zero2: two reduce buckets of h x h elements (hf integrations/deepspeed.py "auto").
    zero3: gathered parameters, at most `stage3_max_live_parameters`, and the buckets.
    fsdp: embedding and head unsharded from forward to backward (the root group), two
    layers (one in use, one prefetched), and one layer's unsharded gradients.
    """
    if inputs.strategy == "single" or inputs.gpus == 1:
        return 0.0
    compute = _DTYPE_BYTES[inputs.compute_dtype]
    if inputs.strategy == "ddp":
        return float(sizes.trainable * _trained_bytes(inputs))
    buckets = 2.0 * inputs.hidden_size**2 * compute
    if inputs.strategy in {"zero1", "zero2"}:
        return buckets
    layer = sizes.layer_stored
    if inputs.quantization is None:
        layer *= compute / _parameter_bytes(inputs)
    if inputs.strategy == "zero3":
        live = _ZERO3_LIVE_PARAMETERS * compute
        return min(layer * inputs.layers, live) + buckets
    outer = (sizes.embedding + sizes.head) * compute
    gradients = layer if inputs.method == "full" else 0.0
    return outer + 2.0 * layer + gradients


def _loss_moment(inputs: MemoryInputs, sizes: _Sizes, fixed: dict[str, float]) -> dict[str, float]:
    """The loss: saved activations and the loss's buffers; earlier micro batches' gradients."""
    kept = fixed["gradients"] if inputs.gradient_accumulation_steps > 1 else 0.0
    return {
        **fixed,
        "gradients": kept,
        "activations": _saved_activations(inputs, sizes),
        "logits": _loss_bytes(inputs, sizes),
    }


def _backward_moment(
    inputs: MemoryInputs, sizes: _Sizes, fixed: dict[str, float]
) -> dict[str, float]:
    """The last layer's backward: saved activations, its recomputation and its gradients."""
    share = 1.0 if inputs.gradient_accumulation_steps > 1 else 1.0 / inputs.layers
    head_gradient = 0.0
    if inputs.method == "full":
        head_gradient = sizes.embedding * _trained_bytes(inputs) / sizes.shards
    return {
        **fixed,
        "gradients": min(fixed["gradients"], fixed["gradients"] * share + head_gradient),
        "activations": _saved_activations(inputs, sizes) + _layer_peak(inputs, sizes),
        "communication": fixed["communication"] + _root_gradients(inputs, sizes.embedding),
        "workspace": fixed["workspace"] + _dequantized(inputs),
    }


def _end_moment(inputs: MemoryInputs, sizes: _Sizes, fixed: dict[str, float]) -> dict[str, float]:
    """The first layer's backward: every gradient, and one layer's activations."""
    layer_input = sizes.tokens * inputs.hidden_size * sizes.stream
    outer = sizes.embedding + sizes.head
    return {
        **fixed,
        "activations": layer_input + _layer_peak(inputs, sizes),
        "communication": fixed["communication"] + _root_gradients(inputs, outer),
        "workspace": fixed["workspace"] + _dequantized(inputs),
    }


def _root_gradients(inputs: MemoryInputs, parameters: int) -> float:
    """Unsharded gradients of the embedding and the head under FSDP.

    They belong to the root group, which is reduced only when the whole backward is done
    (torch fsdp/_fully_shard/_fsdp_param_group.py post_backward).
    """
    if inputs.strategy not in _FSDP or inputs.gpus == 1 or inputs.method != "full":
        return 0.0
    return float(parameters * _DTYPE_BYTES[inputs.compute_dtype])


def _step_moment(inputs: MemoryInputs, sizes: _Sizes, fixed: dict[str, float]) -> dict[str, float]:
    """The optimizer's step: its temporaries; DeepSpeed's float32 copy of its gradients."""
    temporary = _optimizer_row(inputs)[3] * _trained_bytes(inputs)
    if inputs.strategy in _ZERO:
        temporary = float(_FLOAT32)  # ds stage_1_and_2.py: single_grad_partition in float32
    if inputs.offload != "none":
        temporary = 0.0
    shards = sizes.shards if _SHARDED[inputs.strategy][2] else 1
    communication = fixed["communication"] if inputs.strategy == "ddp" else 0.0
    return {
        **fixed,
        "communication": communication,
        "workspace": fixed["workspace"] + temporary * sizes.trainable / shards,
    }


def _saved_activations(inputs: MemoryInputs, sizes: _Sizes) -> float:
    """Activations alive after the forward.

    With checkpointing: every layer's input, T x h in the stream's dtype. Without: what
    each layer saves. The final norm adds its float32 input, and the head's input.
    """
    stream = sizes.stream * inputs.hidden_size
    final = sizes.tokens * (_FLOAT32 * inputs.hidden_size + 2 * stream)
    if not inputs.gradient_checkpointing:
        return final + inputs.layers * _layer_saved(inputs, sizes)
    if inputs.selective_checkpointing:
        return final + inputs.layers * sizes.tokens * (stream + _selected_bytes(inputs, sizes))
    if inputs.activation_offload:
        return final + 2.0 * sizes.tokens * stream  # one in use, one on its way
    return final + inputs.layers * sizes.tokens * float(stream)


def _selected_bytes(inputs: MemoryInputs, sizes: _Sizes) -> float:
    """Bytes a token and layer that selective checkpointing keeps beside the layer's input.

    Attention's output, and half of the matrix products' outputs (torchtitan
    models/common/activation_checkpoint: every second mm is recomputed).
    """
    products = sum(outs * count for _, outs, count in _shapes(inputs).values()) / inputs.layers
    query = inputs.attention_heads * inputs.head_dim
    return sizes.inner * (query + products / 2) + _FLOAT32 * inputs.attention_heads


def _layer_saved(inputs: MemoryInputs, sizes: _Sizes) -> float:
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
    norm = float(stream if inputs.compile else _FLOAT32) * hidden
    if inputs.method == "full" and not inputs.compile:
        norm += stream * hidden
    attention = inner * (2 * query + 2 * key) + _FLOAT32 * inputs.attention_heads
    mlp = (2 if inputs.compile else 3) * inner * width
    token = 2 * norm + attention + mlp + _linear_inputs(inputs, sizes)
    return sizes.tokens * token + _score_matrix(inputs) + _cast_weights(inputs, sizes)


def _cast_weights(inputs: MemoryInputs, sizes: _Sizes) -> float:
    """One layer's weights in the compute dtype, which autocast casts and backward reads.

    Only where float32 weights are computed with under autocast: FSDP's mixed precision
    and DeepSpeed hold the cast copy already (torch aten/src/ATen/autocast_mode.cpp).
    """
    compute = _DTYPE_BYTES[inputs.compute_dtype]
    in_place = inputs.strategy in _ZERO | _FSDP or inputs.quantization is not None
    if in_place or not inputs.autocast or _parameter_bytes(inputs) == compute:
        return 0.0
    return sizes.linear / inputs.layers * compute


def _score_matrix(inputs: MemoryInputs) -> float:
    """Eager attention's matrices: scores and their float32 softmax, and its cast (hf)."""
    if inputs.flash_attention:
        return 0.0
    elements = inputs.micro_batch_size * inputs.attention_heads * inputs.sequence_length**2
    return float(elements * (_FLOAT32 + 2 + 2))


def _linear_inputs(inputs: MemoryInputs, sizes: _Sizes) -> float:
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
    adapter = _DTYPE_BYTES[inputs.compute_dtype] if inputs.autocast else _adapter_bytes(inputs)
    cast = _adapter_bytes(inputs) != sizes.stream or (inputs.autocast and inner != sizes.stream)
    separate = inputs.lora_dropout > 0 or cast
    mask = 1 if inputs.lora_dropout > 0 else 0
    total = inner * (2.0 * hidden + width) if inputs.quantization == "8bit" else 0.0
    seen: set[int] = set()
    for ins, outs, count in _targets(inputs).values():
        shared = not separate and ins in seen and outs != hidden
        per_layer = count / inputs.layers
        total += 0.0 if shared else per_layer * ins * (adapter + mask)
        total += per_layer * inputs.lora_rank * adapter
        seen.add(ins)
    return total


def _layer_peak(inputs: MemoryInputs, sizes: _Sizes) -> float:
    """Bytes that one layer's backward adds to the saved activations.

    Its recomputed activations under checkpointing, and the gradients in flight: two of
    the MLP's width and two of the stream's.
    """
    flight = sizes.tokens * (
        2.0 * sizes.inner * inputs.intermediate_size + 2.0 * sizes.stream * inputs.hidden_size
    )
    recomputed = _layer_saved(inputs, sizes) if inputs.gradient_checkpointing else 0.0
    return recomputed + flight


def _dequantized(inputs: MemoryInputs) -> float:
    """The largest linear weight in the compute dtype (bnb MatMul4Bit.backward dequantises it)."""
    if inputs.quantization is None:
        return 0.0
    largest = max(ins * outs for ins, outs, _ in _shapes(inputs).values())
    return float(largest * _DTYPE_BYTES[inputs.compute_dtype])


def _loss_bytes(inputs: MemoryInputs, sizes: _Sizes) -> float:
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
    kept = _FLOAT32 if inputs.autocast else sizes.stream
    if inputs.logits_dtype is not None:
        kept = _DTYPE_BYTES[inputs.logits_dtype]
    match inputs.loss_path:
        case "full_logits":
            return elements * (3.0 * _FLOAT32 + kept)
        case "chunked" if inputs.compile:
            return elements * (sizes.stream + sizes.stream / _CHUNKS)
        case "chunked":
            return elements * (sizes.stream + _FLOAT32 + 2.0 * _FLOAT32 / _CHUNKS)
        case _:
            return _fused_bytes(inputs, sizes)


def _fused_bytes(inputs: MemoryInputs, sizes: _Sizes) -> float:
    """TRL's fused head (trl kernels/chunked_logprob.py, backward).

    One tile of logits, a tile of the head cast to the compute dtype where it has another,
    the scored positions' hidden states and their float32 gradient; when the head is
    trained, its float32 gradient and the cast of it.
    """
    compute = _DTYPE_BYTES[inputs.compute_dtype]
    columns = min(inputs.vocab_size, _FUSED_VOCABULARY)
    tile = min(sizes.tokens, _FUSED_TOKENS) * columns * compute
    cast = columns * inputs.hidden_size * compute if _outer_bytes(inputs) != compute else 0
    hidden = sizes.tokens * inputs.hidden_size * (sizes.stream + _FLOAT32)
    trained = 0
    if inputs.method == "full":
        in_compute = inputs.strategy in _ZERO | _FSDP
        trained = sizes.embedding * (_FLOAT32 + (compute if in_compute else _trained_bytes(inputs)))
    return float(tile + cast + hidden + trained)
