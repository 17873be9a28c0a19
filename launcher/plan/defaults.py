"""What a user left out: one table of values, by method and device, each said in the plan."""

from __future__ import annotations

from typing import Any

from launcher.facts.probe import Facts
from launcher.plan.adapter import METHODS
from launcher.spec.schema import Spec

# Family of methods -> learning rate. Sources: the LoRA and QLoRA papers' 1e-4 to 2e-4 with
# rank 8 to 64; 2e-5 is TRL's default for full fine-tuning; IA3 and prompt methods from the
# PEFT examples of each method.
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "dora": 2e-4, "ia3": 3e-3, "prompt": 1e-2}
ADAPTER_DEFAULTS: dict[str, Any] = {
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "virtual_tokens": 20,
}
MAX_LENGTH = 2048
CHECKPOINT_STEPS = 200
LOSS_BY_FORMAT = {
    "messages": "assistant",
    "conversations": "assistant",
    "alpaca": "assistant",
    "prompt_completion": "completion",
    "text": "all",
    "input_ids": "all",
}


class Defaults:
    """Collects values that the user did not say, under their dotted keys."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.values: dict[str, Any] = {}

    def fill(self, key: str, value: Any) -> Any:
        """The user's value at a dotted key, else `value`, which is recorded."""
        here: Any = self.spec
        for name in key.split("."):
            here = getattr(here, name)
        if here is not None:
            return here
        self.values[key] = value
        return value


def resolve(spec: Spec, facts: Facts, device: str) -> tuple[Spec, dict[str, Any]]:
    """The spec with every value explicit but strategy and batch, and what was filled in.

    Args:
        spec: as the user wrote it.
        facts: of model, data and machine.
        device: cuda or cpu.
    """
    fill = Defaults(spec)
    method = METHODS[spec.method]
    quantization = fill.fill("quantization", method.quantization)
    loss = _loss(facts)
    lora = {name: fill.fill(f"lora.{name}", ADAPTER_DEFAULTS[name]) for name in method.uses}
    resolved = spec.model_copy(
        update={
            "quantization": quantization,
            "lora": spec.lora.model_copy(update=lora),
            "training": spec.training.model_copy(update=_training(fill, facts, device)),
            "loss": fill.fill("loss", loss) if loss else spec.loss,
            "checkpoints": spec.checkpoints.model_copy(
                update={"every_steps": fill.fill("checkpoints.every_steps", CHECKPOINT_STEPS)}
            ),
            "output": fill.fill("output", f"runs/{run_name(spec)}"),
        }
    )
    return resolved, fill.values


def run_name(spec: Spec) -> str:
    """A folder name from the model and the method, safe in every file system."""
    base = spec.model.path.rstrip("/").rsplit("/", 1)[-1]
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in base).strip(".-")
    return f"{safe or 'model'}-{spec.method}"


def _training(fill: Defaults, facts: Facts, device: str) -> dict[str, Any]:
    family = METHODS[fill.spec.method].family
    bf16, fp16 = _precision(fill, facts, device)
    positions = facts.model.max_position_embeddings if facts.model else None
    return {
        "learning_rate": fill.fill("training.learning_rate", LEARNING_RATES[family]),
        "num_train_epochs": fill.fill("training.num_train_epochs", 1.0),
        "max_length": fill.fill("training.max_length", min(MAX_LENGTH, positions or MAX_LENGTH)),
        "packing": fill.fill("training.packing", False),
        "optim": fill.fill("training.optim", "adamw_torch_fused"),
        "lr_scheduler_type": fill.fill("training.lr_scheduler_type", "cosine"),
        "warmup_steps": fill.fill("training.warmup_steps", 0.03),
        "weight_decay": fill.fill("training.weight_decay", 0.01),
        "max_grad_norm": fill.fill("training.max_grad_norm", 1.0),
        "seed": fill.fill("training.seed", 42),
        # Recomputing costs a third of the speed and buys memory that a CPU does not lack;
        # a prefix lives in the cache, which checkpointing switches off (PEFT, ValueError).
        "gradient_checkpointing": fill.fill(
            "training.gradient_checkpointing",
            device == "cuda" and fill.spec.method != "prefix_tuning",
        ),
        "bf16": bf16,
        "fp16": fp16,
    }


def _precision(fill: Defaults, facts: Facts, device: str) -> tuple[bool, bool]:
    """bf16 where the GPU has it, else fp16; float32 on CPU, where it is exact and as fast."""
    said = fill.spec.training
    has_bf16 = facts.gpu.bf16 if facts.gpu else True
    bf16 = fill.fill("training.bf16", device == "cuda" and has_bf16 and not said.fp16)
    fp16 = fill.fill("training.fp16", device == "cuda" and not has_bf16 and not bf16)
    return bf16, fp16


def _loss(facts: Facts) -> str | None:
    return LOSS_BY_FORMAT.get(facts.dataset.format) if facts.dataset else None
