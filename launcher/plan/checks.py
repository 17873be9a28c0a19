"""Combinations that would fail, waste or surprise later, refused before anything starts.

Each check is one function over the resolved spec and the facts; `CHECKS` is their order.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from launcher.errors import PlanRefused, Refusal, SpecError
from launcher.facts.probe import Facts
from launcher.plan.adapter import METHODS
from launcher.spec.schema import Spec

# Attention that isolates packed documents by their position ids (TRL 1.16, BFD packing).
ISOLATING_ATTENTION = ("flash_attention_2", "flash_attention_3")
# Optimizer name part -> why it cannot run with a sharding or offloading engine.
OPTIMIZER_LIMITS = (
    ("paged", ("fsdp", "fsdp1", "hsdp"), "its state fails at the checkpoint", "bitsandbytes#1732"),
    ("8bit", ("fsdp", "fsdp1", "hsdp"), "its state fails at the checkpoint", "bitsandbytes#1732"),
)
# Optimizer name part -> why a checkpoint would not hold its whole state.
STATE_NOT_SAVED = (
    ("schedule_free", "it counts in its parameter groups, and swaps the weights to evaluate"),
    ("galore", "its projections are objects of its own, not tensors"),
    ("apollo", "its projections are objects of its own, not tensors"),
    ("layerwise", "it steps inside the backward pass, one optimizer a layer"),
    ("lomo", "it steps inside the backward pass"),
)
ALL_LINEAR = "all-linear"
WITH_ANSWERS = ("messages", "prompt_completion", "alpaca")


@dataclass(frozen=True)
class Case:
    """What a check may look at."""

    spec: Spec
    """Resolved: nothing is None that has a default."""
    facts: Facts
    strategy: str
    device: str


def run_checks(case: Case) -> None:
    """Raise the first refusal.

    Raises:
        Refusal: what would not work, with the fix.
    """
    for check in CHECKS:
        refusal = check(case)
        if refusal is not None:
            raise refusal


def precision(case: Case) -> Refusal | None:
    """fp16 with bf16; bf16 on a GPU without it; half precision on CPU's gloo."""
    training, gpu = case.spec.training, case.facts.gpu
    if training.bf16 and training.fp16:
        return PlanRefused(
            "precision", "training.bf16 and training.fp16 are both on", fix="keep one of the two"
        )
    if training.bf16 and gpu and not gpu.bf16:
        return PlanRefused(
            "precision",
            f"{gpu.name} has no bf16",
            fix="use --set training.bf16=false --set training.fp16=true",
            source=gpu.source,
        )
    if training.fp16 and case.device == "cpu":
        return PlanRefused(
            "precision",
            "fp16 needs a GPU",
            why="its loss scaling has no CPU path",
            fix="use --set training.fp16=false",
        )
    return None


def offload_on_cpu(case: Case) -> Refusal | None:
    """FSDP's CPU offload asks torch for an accelerator and finds none (torch 2.13)."""
    sharded = case.strategy in ("fsdp", "fsdp1", "hsdp")
    if case.device != "cpu" or case.spec.offload == "none" or not sharded:
        return None
    return PlanRefused(
        "offload_on_cpu",
        f"--offload {case.spec.offload} under {case.strategy} cannot run with --device cpu",
        why="there is no GPU memory to spare",
        fix="use --offload none to rehearse",
    )


def stored_quantised(case: Case) -> Refusal | None:
    """Weights that lie quantised in the model's folder take no gradient."""
    model = case.facts.model
    if case.spec.method != "full" or model is None or model.quantized is None:
        return None
    return PlanRefused(
        "quantised_full",
        f"the weights of {model.path} are {model.quantized} and cannot be fully fine-tuned",
        why="quantised weights take no gradient",
        fix="use method lora, or the unquantised model",
        source="transformers 5.23 Trainer: ValueError on quantised models without adapter",
    )


