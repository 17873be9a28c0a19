"""The shape of a decoder model from its config.json alone, one table row a family.

Decides how many parameters a configuration has, which linear modules it holds and which
class its layers have. It must not open files; `model.py` does that. Every row is held
against transformers' own models on the meta device (tests/facts/test_model.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

Config = dict[str, Any]
Linear = tuple[str, str, str, str]
"""Name, input dimension, output dimension, bias: never `""`, `always`, or a config key.

Dimensions are words of `_dimensions`: `h` hidden, `q` all query heads, `kv` all key or
value heads, `qkv` the three together, `m` MLP, `2m` gate and up together, `d` one head.
"""


def _attention(qkv_bias: str = "", out_bias: str = "", out: str = "o_proj") -> tuple[Linear, ...]:
    """Separate query, key and value projections, and the output projection."""
    return (
        ("q_proj", "h", "q", qkv_bias),
        ("k_proj", "h", "kv", qkv_bias),
        ("v_proj", "h", "kv", qkv_bias),
        (out, "q", "h", out_bias),
    )


def _gated(bias: str = "", size: str = "m", prefix: str = "") -> tuple[Linear, ...]:
    """Gate, up and down projections."""
    return (
        (f"{prefix}gate_proj", "h", size, bias),
        (f"{prefix}up_proj", "h", size, bias),
        (f"{prefix}down_proj", size, "h", bias),
    )


def _plain(up: str, down: str, bias: str) -> tuple[Linear, ...]:
    """An MLP without a gate."""
    return ((up, "h", "m", bias), (down, "m", "h", bias))


class Family(NamedTuple):
    """How the models of one `model_type` are built."""

    layer_class: str
    """Class of a decoder layer, the unit that FSDP wraps."""

    attention: tuple[Linear, ...] = _attention()
    """Linear modules of the attention."""

    mlp: tuple[Linear, ...] = _gated()
    """Linear modules of a dense MLP."""

    norms: tuple[str, ...] = ("h", "h")
    """Dimension of every normalisation weight in a layer."""

    norm_bias: bool = False
    """Whether normalisations have a bias (LayerNorm) or not (RMSNorm)."""

    final_norm: bool = True
    """Whether a normalisation with weights follows the last layer."""

    head_bias: bool = False
    """Whether `lm_head` has a bias."""

    tied: bool = False
    """`tie_word_embeddings` where config.json leaves it out."""

    experts: bool = False
    """Whether layers may hold routed experts, kept as two stacked parameters."""

    shared_expert: bool = False
    """Whether an expert layer also has a shared expert with its own gate."""

    positions: bool = False
    """Whether positions are a learnt embedding."""

    defaults: tuple[tuple[str, Any], ...] = ()
    """Values of the config class for keys that config.json may leave out."""


_QK_NORM = ("h", "h", "d", "d")
_FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaDecoderLayer",
        _attention("attention_bias", "attention_bias"),
        _gated("mlp_bias"),
    ),
    "mistral": Family("MistralDecoderLayer"),
    "ministral": Family("MinistralDecoderLayer"),
    "qwen2": Family("Qwen2DecoderLayer", _attention("always")),
    "qwen3": Family(
        "Qwen3DecoderLayer", _attention("attention_bias", "attention_bias"), norms=_QK_NORM
    ),
    "mixtral": Family("MixtralDecoderLayer", experts=True),
    "qwen2_moe": Family(
        "Qwen2MoeDecoderLayer",
        _attention("qkv_bias"),
        experts=True,
        shared_expert=True,
        defaults=(("qkv_bias", True), ("num_experts", 60), ("num_experts_per_tok", 4)),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeDecoderLayer",
        _attention("attention_bias", "attention_bias"),
        norms=_QK_NORM,
        experts=True,
        defaults=(("num_local_experts", 128), ("num_experts_per_tok", 8)),
    ),
    "gemma": Family(
        "GemmaDecoderLayer",
        _attention("attention_bias", "attention_bias"),
        tied=True,
        defaults=(("head_dim", 256),),
    ),
    "gemma2": Family(
        "Gemma2DecoderLayer",
        _attention("attention_bias", "attention_bias"),
        norms=("h",) * 4,
        tied=True,
        defaults=(("head_dim", 256),),
    ),
    "gemma3_text": Family(
        "Gemma3DecoderLayer",
        _attention("attention_bias", "attention_bias"),
        norms=("h",) * 4 + ("d", "d"),
        tied=True,
        defaults=(("head_dim", 256),),
    ),
    "phi3": Family(
        "Phi3DecoderLayer",
        (("qkv_proj", "h", "qkv", ""), ("o_proj", "q", "h", "")),
        (("gate_up_proj", "h", "2m", ""), ("down_proj", "m", "h", "")),
    ),
    "phi": Family(
        "PhiDecoderLayer",
        _attention("always", "always", out="dense"),
        _plain("fc1", "fc2", "always"),
        norms=("h",),
        norm_bias=True,
        head_bias=True,
    ),
    "olmo": Family(
        "OlmoDecoderLayer",
        _attention("attention_bias", "attention_bias"),
        norms=(),
        final_norm=False,
    ),
    "olmo2": Family(
        "Olmo2DecoderLayer",
        _attention("attention_bias", "attention_bias"),
        norms=("h", "h", "q", "kv"),
    ),
    "granite": Family(
        "GraniteDecoderLayer",
        _attention("attention_bias", "attention_bias"),
        _gated("mlp_bias"),
    ),
    "smollm3": Family(
        "SmolLM3DecoderLayer",
        _attention("attention_bias", "attention_bias"),
        _gated("mlp_bias"),
        tied=True,
    ),
    "starcoder2": Family(
        "Starcoder2DecoderLayer",
        _attention("use_bias", "use_bias"),
        _plain("c_fc", "c_proj", "use_bias"),
        norm_bias=True,
        tied=True,
        defaults=(("use_bias", True),),
    ),
    "gpt_neox": Family(
        "GPTNeoXLayer",
        (
            ("query_key_value", "h", "qkv", "attention_bias"),
            ("dense", "q", "h", "attention_bias"),
        ),
        _plain("dense_h_to_4h", "dense_4h_to_h", "always"),
        norm_bias=True,
        defaults=(("attention_bias", True),),
    ),
    "falcon": Family(
        "FalconDecoderLayer",
        (("query_key_value", "h", "qkv", "bias"), ("dense", "q", "h", "bias")),
        _plain("dense_h_to_4h", "dense_4h_to_h", "bias"),
        norms=(),  # one or two, by the architecture's flags: see `_layer_norms`
        norm_bias=True,
        tied=True,
        defaults=(("multi_query", True), ("parallel_attn", True)),
    ),
    "gpt2": Family(
        "GPT2Block",
        (("c_attn", "h", "qkv", "always"), ("attn.c_proj", "q", "h", "always")),
        _plain("c_fc", "mlp.c_proj", "always"),
        norm_bias=True,
        tied=True,
        positions=True,
    ),
}

_GENERIC = Family("")

# Other spellings of the same key, older or per family.
_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_ff"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "vocab_size": ("vocab_size",),
    "head_dim": ("head_dim",),
}
_DEFAULT_MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Depth and widths of a decoder model."""

    layers: int
    """Decoder layers."""

    hidden_size: int
    """Width of the residual stream."""

    intermediate_size: int
    """Width of the MLP that one token passes: the routed experts together in a sparse layer."""

    attention_heads: int
    """Query heads."""

    key_value_heads: int
    """Key heads, equal to value heads."""

    head_dim: int
    """Width of one head."""

    vocab_size: int
    """Rows of the embedding."""

    def dimensions(self) -> dict[str, Any]:
        """Name: value, without what a subclass adds."""
        return {field.name: getattr(self, field.name) for field in fields(Dimensions)}


