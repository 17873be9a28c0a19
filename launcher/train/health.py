"""Losses and gradients that say the run has gone wrong, found before they are saved.

A step is unhealthy where its loss or gradient norm is not finite, or where they explode: the
loss stands above twice that of the run's first step for several steps, the gradient norm above
a thousand times its median, or both at once above twice and a hundred times. One hard batch
does none of that. Under fp16 an infinite gradient norm alone is the loss scaler's to mend.
"""

from __future__ import annotations

import math
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
GRAD_NORM_FACTOR_ALONE = 1000.0
STEPS_ABOVE = 3
# A scaler that halves its scale this often in a row has found no scale that works.
MOST_OVERFLOWS_IN_A_ROW = 25
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
    overflows_in_a_row: int = 0
    above_in_a_row: int = 0
    skipped: int = 0

    def problem(self, seen: Agreement, *, scaled: bool = False) -> str | None:
        """What is wrong with a step; None for a healthy one, which is remembered.

        Args:
            seen: what all ranks saw.
            scaled: whether a loss scaler skips steps whose gradients overflow (fp16).
        """
        if scaled and not seen.finite and math.isfinite(seen.loss):
            self.overflows_in_a_row += 1
            if self.overflows_in_a_row <= MOST_OVERFLOWS_IN_A_ROW:
                return None
        elif seen.finite:
            self.overflows_in_a_row = 0
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
        above = seen.loss > LOSS_FACTOR * self.first_loss
        self.above_in_a_row = self.above_in_a_row + 1 if above else 0
        if (
            self.above_in_a_row >= STEPS_ABOVE
            or seen.grad_norm > GRAD_NORM_FACTOR_ALONE * usual > 0
            or (above and seen.grad_norm > GRAD_NORM_FACTOR * usual)
        ):
            return (
                f"it explodes: loss {seen.loss:.4g} after {self.first_loss:.4g} at the first "
                f"step, gradient norm {seen.grad_norm:.4g} with a median of {usual:.4g}"
            )
        return None

    def state(self) -> dict[str, object]:
        """What a resumed run needs to judge alike."""
        return {
            "first_loss": self.first_loss,
            "norms": list(self.norms),
            "skipped": self.skipped,
            "in_a_row": [self.skipped_in_a_row, self.overflows_in_a_row, self.above_in_a_row],
        }

    def load_state(self, values: dict[str, object]) -> None:
        """Go on where `state` was taken."""
        first, norms, skipped = values["first_loss"], values["norms"], values["skipped"]
        self.first_loss = float(first) if isinstance(first, int | float) else None
        self.norms.extend(norms if isinstance(norms, list) else ())
        self.skipped = int(skipped) if isinstance(skipped, int) else 0
        rows = values.get("in_a_row")
        if isinstance(rows, list):
            self.skipped_in_a_row, self.overflows_in_a_row, self.above_in_a_row = rows


def name_rows(rows: Sequence[int]) -> str:
    """Row numbers for a message."""
    shown = ", ".join(map(str, sorted(rows)[:ROWS_SHOWN]))
    more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
    return f"rows {shown}{more} (counted from 0)"
