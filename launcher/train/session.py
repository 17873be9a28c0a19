"""A training session: plan -> model, data, SFTTrainer -> run directory."""

from __future__ import annotations

import time
from typing import Any

from transformers import EarlyStoppingCallback
from trl import SFTConfig, SFTTrainer

from launcher.errors import PlanRefused
from launcher.plan.types import Plan
from launcher.runs.directory import RunDirectory, append_line
from launcher.train.callbacks import BatchCallback, RecordCallback, SamplesCallback
from launcher.train.data import load_rows, split_answer
from launcher.train.generate import answers
from launcher.train.model import (
    keep_4bit_unpacked,
    load_tokenizer,
    model_init_kwargs,
    peft_config,
    quantization_config,
    set_adapter_dtype,
)
from launcher.train.process import rank_of
from launcher.train.save import save_final, save_fsdp1
from launcher.train.state import check_engine, check_world, configure_state, wrapped_type


class CheckedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that checks the engine and the batch equation on its first step."""

    plan: Plan
    rows_seen = 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Count rows until the first optimizer step."""
        if self.state.global_step == 0:
            self.rows_seen += len(inputs["input_ids"])
        return super().training_step(model, inputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights; FSDP1 needs a way of its own."""
        if wrapped_type(self.model_wrapped) == "FSDP1":
            save_fsdp1(self, output_dir or self.args.output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def check_batch(self) -> None:
        """The batch that was really seen, over all ranks, against the plan's equation.

        Raises:
            PlanRefused: where the first optimizer step saw another number of sequences.
        """
        import torch

        seen = torch.tensor(self.rows_seen, device=self.accelerator.device)
        total = int(self.accelerator.reduce(seen, "sum"))
        planned = self.plan.batch.global_batch_size
        # A packed row holds many sequences, and fewer rows than one batch are repeated.
        if self.args.packing or len(self.train_dataset) < planned or total == planned:
            return
        raise PlanRefused(
            "batch_equation",
            f"the first step saw {total} sequences, the plan says {planned}",
            why="the effective batch is not the one asked for",
            fix="report this with the plan and the log",
        )


def train(plan: Plan, run: RunDirectory) -> None:
    """Train, save and evaluate as the plan says; raises what goes wrong."""
    started = time.monotonic()
    check_world(plan)
    _stage(run, "starting", state="running")
    configure_state(plan)
    arguments = sft_config(plan, run)
    tokenizer = load_tokenizer(plan)
    assert plan.worker.dataset is not None  # noqa: S101 - refused before the launch
    with arguments.main_process_first(desc="dataset"):
        rows, held_out = load_rows(plan.worker.dataset, arguments.seed)
    _stage(run, "loading the model")
    trainer = make_trainer(plan, run, arguments, tokenizer, rows, held_out)
    trainer.add_callback(RecordCallback(run))
    trainer.add_callback(BatchCallback(trainer.check_batch))
    examiner = Examiner(plan, run, trainer, tokenizer, held_out)
    trainer.add_callback(SamplesCallback(plan.worker.samples["every_steps"], examiner.examine))
    patience = plan.worker.evaluation["early_stopping_patience"]
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    _stage(run, "preparing", seconds_to_ready=round(time.monotonic() - started, 3))
    trainer.train()
    if held_out is not None:
        _stage(run, "evaluating")
        trainer.evaluate()
    examiner.examine(trainer.state.global_step, last=True)
    _stage(run, "saving", step=trainer.state.global_step)
    save_final(plan, run, trainer)
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    _stage(run, "done", state="completed")


def sft_config(plan: Plan, run: RunDirectory) -> Any:
    """`SFTConfig` of the plan; built before the model, for it sets the device and ZeRO-3."""
    kwargs = dict(plan.worker.training_arguments)
    return SFTConfig(
        output_dir=str(run.checkpoints), model_init_kwargs=model_init_kwargs(plan), **kwargs
    )


def make_trainer(
    plan: Plan, run: RunDirectory, arguments: Any, tokenizer: Any, rows: Any, held_out: Any
) -> Any:
    """The trainer, which checks its engine as soon as the model is wrapped."""
    trainer = CheckedTrainer(
        model=plan.worker.model["path"],
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        quantization_config=quantization_config(plan),
        peft_config=peft_config(plan),
    )
    trainer.plan = plan
    set_adapter_dtype(plan, trainer.model)
    if plan.topology.device == "cpu":
        keep_4bit_unpacked(trainer.model)
    prepare = trainer._prepare_for_training  # noqa: SLF001 - the one place that wraps

    def prepare_and_check(*args: Any, **kwargs: Any) -> Any:
        model, loader = prepare(*args, **kwargs)
        _stage(run, "training", engine=check_engine(plan, trainer.model_wrapped))
        return model, loader

    trainer._prepare_for_training = prepare_and_check  # noqa: SLF001
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
        found = answers(self.trainer, self.tokenizer, prompts, limit)
        if rank_of() == 0:
            self._write(step, found, held_out)
        _stage(self.run, "training")

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
