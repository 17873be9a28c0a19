"""What a run tells while it trains: metrics, status, samples. Only rank 0 writes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from launcher.runs.directory import RunDirectory, append_line
from launcher.train.control import EvaluationStopped, Heartbeat, Ranks

STATUS_INTERVAL_SECONDS = 0.5
# What a stop puts off to the resume.
EVALUATION, SAMPLES = "evaluation", "samples"
METRIC_NAMES = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy")


class RecordCallback(TrainerCallback):  # type: ignore[misc]
    """metrics.jsonl and status.json."""

    def __init__(self, run: RunDirectory, trainer: Any) -> None:
        self.run, self.trainer = run, trainer
        self.last_status = 0.0
        self.last_time = time.monotonic()
        self.last_tokens = 0.0
        self.last_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how many steps there will be."""
        self.last_time = time.monotonic()
        self.last_step = state.global_step
        self.last_tokens = self.trainer._total_train_tokens  # noqa: SLF001 - TRL's only counter
        if state.is_world_process_zero:
            self.run.update_status(
                stage="training", step=state.global_step, max_steps=state.max_steps
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the status, at most twice a second."""
        now = time.monotonic()
        if state.is_world_process_zero and now - self.last_status > STATUS_INTERVAL_SECONDS:
            self.last_status = now
            # A full disk is the next checkpoint's to report, not a healthy step's.
            with contextlib.suppress(OSError):
                self.run.update_status(step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the newest checkpoint."""
        if state.is_world_process_zero:
            self.run.update_status(last_checkpoint=f"checkpoint-{state.global_step}")

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line for a logged step."""
        if not state.is_world_process_zero or not logs:
            return
        values = {name: _number(logs[name]) for name in METRIC_NAMES if name in logs}
        if not values:
            return
        record: dict[str, Any] = {
            "step": state.global_step,
            "epoch": state.epoch,
            "time": time.time(),
            **values,
        }
        if "loss" in logs:
            record |= self._speed(args, state, logs.get("num_tokens", 0.0))
        with contextlib.suppress(OSError):
            append_line(self.run.metrics, record)

    def _speed(self, args: Any, state: Any, tokens: float) -> dict[str, Any]:
        import torch

        now = time.monotonic()
        elapsed = max(now - self.last_time, 1e-9)
        samples = (
            (state.global_step - self.last_step)
            * args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size
        )
        speed = {
            "tokens": tokens,
            "tokens_per_second": (tokens - self.last_tokens) / elapsed,
            "samples_per_second": samples / elapsed,
            "gpu_memory_bytes": (
                torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
            ),
        }
        self.last_time, self.last_tokens, self.last_step = now, tokens, state.global_step
        return speed


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity: null."""
    return value if math.isfinite(value) else None


class SamplesCallback(TrainerCallback):  # type: ignore[misc]
    """Generations at fixed prompts: before the first step, every N steps, after the last."""

    def __init__(self, trainer: Any, every_steps: int | None, write: Callable[[int], None]) -> None:
        self.trainer = trainer
        self.every_steps = every_steps
        self.write = write

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The base model's answers, to compare with; those that a stop has put off."""
        if state.global_step == 0 or SAMPLES in self.trainer.owed:
            self.trainer.owed.discard(SAMPLES)
            self.write(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answers on the way."""
        due = self.every_steps and state.global_step % self.every_steps == 0
        # The answers after the last step are those of the end of the run.
        ends = control.should_training_stop and not self.trainer.stopped
        if not due or ends or state.global_step >= state.max_steps:
            return
        if not self.trainer.stopped:
            self.write(state.global_step)
        if self.trainer.stopped:
            self.trainer.put_off(SAMPLES)


class AgreementCallback(TrainerCallback):  # type: ignore[misc]
    """Stops all ranks at the same step, with a checkpoint.

    Evaluation and samples can wait, a grace period cannot: they are put off to the resume.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a stop is a flag that is looked at once a step."""
        self.trainer.ranks.stop.training = True
        if EVALUATION in self.trainer.owed:
            self.trainer.make_up_evaluation()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the order its epoch: no wrapper of the loader passes it on in every case."""
        order = self.trainer.order
        if order is not None:
            order.epoch = state.global_step // order.steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks are here with all their micro batches."""
        self.trainer.agree_on_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where any rank was asked to."""
        if self.trainer.agreement.stop:
            if control.should_evaluate:
                self.trainer.put_off(EVALUATION)
            control.should_evaluate = False
            self.trainer.stop_here()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave an evaluation between two batches, of which all ranks have as many."""
        if self.trainer.ranks.stop_wanted():
            raise EvaluationStopped


class EarlyStopSaveCallback(TrainerCallback):  # type: ignore[misc]
    """A checkpoint where early stopping ends the training; comes after that callback."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the evaluation has decided."""
        if control.should_training_stop:
            control.should_save = True


class HeartbeatCallback(TrainerCallback):  # type: ignore[misc]
    """Progress, for the timer that ends stuck ranks; and a limit on every collective."""

    def __init__(self, ranks: Ranks, heartbeat: Heartbeat, collective_seconds: float) -> None:
        self.ranks, self.heartbeat = ranks, heartbeat
        self.collective_seconds = collective_seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Data and model are there: what takes long from now on is stuck."""
        self.ranks.limit_collectives(self.collective_seconds)
        self.heartbeat.start()

    def _beat(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.heartbeat.beat()

    on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_save = _beat

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What follows has no steps to measure it by; the collectives' limit stays."""
        self.heartbeat.stop()
