"""The catalogue: usual names, and what a wrong one is told."""

from __future__ import annotations

import pytest

from launcher.errors import SpecError
from launcher.facts.catalogue import GPUS, find_gpu


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("H100", "h100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("H100 SXM", "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("a100", "a100-80gb"),
        ("A100 80 GB", "a100-80gb"),
        ("a100_40gb", "a100-40gb"),
        ("4090", "rtx4090-24gb"),
        ("RTX4090", "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090-24gb"),
        ("Tesla T4", "t4-16gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA A10G", "a10g-24gb"),
        ("NVIDIA RTX A6000", "a6000-48gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("B200", "b200-180gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
    ],
)
def test_usual_names(name: str, expected: str) -> None:
    assert find_gpu(name).name == expected


def test_every_catalogue_name_finds_itself() -> None:
    for name, spec in GPUS.items():
        assert find_gpu(name) is spec
        assert find_gpu(name.upper()) is spec


def test_usable_memory_is_below_the_advertised() -> None:
    for name, spec in GPUS.items():
        advertised = int(name.rsplit("-", 1)[1].removesuffix("gb"))
        assert 0.85 * advertised * 1e9 < spec.memory_bytes < 1.075 * advertised * 1e9, name


def test_only_ampere_and_later_have_bf16() -> None:
    assert {name for name, spec in GPUS.items() if not spec.bf16} == {
        "t4-16gb",
        "v100-16gb",
        "v100-32gb",
    }


def test_an_unknown_name_gets_suggestions_and_the_list() -> None:
    with pytest.raises(SpecError) as caught:
        find_gpu("h101")
    assert caught.value.code == "unknown_gpu"
    assert "h100-80gb" in caught.value.fix.split("known:")[0]
    assert all(name in caught.value.fix for name in GPUS)
