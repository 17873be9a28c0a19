"""What a rank is told: `SFTConfig` arguments, model, adapter and data, all explicit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.plan.adapter import METHODS
from launcher.plan.engine import Engine
from launcher.plan.types import Adapter, Batch, Topology, Worker
from launcher.spec.durations import seconds
from launcher.spec.schema import Spec

TRAINING_KEYS = (
    "learning_rate",
    "num_train_epochs",
    "max_length",
    "packing",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "gradient_checkpointing",
    "bf16",
    "fp16",
)
TASK = "CAUSAL_LM"
LATER_KEYS = ("drop_bad", "sources", "weight")
# What an elastic agent passes on to its ranks; it would die on SIGUSR1 (torch 2.13).
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# None: TRL masks by the assistant tokens instead.
COMPLETION_ONLY = {"assistant": None, "completion": True, "all": False}


def make_worker(
    spec: Spec,
    topology: Topology,
    batch: Batch,
    adapter: Adapter,
    engine: Engine,
    *,
    dtype: str,
    shutdown_timeout_seconds: int,
) -> Worker:
    """Everything that reaches a rank, from a resolved spec and the decisions."""
    limits = spec.limits
    return Worker(
        environment=engine.environment,
        training_arguments=training_arguments(spec, topology, batch, adapter),
        model={
            "path": spec.model.path,
            "revision": spec.model.revision,
            "dtype": dtype,
            "attn_implementation": spec.model.attn_implementation,
            "trust_remote_code": spec.model.trust_remote_code,
            "quantization": _quantization(spec, adapter),
        },
        peft=_peft(spec),
        dataset=_dataset(spec),
        loss=spec.loss,
        evaluation=spec.evaluation.model_dump(),
        samples=spec.samples.model_dump(),
        checkpoints={"keep": spec.checkpoints.keep},
        limits={
            "stop_after_seconds": seconds(limits.stop_after) if limits.stop_after else None,
            "stuck_after_seconds": seconds(limits.stuck_after),
            "max_restarts": limits.max_restarts,
            "shutdown_timeout_seconds": shutdown_timeout_seconds,
            "signals": SIGNALS,
        },
        health=spec.health.model_dump(),
    )


def _dataset(spec: Spec) -> dict[str, Any] | None:
    """The dataset's keys; later ones only where they are set.

    What was prepared before they existed stays what it was (launcher.runs.prepared).
    """
    if spec.dataset is None:
        return None
    values = spec.dataset.model_dump()
    return {key: value for key, value in values.items() if value or key not in LATER_KEYS}


def training_arguments(
    spec: Spec, topology: Topology, batch: Batch, adapter: Adapter
) -> dict[str, Any]:
    """Keyword arguments of `SFTConfig` (TRL 1.16), without the paths.

    Fields that the user set under `training:` come last and so win over the logging
    defaults; those that the plan owns were refused by the spec.
    """
    arguments: dict[str, Any] = {key: getattr(spec.training, key) for key in TRAINING_KEYS}
    if spec.training.max_steps is not None:
        arguments["max_steps"] = spec.training.max_steps
    arguments |= {
        "per_device_train_batch_size": batch.micro_batch_size,
        "per_device_eval_batch_size": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "ddp_find_unused_parameters": adapter.find_unused_parameters,
        "save_strategy": "steps",
        "save_steps": spec.checkpoints.every_steps,
        # A loss that is not finite must be seen as it is (launcher.train.health).
        "logging_nan_inf_filter": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": list(spec.trackers),
        "assistant_only_loss": spec.loss == "assistant",
        "completion_only_loss": COMPLETION_ONLY[spec.loss or "all"],
    }
    if spec.training.gradient_checkpointing:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": adapter.use_reentrant}
    if spec.evaluation.every_steps is not None:
        arguments |= {"eval_strategy": "steps", "eval_steps": spec.evaluation.every_steps}
    if spec.evaluation.early_stopping_patience is not None:
        arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    if topology.device == "cpu":
        arguments |= {
            "use_cpu": True,
            # Keeps the trainer from resetting the state that launcher.train.state makes.
            "accelerator_config": {"use_configured_state": True},
        }
    return {**arguments, **spec.training.sft_fields()}


def _quantization(spec: Spec, adapter: Adapter) -> Mapping[str, Any] | None:
    if spec.quantization == "8bit":
        return {"load_in_8bit": True}
    if spec.quantization != "nf4":
        return None
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16" if spec.training.bf16 else "float32",
        "bnb_4bit_quant_storage": adapter.quant_storage,
    }


def _peft(spec: Spec) -> Mapping[str, Any] | None:
    method = METHODS[spec.method]
    if method.peft_type is None:
        return None
    settings: dict[str, Any] = {"peft_type": method.peft_type, "task_type": TASK}
    names = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "target_modules": "target_modules",
        "virtual_tokens": "num_virtual_tokens",
    }
    settings |= {names[key]: getattr(spec.lora, key) for key in method.uses}
    return {**settings, **dict(method.options)}
