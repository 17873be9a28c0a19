"""What the command line loads, and which way imports point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import HEAVY, ROOT


@pytest.mark.parametrize(
    "statement",
    [
        "import launcher.cli",
        "import launcher.cli.app as a; a._run(['plan', '--gpus', '8', '--gpu', 'h100-80gb'])",
        "import launcher.cli.app as a; a._run(['run', '--dry-run', '--json'])",
        "import launcher.cli.app as a; a._run(['--help'])",
        "import launcher.cli.app as a; a._run(['run', '--gpus', '8'])",
        "import launcher.cli.app as a; a._run(['recipes']); a._run(['schema']); a._run(['status'])",
    ],
)
def test_nothing_heavy_is_loaded(statement: str, tmp_path: Path) -> None:
    code = (
        f"import sys\n{statement}\nprint([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_imports_point_down_the_floors() -> None:
    """The contracts stand in pyproject.toml under [tool.importlinter]."""
    program = Path(sys.executable).with_name("lint-imports")
    if not program.is_file():
        pytest.fail("lint-imports is missing: pip install import-linter")
    done = subprocess.run(
        [str(program), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout
