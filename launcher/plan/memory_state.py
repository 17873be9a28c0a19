"""What a rank holds all the time: parameters, gradients, optimizer state, communication.

Terms of `launcher.plan.memory`, whose docstring has the words and the sources.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.plan.memory_inputs import MemoryInputs

MIB = 2**20
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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
SHARDED: dict[str, tuple[bool, bool, bool]] = {
    "single": (False, False, False),
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp": (True, True, True),
    "fsdp1": (True, True, True),
    "hsdp": (True, True, True),
}
ZERO = frozenset({"zero1", "zero2", "zero3"})
FSDP = frozenset({"fsdp", "fsdp1", "hsdp"})
_NF4_BLOCK = 64  # bnb functional.quantize_4bit: weights that share an absmax
_NF4_SECOND_BLOCK = 256  # bnb: absmaxes that share one in double quantisation
_WORKSPACE_BYTES = 32 * MIB  # torch CUDABlas: cuBLAS workspace on Hopper; 8 MiB before it
_ZERO3_LIVE_PARAMETERS = 1_000_000_000  # ds stage3_max_live_parameters
FLOAT32 = 4


class Sizes(NamedTuple):
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
        count * inputs.lora_rank * (ins + outs)
        for ins, outs, count in adapted_shapes(inputs).values()
    )


def linear_shapes_of(inputs: MemoryInputs) -> Mapping[str, tuple[int, int, int]]:
    """The linear modules as given, or those of a Llama of the same shape."""
    return inputs.linear_shapes or llama_linear_shapes(inputs)


def adapted_shapes(inputs: MemoryInputs) -> dict[str, tuple[int, int, int]]:
    """The adapted modules."""
    shapes = linear_shapes_of(inputs)
    names = inputs.lora_targets
    return {name: row for name, row in shapes.items() if names is None or name in names}


def derive_sizes(inputs: MemoryInputs) -> Sizes:
    """Counts that the terms share: tokens, parameters by kind, shards, bytes a parameter."""
    linear = sum(ins * outs * count for ins, outs, count in linear_shapes_of(inputs).values())
    embedding = inputs.vocab_size * inputs.hidden_size
    head = 0 if inputs.tie_word_embeddings else embedding
    rest = max(0, inputs.parameters - linear - embedding - head)
    adapters = adapter_parameters(inputs)
    stored = _stored_bytes(inputs, linear, embedding + head, rest)
    outside = (embedding + head) * outer_bytes(inputs)
    return Sizes(
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
        inner=DTYPE_BYTES[inputs.compute_dtype] if inputs.autocast else _stream_bytes(inputs),
    )


def _shards(inputs: MemoryInputs) -> int:
    """GPUs that one copy of the sharded state is spread over."""
    if inputs.strategy in {"single", "ddp"}:
        return 1
    if inputs.strategy == "hsdp" and inputs.shard_size:
        return inputs.shard_size
    return max(1, inputs.gpus)


def parameter_bytes(inputs: MemoryInputs) -> int:
    """Bytes of a stored parameter; DeepSpeed casts the model to the compute dtype (ds engine)."""
    if inputs.strategy in ZERO:
        return DTYPE_BYTES[inputs.compute_dtype]
    return DTYPE_BYTES[inputs.parameter_dtype]


def outer_bytes(inputs: MemoryInputs) -> int:
    """Bytes of a parameter of the embedding, the norms and the head."""
    if inputs.embedding_dtype is not None:
        return DTYPE_BYTES[inputs.embedding_dtype]
    return parameter_bytes(inputs)


def _stream_bytes(inputs: MemoryInputs) -> int:
    """Bytes of an element of the residual stream: the embedding's dtype as it is computed with."""
    if inputs.strategy in ZERO | FSDP:
        return DTYPE_BYTES[inputs.compute_dtype]
    return outer_bytes(inputs)


def quantized_bytes(inputs: MemoryInputs) -> float:
    """Bytes of a weight in a quantised linear module, with its scales.

    NF4: half a byte, and a float32 absmax per 64 weights; with double quantisation a
    uint8 per 64 and a float32 per 64 x 256: 4.127 bits (bnb; QLoRA, arXiv:2305.14314, 3).
    LLM.int8(): one byte, and a float32 per output row, which is under 0.1%.
    """
    if inputs.quantization == "8bit":
        return 1.0
    if inputs.double_quantization:
        return 0.5 + 1 / _NF4_BLOCK + FLOAT32 / (_NF4_BLOCK * _NF4_SECOND_BLOCK)
    return 0.5 + FLOAT32 / _NF4_BLOCK


