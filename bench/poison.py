"""The fork agent with one bad thing in it: a loss that is not a number, or a rank that hangs.

`python -m bench.poison KIND STEP RANK RANKS RUN` starts the ranks of a prepared run. At
optimizer step STEP (counted from 1) rank RANK's loss is multiplied by NaN, or the rank stops.
Nothing of this is in the package: the trainer is patched before the ranks are forked.
"""

from __future__ import annotations

import sys
import time
from typing import Any

FOREVER_SECONDS = 100_000
KINDS = ("nan", "hang")


def poison(kind: str, step: int, rank: int) -> None:
    """Patch the trainer class that the ranks will use."""
    from launcher.train.process import rank_of
    from launcher.train.trainer import CheckedTrainer

    whole: Any = CheckedTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, *args, **kwargs)
        if self.model.training and (self.state.global_step + 1, rank_of()) == (step, rank):
            if kind == "hang":
                time.sleep(FOREVER_SECONDS)
            loss = loss * float("nan")
        return loss

    CheckedTrainer.compute_loss = compute_loss


def main(arguments: list[str]) -> int:
    """Patch, then be the agent."""
    kind, step, rank, *rest = arguments
    from launcher.train import agent

    poison(kind, int(step), int(rank))
    return agent.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
