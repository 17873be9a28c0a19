"""What is worth knowing and stops nothing: one function a piece of advice, in their order."""

from __future__ import annotations

from collections.abc import Callable

from launcher.plan.adapter import METHODS
from launcher.plan.checks import Case
from launcher.plan.types import Advice, Batch, Memory


def advise(case: Case, batch: Batch, memory: Memory) -> tuple[Advice, ...]:
    """All that applies."""
    found = (rule(case, batch, memory) for rule in ADVICE)
    return tuple(advice for advice in found if advice is not None)


def tight_memory(case: Case, batch: Batch, memory: Memory) -> Advice | None:
    """The upper end of the estimate does not fit, the lower end does."""
    if memory.fits is not False:
        return None
    return Advice(
        "tight_memory",
        "the upper end of the memory estimate is above the GPU's",
        "use a smaller --micro-batch-size, or a sharding strategy on more GPUs",
    )


def small_dataset(case: Case, batch: Batch, memory: Memory) -> Advice | None:
    """Fewer rows than one step takes."""
    rows = case.facts.dataset.rows if case.facts.dataset else None
    if rows is None or rows >= batch.global_batch_size:
        return None
    return Advice(
        "small_dataset",
        f"{rows} rows are fewer than one global batch of {batch.global_batch_size}",
        "use a smaller --global-batch-size",
    )


def unused_keys(case: Case, batch: Batch, memory: Memory) -> Advice | None:
    """Adapter keys that were said and mean nothing to the method."""
    said, uses = case.spec.lora.model_dump(exclude_none=True), METHODS[case.spec.method].uses
    unused = sorted(name for name in said if name not in uses)
    if not unused:
        return None
    return Advice(
        "unused_keys",
        f"method {case.spec.method} makes no use of lora.{', lora.'.join(unused)}",
        "remove what it does not use",
    )


def remote_code(case: Case, batch: Batch, memory: Memory) -> Advice | None:
    """Code that comes with a model."""
    if not case.spec.model.trust_remote_code:
        return None
    return Advice(
        "remote_code",
        "trust_remote_code runs Python code that ships with the model",
        "leave it off unless you have read that code",
    )


ADVICE: tuple[Callable[[Case, Batch, Memory], Advice | None], ...] = (
    tight_memory,
    small_dataset,
    unused_keys,
    remote_code,
)
