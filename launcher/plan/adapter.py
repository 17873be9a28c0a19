"""The adapter rules: what goes with what, one row a cell, no silent cell.

Keys are strategy family x weights family. A row says works, fixed up (with the setting
that makes it work) or refused (with the reason and the way out), and where that is known
from. Versions: torch 2.13, transformers 5.23, trl 1.16, peft 0.21, accelerate 1.15,
deepspeed 0.19, bitsandbytes 0.50. "run" in a source: executed by this project's matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import PlanRefused
from launcher.plan.types import Adapter, Advice


@dataclass(frozen=True)
class MethodRow:
    """One fine-tuning method."""

    peft_type: str | None
    """Name in PEFT; None for full fine-tuning."""
    family: str
    """full, lora, ia3 or prompt: what the strategy table distinguishes."""
    quantization: str = "none"
    """Quantisation that the method's name implies."""
    options: tuple[tuple[str, bool], ...] = ()
    """Switches of PEFT's configuration."""
    uses: tuple[str, ...] = ()
    """Keys of the spec's `lora` section that mean something to it."""


_LORA = ("rank", "alpha", "dropout", "target_modules")
METHODS: dict[str, MethodRow] = {
    "full": MethodRow(None, "full"),
    "lora": MethodRow("LORA", "lora", uses=_LORA),
    "qlora": MethodRow("LORA", "lora", quantization="nf4", uses=_LORA),
    "dora": MethodRow("LORA", "dora", options=(("use_dora", True),), uses=_LORA),
    "rslora": MethodRow("LORA", "lora", options=(("use_rslora", True),), uses=_LORA),
    # PEFT's own targets: with others its saved configuration may not load again (0.21:
    # feedforward_modules must be a subset of target_modules).
    "ia3": MethodRow("IA3", "ia3"),
    "prefix_tuning": MethodRow("PREFIX_TUNING", "prompt", uses=("virtual_tokens",)),
    "prompt_tuning": MethodRow("PROMPT_TUNING", "prompt", uses=("virtual_tokens",)),
}


@dataclass(frozen=True)
class Rule:
    """One cell of the table."""

    status: str
    """works, fixed or refused."""
    why: str = ""
    fix: str = ""
    source: str = ""
    use_reentrant: bool = False
    quant_storage: str | None = None
    """Of nf4 weights: a dtype, or base (that of the base model's other weights)."""
    adapter_dtype: str | None = None
    """float32, base (that of the base model), or None for no adapter."""
    experimental: str = ""
    """A warning to print where the cell runs but is not proven."""


def _works(source: str, **settings: object) -> Rule:
    return Rule("works", source=source, **settings)  # type: ignore[arg-type]


_MATRIX = "run: docs/matrix.md"
_NO_8BIT_SHARDING = Rule(
    "refused",
    why="integer weights cannot be sharded",
    fix="use method qlora, or strategy ddp",
    source="bitsandbytes 0.50: Int8Params keeps a packed state that shards lose",
)
_ZERO3_REENTRANT = (
    "ZeRO-3 with PEFT and checkpointing fails unless it is reentrant (transformers#47254, trl#6356)"
)
_UNPROVEN_HSDP = Rule(
    "refused",
    why="a quantised base under hybrid sharding is not proven",
    fix="use strategy fsdp, or ddp where it fits",
    source="no run is known",
)
_FSDP_QLORA = (
    "FSDP2 with a 4-bit base is experimental: wrong forwards were reported with bf16 storage "
    "on GPU (bitsandbytes#1945)"
)