@dataclass(frozen=True, kw_only=True)
class Shape(Dimensions):
    """What a configuration says about a model, in numbers."""

    known: bool
    """Whether the family is in the table; if not, the counts are those of a Llama."""

    layer_class: str | None
    """Class of a decoder layer; None for an unknown family."""

    max_position_embeddings: int | None
    """Longest sequence that the configuration promises; None where it says nothing."""

    tied: bool
    """Whether `lm_head` is the embedding."""

    parameters: int
    """All parameters; a tied head is counted once."""

    active_parameters: int
    """Parameters that one token passes: `parameters` less the experts not chosen."""

    linear_shapes: dict[str, tuple[int, int, int]]
    """Name: inputs, outputs, modules in the whole model; without `lm_head`."""


def known_families() -> tuple[str, ...]:
    """Every `model_type` whose parameters are counted exactly."""
    return tuple(_FAMILIES)


def read_value(config: Config, key: str) -> Any:
    """The value of a key under any of its spellings; None where it is absent."""
    for name in _ALIASES.get(key, (key,)):
        if config.get(name) is not None:
            return config[name]
    return None


def missing_keys(config: Config) -> tuple[str, ...]:
    """Keys without which no shape can be told."""
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return tuple(key for key in needed if not _is_size(read_value(config, key)))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_shape(config: Config) -> Shape:
    """The shape that a configuration describes; no key of `missing_keys` may be missing."""
    model_type = str(config.get("model_type", ""))
    family = _FAMILIES.get(model_type, _GENERIC)
    full = {**dict(family.defaults), **{k: v for k, v in config.items() if v is not None}}
    size = _dimensions(full, model_type)
    layers = int(read_value(full, "num_hidden_layers"))
    sparse = _sparse_layers(full, layers) if _has_experts(family, full) else 0
    modules = _linear_modules(family, layers, sparse)
    tied = bool(full.get("tie_word_embeddings", family.tied))
    dense = _dense_parameters(family, full, size, modules, tied)
    experts, active = _expert_weights(full, size) if sparse else (0, 0)
    return Shape(
        known=model_type in _FAMILIES,
        layer_class=family.layer_class or None,
        layers=layers,
        hidden_size=size["h"],
        intermediate_size=_token_width(full, size, sparse, layers),
        attention_heads=size["heads"],
        key_value_heads=size["kv"] // size["d"],
        head_dim=size["d"],
        vocab_size=size["vocab"],
        max_position_embeddings=_positions(full),
        tied=tied,
        parameters=dense + sparse * experts,
        active_parameters=dense + sparse * active,
        linear_shapes={
            name: (size[inputs], size[outputs], count)
            for (name, inputs, outputs, _), count in modules
        },
    )


