"""The files that ship beside the code: engine configurations, templates, recipes.

In a wheel they lie in `launcher/_assets`, in a checkout at the repository's root.
"""

from __future__ import annotations

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
