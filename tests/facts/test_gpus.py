"""Probing by nvidia-smi, with a stand-in program on the path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from launcher.facts.gpus import Gpu, probe_gpus

if TYPE_CHECKING:
    from pathlib import Path

_TEXT = """\
0, GPU-aaaa1111, NVIDIA H100 80GB HBM3, 81559, 9.0
1, GPU-bbbb2222, NVIDIA A100-SXM4-40GB, 40960, 8.0
2, GPU-cccc3333, Old Card, [N/A], [N/A]
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "nvidia-smi"
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{_TEXT}END\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return file


def test_all_gpus(program: Path) -> None:
    assert probe_gpus() == (
        Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * 2**20, compute_capability=(9, 0)),
        Gpu(name="NVIDIA A100-SXM4-40GB", memory_bytes=40960 * 2**20, compute_capability=(8, 0)),
    )


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("", []),
        ("-1", []),
        ("1", ["A100"]),
        ("1,0", ["A100", "H100"]),
        ("GPU-bbbb", ["A100"]),
        ("0,7,1", ["H100"]),  # CUDA stops at the first that it does not know
    ],
)
def test_visible_devices(
    program: Path, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name.split()[1][:4] for gpu in probe_gpus()] == names


@pytest.mark.parametrize("body", ["exit 9", "echo 'Failed to initialize NVML'", "echo 0, x"])
def test_a_failing_program_means_no_gpus(program: Path, body: str) -> None:
    program.write_text(f"#!/bin/sh\n{body}\n")
    assert probe_gpus() == ()


def test_no_program_means_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe_gpus() == ()
