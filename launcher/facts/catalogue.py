"""The GPUs that a plan can be made for without having one.

Decides what a GPU's name stands for: its memory, number formats and speeds. It must not
look at the machine; `gpus.py` does that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher.errors import SpecError

_GIB = 2**30
_TERA = 1e12
_GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU model, as its maker describes it and as CUDA reports it."""

    name: str
    """The catalogue's own name, for example `h100-80gb`."""

    memory_bytes: int
    """Bytes that CUDA can use (torch's `total_memory`): after ECC and the driver's share."""

    bf16: bool
    """Whether bfloat16 runs in hardware (compute capability 8.0 and later)."""

    fp8: bool
    """Whether float8 runs in hardware (compute capability 8.9 and later; CDNA 3)."""

    bf16_flops: float
    """Dense bfloat16 FLOP/s without sparsity; float16 where `bf16` is False."""

    memory_bandwidth: float
    """Bytes per second between the GPU and its memory."""

    link_bandwidth: float
    """Bytes per second in one direction between this GPU and its neighbours."""

    source: str
    """Where the figures come from."""


# name: usable GiB, bf16, fp8, dense TFLOP/s, memory GB/s, link GB/s (one direction), source.
# Usable memory is what torch reports for the card. NVLink figures are half of the
# advertised two-way sum; a card without NVLink has its PCIe generation's x16 rate.
# GeForce figures are tensor-core rates with float32 accumulation, the rate training gets.
_ROWS: tuple[tuple[str, float, bool, bool, float, float, float, str], ...] = (
    ("t4-16gb", 14.56, False, False, 65, 320, 16, "NVIDIA T4 datasheet"),
    ("v100-16gb", 15.77, False, False, 125, 900, 150, "NVIDIA V100 SXM2 datasheet"),
    ("v100-32gb", 31.73, False, False, 125, 900, 150, "NVIDIA V100 SXM2 datasheet"),
    ("a10g-24gb", 22.06, True, False, 70, 600, 32, "AWS G5, NVIDIA A10G"),
    ("a10-24gb", 22.06, True, False, 125, 600, 32, "NVIDIA A10 datasheet"),
    ("a100-40gb", 39.39, True, False, 312, 1555, 300, "NVIDIA A100 SXM4 datasheet"),
    ("a100-80gb", 79.15, True, False, 312, 2039, 300, "NVIDIA A100 SXM4 datasheet"),
    ("a100-pcie-40gb", 39.39, True, False, 312, 1555, 32, "NVIDIA A100 PCIe datasheet"),
    ("a100-pcie-80gb", 79.15, True, False, 312, 1935, 32, "NVIDIA A100 PCIe datasheet"),
    ("a6000-48gb", 47.43, True, False, 155, 768, 32, "NVIDIA RTX A6000 datasheet"),
    ("a40-48gb", 44.34, True, False, 150, 696, 32, "NVIDIA A40 datasheet"),
    ("rtx3090-24gb", 23.67, True, False, 71, 936, 32, "NVIDIA GA102 whitepaper"),
    ("rtx4090-24gb", 23.64, True, True, 165, 1008, 32, "NVIDIA Ada whitepaper"),
    ("rtx5090-32gb", 31.36, True, True, 209, 1792, 64, "NVIDIA RTX Blackwell whitepaper"),
    ("rtx6000-ada-48gb", 47.40, True, True, 364, 960, 32, "NVIDIA RTX 6000 Ada datasheet"),
    ("rtxpro6000-96gb", 94.97, True, True, 504, 1792, 64, "NVIDIA RTX PRO 6000 datasheet"),
    ("l4-24gb", 22.05, True, True, 121, 300, 32, "NVIDIA L4 datasheet"),
    ("l40-48gb", 44.39, True, True, 181, 864, 32, "NVIDIA L40 datasheet"),
    ("l40s-48gb", 44.39, True, True, 362, 864, 32, "NVIDIA L40S datasheet"),
    ("h100-80gb", 79.11, True, True, 989, 3350, 450, "NVIDIA H100 SXM5 datasheet"),
    ("h100-pcie-80gb", 79.11, True, True, 756, 2039, 64, "NVIDIA H100 PCIe datasheet"),
    ("h100-nvl-94gb", 93.02, True, True, 835, 3938, 300, "NVIDIA H100 NVL datasheet"),
    ("h200-141gb", 139.80, True, True, 989, 4800, 450, "NVIDIA H200 SXM datasheet"),
    ("gh200-96gb", 94.50, True, True, 989, 4000, 450, "NVIDIA GH200 datasheet"),
    ("b200-180gb", 178.35, True, True, 2250, 8000, 900, "NVIDIA DGX B200 datasheet"),
    ("b300-288gb", 267.0, True, True, 2250, 8000, 900, "NVIDIA DGX B300 datasheet"),
    ("mi250x-64gb", 63.98, True, False, 191, 1638, 50, "AMD MI250X datasheet, one die"),
    ("mi300x-192gb", 191.69, True, True, 1307, 5300, 448, "AMD MI300X datasheet"),
)

