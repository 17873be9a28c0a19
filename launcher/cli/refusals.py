"""Refusals that a run and a sweep share."""

from __future__ import annotations

from launcher.errors import SpecError


def no_rows() -> SpecError:
    """Nothing to train on."""
    return SpecError(
        "missing_key", "dataset is not set", why="a run needs rows", fix="pass --dataset FILE"
    )


def unwritable(output: str, error: OSError) -> SpecError:
    """A folder that cannot be written."""
    return SpecError(
        "output_unwritable",
        f"{output} cannot be written: {error.strerror}",
        fix="use --output with a folder that you may write",
    )
