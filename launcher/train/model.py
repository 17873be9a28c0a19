"""Tokenizer, quantisation and adapter configurations, from the plan's worker section."""

from __future__ import annotations

from typing import Any

from launcher.plan.types import Plan


def load_tokenizer(plan: Plan) -> Any:
    """The model's own tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    model = plan.worker.model
    tokenizer = AutoTokenizer.from_pretrained(
        model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"]
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_init_kwargs(plan: Plan) -> dict[str, Any]:
    """What `from_pretrained` gets; the device map is left to TRL (None when distributed)."""
    model = plan.worker.model
    kwargs = {
        "dtype": model["dtype"],
        "revision": model["revision"],
        "attn_implementation": model["attn_implementation"],
        "trust_remote_code": model["trust_remote_code"],
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def quantization_config(plan: Plan) -> Any:
    """Bitsandbytes configuration, or None.

    The storage dtype is the adapter rules' business: FSDP and ZeRO-3 shard 4-bit weights
    only where they are stored in the dtype of the other parameters.
    """
    settings = plan.worker.model["quantization"]
    if settings is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    dtypes = {
        name: getattr(torch, value)
        for name, value in settings.items()
        if name.endswith(("_dtype", "_storage"))
    }
    return BitsAndBytesConfig(**{**settings, **dtypes})


def peft_config(plan: Plan) -> Any:
    """PEFT configuration, or None for full fine-tuning."""
    settings = plan.worker.peft
    if settings is None:
        return None
    from peft import get_peft_config

    return get_peft_config(dict(settings))


def keep_4bit_unpacked(model: Any) -> None:
    """Switch off bitsandbytes' repacking of 4-bit weights on CPUs with AVX512-BF16.

    In eval mode it repacks them in place at the first forward (bitsandbytes 0.50,
    Linear4bit.forward), which breaks gathered shards and any storage but uint8: a sample
    in the middle of a run would spoil the steps after it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def set_adapter_dtype(plan: Plan, model: Any) -> None:
    """Bring trainable adapter weights to the planned dtype.

    TRL 1.16 casts them to bf16 on a quantised base, which rounds every accumulated
    gradient and update: the curve then depends on the split (docs/parity.md).
    """
    if plan.worker.peft is None or plan.adapter.adapter_dtype is None:
        return
    import torch

    dtype = getattr(torch, plan.adapter.adapter_dtype)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