def _stored_bytes(inputs: MemoryInputs, linear: int, outer: int, rest: int) -> float:
    """Bytes of the whole base model as stored, before sharding."""
    if inputs.quantization is None:
        weights = linear * float(parameter_bytes(inputs))
    else:
        weights = linear * quantized_bytes(inputs)
    return weights + (outer + rest) * outer_bytes(inputs)


def adapter_bytes(inputs: MemoryInputs) -> int:
    """Bytes of one adapter parameter."""
    if inputs.strategy in ZERO:
        return DTYPE_BYTES[inputs.compute_dtype]
    return DTYPE_BYTES[inputs.adapter_dtype]


def trained_bytes(inputs: MemoryInputs) -> int:
    """Bytes of a trainable parameter, and of its gradient."""
    return parameter_bytes(inputs) if inputs.method == "full" else adapter_bytes(inputs)


def optimizer_row(inputs: MemoryInputs) -> tuple[str, float, float, float, str]:
    """The optimizer's row of the table, by a part of its name."""
    return next(row for row in _OPTIMIZERS if row[0] in inputs.optimizer.lower())


def fixed_parts(inputs: MemoryInputs, sizes: Sizes) -> dict[str, float]:
    """Parts that stay for the whole step, and the whole gradients.

    parameters: base as stored + adapters, over N where sharded.
    gradients: trainable x their dtype, over N where sharded.
    optimizer: states x trainable, over N where sharded. DeepSpeed keeps float32 master
    weights and states (ds zero/stage_1_and_2.py single_partition_of_fp32_groups).
    """
    parameters_sharded, gradients_sharded, optimizer_sharded = SHARDED[inputs.strategy]
    trained = trained_bytes(inputs)
    parameters = sizes.stored + sizes.adapters * adapter_bytes(inputs)
    gradients = float(sizes.trainable * trained)
    _, own, fixed, _, _ = optimizer_row(inputs)
    is_zero = inputs.strategy in ZERO
    state_bytes = FLOAT32 * own + fixed + FLOAT32 if is_zero else trained * own + fixed
    optimizer = sizes.trainable * state_bytes
    on_host = inputs.offload != "none"
    return {
        "parameters": _resident(inputs, parameters, sizes.shards if parameters_sharded else 1),
        "gradients": 0.0
        if on_host and inputs.strategy in ZERO | FSDP
        else gradients / (sizes.shards if gradients_sharded else 1),
        "optimizer": 0.0 if on_host else optimizer / (sizes.shards if optimizer_sharded else 1),
        "activations": 0.0,
        "logits": 0.0,
        "communication": _communication(inputs, sizes),
        "workspace": float(_WORKSPACE_BYTES),
    }


def _resident(inputs: MemoryInputs, parameters: float, shards: int) -> float:
    """Bytes of stored parameters on the GPU; FSDP offloads them with the optimizer."""
    in_fsdp = inputs.strategy in FSDP and inputs.offload != "none"
    return 0.0 if inputs.offload == "all" or in_fsdp else parameters / shards


def _communication(inputs: MemoryInputs, sizes: Sizes) -> float:
    """Buffers of the collectives that live through forward and backward.

    ddp: gradient buckets, a copy of the gradients (torch Reducer, no bucket view).
    zero1, zero2: two reduce buckets of h x h elements (hf integrations/deepspeed.py "auto").
    zero3: gathered parameters, at most `stage3_max_live_parameters`, and the buckets.
    fsdp: embedding and head unsharded from forward to backward (the root group), two
    layers (one in use, one prefetched), and one layer's unsharded gradients.
    """
    if inputs.strategy == "single" or inputs.gpus == 1:
        return 0.0
    compute = DTYPE_BYTES[inputs.compute_dtype]
    if inputs.strategy == "ddp":
        return float(sizes.trainable * trained_bytes(inputs))
    buckets = 2.0 * inputs.hidden_size**2 * compute
    if inputs.strategy in {"zero1", "zero2"}:
        return buckets
    layer = sizes.layer_stored
    if inputs.quantization is None:
        layer *= compute / parameter_bytes(inputs)
    if inputs.strategy == "zero3":
        live = _ZERO3_LIVE_PARAMETERS * compute
        return min(layer * inputs.layers, live) + buckets
    outer = (sizes.embedding + sizes.head) * compute
    gradients = layer if inputs.method == "full" else 0.0
    return outer + 2.0 * layer + gradients


def root_gradients(inputs: MemoryInputs, parameters: int) -> float:
    """Unsharded gradients of the embedding and the head under FSDP.

    They belong to the root group, which is reduced only when the whole backward is done
    (torch fsdp/_fully_shard/_fsdp_param_group.py post_backward).
    """
    if inputs.strategy not in FSDP or inputs.gpus == 1 or inputs.method != "full":
        return 0.0
    return float(parameters * DTYPE_BYTES[inputs.compute_dtype])
