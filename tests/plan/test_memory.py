"""The memory estimate: against published measurements, and its own consistency."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan import memory_activations
from launcher.plan.memory import (
    MemoryInputs,
    estimate_memory,
    memory_inputs,
)
from launcher.plan.memory_state import adapter_parameters, derive_sizes, quantized_bytes
from tests.plan.published import GIB, LLAMA_8B, Row, mean_error, read_rows

_PARTS = {
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "communication",
    "workspace",
}


def _peak(**settings: Any) -> int:
    return estimate_memory(MemoryInputs(**{**LLAMA_8B, **settings})).peak_allocated_bytes


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows()


def test_mean_error_on_all_published_rows(rows: list[Row]) -> None:
    """Rows whose source leaves settings open are in it too: 5.7% when this was written."""
    assert len(rows) == 41
    assert mean_error(rows) < 0.06


def test_mean_error_on_complete_rows(rows: list[Row]) -> None:
    """Rows whose every setting is known: 1.7%, none above 10%."""
    complete = [row for row in rows if not row.missing]
    assert len(complete) == 20
    assert mean_error(complete) < 0.02
    assert max(abs(row.error) for row in complete) < 0.10


def test_mean_error_of_reserved_memory(rows: list[Row]) -> None:
    both = [row for row in rows if row.measured_reserved]
    errors = [
        abs(row.estimate.peak_reserved_bytes / GIB / (row.measured_reserved or 1) - 1)
        for row in both
    ]
    assert len(errors) == 16
    assert sum(errors) / len(errors) < 0.05


def test_the_interval_holds_what_was_measured(rows: list[Row]) -> None:
    inside = [
        row
        for row in rows
        if row.estimate.low_bytes <= row.measured * GIB <= row.estimate.high_bytes
    ]
    assert len(inside) >= 36


def test_nf4_is_4_127_bits() -> None:
    inputs = MemoryInputs(**LLAMA_8B, method="qlora", quantization="nf4")
    assert round(8 * quantized_bytes(inputs), 3) == 4.127
    assert 8 * quantized_bytes(replace(inputs, double_quantization=False)) == 4.5


def test_adapter_parameters_of_llama_8b() -> None:
    """PEFT prints 41,943,040 for rank 16 on every linear module of Llama-3.1-8B."""
    assert adapter_parameters(MemoryInputs(**LLAMA_8B, method="lora")) == 41_943_040


def test_zero3_states_are_sixteen_bytes_over_the_shards() -> None:
    parts = estimate_memory(
        MemoryInputs(**LLAMA_8B, strategy="zero3", gpus=8, optimizer="adamw_torch")
    ).parts
    assert parts["parameters"] == 2 * 8_030_261_248 // 8
    assert parts["optimizer"] == 12 * 8_030_261_248 // 8


@pytest.mark.parametrize(
    ("strategies", "why"),
    [
        (("ddp", "zero1", "zero2", "zero3"), "each stage shards more"),
        (("ddp", "hsdp", "fsdp"), "half a shard group, then the whole"),
    ],
)
def test_more_sharding_needs_less(strategies: tuple[str, ...], why: str) -> None:
    peaks = [
        _peak(strategy=s, gpus=8, parameter_dtype="float32", shard_size=4 if s == "hsdp" else None)
        for s in strategies
    ]
    assert peaks == sorted(peaks, reverse=True), why


@pytest.mark.parametrize(
    ("cheap", "dear"),
    [
        ({"method": "lora", "loss_path": "fused"}, {"method": "lora", "loss_path": "full_logits"}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"optimizer": "adamw_8bit"}, {"optimizer": "adamw_torch_fused"}),
        ({"optimizer": "adamw_torch_fused"}, {"optimizer": "adamw_torch"}),
        ({"parameter_dtype": "bfloat16"}, {"parameter_dtype": "float32"}),
        ({"flash_attention": True}, {"flash_attention": False}),
        ({"method": "lora"}, {"method": "full"}),
        ({"method": "qlora", "quantization": "nf4"}, {"method": "lora", "quantization": "8bit"}),
        ({"method": "lora", "quantization": "8bit"}, {"method": "lora"}),
        ({"method": "lora", "lora_dropout": 0.0}, {"method": "lora", "lora_dropout": 0.1}),
        (
            {"strategy": "fsdp", "gpus": 8, "offload": "optimizer"},
            {"strategy": "fsdp", "gpus": 8},
        ),
        (
            {"strategy": "zero3", "gpus": 8, "offload": "all"},
            {"strategy": "zero3", "gpus": 8, "offload": "optimizer"},
        ),
    ],
)
def test_what_saves_memory_saves_it(cheap: dict[str, Any], dear: dict[str, Any]) -> None:
    common = {"sequence_length": 4096, "gpus": 1}
    assert _peak(**{**common, **cheap}) < _peak(**{**common, **dear})


_STRATEGIES = ["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp"]


@given(
    strategy=st.sampled_from(_STRATEGIES),
    gpus=st.sampled_from([1, 2, 8, 64]),
    micro=st.integers(1, 64),
    length=st.sampled_from([128, 2048, 32768]),
    method=st.sampled_from([("full", None), ("lora", None), ("qlora", "nf4"), ("lora", "8bit")]),
    offload=st.sampled_from(["none", "optimizer", "all"]),
    loss=st.sampled_from(["fused", "chunked", "full_logits"]),
    checkpointing=st.booleans(),
)
def test_parts_add_up_and_a_larger_batch_needs_more(  # noqa: PLR0917 - hypothesis fills them
    strategy: str,
    gpus: int,
    micro: int,
    length: int,
    method: tuple[str, str | None],
    offload: str,
    loss: str,
    checkpointing: bool,
) -> None:
    settings: dict[str, Any] = {
        "strategy": strategy,
        "gpus": gpus,
        "sequence_length": length,
        "method": method[0],
        "quantization": method[1],
        "offload": offload,
        "loss_path": loss,
        "gradient_checkpointing": checkpointing,
    }
    one = estimate_memory(MemoryInputs(**LLAMA_8B, **settings, micro_batch_size=micro))
    two = estimate_memory(MemoryInputs(**LLAMA_8B, **settings, micro_batch_size=micro + 1))
    assert set(one.parts) == _PARTS
    assert min(one.parts.values()) >= 0
    assert sum(one.parts.values()) == one.peak_allocated_bytes
    assert one.low_bytes < one.peak_allocated_bytes < one.peak_reserved_bytes < one.high_bytes
    assert two.peak_allocated_bytes >= one.peak_allocated_bytes


def test_builder_takes_a_probed_model() -> None:
    from launcher.facts.model import ModelFacts

    facts = ModelFacts(
        path="m",
        architecture="LlamaForCausalLM",
        model_type="llama",
        **LLAMA_8B,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        active_parameters=8_030_261_248,
        linear_targets=("q_proj",),
        linear_shapes={"q_proj": (4096, 4096, 32)},
        dtype="bfloat16",
        layer_class="LlamaDecoderLayer",
        has_chat_template=None,
        has_tokenizer=True,
        has_weights=True,
        weights_bytes=1,
        config_hash="0",
        basis="config.json",
        quantized=None,
    )
    inputs = memory_inputs(facts, method="lora", lora_rank=8)
    assert adapter_parameters(inputs) == 32 * 8 * 8192


def test_one_estimate_takes_well_under_a_millisecond() -> None:
    inputs = MemoryInputs(**LLAMA_8B, method="lora")
    start = time.perf_counter()
    for _ in range(200):
        estimate_memory(inputs)
    assert (time.perf_counter() - start) / 200 < 0.002


_TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "vocab_size": 512,
}


def _measure_saved(layers: int, dtype: str, *, autocast: bool, adapted: bool) -> int:
    """Bytes that autograd saves in one forward of a real Llama, without its parameters."""
    import contextlib

    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        **_TINY,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model: Any = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    if adapted:
        model.enable_input_require_grads()
        lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, sizes = [], {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, context:
        model(torch.randint(0, 512, (2, 512)))
    return sum(sizes.values())


@pytest.mark.engine
@pytest.mark.parametrize(
    ("dtype", "autocast", "adapted"),
    [
        ("bfloat16", False, False),
        ("float32", True, False),
        ("bfloat16", True, True),
        ("float32", True, True),
        ("bfloat16", False, True),
    ],
)
def test_saved_activations_equal_those_of_a_real_layer(
    dtype: Any, autocast: bool, adapted: bool
) -> None:
    """The formula of one layer against autograd itself, within 2%."""
    pytest.importorskip("peft")
    settings = {"autocast": autocast, "adapted": adapted}
    four, two = (_measure_saved(layers, dtype, **settings) for layers in (4, 2))
    inputs = MemoryInputs(
        **_TINY,
        layers=4,
        attention_heads=8,
        key_value_heads=2,
        head_dim=32,
        parameters=10_000_000,
        method="lora" if adapted else "full",
        micro_batch_size=2,
        sequence_length=512,
        parameter_dtype=dtype,
        autocast=autocast,
        gradient_checkpointing=False,
    )
    estimate = memory_activations._layer_saved(inputs, derive_sizes(inputs))
    assert estimate == pytest.approx((four - two) / 2, rel=0.02)
