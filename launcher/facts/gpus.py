"""The GPUs of this machine, by asking nvidia-smi.

Decides nothing: a machine without nvidia-smi, or with a broken one, has no GPUs here.
It must not import torch, whose CUDA start-up takes seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_MIB = 2**20
_TIMEOUT_SECONDS = 10
_FIELDS = 5


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that this process may use."""

    name: str
    """The name that nvidia-smi prints, for example `NVIDIA H100 80GB HBM3`."""

    memory_bytes: int
    """Total memory in bytes as nvidia-smi reports it; CUDA can use a little less."""

    compute_capability: tuple[int, int]
    """Major and minor compute capability, for example (9, 0); (0, 0) where not reported."""


def probe_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; () where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in {"", "-1"}:
        return ()
    program = _find_program()
    if program is None:
        return ()
    rows = _parse(_query(program))
    return tuple(gpu for _, _, gpu in _choose(rows, visible))


def _find_program() -> str | None:
    """Path of nvidia-smi; `shutil.which` does the same, and its import costs a plan 5 ms."""
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        program = os.path.join(folder, "nvidia-smi")  # noqa: PTH118
        if os.path.isfile(program) and os.access(program, os.X_OK):  # noqa: PTH113
            return program
    return None


def _query(program: str) -> str:
    """What nvidia-smi prints about its GPUs; empty when it fails or hangs."""
    import subprocess  # noqa: PLC0415 - machines without nvidia-smi must not pay for it

    fields = "index,uuid,name,memory.total,compute_cap"
    try:
        done = subprocess.run(
            [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _parse(text: str) -> list[tuple[str, str, Gpu]]:
    """Index, UUID and GPU of every line that reads as one."""
    rows = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != _FIELDS or not parts[3].isdigit():
            continue
        index, uuid, name, mebibytes, capability = parts
        gpu = Gpu(
            name=name,
            memory_bytes=int(mebibytes) * _MIB,
            compute_capability=_capability(capability),
        )
        rows.append((index, uuid, gpu))
    return rows


def _capability(text: str) -> tuple[int, int]:
    """(9, 0) from `9.0`; (0, 0) from what old drivers print instead."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _choose(rows: list[tuple[str, str, Gpu]], visible: str | None) -> list[tuple[str, str, Gpu]]:
    """The rows that CUDA_VISIBLE_DEVICES names, by index or by a UUID's beginning.

    CUDA stops at the first entry that it does not know; so does this.
    """
    if visible is None:
        return rows
    chosen = []
    for wanted in (part.strip() for part in visible.split(",")):
        match = [
            row
            for row in rows
            if row[0] == wanted or (wanted.startswith("GPU-") and row[1].startswith(wanted))
        ]
        if not match:
            break
        chosen.append(match[0])
    return chosen
