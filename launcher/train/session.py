"""A training session: plan -> model, data, SFTTrainer -> run directory."""

from __future__ import annotations

import time
from typing import Any

from transformers import EarlyStoppingCallback
from trl import SFTConfig

from launcher.plan.types import Plan
from launcher.runs.checkpoints import Checkpoint
from launcher.runs.directory import RunDirectory, append_line
from launcher.runs.prepared import usable
from launcher.train.callbacks import (
    AgreementCallback,
    EarlyStopSaveCallback,
    HeartbeatCallback,
    RecordCallback,
    SamplesCallback,
)
from launcher.train.checkpoint import CheckpointStore
from launcher.train.control import (
    EvaluationStopped,
    Heartbeat,
    Ranks,
    StoppedBeforeTraining,
    StopRequest,
)
from launcher.train.data import load_rows, loss_arguments, row_numbers, split_answer
from launcher.train.generate import answers
from launcher.train.health import Health
from launcher.train.model import (
    keep_4bit_unpacked,
    load_tokenizer,
    model_init_kwargs,
    peft_config,
    quantization_config,
    set_adapter_dtype,
)
from launcher.train.prepare import Rows, read_rows
from launcher.train.process import rank_of
from launcher.train.save import save_final
from launcher.train.shared import check_shared
from launcher.train.state import check_world, configure_state
from launcher.train.tokens import usable_rows
from launcher.train.trainer import CheckedTrainer

MARGIN_SECONDS = 60.0


def train(plan: Plan, run: RunDirectory, stop: StopRequest) -> None:
    """Train, save and evaluate as the plan says; raises what goes wrong.

    It goes on from the run's newest whole checkpoint where there is one. A stop that was
    asked for ends it in state `preempted`.
    """
    trainer, examiner = prepare(plan, run, stop)
    checkpoint = trainer.resumed
    trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    for stage in (_evaluate, examiner.examine_last, _save):
        if trainer.stopped or trainer.ranks.stop_wanted():
            _end_early(run, trainer, stop)
            return
        stage(plan, run, trainer)
    stop.disarm()
    trainer.end()
    _stage(run, "done", state="completed", step=trainer.state.global_step)


def prepare(plan: Plan, run: RunDirectory, stop: StopRequest) -> tuple[Any, Examiner]:
    """Process group, rows, checkpoint, model, trainer: all that comes before the first step."""
    started = time.monotonic()
    check_world(plan)
    _stage(run, "starting", state="running", error=None)
    configure_state(plan)
    arguments = sft_config(plan, run)
    tokenizer = load_tokenizer(plan)
    with arguments.main_process_first(desc="dataset"):
        rows = _rows(plan, run, arguments.seed)
    if not rows.prepared:
        for name, value in loss_arguments(plan, rows.train.column_names).items():
            setattr(arguments, name, value)
    ranks = Ranks(stop)
    check_shared(run, ranks)
    store = CheckpointStore(plan, run, ranks, Health(plan.worker.health["policy"]))
    _stage(run, "looking for a checkpoint")
    checkpoint = store.find(lambda text: _say(run, text))
    _stage(run, "loading the model")
    trainer = make_trainer(plan, arguments, tokenizer, rows.train, rows.evaluation)
    trainer.prepare_run(
        plan,
        ranks,
        store,
        rows.numbers if rows.prepared else row_numbers(rows.train, trainer.train_dataset),
        Heartbeat(time_limits(plan)[0]),
        lambda engine: _stage(run, "loading the checkpoint", engine=engine),
    )
    examiner = Examiner(plan, run, trainer, tokenizer, rows.held_out)
    for callback in callbacks(plan, run, trainer, examiner):
        trainer.add_callback(callback)
    ready = round(time.monotonic() - started, 3)
    _stage(run, "preparing", seconds_to_ready=ready, prepared=rows.prepared)
    _resume(run, trainer, checkpoint)
    return trainer, examiner


def _rows(plan: Plan, run: RunDirectory, seed: int) -> Rows:
    """The prepared rows, else the dataset's own, which the trainer prepares then."""
    if usable(plan, run):
        return read_rows(run)
    assert plan.worker.dataset is not None  # noqa: S101 - refused before the launch
    tokenised = usable_rows(plan, load_tokenizer(plan))
    train, held_out = load_rows(plan.worker.dataset, seed, tokenised)
    return Rows(train, held_out, held_out)


def _evaluate(plan: Plan, run: RunDirectory, trainer: Any) -> None:
    if trainer.eval_dataset is not None:
        _stage(run, "evaluating")
        trainer.evaluate_last()


def _save(plan: Plan, run: RunDirectory, trainer: Any) -> None:
    _stage(run, "saving", step=trainer.state.global_step)
    save_final(plan, run, trainer)
    trainer.ranks.wait()


def callbacks(plan: Plan, run: RunDirectory, trainer: Any, examiner: Examiner) -> list[Any]:
    """The run's callbacks, in the order they are called."""
    worker = plan.worker
    found: list[Any] = [
        RecordCallback(run, trainer),
        AgreementCallback(trainer),
        HeartbeatCallback(trainer.ranks, trainer.heartbeat, time_limits(plan)[1]),
        SamplesCallback(trainer, worker.samples["every_steps"], examiner.examine),
    ]
    patience = worker.evaluation["early_stopping_patience"]
    if patience is not None:
        found += [EarlyStoppingCallback(patience), EarlyStopSaveCallback()]
    return found


