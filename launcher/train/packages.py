"""Which heavy packages a run can do without, so that they are not imported.

PEFT imports bitsandbytes wherever it is installed, and that imports torch's compiler:
about 0.8 s of 4.4 s on CPU (peft 0.21, bitsandbytes 0.50). A run that quantises nothing is
told that it is not installed, which is a path that its users take every day.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.plan.types import Plan

# Parts of optimizer names whose optimizers are bitsandbytes'.
BITSANDBYTES_OPTIMIZERS = ("8bit", "paged", "bnb", "lion", "ademamix", "4bit")


def leave_out_unused(plans: Iterable[Plan]) -> None:
    """Hide bitsandbytes from imports where none of the plans needs it."""
    if any(needs_bitsandbytes(plan) for plan in plans):
        return
    # The import system's own mark for a module that is known not to be there.
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def needs_bitsandbytes(plan: Plan) -> bool:
    """Whether a plan quantises weights or optimizer state."""
    optimizer = str(plan.worker.training_arguments["optim"])
    return plan.worker.model["quantization"] is not None or any(
        part in optimizer for part in BITSANDBYTES_OPTIMIZERS
    )
