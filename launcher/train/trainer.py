"""SFTTrainer with what a run must never get wrong: its engine, its batch, its rows, its saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from trl import SFTTrainer

from launcher.errors import PlanRefused
from launcher.plan.types import Plan
from launcher.runs.checkpoints import Checkpoint
from launcher.train.callbacks import EVALUATION
from launcher.train.checkpoint import CheckpointStore
from launcher.train.control import Agreement, EvaluationStopped, Heartbeat, Ranks
from launcher.train.health import Health, UnhealthyStepError, name_rows
from launcher.train.order import GlobalBatchOrder, mask_filling, positions
from launcher.train.save import save_fsdp1
from launcher.train.state import check_engine, wrapped_type

OWN_ORDER = ("random", "sequential")


class CheckedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that agrees with all ranks on every step, and saves whole checkpoints.

    `prepare_run` gives it what the constructor's caller cannot.
    """

    plan: Plan
    ranks: Ranks
    store: CheckpointStore
    health: Health
    order: GlobalBatchOrder | None = None
    row_numbers: list[int] | None = None
    on_engine: Callable[[str], None]
    resumed: Checkpoint | None = None
    agreement: Agreement | None = None
    stopped = False
    nothing_left = False
    """Resumed where early stopping had ended the run already."""

    def prepare_run(
        self,
        plan: Plan,
        ranks: Ranks,
        store: CheckpointStore,
        row_numbers: list[int] | None,
        heartbeat: Heartbeat,
        on_engine: Callable[[str], None],
    ) -> None:
        """Hand over the run.

        Args:
            plan: the run's plan.
            ranks: their side channel.
            store: the run's checkpoints.
            row_numbers: each prepared row's number in the dataset; None where unknown.
            heartbeat: ends this rank where it makes no progress.
            on_engine: told the engine around the model, once it is there.
        """
        self.plan, self.ranks, self.store = plan, ranks, store
        self.health, self.row_numbers, self.on_engine = store.health, row_numbers, on_engine
        self.heartbeat = heartbeat
        self._micro_losses: list[Any] = []
        self._grad_norm = 0.0
        self._rows_in_step = 0
        self._loss_spoilt = False
        self.owed: set[str] = set()

    # --- rows ---

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The same rows in every step on any number of ranks."""
        if self.args.train_sampling_strategy not in OWN_ORDER:
            return super()._get_train_sampler(train_dataset)
        self.order = GlobalBatchOrder(
            len(self.train_dataset if train_dataset is None else train_dataset),
            self.plan.batch.global_batch_size,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle=self.args.train_sampling_strategy == "random",
        )
        return self.order

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> Any:
        """This rank's micro batches of a step, the filling masked."""
        if self.nothing_left or self.state.global_step >= self.state.max_steps:
            # Resumed from the last step's checkpoint: nothing is left to train.
            self.control.should_training_stop = True
            return [], None
        order = self.order
        if order is None or not (filling := order.filling(self.state.global_step)):
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        masked = mask_filling(
            epoch_iterator,
            real=order.global_batch_size - filling,
            rank=self.ranks.rank,
            world=self.ranks.world,
            micro_batch_size=self.args.per_device_train_batch_size,
            length_of=self._tokens_at,
        )
        return super().get_batch_samples(masked, num_batches, device)

    def _tokens_at(self, place: int) -> int:
        """Tokens of the sequence at a place in this step's global batch."""
        assert self.order is not None  # noqa: S101 - there is no filling without it
        row = self.order.row_at(self.state.global_step, place)
        return len(self.train_dataset[row]["input_ids"])

    # --- one step ---

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Remember each micro batch's loss, and count the first step's rows."""
        self._rows_in_step += len(inputs["input_ids"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._grad_norm = 0.0 if norm is None else float(norm)
        return norm

    def agree_on_step(self) -> None:
        """Before the optimizer steps: what all ranks saw, and whether they go on.

        Raises:
            UnhealthyStepError: where the health policy says stop; on all ranks alike.
        """
        if self.state.global_step == 0:
            self._check_batch()
        losses, self._micro_losses, self._rows_in_step = self._micro_losses, [], 0
        total = float(torch.stack(losses).sum()) if losses else 0.0
        self.agreement = self.ranks.agree(total, self._grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        problem = self.health.problem(self.agreement, scaled=scaled)
        self._loss_spoilt = not self.agreement.finite
        if problem is not None and self.health.policy != "ignore":
            self._handle(problem, losses)

    def _handle(self, problem: str, losses: list[Any]) -> None:
        step = self.state.global_step + 1
        message = f"step {step} is unhealthy: {problem}; {self._blame(losses)}"
        if self.health.policy == "skip" and self.health.may_skip():
            # Without gradients the optimizer leaves every weight and its state alone.
            self.model_wrapped.zero_grad(set_to_none=True)
            self.report(f"{message}; skipped")
            return
        raise UnhealthyStepError(message)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After an unhealthy step, the running loss starts anew: NaN would stay in it for good."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._loss_spoilt:
            self._tr_loss.zero_()
            self._loss_spoilt = False

    # --- stopping ---

    def stop_here(self) -> None:
        """Save and stop at this step; all ranks alike."""
        self.control.should_save = self.control.should_training_stop = self.stopped = True

    def put_off(self, what: str) -> None:
        """Leave something due at this step to the resume."""
        self.owed.add(what)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Nothing where a stop was asked for on the way."""
        try:
            found: dict[str, float] = super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.put_off(EVALUATION)
            self.stop_here()
            return {}
        return found

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return bool(metrics) and bool(super()._determine_best_metric(metrics, trial))

    def make_up_evaluation(self) -> None:
        """The evaluation that a stop has put off; early stopping may end the training by it."""
        self.owed.discard(EVALUATION)
        self._determine_best_metric(self._evaluate(None, None), None)
        self.nothing_left = self.control.should_training_stop

    def evaluate_last(self) -> None:
        """After the training: no checkpoint waits for it."""
        try:
            self.evaluate()
        except EvaluationStopped:
            self.stopped = True

    def report(self, message: str) -> None:
        """Say something in rank 0's log."""
        if self.ranks.rank == 0:
            print(message, flush=True)  # noqa: T201 - standard output is this rank's log

    def _blame(self, losses: list[Any]) -> str:
        """The rows of the micro batches whose own loss is not finite, else of the step."""
        if self.order is None:
            return "rows unknown with this sampling strategy"
        rows = self.order.step_rows(self.state.global_step)
        channel, micro = self.ranks, self.args.per_device_train_batch_size
        mine = [
            rows[place]
            for micro_step, loss in enumerate(losses)
            if not torch.isfinite(loss)
            for place in positions(micro_step, channel.rank, channel.world, micro)
            if place < len(rows)
        ]
        bad = [row for found in channel.gather(mine) for row in found] or rows
        numbers = self.row_numbers
        return name_rows([numbers[row] for row in bad] if numbers else bad)

    def _check_batch(self) -> None:
        """The batch that was really seen, over all ranks, against the plan's equation.

        Raises:
            PlanRefused: where the first optimizer step saw another number of sequences.
        """
        total = sum(self.ranks.gather(self._rows_in_step))
        planned = self.plan.batch.global_batch_size
        # A packed row holds many sequences, a padding-free batch is one long row.
        if self.args.packing or self.args.padding_free or total == planned:
            return
        raise PlanRefused(
            "batch_equation",
            f"the first step saw {total} sequences, the plan says {planned}",
            why="the effective batch is not the one asked for",
            fix="report this with the plan and the log",
        )

    # --- saving and resuming ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights; FSDP1 needs a way of its own."""
        if wrapped_type(self.model_wrapped) == "FSDP1":
            save_fsdp1(self, output_dir or self.args.output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A whole checkpoint in place of transformers' own."""
        self.heartbeat.beat(self.plan.worker.limits["shutdown_timeout_seconds"])
        self.store_flos()
        self.store.save(self)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Wrap, check the engine, then load: in this order for every engine."""
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.on_engine(check_engine(self.plan, self.model_wrapped))
        if self.resumed is not None:
            self.store.load(self, self.resumed)
        return model, loader

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Step and position as saved; how often to log and save as this plan says."""
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: `_prepare_for_training` loads once the model is wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is not None:
            self.store.load_random(self.resumed)
