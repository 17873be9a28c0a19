"""Bytes on disk and patience at a stop, by hand and as properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.memory import MemoryInputs
from launcher.plan.memory_state import adapter_parameters
from launcher.plan.storage import (
    BYTES_PER_SECOND,
    LEAST_SHUTDOWN_SECONDS,
    MARGIN,
    forecast_storage,
    shutdown_timeout_seconds,
)
from launcher.plan.types import Storage
from tests.plan.published import LLAMA_8B

PARAMETERS = LLAMA_8B["parameters"]
ADAPTER = 41_943_040  # rank 16 on every linear module of Llama-3.1-8B, as PEFT prints
UNKNOWN = Storage(None, None, None)


def forecast(keep: int = 3, **settings: Any) -> Storage:
    return forecast_storage(MemoryInputs(**{**LLAMA_8B, **settings}), keep)


@pytest.mark.parametrize(
    ("settings", "checkpoint", "final"),
    [
        # Float32 weights and two moments: 12 bytes a parameter.
        ({"method": "full", "parameter_dtype": "float32"}, 12 * PARAMETERS, 4 * PARAMETERS),
        ({"method": "full", "parameter_dtype": "bfloat16"}, 6 * PARAMETERS, 2 * PARAMETERS),
        # ZeRO saves float32 masters and moments, whatever the model trains in.
        (
            {"method": "full", "parameter_dtype": "bfloat16", "strategy": "zero3", "gpus": 8},
            12 * PARAMETERS,
            2 * PARAMETERS,
        ),
        # An adapter is there twice: in the state, and as PEFT loads it.
        ({"method": "lora", "adapter_dtype": "float32"}, 16 * ADAPTER, 4 * ADAPTER),
        ({"method": "lora", "adapter_dtype": "bfloat16"}, 8 * ADAPTER, 2 * ADAPTER),
        (
            {"method": "lora", "adapter_dtype": "bfloat16", "strategy": "zero2", "gpus": 8},
            14 * ADAPTER,
            2 * ADAPTER,
        ),
    ],
)
def test_sizes_by_hand(settings: dict[str, Any], checkpoint: int, final: int) -> None:
    found = forecast(3, optimizer="adamw_torch_fused", **settings)
    assert found == Storage(checkpoint, final, 4 * checkpoint + final)


def test_the_adapter_is_the_one_of_the_memory_estimate() -> None:
    assert adapter_parameters(MemoryInputs(**LLAMA_8B, method="lora")) == ADAPTER


def test_what_is_unknown_stays_unknown() -> None:
    assert forecast_storage(None, 3) == UNKNOWN


@pytest.mark.parametrize("smaller", ["adamw_8bit", "lion", "sgd", "adafactor"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_optimizer_with_less_state_makes_a_smaller_checkpoint(smaller: str, method: str) -> None:
    usual = forecast(method=method, optimizer="adamw_torch_fused")
    found = forecast(method=method, optimizer=smaller)
    assert (found.checkpoint_bytes or 0) < (usual.checkpoint_bytes or 0)
    assert found.final_bytes == usual.final_bytes


STRATEGIES = ["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp"]


@given(
    strategy=st.sampled_from(STRATEGIES),
    method=st.sampled_from([("full", None), ("lora", None), ("qlora", "nf4")]),
    optimizer=st.sampled_from(["adamw_torch_fused", "adamw_8bit", "adafactor", "sgd"]),
    keep=st.integers(1, 100),
    gpus=st.sampled_from([2, 8, 64]),
    micro=st.integers(1, 64),
    offload=st.sampled_from(["none", "optimizer", "all"]),
)
def test_everything_is_saved_once_however_it_is_spread(  # noqa: PLR0917 - hypothesis fills them
    strategy: str,
    method: tuple[str, str | None],
    optimizer: str,
    keep: int,
    gpus: int,
    micro: int,
    offload: str,
) -> None:
    settings: dict[str, Any] = {
        "strategy": strategy,
        "method": method[0],
        "quantization": method[1],
        "optimizer": optimizer,
    }
    found = forecast(keep, **settings, gpus=gpus, micro_batch_size=micro, offload=offload)
    checkpoint, final, total = found.checkpoint_bytes, found.final_bytes, found.total_bytes
    assert isinstance(checkpoint, int)
    assert isinstance(final, int)
    assert 0 < final <= checkpoint
    # The one being written stands beside all that are kept.
    assert total == (keep + 1) * checkpoint + final
    assert forecast(keep, **settings, gpus=4) == found


# --- patience at a stop -------------------------------------------------------------------

SECONDS = st.none() | st.floats(0, 1e6)
STORAGES = st.builds(
    Storage,
    checkpoint_bytes=st.none() | st.integers(0, 10**15),
    final_bytes=st.none(),
    total_bytes=st.none(),
)


@pytest.mark.parametrize(
    ("size", "step", "save", "patience"),
    [
        (None, None, None, 120),
        (10**6, 0.01, None, 120),
        (100 * 10**9, None, None, 3000),
        (100 * 10**9, 10.0, None, 3060),
        (100 * 10**9, 10.0, 100.0, 360),
        (None, 300.0, None, 1800),
        (None, None, 400.0, 1200),
        (None, None, 0.0, 120),
        (None, None, 40.1, 121),
    ],
)
def test_patience_by_hand(
    size: int | None, step: float | None, save: float | None, patience: int
) -> None:
    assert shutdown_timeout_seconds(Storage(size, None, None), step, save) == patience


@given(STORAGES, SECONDS, SECONDS)
def test_patience_holds_the_save_and_two_steps(
    storage: Storage, step: float | None, save: float | None
) -> None:
    found = shutdown_timeout_seconds(storage, step, save)
    expected = (storage.checkpoint_bytes or 0) / BYTES_PER_SECOND if save is None else save
    assert isinstance(found, int), "torchrun takes whole seconds"
    assert found >= LEAST_SHUTDOWN_SECONDS
    assert found >= MARGIN * expected
    assert found >= MARGIN * 2 * (step or 0)
    assert found <= max(LEAST_SHUTDOWN_SECONDS, math.ceil(MARGIN * (expected + 2 * (step or 0))))


@given(STORAGES, SECONDS, st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_slower_save_is_given_more_time(
    storage: Storage, step: float | None, one: float, more: float
) -> None:
    assert shutdown_timeout_seconds(storage, step, one) <= shutdown_timeout_seconds(
        storage, step, one + more
    )
