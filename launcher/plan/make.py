"""`make_plan`: a spec and facts in, a `Plan` out, or the refusal that spares a queue.

It decides in this order: device, defaults, topology, strategy, adapter rules, batch,
engine, forecast. It reads no file but the shipped policy and starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import SpecError
from launcher.facts.probe import Facts
from launcher.plan.adapter import METHODS, adapter_rule, decide_adapter
from launcher.plan.advice import advise
from launcher.plan.batch import CPU_MICRO_BATCH, default_global_batch_size, equation, solve_batch
from launcher.plan.checks import Case, run_checks
from launcher.plan.defaults import resolve
from launcher.plan.engine import Engine, decide_engine
from launcher.plan.forecast import (
    fits,
    forecast_memory,
    forecast_time,
    memory_for,
    refuse_if_too_large,
)
from launcher.plan.storage import forecast_storage, shutdown_timeout_seconds
from launcher.plan.strategy import check_strategy, choose_strategy
from launcher.plan.topology import decide_topology
from launcher.plan.types import Batch, Plan, Topology
from launcher.plan.worker import make_worker
from launcher.spec.schema import Spec


@dataclass(frozen=True)
class Planned:
    """A plan with what rendering needs beside it."""

    plan: Plan
    spec: Spec
    """Resolved: every value explicit."""
    engine: Engine


def make_plan(spec: Spec, facts: Facts) -> Planned:
    """Decide everything.

    Raises:
        Refusal: SpecError or PlanRefused, with what, why and the fix.
    """
    device = spec.hardware.device or "cuda"
    _refuse_contradiction(spec)
    resolved, defaults = resolve(spec, facts, device)
    topology = decide_topology(resolved.hardware, len(facts.gpus), device)
    dtype = base_dtype(resolved, device)
    strategy, reason = _strategy(resolved, facts, topology, dtype)
    topology = check_strategy(strategy, topology, resolved.offload)
    run_checks(Case(resolved, facts, strategy, device))
    adapter, warnings, fixed = decide_adapter(
        strategy=strategy,
        method=resolved.method,
        quantization=resolved.quantization or "none",
        model_dtype=dtype,
        offload=resolved.offload,
    )
    inputs = memory_for(resolved, facts, topology, strategy, dtype)

    def fits_micro(micro: int) -> bool | None:
        if device == "cpu":
            return micro <= CPU_MICRO_BATCH
        return fits(inputs, facts, micro)

    batch = _batch(resolved, topology, fits_micro, defaults)
    memory = forecast_memory(inputs, facts, batch)
    refuse_if_too_large(memory, facts, resolved, strategy)
    engine = decide_engine(
        strategy=strategy,
        topology=topology,
        offload=resolved.offload,
        mixed_precision=mixed_precision(resolved),
        state_dict_type=adapter.state_dict_type,
        layer_class=facts.model.layer_class if facts.model else None,
    )
    explicit = _explicit(resolved, strategy, topology, batch, dtype)
    time = forecast_time(resolved, facts, topology, batch, strategy)
    storage = forecast_storage(inputs, resolved.checkpoints.keep)
    patience = shutdown_timeout_seconds(storage, time.seconds_per_step)
    plan = Plan(
        strategy=strategy,
        reasons=(reason, equation(batch, topology.data_parallel_size), *fixed),
        defaults=defaults,
        warnings=(*warnings, *advise(Case(explicit, facts, strategy, device), batch, memory)),
        topology=topology,
        batch=batch,
        adapter=adapter,
        memory=memory,
        time=time,
        storage=storage,
        offload=resolved.offload,
        worker=make_worker(
            explicit,
            topology,
            batch,
            adapter,
            engine,
            dtype=dtype,
            shutdown_timeout_seconds=patience,
        ),
    )
    return Planned(plan, explicit, engine)


def mixed_precision(spec: Spec) -> str:
    """Accelerate's name for the precision."""
    if spec.training.bf16:
        return "bf16"
    return "fp16" if spec.training.fp16 else "no"


def base_dtype(spec: Spec, device: str) -> str:
    """Dtype that the base model is loaded in.

    Full fine-tuning keeps float32 masters (TRL's own default); a frozen base needs no
    more than half precision; on CPU float32 is exact.
    """
    if spec.model.dtype:
        return spec.model.dtype
    if METHODS[spec.method].peft_type is None or (device == "cpu" and not spec.training.bf16):
        return "float32"
    return "float16" if spec.training.fp16 else "bfloat16"


def _strategy(spec: Spec, facts: Facts, topology: Topology, dtype: str) -> tuple[str, str]:
    if spec.strategy != "auto":
        return spec.strategy, f"strategy {spec.strategy} was asked for"
    micro = spec.batch.micro_batch_size
    least = micro if isinstance(micro, int) else 1

    def fits_under(strategy: str) -> bool | None:
        return fits(memory_for(spec, facts, topology, strategy, dtype), facts, least)

    strategy, reason = choose_strategy(
        topology,
        trains_adapter=METHODS[spec.method].peft_type is not None,
        quantization=spec.quantization or "none",
        offload=spec.offload,
        fits=fits_under,
    )
    rule = adapter_rule(strategy, spec.method, spec.quantization or "none")
    if rule.status == "refused" and strategy != "ddp" and topology.gpus > 1:
        return "ddp", f"{strategy} does not work with {spec.method}: {rule.why}"
    return strategy, reason


def _batch(spec: Spec, topology: Topology, fits_micro: Any, defaults: dict[str, Any]) -> Batch:
    total = spec.batch.global_batch_size
    if total is None:
        micro = spec.batch.micro_batch_size
        unit = topology.data_parallel_size * (micro if isinstance(micro, int) else 1)
        total = defaults["batch.global_batch_size"] = default_global_batch_size(unit)
    micro = spec.batch.micro_batch_size
    return solve_batch(
        global_batch_size=total,
        micro_batch_size=micro if isinstance(micro, int) else None,
        data_parallel_size=topology.data_parallel_size,
        max_length=spec.training.max_length or 0,
        fits=fits_micro,
    )


def _refuse_contradiction(spec: Spec) -> None:
    """A method whose name says one quantisation while the spec says another."""
    implied = METHODS[spec.method].quantization
    if implied != "none" and spec.quantization not in (None, implied):
        raise SpecError(
            "quantization_conflict",
            f"method {spec.method} means {implied}, quantization says {spec.quantization}",
            fix=f"use method lora with quantization {spec.quantization}, or leave it out",
        )


def _explicit(spec: Spec, strategy: str, topology: Topology, batch: Batch, dtype: str) -> Spec:
    """The resolved spec with strategy, hardware and batch as decided."""
    return spec.model_copy(
        update={
            "strategy": strategy,
            "model": spec.model.model_copy(update={"dtype": dtype}),
            "hardware": spec.hardware.model_copy(
                update={
                    "gpus": topology.gpus,
                    "nodes": topology.nodes,
                    "gpus_per_node": topology.gpus_per_node,
                    "device": topology.device,
                }
            ),
            "batch": spec.batch.model_copy(
                update={
                    "global_batch_size": batch.global_batch_size,
                    "micro_batch_size": batch.micro_batch_size,
                }
            ),
        }
    )


def spec_as_mapping(spec: Spec) -> Mapping[str, Any]:
    """A spec as plain YAML values, without what is unset."""
    return spec.model_dump(exclude_none=True)
