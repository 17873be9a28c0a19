"""The compiler of the image's build asks for no code that only the building machine runs."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT


def compiled(*arguments: str, folder: Path) -> list[str]:
    """What reaches g++."""
    fake = folder / "g++"
    fake.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "docker" / "portable-c++"), *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 names")
def test_code_for_every_server(tmp_path: Path) -> None:
    asked = ("-g", "-O3", "-march=native", "-D__AVX512__", "a b.cpp", "-o", "x")
    assert compiled(*asked, folder=tmp_path) == [
        "-O3",
        "-march=x86-64-v3",
        "-D__AVX256__",
        "a b.cpp",
        "-o",
        "x",
    ]
