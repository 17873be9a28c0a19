"""`strategy: auto`: the documented rule, and what a named strategy needs."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import PlanRefused
from launcher.plan.strategy import check_strategy, choose_strategy
from launcher.plan.topology import decide_topology
from launcher.plan.types import Topology
from launcher.spec.schema import HardwareSpec, Strategy

STRATEGIES = tuple(name for name in get_args(Strategy) if name != "auto")


def _topology(gpus: int, device: str = "cuda") -> Topology:
    return decide_topology(HardwareSpec(gpus=gpus), 0, device)


def _choose(
    gpus: int = 8,
    *,
    fits: bool | None = None,
    adapter: bool = True,
    quantization: str = "none",
    offload: str = "none",
    device: str = "cuda",
) -> str:
    strategy, reason = choose_strategy(
        _topology(gpus, device),
        trains_adapter=adapter,
        quantization=quantization,
        offload=offload,
        fits=lambda _: fits,
    )
    assert reason
    return strategy


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gpus": 1}, "single"),
        ({"gpus": 1, "fits": False}, "single"),
        ({"gpus": 8, "fits": True}, "ddp"),
        ({"gpus": 8, "fits": True, "adapter": False}, "ddp"),
        ({"gpus": 8, "fits": False}, "fsdp"),
        ({"gpus": 8, "fits": False, "adapter": False}, "fsdp"),
        ({"gpus": 8, "fits": None, "adapter": True}, "ddp"),
        ({"gpus": 8, "fits": None, "adapter": False}, "fsdp"),
        ({"gpus": 8, "fits": False, "quantization": "8bit"}, "ddp"),
        ({"gpus": 8, "fits": False, "quantization": "nf4"}, "fsdp"),
        ({"gpus": 2, "device": "cpu", "fits": False}, "ddp"),
        ({"gpus": 8, "offload": "all"}, "zero3"),
        ({"gpus": 8, "offload": "optimizer"}, "zero2"),
        ({"gpus": 1, "offload": "all"}, "zero3"),
    ],
)
def test_the_rule_of_auto(settings: dict[str, object], expected: str) -> None:
    assert _choose(**settings) == expected  # type: ignore[arg-type]


@given(
    st.integers(1, 64),
    st.sampled_from([True, False, None]),
    st.booleans(),
    st.sampled_from(["none", "nf4", "8bit"]),
    st.sampled_from(["none", "optimizer", "all"]),
    st.sampled_from(["cuda", "cpu"]),
)
def test_what_auto_chooses_is_never_refused_for_its_gpus(
    gpus: int, fits: bool | None, adapter: bool, quantization: str, offload: str, device: str
) -> None:
    strategy = _choose(
        gpus, fits=fits, adapter=adapter, quantization=quantization, offload=offload, device=device
    )
    check_strategy(strategy, _topology(gpus, device), offload)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_is_single_s(strategy: str) -> None:
    if strategy == "single":
        assert check_strategy(strategy, _topology(1), "none").gpus == 1
        return
    with pytest.raises(PlanRefused) as caught:
        check_strategy(strategy, _topology(1), "none")
    assert "--strategy single" in caught.value.fix


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_several_gpus_are_not_single_s(strategy: str) -> None:
    if strategy != "single":
        check_strategy(strategy, _topology(4), "none")
        return
    with pytest.raises(PlanRefused):
        check_strategy(strategy, _topology(4), "none")


@pytest.mark.parametrize("gpus", [2, 3, 5, 7])
def test_hsdp_needs_groups(gpus: int) -> None:
    with pytest.raises(PlanRefused, match="groups of at least two"):
        check_strategy("hsdp", _topology(gpus), "none")
