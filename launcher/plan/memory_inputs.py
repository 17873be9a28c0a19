"""What the memory estimate depends on; `launcher.plan.memory` has the words and sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.facts.families import Dimensions

Method = Literal["full", "lora", "qlora", "8bit-lora"]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp"]
LossPath = Literal["fused", "chunked", "full_logits"]
Offload = Literal["none", "optimizer", "all"]
Quantization = Literal["nf4", "8bit"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class MemoryInputs(Dimensions):
    """Everything that the estimate depends on, in plain numbers and names."""

    parameters: int
    """All parameters of the model without adapters; a tied head counted once."""

    tie_word_embeddings: bool = False
    """Whether the head is the embedding."""

    linear_shapes: Mapping[str, tuple[int, int, int]] | None = None
    """Name: inputs, outputs, modules in the whole model; those of a Llama where None."""

    method: Method = "full"
    """What is trained: every parameter, or low-rank adapters on a plain or quantised base."""

    strategy: Strategy = "single"
    """How state is spread over GPUs."""

    gpus: int = 1
    """GPUs of the whole run (the data-parallel size)."""

    shard_size: int | None = None
    """GPUs that share one copy under `hsdp`; all of them where None."""

    micro_batch_size: int = 1
    """Sequences a GPU passes at once."""

    sequence_length: int = 2048
    """Tokens of a sequence, padding included."""

    gradient_accumulation_steps: int = 1
    """Micro batches before a step; more than one keeps gradients during the forward."""

    gradient_checkpointing: bool = True
    """Whether layers keep only their input and are recomputed."""

    selective_checkpointing: bool = False
    """Whether layers keep the attention and every second matrix product (torchtitan's `op`)
    and recompute the rest; matters only where `gradient_checkpointing` is True."""

    activation_offload: bool = False
    """Whether checkpointed layer inputs wait in host memory."""

    loss_path: LossPath = "fused"
    """`fused`: TRL's fused head; `chunked`: logits kept, loss in 8 chunks; `full_logits`."""

    logits_dtype: Dtype | None = None
    """Dtype of the logits that stay through the loss; None: float32 under autocast, else the
    head's. Models of transformers before 4.45 cast theirs to float32 always."""

    parameter_dtype: Dtype = "bfloat16"
    """Dtype that parameters are stored in (the base's, where it is not quantised)."""

    embedding_dtype: Dtype | None = None
    """Dtype of embedding, norms and head, where it differs (PEFT's k-bit preparation)."""

    compute_dtype: Dtype = "bfloat16"
    """Dtype of matrix products under autocast, FSDP's mixed precision or DeepSpeed."""

    autocast: bool = True
    """Whether the forward runs under torch.autocast (`bf16: true` of the trainer)."""

    adapter_dtype: Dtype = "float32"
    """Dtype of LoRA's weights."""

    optimizer: str = "adamw_torch_fused"
    """The trainer's `optim` name."""

    lora_rank: int = 16
    """Rank of the adapters."""

    lora_targets: tuple[str, ...] | None = None
    """Names of adapted modules among `linear_shapes`; all of them where None."""

    lora_dropout: float = 0.0
    """Dropout before the adapters; more than 0 keeps a mask and a copy of each input."""

    quantization: Quantization | None = None
    """How the frozen base's linear modules are stored."""

    double_quantization: bool = True
    """Whether NF4's scales are quantised too."""

    compile: bool = False
    """Whether torch.compile fuses elementwise operations."""

    offload: Offload = "none"
    """What waits in host memory: optimizer state, or parameters too."""

    flash_attention: bool = True
    """Whether attention keeps no score matrix (SDPA's fused kernels, FlashAttention)."""