def length(case: Case) -> Refusal | None:
    """A length above the positions that the model knows."""
    model, asked = case.facts.model, case.spec.training.max_length
    positions = model.max_position_embeddings if model else None
    if positions and asked and asked > positions:
        return PlanRefused(
            "max_length",
            f"training.max_length {asked} is above the model's {positions} positions",
            fix=f"use --set training.max_length={positions}",
            source="config.json max_position_embeddings",
        )
    return None


def packing(case: Case) -> Refusal | None:
    """Packing whose attention would cross documents."""
    spec = case.spec
    if not spec.training.packing or spec.model.attn_implementation in ISOLATING_ATTENTION:
        return None
    return PlanRefused(
        "packing",
        f"packing with {spec.model.attn_implementation or 'the default attention'} lets documents "
        "attend to each other",
        why="only FlashAttention reads the position ids that separate them",
        fix="use --set model.attn_implementation=flash_attention_2, or training.packing=false",
        source="trl#3067",
    )


def chat_template(case: Case) -> Refusal | None:
    """Messages without a chat template."""
    model, data = case.facts.model, case.facts.dataset
    if data is None or model is None or not data.conversational:
        return None
    said = case.spec.training.sft_fields()
    if model.has_chat_template is not False or said.get("chat_template_path"):
        return None
    return PlanRefused(
        "no_chat_template",
        f"{data.path} holds messages, and the tokenizer of {model.path} has no chat template",
        fix="use the model's instruct variant, set training.chat_template_path, "
        "or give prompt/completion rows",
    )


def loss_rule(case: Case) -> Refusal | None:
    """A loss that the rows have no tokens for."""
    data, loss = case.facts.dataset, case.spec.loss
    if data is None:
        return None
    if loss == "assistant" and not data.conversational:
        return PlanRefused(
            "loss",
            f"loss: assistant needs conversations, {data.path} holds {data.format} rows",
            fix="use loss: completion or loss: all",
        )
    if loss == "completion" and data.format != "prompt_completion":
        return PlanRefused(
            "loss",
            f"loss: completion needs prompt and completion, {data.path} holds {data.format} rows",
            fix="use loss: assistant or loss: all",
        )
    return None


