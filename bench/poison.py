"""Something bad in one rank at one step: a loss that is not a number, or a rank that hangs."""

from __future__ import annotations

import time
from typing import Any

FOREVER_SECONDS = 100_000


def poison(trainer: Any, kind: str, step: int, rank: int) -> None:
    """Patch a trainer class.

    Args:
        trainer: the class.
        kind: nan or hang.
        step: optimizer step, counted from 1.
        rank: the rank that it happens to.
    """
    from launcher.train.process import rank_of

    whole = trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, *args, **kwargs)
        if self.model.training and (self.state.global_step + 1, rank_of()) == (step, rank):
            if kind == "hang":
                time.sleep(FOREVER_SECONDS)
            loss = loss * float("nan")
        return loss

    trainer.compute_loss = compute_loss
