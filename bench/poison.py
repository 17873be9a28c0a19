"""Something bad in one rank at one step: a bad loss, a hang, a stop at an unlucky moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

FOREVER_SECONDS = 100_000


def poison(trainer: Any, kind: str, step: int, rank: int) -> None:
    """Patch a trainer class.

    Args:
        trainer: the class.
        kind: nan, hang, evaluation or samples.
        step: optimizer step, counted from 1.
        rank: the rank that it happens to.
    """
    KINDS[kind](trainer, step, rank)


def _bad_loss(trainer: Any, step: int, rank: int) -> None:
    def change(loss: Any) -> Any:
        return loss * float("nan")

    _in_training(trainer, step, rank, change)


def _hang(trainer: Any, step: int, rank: int) -> None:
    def change(loss: Any) -> Any:
        time.sleep(FOREVER_SECONDS)
        return loss

    _in_training(trainer, step, rank, change)


def _in_training(trainer: Any, step: int, rank: int, change: Callable[[Any], Any]) -> None:
    from launcher.train.process import rank_of

    whole = trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, *args, **kwargs)
        if self.model.training and (self.state.global_step + 1, rank_of()) == (step, rank):
            loss = change(loss)
        return loss

    trainer.compute_loss = compute_loss


def _stop_in_evaluation(trainer: Any, step: int, rank: int) -> None:
    """SIGUSR1 in the first batch of the evaluation after a step."""
    from launcher.train.process import rank_of

    whole = trainer.prediction_step

    def prediction_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (self.state.global_step, rank_of()) == (step, rank):
            os.kill(os.getpid(), signal.SIGUSR1)
        return whole(self, *args, **kwargs)

    trainer.prediction_step = prediction_step


def _stop_in_samples(trainer: Any, step: int, rank: int) -> None:
    """SIGUSR1 in the first answer of the samples after a step; one answer a batch."""
    from launcher.train import generate
    from launcher.train.process import rank_of

    generate.GENERATION_BATCH = 1
    whole = generate._model_for_generation  # noqa: SLF001

    def model_for_generation(trainer: Any) -> Any:
        if (trainer.state.global_step, rank_of()) == (step, rank):
            os.kill(os.getpid(), signal.SIGUSR1)
        return whole(trainer)

    generate._model_for_generation = model_for_generation  # noqa: SLF001


KINDS: dict[str, Callable[[Any, int, int], None]] = {
    "nan": _bad_loss,
    "hang": _hang,
    "evaluation": _stop_in_evaluation,
    "samples": _stop_in_samples,
}