GPUS: dict[str, GpuSpec] = {
    name: GpuSpec(
        name=name,
        memory_bytes=int(gib * _GIB),
        bf16=bf16,
        fp8=fp8,
        bf16_flops=tera * _TERA,
        memory_bandwidth=bandwidth * _GIGA,
        link_bandwidth=link * _GIGA,
        source=source,
    )
    for name, gib, bf16, fp8, tera, bandwidth, link, source in _ROWS
}
"""Every known GPU by its catalogue name."""

# What people write for a card that the name alone leaves open: the commonest variant.
_USUAL: dict[str, str] = {
    "t4": "t4-16gb",
    "v100": "v100-16gb",
    "v100-pcie-16gb": "v100-16gb",
    "v100-pcie-32gb": "v100-32gb",
    "a10": "a10-24gb",
    "a10g": "a10g-24gb",
    "a100": "a100-80gb",
    "a100-pcie": "a100-pcie-80gb",
    "a100-40gb-pcie": "a100-pcie-40gb",
    "a100-80gb-pcie": "a100-pcie-80gb",
    "a6000": "a6000-48gb",
    "a40": "a40-48gb",
    "3090": "rtx3090-24gb",
    "4090": "rtx4090-24gb",
    "5090": "rtx5090-32gb",
    "rtx6000-ada": "rtx6000-ada-48gb",
    "6000-ada": "rtx6000-ada-48gb",
    "6000-ada-generation": "rtx6000-ada-48gb",
    "rtx-pro-6000": "rtxpro6000-96gb",
    "pro-6000-blackwell-server-edition": "rtxpro6000-96gb",
    "pro-6000-blackwell-workstation-edition": "rtxpro6000-96gb",
    "l4": "l4-24gb",
    "l40": "l40-48gb",
    "l40s": "l40s-48gb",
    "h100": "h100-80gb",
    "h100-80gb-hbm3": "h100-80gb",
    "h100-pcie": "h100-pcie-80gb",
    "h100-80gb-pcie": "h100-pcie-80gb",
    "h100-nvl": "h100-nvl-94gb",
    "h200": "h200-141gb",
    "gh200": "gh200-96gb",
    "gh200-480gb": "gh200-96gb",
    "b200": "b200-180gb",
    "b200-192gb": "b200-180gb",
    "b300": "b300-288gb",
    "b300-ac": "b300-288gb",
    "mi250x": "mi250x-64gb",
    "mi300x": "mi300x-192gb",
    "mi300x-oam": "mi300x-192gb",
}

# Words of a maker or a product line that tell nothing about the card.
_NOISE = re.compile(r"^(nvidia|geforce|tesla|quadro|amd|instinct|rtx)[- _]+|\b(nvidia)\b[- _]*")


def _normalise(name: str) -> str:
    """Lower case, one hyphen between words, makers' names dropped.

    `NVIDIA GeForce RTX 4090` becomes `4090`, `A100 80 GB` becomes `a100-80gb`.
    """
    text = name.strip().lower()
    previous = None
    while previous != text:
        previous, text = text, _NOISE.sub("", text)
    text = re.sub(r"(\d)[\s_-]*gi?b\b", r"\1gb", text)
    text = re.sub(r"[\s_-]+", "-", text).strip("-")
    return re.sub(r"-sxm\d?\b", "", text)


def match_gpu(name: str) -> GpuSpec | None:
    """The catalogue's entry for a name, or None where there is none (see `find_gpu`)."""
    raw = re.sub(r"[\s_-]+", "-", name.strip().lower())
    text = _normalise(name)
    for candidate in (raw, text, f"rtx{text}", text.removeprefix("rtx")):
        if candidate in GPUS:
            return GPUS[candidate]
        if candidate in _USUAL:
            return GPUS[_USUAL[candidate]]
    return None


def find_gpu(name: str) -> GpuSpec:
    """The catalogue's entry for a usual name, in any case.

    Takes catalogue names (`h100-80gb`), short ones (`H100`, `4090`) and what nvidia-smi
    prints (`NVIDIA H100 80GB HBM3`).

    Raises:
        SpecError: `unknown_gpu`, with close names and the whole list.
    """
    found = match_gpu(name)
    if found is not None:
        return found
    import difflib  # noqa: PLC0415 - only a mistake pays for it

    text = _normalise(name)
    close = difflib.get_close_matches(text, [*GPUS, *_USUAL], n=3, cutoff=0.5)
    names = list(dict.fromkeys(_USUAL.get(each, each) for each in close))
    hint = f"did you mean {' or '.join(names)}? " if names else ""
    raise SpecError(
        "unknown_gpu",
        f"the GPU {name!r} is not in the catalogue",
        fix=f"{hint}known: {', '.join(GPUS)}",
        source="launcher/facts/catalogue.py",
    )