_ZERO_DTYPE = "DeepSpeed casts the module to the precision it trains in"
_FULL = {
    family: _works(_MATRIX)
    for family in ("single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp")
}
_ADAPTER = {
    **{f: _works(_MATRIX, adapter_dtype="float32") for f in ("single", "ddp", "fsdp", "hsdp")},
    "fsdp1": _works(
        _MATRIX,
        adapter_dtype="float32",
        experimental="FSDP1 is deprecated and saves adapters only by a way of our own; "
        "prefer strategy fsdp",
    ),
    **{f: _works(f"{_MATRIX}; {_ZERO_DTYPE}", adapter_dtype="base") for f in ("zero1", "zero2")},
    "zero3": Rule(
        "fixed",
        why="adapter in the base model's dtype, reentrant checkpointing",
        source=f"{_ZERO3_REENTRANT}; trl#6089",
        use_reentrant=True,
        adapter_dtype="base",
    ),
}
# TRL casts the adapter to bf16 on a quantised base; float32 keeps the curve independent of
# the split (docs/parity.md: 1e-6 against 5e-3), so it stands wherever the engine allows it.
_NF4 = {
    **{
        f: _works(_MATRIX, adapter_dtype="float32", quant_storage="uint8")
        for f in ("single", "ddp")
    },
    **{
        f: _works(f"{_MATRIX}; {_ZERO_DTYPE}", adapter_dtype="base", quant_storage="uint8")
        for f in ("zero1", "zero2")
    },
    "zero3": Rule(
        "fixed",
        why="4-bit weights stored as bf16, adapter in the base's dtype, reentrant checkpointing",
        source=_ZERO3_REENTRANT,
        use_reentrant=True,
        adapter_dtype="base",
        quant_storage="bfloat16",
    ),
    "fsdp": Rule(
        "fixed",
        why="4-bit weights stored as bf16, so that they shard",
        source="PEFT documentation, FSDP-QLoRA; uint8 storage would be replicated",
        adapter_dtype="float32",
        quant_storage="bfloat16",
        experimental=_FSDP_QLORA,
    ),
    "fsdp1": Rule(
        "fixed",
        why="4-bit weights and the adapter in the base's dtype, since FSDP1 flattens them "
        "together; reentrant checkpointing as in PEFT's example",
        source="PEFT documentation, FSDP-QLoRA",
        use_reentrant=True,
        adapter_dtype="base",
        quant_storage="base",
    ),
    "hsdp": _UNPROVEN_HSDP,
}
_INT8 = {
    **{f: _works(_MATRIX, adapter_dtype="float32") for f in ("single", "ddp")},
    **{f: _works(f"{_MATRIX}; {_ZERO_DTYPE}", adapter_dtype="base") for f in ("zero1", "zero2")},
    "zero3": Rule(
        "refused",
        why="ZeRO-3 partitions parameters, and 8-bit weights lose their scales",
        fix="use method qlora, or strategy zero2 or ddp",
        source="no run is known; bitsandbytes 0.50 Int8Params",
    ),
    **dict.fromkeys(("fsdp", "fsdp1", "hsdp"), _NO_8BIT_SHARDING),
}
RULES: dict[str, dict[str, Rule]] = {
    "full": _FULL,
    "adapter": _ADAPTER,
    "nf4": _NF4,
    "8bit": _INT8,
}

_SHARDING = ("zero3", "fsdp", "fsdp1", "hsdp")
_PROMPT_REFUSED = Rule(
    "refused",
    why="its virtual tokens are looked up outside the sharded layers, which fails or hangs",
    fix="use strategy ddp, zero1 or zero2, or method lora",
    source="run with PEFT 0.21: mixed DTensor error (fsdp), hang (zero3, fsdp1)",
)
_DORA_FSDP1_REFUSED = Rule(
    "refused",
    why="DoRA reads whole weight matrices, which FSDP1 has flattened",
    fix="use strategy fsdp, or method lora",
    source="run with PEFT 0.21: IndexError in DoRA's forward",
)
# Families of methods that not every strategy can run; what is absent follows `RULES`.
METHOD_RULES: dict[tuple[str, str], Rule] = {
    **{("prompt", strategy): _PROMPT_REFUSED for strategy in _SHARDING},
    ("dora", "fsdp1"): _DORA_FSDP1_REFUSED,
}


def weights_family(method: str, quantization: str) -> str:
    """Row of `RULES`: full, adapter, nf4 or 8bit."""
    if quantization != "none":
        return quantization
    return "full" if METHODS[method].peft_type is None else "adapter"


def adapter_rule(strategy: str, method: str, quantization: str) -> Rule:
    """The cell for a strategy, a method and the base's quantisation."""
    special = METHOD_RULES.get((METHODS[method].family, strategy))
    return special or RULES[weights_family(method, quantization)][strategy]


