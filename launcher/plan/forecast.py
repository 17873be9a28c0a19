"""Memory and time of a decided run, as far as the facts allow."""

from __future__ import annotations

from dataclasses import replace

from launcher.errors import PlanRefused
from launcher.facts.probe import Facts
from launcher.plan.adapter import METHODS, adapter_rule
from launcher.plan.duration import count_sequences, estimate_duration, flops_per_token
from launcher.plan.memory import MemoryInputs, estimate_memory, memory_inputs
from launcher.plan.types import Batch, Memory, Time, Topology
from launcher.spec.schema import Spec

PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "communication",
    "workspace",
)


def memory_for(
    spec: Spec, facts: Facts, topology: Topology, strategy: str, dtype: str
) -> MemoryInputs | None:
    """The inputs of the memory estimate at micro batch 1; None for an unknown model."""
    if facts.model is None or not facts.model.parameters:
        return None
    method = METHODS[spec.method]
    adapted = method.peft_type is not None
    rule = adapter_rule(strategy, spec.method, spec.quantization or "none")
    quantization = None if spec.quantization == "none" else spec.quantization
    names = {"nf4": "qlora", "8bit": "8bit-lora"}
    half = "bfloat16" if spec.training.bf16 else "float16"
    mixed = bool(spec.training.bf16 or spec.training.fp16)
    targets = spec.lora.target_modules
    return memory_inputs(
        facts.model,
        method=names.get(quantization or "", "lora") if adapted else "full",
        strategy=strategy,
        gpus=topology.gpus,
        shard_size=topology.gpus // topology.replicate_size,
        sequence_length=spec.training.max_length,
        gradient_checkpointing=spec.training.gradient_checkpointing,
        parameter_dtype=dtype,
        compute_dtype=half if mixed else "float32",
        autocast=mixed,
        adapter_dtype=dtype if rule.adapter_dtype == "base" else "float32",
        optimizer=spec.training.optim,
        lora_rank=(spec.lora.rank if "rank" in method.uses else None) or 1,
        lora_targets=tuple(targets) if isinstance(targets, list) else None,
        lora_dropout=spec.lora.dropout or 0.0,
        quantization=quantization,
        offload=spec.offload,
    )


def fits(inputs: MemoryInputs | None, facts: Facts, micro_batch_size: int) -> bool | None:
    """Whether the upper end of the interval fits the GPU; None where either is unknown."""
    if inputs is None or facts.gpu is None:
        return None
    estimate = estimate_memory(replace(inputs, micro_batch_size=micro_batch_size))
    return estimate.high_bytes <= facts.gpu.memory_bytes


def forecast_memory(inputs: MemoryInputs | None, facts: Facts, batch: Batch) -> Memory:
    """The plan's memory section."""
    gpu_bytes = facts.gpu.memory_bytes if facts.gpu else None
    if inputs is None:
        return Memory(gpu_bytes, None, None, None, None, None, dict.fromkeys(PARTS))
    estimate = estimate_memory(
        replace(
            inputs,
            micro_batch_size=batch.micro_batch_size,
            gradient_accumulation_steps=batch.gradient_accumulation_steps,
        )
    )
    return Memory(
        gpu_memory_bytes=gpu_bytes,
        peak_allocated_bytes=estimate.peak_allocated_bytes,
        peak_reserved_bytes=estimate.peak_reserved_bytes,
        low_bytes=estimate.low_bytes,
        high_bytes=estimate.high_bytes,
        fits=None if gpu_bytes is None else estimate.high_bytes <= gpu_bytes,
        parts=dict(estimate.parts),
    )


def refuse_if_too_large(memory: Memory, facts: Facts, spec: Spec, strategy: str) -> None:
    """Refuse what even the lower end of the interval says cannot fit.

    Raises:
        PlanRefused: with the size, the GPU and what to change.
    """
    low, have = memory.low_bytes, memory.gpu_memory_bytes
    if low is None or have is None or low <= have:
        return
    name = facts.gpu.name if facts.gpu else "the GPU"
    options = []
    if METHODS[spec.method].peft_type is None:
        options.append("--method lora")
    if spec.quantization == "none":
        options.append("--method qlora")
    if strategy in ("single", "ddp"):
        options.append("--strategy fsdp on more --gpus")
    options.append("a smaller --micro-batch-size or --set training.max_length=...")
    raise PlanRefused(
        "does_not_fit",
        f"{gib(low)} to {gib(memory.high_bytes or low)} per GPU do not fit in the "
        f"{gib(have)} of {name}",
        why=f"{strategy} of {spec.model.path}",
        fix="use " + ", or ".join(options),
    )


def gib(number: int) -> str:
    """Bytes as people read them."""
    return f"{number / 2**30:.1f} GiB"


def forecast_time(
    spec: Spec, facts: Facts, topology: Topology, batch: Batch, strategy: str
) -> Time:
    """Steps and seconds; None where model, data or GPU are unknown."""
    model, data, training = facts.model, facts.dataset, spec.training
    sequences, tokens = None, None
    if data is not None and data.rows is not None:
        rows = data.rows
        if spec.dataset and spec.dataset.eval_share:
            rows = max(1, round(rows * (1 - spec.dataset.eval_share)))
        sequences, tokens = count_sequences(
            rows, data.mean_characters, training.max_length or 0, packing=bool(training.packing)
        )
    full = METHODS[spec.method].peft_type is None
    flops = trained = None
    if model is not None:
        trained = model.parameters if full else None
        flops = flops_per_token(
            compute_parameters=model.active_parameters,
            layers=model.layers,
            attention_width=model.attention_heads * model.head_dim,
            tokens_per_sequence=tokens or float(training.max_length or 0),
            trains_all=full,
            gradient_checkpointing=bool(training.gradient_checkpointing),
        )
    duration = estimate_duration(
        gpu=facts.gpu,
        gpus=topology.gpus,
        nodes=topology.nodes,
        strategy=strategy,
        quantization=None if spec.quantization == "none" else spec.quantization,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        sequences=sequences,
        tokens_per_sequence=tokens,
        epochs=training.num_train_epochs or 1.0,
        max_steps=training.max_steps,
        parameters=model.parameters if model else None,
        trained_parameters=trained,
        flops=flops,
    )
    return Time(duration.steps, duration.seconds_per_step, duration.total_seconds, duration.basis)