def targets(case: Case) -> Refusal | None:
    """LoRA targets that match nothing, or the head (TRL computes it outside the adapter)."""
    asked = case.spec.lora.target_modules
    if asked is None or asked == ALL_LINEAR or "target_modules" not in _uses(case):
        return None
    names = [asked] if isinstance(asked, str) else list(asked)
    if not any(names):
        return PlanRefused(
            "lora_targets", "lora.target_modules names nothing", fix=f"use {ALL_LINEAR}"
        )
    if "lm_head" in names:
        return PlanRefused(
            "lora_targets",
            "an adapter on lm_head would not be trained",
            fix="remove lm_head from lora.target_modules",
            source="TRL 1.16 SFTTrainer: the fused head bypasses the adapter",
        )
    known = case.facts.model.linear_targets if case.facts.model else ()
    missing = [name for name in names if known and name.split(".")[-1] not in known]
    if not missing:
        return None
    near = difflib.get_close_matches(missing[0], known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return PlanRefused(
        "lora_targets",
        f"lora.target_modules: {missing[0]} matches nothing in the model",
        fix=f"{hint}there are {', '.join(known)}; or use {ALL_LINEAR}",
    )


def optimizer(case: Case) -> Refusal | None:
    """Optimizers that an engine drops or breaks."""
    name = case.spec.training.optim or ""
    for part, strategies, why, source in OPTIMIZER_LIMITS:
        if part in name and case.strategy in strategies:
            return PlanRefused(
                "optimizer",
                f"optimizer {name} under {case.strategy} does not work",
                why=why,
                fix="use --set training.optim=adamw_torch_fused, or --strategy ddp",
                source=source,
            )
    for part, why in STATE_NOT_SAVED:
        if part in name:
            return PlanRefused(
                "optimizer",
                f"optimizer {name} cannot be saved and resumed",
                why=why,
                fix="use --set training.optim=adamw_torch_fused",
                source="transformers 5.23 trainer_optimizer",
            )
    special = "8bit" in name or "paged" in name
    if special and case.spec.offload != "none" and case.strategy.startswith("zero"):
        return PlanRefused(
            "optimizer",
            f"optimizer {name} would be replaced by DeepSpeedCPUAdam under offload",
            fix="use --set training.optim=adamw_torch_fused, or --offload none",
            source="accelerate 1.15 map_pytorch_optim_to_deepspeed",
        )
    return None


def held_out(case: Case) -> Refusal | None:
    """Evaluation without rows to evaluate on."""
    data, evaluation = case.spec.dataset, case.spec.evaluation
    wanted = [
        name
        for name in ("every_steps", "early_stopping_patience", "exact_match")
        if getattr(evaluation, name)
    ]
    if not wanted or data is None or data.eval_path or data.eval_split or data.eval_share:
        return None
    return SpecError(
        "no_held_out_rows",
        f"evaluation.{wanted[0]} needs held-out rows",
        fix="set dataset.eval_share (such as 0.05), eval_split or eval_path",
    )


def early_stopping(case: Case) -> Refusal | None:
    """Patience counts evaluations, so there must be some."""
    evaluation = case.spec.evaluation
    if evaluation.early_stopping_patience is None or evaluation.every_steps is not None:
        return None
    return SpecError(
        "early_stopping",
        "evaluation.early_stopping_patience counts evaluations, and there are none on the way",
        fix="set evaluation.every_steps",
    )


def answers_to_match(case: Case) -> Refusal | None:
    """Exact match on rows that hold no answer of their own."""
    data = case.facts.held_out or case.facts.dataset
    if not case.spec.evaluation.exact_match or data is None or data.format in WITH_ANSWERS:
        return None
    return SpecError(
        "exact_match",
        f"evaluation.exact_match needs rows with an answer, {data.path} holds {data.format} rows",
        fix=f"use rows of the formats {' or '.join(WITH_ANSWERS)}, or switch it off",
    )


def local_splits(case: Case) -> Refusal | None:
    """A single file has no split to evaluate on."""
    data, facts = case.spec.dataset, case.facts.dataset
    if data is None or facts is None or facts.folder or data.eval_split is None:
        return None
    return SpecError(
        "eval_split",
        f"{data.path} is one file and has no split {data.eval_split}",
        fix="use dataset.eval_path with a second file, or dataset.eval_share",
    )


def prefix_checkpointing(case: Case) -> Refusal | None:
    """Prefix tuning lives in the cache that checkpointing switches off."""
    if case.spec.method != "prefix_tuning" or not case.spec.training.gradient_checkpointing:
        return None
    return PlanRefused(
        "prefix_checkpointing",
        "prefix tuning does not work with gradient checkpointing",
        fix="use --set training.gradient_checkpointing=false",
        source="PEFT 0.21 PeftModel: ValueError",
    )


def skipped_steps(case: Case) -> Refusal | None:
    """DeepSpeed steps its optimizer inside the backward pass: there is nothing left to skip."""
    if case.spec.health.policy != "skip" or not case.strategy.startswith("zero"):
        return None
    return PlanRefused(
        "health_policy",
        f"health.policy skip does not work under {case.strategy}",
        why="the optimizer has stepped by the time a bad loss is seen",
        fix="use --set health.policy=stop, or --strategy fsdp",
        source="accelerate 1.15 DeepSpeedEngineWrapper.backward",
    )


CHECKS: tuple[Callable[[Case], Refusal | None], ...] = (
    precision,
    offload_on_cpu,
    skipped_steps,
    stored_quantised,
    length,
    packing,
    chat_template,
    loss_rule,
    targets,
    optimizer,
    held_out,
    early_stopping,
    answers_to_match,
    local_splits,
    prefix_checkpointing,
)


def _uses(case: Case) -> tuple[str, ...]:
    return METHODS[case.spec.method].uses
