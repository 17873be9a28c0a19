"""The adapter table: every cell has a rule, and the rules are those of the known facts."""

from __future__ import annotations

from typing import get_args

import pytest

from launcher.errors import PlanRefused
from launcher.plan.adapter import METHODS, RULES, adapter_rule, decide_adapter
from launcher.plan.types import Adapter
from launcher.spec.schema import Method, Quantization, Strategy

STRATEGIES = tuple(name for name in get_args(Strategy) if name != "auto")
SHARDED = ("fsdp", "fsdp1", "hsdp")
# Row of the table -> a method and a quantisation that lead to it.
ROWS = {
    "full": ("full", "none"),
    "adapter": ("lora", "none"),
    "nf4": ("qlora", "nf4"),
    "8bit": ("lora", "8bit"),
}
CELLS = [
    (strategy, method, quantization)
    for strategy in STRATEGIES
    for method in get_args(Method)
    for quantization in get_args(Quantization)
    if method != "full" or quantization == "none"
]

# Strategy: (status, reentrant checkpointing, 4-bit storage, adapter dtype) of each row.
# None: refused. "base" is the dtype of the base model's weights.
# float32 adapters on a quantised base, where TRL makes them bf16: docs/parity.md says why.
_NF4 = ("works", False, "uint8", "float32")
_INT8 = ("works", False, None, "float32")
# DeepSpeed casts the whole module to the precision that it trains in.
_ZERO_LORA = ("works", False, None, "base")
_ZERO_NF4 = ("works", False, "uint8", "base")
_FULL = ("works", False, None, None)
_LORA = ("works", False, None, "float32")
EXPECTED: dict[str, dict[str, tuple[str, bool, str | None, str | None] | None]] = {
    "single": {"full": _FULL, "adapter": _LORA, "nf4": _NF4, "8bit": _INT8},
    "ddp": {"full": _FULL, "adapter": _LORA, "nf4": _NF4, "8bit": _INT8},
    "zero1": {"full": _FULL, "adapter": _ZERO_LORA, "nf4": _ZERO_NF4, "8bit": _ZERO_LORA},
    "zero2": {"full": _FULL, "adapter": _ZERO_LORA, "nf4": _ZERO_NF4, "8bit": _ZERO_LORA},
    "zero3": {
        "full": _FULL,
        "adapter": ("fixed", True, None, "base"),
        "nf4": ("fixed", True, "bfloat16", "base"),
        "8bit": None,  # stricter than what others report as working: no run of ours proves it
    },
    "fsdp": {
        "full": _FULL,
        "adapter": _LORA,
        "nf4": ("fixed", False, "bfloat16", "float32"),
        "8bit": None,
    },
    "fsdp1": {
        "full": _FULL,
        "adapter": _LORA,
        "nf4": ("fixed", True, "base", "base"),
        "8bit": None,
    },
    "hsdp": {"full": _FULL, "adapter": _LORA, "nf4": None, "8bit": None},
}


def _decide(
    strategy: str, method: str, quantization: str, offload: str = "none", dtype: str = "bfloat16"
) -> Adapter:
    return decide_adapter(
        strategy=strategy,
        method=method,
        quantization=quantization,
        model_dtype=dtype,
        offload=offload,
    )[0]


@pytest.mark.parametrize(("strategy", "method", "quantization"), CELLS)
def test_no_cell_is_silent(strategy: str, method: str, quantization: str) -> None:
    rule = adapter_rule(strategy, method, quantization)
    assert rule.status in ("works", "fixed", "refused")
    assert rule.source, "every rule says where it is known from"
    if rule.status == "refused":
        assert rule.why
        assert rule.fix
        with pytest.raises(PlanRefused) as caught:
            _decide(strategy, method, quantization)
        assert caught.value.why == rule.why
        assert caught.value.fix == rule.fix
        assert caught.value.source == rule.source
        assert strategy in caught.value.what
        return
    adapter, warnings, fixed = decide_adapter(
        strategy=strategy,
        method=method,
        quantization=quantization,
        model_dtype="bfloat16",
        offload="none",
    )
    assert bool(fixed) == (rule.status == "fixed")
    assert all(rule.why and rule.why in said for said in fixed)
    assert bool(rule.experimental) == any(advice.code == "experimental" for advice in warnings)
    assert (adapter.adapter_dtype is None) == (method == "full")
    assert adapter.find_unused_parameters is False


