"""Steps and time: counting is exact, time is of the right size."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.facts.catalogue import find_gpu
from launcher.plan.duration import (
    count_sequences,
    count_steps,
    estimate_duration,
    flops_per_token,
)


@pytest.mark.parametrize(
    ("sequences", "batch", "epochs", "max_steps", "steps"),
    [
        (1000, 100, 1.0, None, 10),
        (1001, 100, 1.0, None, 11),
        (1001, 100, 3.0, None, 33),
        (1000, 100, 0.25, None, 3),
        (5, 100, 1.0, None, 1),
        (1000, 100, 1.0, 7, 7),
        (None, 100, 1.0, 7, 7),
        (None, 100, 1.0, None, None),
        (1000, 100, 1.0, -1, 10),
    ],
)
def test_steps(
    sequences: int | None, batch: int, epochs: float, max_steps: int | None, steps: int | None
) -> None:
    assert count_steps(sequences, batch, epochs, max_steps) == steps


def test_packing_fills_sequences() -> None:
    assert count_sequences(1000, 400, 1000, packing=True) == (100, 1000.0)
    assert count_sequences(1000, 400, 1000, packing=False) == (1000, 100.0)
    assert count_sequences(1000, 40_000, 1000, packing=False) == (1000, 1000.0)


def _flops(*, trains_all: bool, checkpointing: bool) -> float:
    return flops_per_token(
        compute_parameters=7_504_924_672,
        layers=32,
        attention_width=4096,
        tokens_per_sequence=8192,
        trains_all=trains_all,
        gradient_checkpointing=checkpointing,
    )


def test_operations_are_six_four_and_two_a_parameter() -> None:
    full = _flops(trains_all=True, checkpointing=False)
    attention = 6 * 8192 * 4096 * 32
    assert full == 6 * 7_504_924_672 + attention
    assert _flops(trains_all=False, checkpointing=False) == full - 2 * 7_504_924_672
    recomputed = 2 * 7_504_924_672 + attention / 3
    assert _flops(trains_all=True, checkpointing=True) == pytest.approx(full + recomputed)


_TITAN: dict[str, Any] = {
    "gpus": 8,
    "strategy": "fsdp",
    "quantization": None,
    "global_batch_size": 16,
    "micro_batch_size": 2,
    "sequences": 1600,
    "tokens_per_sequence": 8192.0,
    "epochs": 1.0,
    "max_steps": None,
    "parameters": 8_030_261_248,
    "trained_parameters": 8_030_261_248,
}


def test_torchtitan_8b_is_within_a_quarter() -> None:
    """5,762 tokens/s a GPU: torchtitan benchmarks/llama3_h100_202412, 8 H100, FSDP."""
    duration = estimate_duration(
        gpu=find_gpu("h100"), flops=_flops(trains_all=True, checkpointing=False), **_TITAN
    )
    assert duration.seconds_per_step is not None
    tokens_per_second = 2 * 8192 / duration.seconds_per_step
    assert tokens_per_second == pytest.approx(5762, rel=0.25)
    assert duration.steps == 100
    assert duration.total_seconds == pytest.approx(100 * duration.seconds_per_step)
    assert duration.basis == "estimate: catalogue"


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"gpu": None}, "GPU"),
        ({"flops": None}, "model"),
        ({"tokens_per_sequence": None}, "dataset"),
    ],
)
def test_what_is_unknown_is_none_and_said(change: dict[str, Any], missing: str) -> None:
    values = {"gpu": find_gpu("h100"), "flops": 1e10, **_TITAN, **change}
    duration = estimate_duration(**values)
    assert duration.seconds_per_step is None
    assert duration.total_seconds is None
    assert duration.steps == 100
    assert missing in duration.basis


def test_a_slow_link_between_nodes_costs_time() -> None:
    values: dict[str, Any] = {**_TITAN, "tokens_per_sequence": 128.0}
    flops = _flops(trains_all=True, checkpointing=True)
    one = estimate_duration(gpu=find_gpu("h100"), flops=flops, **values)
    two = estimate_duration(gpu=find_gpu("h100"), flops=flops, nodes=2, **values)
    assert (one.seconds_per_step or 0) < (two.seconds_per_step or 0)
