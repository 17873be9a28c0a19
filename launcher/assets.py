"""The files that ship beside the code: engine configurations, templates, recipes.

In a wheel they lie in `launcher/_assets`, in a checkout at the repository's root.
"""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


@lru_cache(maxsize=1)
def assets_root() -> Path:
    """Folder that holds accelerate_configs, deepspeed_configs, recipes, ..."""
    shipped = _PACKAGE / "_assets"
    return shipped if shipped.is_dir() else _PACKAGE.parent


def asset(*parts: str) -> Path:
    """Path of one shipped file or folder."""
    return assets_root().joinpath(*parts)


# What an image is built from, at the root of a checkout or among a wheel's assets.
SOURCES = (
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
    "accelerate_configs",
    "deepspeed_configs",
    "docker",
    "recipes",
    "slurm",
)
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "_assets", "*.pyc")


def copy_sources(target: Path, wheels: Path | None = None) -> None:
    """Lay out this project's sources as a checkout has them, to build from.

    Args:
        target: an empty folder.
        wheels: a folder of wheels that the build may take, and that do not stay in the image.
    """
    for name in SOURCES:
        source = asset(name)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=_LEFT_OUT)
        else:
            shutil.copyfile(source, target / name)
    shutil.copytree(_PACKAGE, target / "launcher", ignore=_LEFT_OUT)
    if wheels is not None:
        folder = target / "wheels"
        folder.mkdir()
        for wheel in sorted(wheels.glob("*.whl")):
            shutil.copyfile(wheel, folder / wheel.name)