def test_the_table_has_every_strategy_in_every_row_and_no_other() -> None:
    assert set(RULES) == set(ROWS)
    for row, cells in RULES.items():
        assert set(cells) == set(STRATEGIES), row
    assert set(METHODS) == set(get_args(Method))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("row", ROWS)
def test_the_rules_are_the_known_facts(strategy: str, row: str) -> None:
    method, quantization = ROWS[row]
    rule, expected = adapter_rule(strategy, method, quantization), EXPECTED[strategy][row]
    if expected is None:
        assert rule.status == "refused"
        return
    assert (rule.status, rule.use_reentrant, rule.quant_storage, rule.adapter_dtype) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("row", ROWS)
def test_a_whole_state_dict_is_asked_of_sharded_strategies_only(strategy: str, row: str) -> None:
    if EXPECTED[strategy][row] is None:
        return
    whole = "FULL_STATE_DICT" if strategy in SHARDED else None
    assert _decide(strategy, *ROWS[row]).state_dict_type == whole


def test_reentrant_checkpointing_never_meets_fsdp2() -> None:
    """It leaks there (pytorch#169349)."""
    for method, quantization in ROWS.values():
        for strategy in ("fsdp", "hsdp"):
            assert not adapter_rule(strategy, method, quantization).use_reentrant


def test_storage_of_a_sharded_4bit_base_is_a_float() -> None:
    """Integer storage is replicated under FSDP2 and cannot be flattened under FSDP1."""
    for strategy in SHARDED:
        rule = adapter_rule(strategy, "qlora", "nf4")
        assert rule.status == "refused" or rule.quant_storage in ("bfloat16", "base")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_under_zero_has_the_dtype_of_its_base(dtype: str) -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        assert _decide(strategy, "lora", "none", dtype=dtype).adapter_dtype == dtype
    assert _decide("fsdp", "lora", "none", dtype=dtype).adapter_dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fsdp1_flattens_one_dtype(dtype: str) -> None:
    adapter = _decide("fsdp1", "qlora", "nf4", dtype=dtype)
    assert (adapter.quant_storage, adapter.adapter_dtype) == (dtype, dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("quantization", ["nf4", "8bit"])
def test_a_quantised_base_is_never_fully_tuned(strategy: str, quantization: str) -> None:
    with pytest.raises(PlanRefused, match="cannot be fully fine-tuned") as caught:
        _decide(strategy, "full", quantization)
    assert "qlora" in caught.value.fix


# (strategy, offload) that can run; every other pair is refused.
OFFLOADS = {
    ("zero1", "optimizer"),
    ("zero2", "optimizer"),
    ("zero3", "optimizer"),
    ("zero3", "all"),
    ("fsdp", "all"),
    ("fsdp1", "all"),
    ("hsdp", "all"),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("offload", ["optimizer", "all"])
@pytest.mark.parametrize("row", ["full", "adapter"])
def test_offload_goes_with_these_strategies(strategy: str, offload: str, row: str) -> None:
    if (strategy, offload) in OFFLOADS:
        _decide(strategy, *ROWS[row], offload=offload)
        return
    with pytest.raises(PlanRefused) as caught:
        _decide(strategy, *ROWS[row], offload=offload)
    assert caught.value.code == "offload_strategy"
    assert caught.value.fix.startswith("use --")


@pytest.mark.parametrize("strategy", SHARDED)
def test_a_quantised_base_is_not_offloaded_under_fsdp(strategy: str) -> None:
    with pytest.raises(PlanRefused):
        _decide(strategy, "qlora", "nf4", offload="all")


def test_qlora_with_offload_under_zero3_warns() -> None:
    warnings = decide_adapter(
        strategy="zero3",
        method="qlora",
        quantization="nf4",
        model_dtype="bfloat16",
        offload="all",
    )[1]
    assert [advice.code for advice in warnings] == ["offload_wasteful"]


@pytest.mark.parametrize(("method", "row"), METHODS.items())
def test_methods_name_real_peft_types(method: str, row: object) -> None:
    """Names as PEFT 0.21 spells them, without importing it."""
    known = {"LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", None}
    assert METHODS[method].peft_type in known
    assert (METHODS[method].peft_type is None) == (method == "full")