def decide_adapter(
    *, strategy: str, method: str, quantization: str, model_dtype: str, offload: str
) -> tuple[Adapter, tuple[Advice, ...], tuple[str, ...]]:
    """Settings of the adapter, what to warn of, and what was fixed up.

    Args:
        strategy: a concrete strategy, not auto.
        method: a key of `METHODS`.
        quantization: none, nf4 or 8bit.
        model_dtype: dtype of the base model's unquantised weights.
        offload: none, optimizer or all.

    Raises:
        PlanRefused: where the cell is refused.
    """
    _refuse_quantised_full(method, quantization)
    rule = adapter_rule(strategy, method, quantization)
    name = (
        method
        if quantization in ("none", METHODS[method].quantization)
        else (f"{method} on {quantization}")
    )
    if rule.status == "refused":
        raise PlanRefused(
            "combination",
            f"{name} under {strategy} does not work",
            why=rule.why,
            fix=rule.fix,
            source=rule.source,
        )
    _refuse_offload(strategy, method, quantization, offload)
    dtype = model_dtype if rule.adapter_dtype == "base" else rule.adapter_dtype
    storage = model_dtype if rule.quant_storage == "base" else rule.quant_storage
    adapter = Adapter(
        method=method,
        use_reentrant=rule.use_reentrant,
        state_dict_type="FULL_STATE_DICT" if strategy in ("fsdp", "fsdp1", "hsdp") else None,
        quant_storage=storage if quantization == "nf4" else None,
        adapter_dtype=dtype,
        # A PeftModel is no PreTrainedModel, so the trainer would default this to True, which
        # breaks reentrant checkpointing; text models use all their trainable parameters.
        find_unused_parameters=False,
    )
    fixed = (f"{name} under {strategy}: {rule.why}",) if rule.status == "fixed" else ()
    return adapter, _advice(rule, strategy, quantization, offload), fixed


def _refuse_quantised_full(method: str, quantization: str) -> None:
    if method == "full" and quantization != "none":
        raise PlanRefused(
            "quantised_full",
            f"a base in {quantization} cannot be fully fine-tuned",
            why="quantised weights take no gradient",
            fix="use method qlora (or lora), or quantization none",
            source="transformers 5.23 Trainer: ValueError on quantised models without adapter",
        )


def _refuse_offload(strategy: str, method: str, quantization: str, offload: str) -> None:
    if offload == "none":
        return
    if not strategy.startswith(("zero", "fsdp", "hsdp")):
        raise PlanRefused(
            "offload_strategy",
            f"--offload {offload} needs ZeRO or FSDP, not {strategy}",
            fix="use --strategy zero3 or fsdp, or --offload none",
        )
    if offload == "optimizer" and not strategy.startswith("zero"):
        raise PlanRefused(
            "offload_strategy",
            f"{strategy} offloads parameters and optimizer together",
            fix="use --offload all, or --strategy zero2 or zero3",
            source="torch CPUOffloadPolicy",
        )
    if offload == "all" and strategy in ("zero1", "zero2"):
        raise PlanRefused(
            "offload_strategy",
            f"{strategy} keeps whole parameters on each GPU",
            fix="use --offload optimizer, or --strategy zero3",
            source="DeepSpeed: offload_param is a stage 3 option",
        )
    if quantization != "none" and strategy.startswith("fsdp"):
        raise PlanRefused(
            "offload_quantised",
            "a quantised base with FSDP offload is not proven",
            fix="use --offload none",
            source="no run is known",
        )


def _advice(rule: Rule, strategy: str, quantization: str, offload: str) -> tuple[Advice, ...]:
    found = []
    if rule.experimental:
        found.append(
            Advice("experimental", rule.experimental, "compare a short run with ddp", rule.source)
        )
    if strategy == "zero3" and quantization == "nf4" and offload != "none":
        found.append(
            Advice(
                "offload_wasteful",
                "QLoRA under ZeRO-3 with offload uses more GPU memory than without",
                "use --offload none",
                "DeepSpeed stage 3 keeps gathered 4-bit weights; run with and without",
            )
        )
    return tuple(found)