def _dense_parameters(
    family: Family,
    config: Config,
    size: dict[str, int],
    modules: list[tuple[Linear, int]],
    tied: bool,
) -> int:
    """Parameters of everything but routed experts."""
    linear = sum(count * _weights(row, size, config) for row, count in modules)
    words = _layer_norms(family, config) * int(read_value(config, "num_hidden_layers"))
    norms = sum(size[word] for word in words) + size["h"] * family.final_norm
    norms *= 2 if family.norm_bias else 1
    return linear + norms + _outside_layers(family, config, size, tied)


def _dimensions(config: Config, model_type: str) -> dict[str, int]:
    """Every dimension word of the table, and `heads` and `vocab`, in units of one."""
    hidden = int(read_value(config, "hidden_size"))
    heads = int(read_value(config, "num_attention_heads"))
    head_dim = int(read_value(config, "head_dim") or hidden // heads)
    kv_heads = _key_value_heads(config, model_type, heads)
    width = int(read_value(config, "intermediate_size") or _DEFAULT_MLP_RATIO * hidden)
    return {
        "h": hidden,
        "d": head_dim,
        "q": heads * head_dim,
        "kv": kv_heads * head_dim,
        "qkv": (heads + 2 * kv_heads) * head_dim,
        "m": width,
        "2m": 2 * width,
        "shared": int(config.get("shared_expert_intermediate_size") or 0),
        "expert": int(config.get("moe_intermediate_size") or width),
        "one": 1,
        "heads": heads,
        "vocab": int(read_value(config, "vocab_size")),
    }


def _key_value_heads(config: Config, model_type: str, heads: int) -> int:
    """Key heads; some families have one or all of them, whatever the key says."""
    if model_type in {"gpt_neox", "gpt2"}:
        return heads
    if model_type == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query") else heads
    return int(read_value(config, "num_key_value_heads") or heads)


def _has_experts(family: Family, config: Config) -> bool:
    return family.experts and bool(read_value(config, "num_experts"))


def _sparse_layers(config: Config, layers: int) -> int:
    """Layers with routed experts (`decoder_sparse_step` and `mlp_only_layers` of Qwen)."""
    step = int(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ())
    return sum(1 for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _linear_modules(family: Family, layers: int, sparse: int) -> list[tuple[Linear, int]]:
    """Every linear module with the number of layers that hold it."""
    modules = [(row, layers) for row in family.attention]
    modules += [(row, layers - sparse) for row in family.mlp]
    if family.shared_expert:
        modules += [(row, sparse) for row in _gated(size="shared", prefix="shared_expert.")]
        modules.append((("shared_expert_gate", "h", "one", ""), sparse))
    return [(row, count) for row, count in modules if count]


def _weights(row: Linear, size: dict[str, int], config: Config) -> int:
    """Weights and biases of one linear module."""
    _, inputs, outputs, bias = row
    has_bias = bias == "always" or bool(bias and config.get(bias))
    return size[inputs] * size[outputs] + has_bias * size[outputs]


def _layer_norms(family: Family, config: Config) -> tuple[str, ...]:
    """Dimension words of the normalisations in a layer, by the flags of its family."""
    if family is _FAMILIES["falcon"]:
        new = config.get("new_decoder_architecture")
        parallel = config.get("num_ln_in_parallel_attn", 2 if new else 1)
        return ("h",) * (parallel if config["parallel_attn"] else 2)
    if family is _FAMILIES["phi"] and config.get("qk_layernorm"):
        return ("h", "d", "d")
    return family.norms


def _outside_layers(family: Family, config: Config, size: dict[str, int], tied: bool) -> int:
    """Parameters of the embeddings and the head."""
    embedding = size["vocab"] * size["h"]
    head = (0 if tied else embedding) + family.head_bias * size["vocab"]
    positions = (_positions(config) or 0) * size["h"] if family.positions else 0
    return embedding + head + positions


def _positions(config: Config) -> int | None:
    value = read_value(config, "max_position_embeddings")
    return int(value) if _is_size(value) else None


def _expert_weights(config: Config, size: dict[str, int]) -> tuple[int, int]:
    """Parameters of one layer's experts and router: all, and those that one token passes."""
    count = int(read_value(config, "num_experts"))
    chosen = int(config.get("num_experts_per_tok") or 2)
    one = 3 * size["h"] * size["expert"]
    router = count * size["h"]
    return count * one + router, min(count, chosen) * one + router


def _token_width(config: Config, size: dict[str, int], sparse: int, layers: int) -> int:
    """MLP width that one token passes in the widest layer."""
    if not sparse:
        return size["m"]
    chosen = int(config.get("num_experts_per_tok") or 2)
    routed = chosen * size["expert"] + size["shared"]
    return max(routed, size["m"]) if sparse < layers else routed
