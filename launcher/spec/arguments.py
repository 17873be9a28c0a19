"""Names of training arguments: upstream's, ours, and those of older tutorials.

Two tables decide what a name outside the schema means. They suggest; they never rewrite
what the user said without a word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

# Upstream arguments that the plan computes: the spec's own key says the same once.
OWNED = {
    "output_dir": "output",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size",
    "per_device_eval_batch_size": "batch.micro_batch_size",
    "auto_find_batch_size": "batch.micro_batch_size: auto",
    "fsdp": "strategy: fsdp",
    "fsdp_config": "strategy: fsdp",
    "deepspeed": "strategy: zero3",
    "parallelism_config": "strategy: hsdp",
    "accelerator_config": "strategy",
    "use_cpu": "hardware.device: cpu",
    "ddp_backend": "hardware.device",
    "local_rank": "hardware.gpus",
    "save_strategy": "checkpoints.every_steps",
    "save_steps": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep",
    "eval_strategy": "evaluation.every_steps",
    "eval_steps": "evaluation.every_steps",
    "do_eval": "evaluation.every_steps",
    "report_to": "trackers",
    "assistant_only_loss": "loss: assistant",
    "completion_only_loss": "loss: completion",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    "resume_from_checkpoint": "--resume",
    "ignore_data_skip": "nothing: a resumed run goes on in its data",
    "save_only_model": "nothing: a checkpoint holds all that a resume needs",
    "load_best_model_at_end": "evaluation.early_stopping_patience",
    "average_tokens_across_devices": "nothing: the loss is always a mean over all tokens",
    "ddp_find_unused_parameters": "nothing: the adapter rules set it",
    "gradient_checkpointing_kwargs": "training.gradient_checkpointing",
    "skip_prepare_dataset": "dataset",
    "dataset_kwargs": "dataset",
    "push_to_hub": "nothing yet: push the final folder by hand",
    "hub_token": "the environment variable HF_TOKEN",
    "push_to_hub_token": "the environment variable HF_TOKEN",
}

# Names of older releases and other tools -> the key that means the same here.
OLDER = {
    "warmup_ratio": ("training.warmup_steps", "a value below 1 is a share of all steps"),
    "max_seq_length": ("training.max_length", "renamed in TRL 0.20"),
    "evaluation_strategy": ("evaluation.every_steps", "renamed in transformers 4.46"),
    "tokenizer": ("model.path", "the tokenizer comes with the model"),
    "group_by_length": ("training.train_sampling_strategy", "removed in transformers 5"),
    "no_cuda": ("hardware.device: cpu", "removed in transformers 5"),
    "logging_dir": ("output", "logs go to the run directory"),
    "overwrite_output_dir": ("--resume", "a run directory is never overwritten"),
    "save_safetensors": ("nothing", "weights are always safetensors"),
    "fsdp_min_num_params": ("strategy: fsdp", "layers are wrapped by class"),
    "fsdp_transformer_layer_cls_to_wrap": ("strategy: fsdp", "the layer class is found"),
    "include_tokens_per_second": ("nothing", "metrics.jsonl always has tokens_per_second"),
    "data_collator": ("loss", "DataCollatorForCompletionOnlyLM became loss: assistant"),
    "response_template": ("loss: assistant", "the chat template marks the answers"),
    "num_epochs": ("training.num_train_epochs", ""),
    "epochs": ("training.num_train_epochs", ""),
    "lr": ("training.learning_rate", ""),
    "lr_scheduler": ("training.lr_scheduler_type", ""),
    "optimizer": ("training.optim", ""),
    "gradient_clipping": ("training.max_grad_norm", ""),
    "batch_size": ("batch.global_batch_size", "or batch.micro_batch_size, per GPU"),
    "train_batch_size": ("batch.global_batch_size", "or batch.micro_batch_size, per GPU"),
    "micro_batch_size": ("batch.micro_batch_size", ""),
    "global_batch_size": ("batch.global_batch_size", ""),
    "sequence_len": ("training.max_length", ""),
    "cutoff_len": ("training.max_length", ""),
    "max_seq_len": ("training.max_length", ""),
    "lora_r": ("lora.rank", ""),
    "lora_rank": ("lora.rank", ""),
    "lora_alpha": ("lora.alpha", ""),
    "lora_dropout": ("lora.dropout", ""),
    "lora_target": ("lora.target_modules", ""),
    "lora_target_modules": ("lora.target_modules", ""),
    "load_in_4bit": ("quantization: nf4", ""),
    "load_in_8bit": ("quantization: 8bit", ""),
    "adapter": ("method", ""),
    "base_model": ("model", ""),
    "model_name_or_path": ("model", ""),
    "dataset_name": ("dataset", ""),
    "datasets": ("dataset", ""),
    "num_gpus": ("hardware.gpus", ""),
    "gpus": ("hardware.gpus", ""),
    "nodes": ("hardware.nodes", ""),
    "device": ("hardware.device", ""),
    "output_directory": ("output", ""),
}

ATTENTION = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
# Integrations of transformers 5.23 that are named by their package.
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab")


@lru_cache(maxsize=1)
def _listing() -> dict[str, dict[str, list[str]]]:
    text = Path(__file__).with_name("sft_fields.json").read_text(encoding="utf-8")
    listing: dict[str, dict[str, list[str]]] = json.loads(text)
    return listing


def sft_fields() -> dict[str, list[str]]:
    """Field of `SFTConfig` -> JSON kinds it accepts (TRL 1.16, see `make fields`)."""
    return _listing()["fields"]


def sft_choices() -> dict[str, list[str]]:
    """Field of `SFTConfig` -> the names it takes, where they are a closed list."""
    return _listing()["choices"]


def choices() -> dict[str, tuple[Sequence[str], str]]:
    """Dotted key -> the values that upstream knows, and where they stand there."""
    listed = sft_choices()
    return {
        "training.optim": (listed["optim"], "transformers training_args.OptimizerNames"),
        "training.lr_scheduler_type": (
            listed["lr_scheduler_type"],
            "transformers trainer_utils.SchedulerType",
        ),
        "model.attn_implementation": (
            ATTENTION,
            "transformers modeling_utils; also a kernel's Hub name, with a slash",
        ),
        "trackers": (TRACKERS, "transformers integrations"),
    }


def kind_fits(value: Any, kinds: list[str]) -> bool:
    """Whether a YAML value is of one of the JSON kinds; an int serves as a float."""
    kind = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict"}
    found = "null" if value is None else kind.get(type(value), "str")
    return found in kinds or (found == "int" and "float" in kinds)