def time_limits(plan: Plan) -> tuple[float, float]:
    """Seconds without progress before a rank ends, and before a collective fails.

    On GPUs the collective comes first, for its watchdog writes the flight recorder; on CPU
    the rank, whose stacks say more than gloo's error. A save may take longer than a step.
    """
    limits = plan.worker.limits
    stuck = float(limits["stuck_after_seconds"])
    save = max(stuck, float(limits["shutdown_timeout_seconds"]))
    if plan.topology.device == "cuda":
        return stuck + MARGIN_SECONDS, save
    return stuck, save + MARGIN_SECONDS


def _resume(run: RunDirectory, trainer: Any, checkpoint: Checkpoint | None) -> None:
    """Tell the trainer and the records where the run goes on."""
    trainer.resumed = checkpoint
    if rank_of() != 0:
        return
    if checkpoint is None:
        run.forget_after(-1)  # what an attempt without a checkpoint has left
        return
    _say(run, f"goes on from {checkpoint.path.name}")
    run.forget_after(checkpoint.step)
    run.update_status(resumed_from=checkpoint.path.name, step=checkpoint.step)


def _end_early(run: RunDirectory, trainer: Any, stop: StopRequest) -> None:
    why = (*trainer.ranks.stop_reasons(), "a stop request")[0]
    _stage(run, f"stopped by {why}", state="preempted", step=trainer.state.global_step)
    trainer.ranks.wait()
    stop.disarm()
    trainer.end()


def _say(run: RunDirectory, text: str) -> None:
    """One line in the log, and in the status for those who follow."""
    if rank_of() == 0:
        print(text, flush=True)  # noqa: T201 - standard output is this rank's log
        notes = [*run.read_status().get("notes", []), text]
        run.update_status(notes=notes)


def sft_config(plan: Plan, run: RunDirectory) -> Any:
    """`SFTConfig` of the plan; built before the model, for it sets the device and ZeRO-3."""
    kwargs = dict(plan.worker.training_arguments)
    if usable(plan, run):
        # The masks are in the labels already; TRL would look for the turns they came from.
        kwargs |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "assistant_only_loss": False}
    return SFTConfig(
        output_dir=str(run.checkpoints), model_init_kwargs=model_init_kwargs(plan), **kwargs
    )


def make_trainer(plan: Plan, arguments: Any, tokenizer: Any, rows: Any, held_out: Any) -> Any:
    """The trainer with the model in the dtypes that the plan says."""
    trainer = CheckedTrainer(
        model=plan.worker.model["path"],
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        quantization_config=quantization_config(plan),
        peft_config=peft_config(plan),
    )
    set_adapter_dtype(plan, trainer.model)
    if plan.topology.device == "cpu":
        keep_4bit_unpacked(trainer.model)
    return trainer


class Examiner:
    """Samples and exact match, written by rank 0."""

    def __init__(
        self, plan: Plan, run: RunDirectory, trainer: Any, tokenizer: Any, held_out: Any
    ) -> None:
        self.plan, self.run, self.trainer, self.tokenizer = plan, run, trainer, tokenizer
        self.prompts = list(plan.worker.samples["prompts"])
        exact = plan.worker.evaluation["exact_match"] and held_out is not None
        self.held_out = [split_answer(row) for row in held_out] if exact else []

    def examine(self, step: int, *, last: bool = False) -> None:
        """Answer the sample prompts; at both ends of the run, the held-out ones too."""
        limit = self.plan.worker.samples["max_new_tokens"]
        held_out = self.held_out if last or step == 0 else []
        prompts = [*self.prompts, *(prompt for prompt, _ in held_out)]
        if not prompts:
            return
        _stage(self.run, "answering held-out prompts" if held_out else "sampling")
        try:
            found = answers(self.trainer, self.tokenizer, prompts, limit)
        except EvaluationStopped:
            if step == 0:  # there is nothing to save yet, and the next start answers anew
                reasons = self.trainer.ranks.stop_reasons()
                raise StoppedBeforeTraining(reasons[0]) from None
            self.trainer.stop_here()
            return
        if rank_of() == 0:
            self._write(step, found, held_out)
        _stage(self.run, "training")

    def examine_last(self, plan: Plan, run: RunDirectory, trainer: Any) -> None:
        """The trained model's answers."""
        self.examine(trainer.state.global_step, last=True)

    def _write(self, step: int, found: list[tuple[str, bool]], held_out: list[Any]) -> None:
        for prompt, (answer, stopped) in zip(self.prompts, found, strict=False):
            append_line(
                self.run.samples,
                {"step": step, "prompt": prompt, "answer": answer, "stopped": stopped},
            )
        if held_out:
            pairs = list(zip(found[len(self.prompts) :], held_out, strict=True))
            right = sum(answer == reference.strip() for (answer, _), (_, reference) in pairs)
            ended = sum(stopped for (_, stopped), _ in pairs)
            append_line(
                self.run.metrics,
                {
                    "step": step,
                    "exact_match": right / len(pairs),
                    "stopped": ended / len(pairs),
                    "held_out_rows": len(pairs),
                },
            )


def _stage(run: RunDirectory, stage: str, **changes: Any) -> None:
    if rank_of() == 0:
        run.update_status(stage=stage, **changes)
