"""Losses and gradients that say the run has gone wrong, found before they are saved.

A step is unhealthy where its loss or gradient norm is not finite, or where they explode:
the loss stands above twice that of the run's first step, and the gradient norm above a
hundred times its median. Both together, because either alone happens in healthy runs.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from launcher.train.control import Agreement

WINDOW_STEPS = 50
# Below this many steps there is no median to speak of.
LEAST_STEPS = 5
LOSS_FACTOR = 2.0
GRAD_NORM_FACTOR = 100.0
MOST_SKIPS_IN_A_ROW = 10
ROWS_SHOWN = 32


class UnhealthyStepError(RuntimeError):
    """The step's loss or gradient is not finite, or explodes."""


@dataclass
class Health:
    """Judges steps; every rank sees the same numbers and so comes to the same verdict."""

    policy: str
    """stop, skip or ignore."""
    first_loss: float | None = None
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    skipped_in_a_row: int = 0
    skipped: int = 0

    def problem(self, seen: Agreement) -> str | None:
        """What is wrong with a step; None for a healthy one, which is remembered."""
        found = self._find(seen)
        if found is None:
            self.first_loss = seen.loss if self.first_loss is None else self.first_loss
            self.norms.append(seen.grad_norm)
            self.skipped_in_a_row = 0
        return found

    def may_skip(self) -> bool:
        """Count a skipped step; False after too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        return self.skipped_in_a_row <= MOST_SKIPS_IN_A_ROW

    def _find(self, seen: Agreement) -> str | None:
        if not seen.finite:
            return f"loss {seen.loss:.4g}, gradient norm {seen.grad_norm:.4g}: not finite"
        if self.first_loss is None or len(self.norms) < LEAST_STEPS:
            return None
        usual = statistics.median(self.norms)
        loss_explodes = seen.loss > LOSS_FACTOR * self.first_loss
        if loss_explodes and seen.grad_norm > GRAD_NORM_FACTOR * usual:
            return (
                f"the loss explodes: {seen.loss:.4g} after {self.first_loss:.4g} at the first "
                f"step, gradient norm {seen.grad_norm:.4g} with a median of {usual:.4g}"
            )
        return None

    def state(self) -> dict[str, object]:
        """What a resumed run needs to judge alike."""
        return {
            "first_loss": self.first_loss,
            "norms": list(self.norms),
            "skipped": self.skipped,
        }

    def load_state(self, values: dict[str, object]) -> None:
        """Go on where `state` was taken."""
        first, norms, skipped = values["first_loss"], values["norms"], values["skipped"]
        self.first_loss = float(first) if isinstance(first, int | float) else None
        self.norms.extend(norms if isinstance(norms, list) else ())
        self.skipped = int(skipped) if isinstance(skipped, int) else 0


def name_rows(rows: Sequence[int]) -> str:
    """Row numbers for a message."""
    shown = ", ".join(map(str, sorted(rows)[:ROWS_SHOWN]))
    more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
    return f"rows {shown}{more} (counted from 0)"
