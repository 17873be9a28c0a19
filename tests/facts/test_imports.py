"""What the floor of facts and the two estimates load: nothing heavy."""

from __future__ import annotations

import subprocess
import sys

_MODULES = (
    "launcher.facts.catalogue",
    "launcher.facts.dataset",
    "launcher.facts.families",
    "launcher.facts.gpus",
    "launcher.facts.model",
    "launcher.facts.versions",
    "launcher.plan.duration",
    "launcher.plan.memory",
)
_HEAVY = ("torch", "transformers", "pydantic", "yaml", "importlib.metadata", "urllib.request")


def test_nothing_heavy_is_imported() -> None:
    code = f"import sys, {', '.join(_MODULES)}; print([m for m in {_HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_installed_versions_are_read_from_metadata() -> None:
    from launcher.facts.versions import TESTED_VERSIONS, installed_versions

    found = installed_versions()
    assert set(found) <= set(TESTED_VERSIONS)
    assert all(version[0].isdigit() for version in found.values())
