"""The plan as plain data: what every room below `plan` reads and no one changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Advice:
    """Something worth knowing that does not stop the run."""

    code: str
    message: str
    fix: str = ""
    source: str = ""


@dataclass(frozen=True)
class Topology:
    """How many ranks, and where. On CPU a "GPU" is a rank."""

    gpus: int
    nodes: int
    gpus_per_node: int
    data_parallel_size: int
    """world / (tensor x context x sequence parallel); none of these is used yet."""
    device: str
    """cuda or cpu."""
    replicate_size: int = 1
    """Mesh rows that hold whole copies (hsdp); 1 elsewhere."""


@dataclass(frozen=True)
class Batch:
    """`global = micro x accumulation x data_parallel_size`, all in sequences."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    tokens_per_step: int
    """Upper bound: global batch x max_length."""


@dataclass(frozen=True)
class Adapter:
    """What the adapter rules decided for this method under this strategy."""

    method: str
    use_reentrant: bool
    state_dict_type: str | None
    """FSDP only."""
    quant_storage: str | None
    """Dtype that packed 4-bit weights are stored as; None without 4-bit."""
    adapter_dtype: str | None
    """Dtype of trainable adapter weights; None for full fine-tuning."""
    find_unused_parameters: bool


@dataclass(frozen=True)
class Memory:
    """Predicted GPU memory per rank, in bytes; None where the model or GPU is unknown."""

    gpu_memory_bytes: int | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    low_bytes: int | None
    high_bytes: int | None
    fits: bool | None
    parts: Mapping[str, int | None]


@dataclass(frozen=True)
class Time:
    """Predicted duration; None where it depends on something unknown."""

    steps: int | None
    seconds_per_step: float | None
    total_seconds: float | None
    basis: str


@dataclass(frozen=True)
class Storage:
    """Predicted size on disk, in bytes; None where the model is unknown."""

    checkpoint_bytes: int | None
    """One checkpoint: trainable parameters and optimizer state."""
    final_bytes: int | None
    """The trained adapter or model."""
    total_bytes: int | None
    """Kept checkpoints, the one being written, and the final save."""


@dataclass(frozen=True)
class Worker:
    """All that a rank needs to know; nothing else of the spec reaches it."""

    environment: Mapping[str, str]
    """Set before torch is imported, unless a launcher has set it already."""
    training_arguments: Mapping[str, Any]
    """Keyword arguments of `SFTConfig`, without paths."""
    model: Mapping[str, Any]
    """path, revision, dtype, attn_implementation, trust_remote_code, quantization."""
    peft: Mapping[str, Any] | None
    """`peft_type` and the keyword arguments of its configuration."""
    dataset: Mapping[str, Any] | None
    loss: str | None
    """assistant, completion or all."""
    evaluation: Mapping[str, Any]
    samples: Mapping[str, Any]
    checkpoints: Mapping[str, Any]
    """keep: how many."""
    limits: Mapping[str, Any]
    """stop_after_seconds, stuck_after_seconds, max_restarts, shutdown_timeout_seconds, signals."""
    health: Mapping[str, Any]
    """policy."""
    resume_from: str | None = None
    """Another run's checkpoint to start from; a run's own ones are found without it."""


@dataclass(frozen=True)
class Plan:
    """What will happen; `as_json` is the `plan --json` contract."""

    strategy: str
    reasons: tuple[str, ...]
    defaults: Mapping[str, Any]
    warnings: tuple[Advice, ...]
    topology: Topology
    batch: Batch
    adapter: Adapter
    memory: Memory
    time: Time
    storage: Storage
    offload: str
    worker: Worker
    command: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, in the order of the fields."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values


def plan_from_json(values: Mapping[str, Any]) -> Plan:
    """Read back what `Plan.as_json` wrote (the run directory's plan.json)."""
    return Plan(
        **{
            **values,
            "reasons": tuple(values["reasons"]),
            "warnings": tuple(Advice(**advice) for advice in values["warnings"]),
            "topology": Topology(**values["topology"]),
            "batch": Batch(**values["batch"]),
            "adapter": Adapter(**values["adapter"]),
            "memory": Memory(**values["memory"]),
            "time": Time(**values["time"]),
            "storage": Storage(**values["storage"]),
            "worker": Worker(**values["worker"]),
            "command": tuple(values["command"]),
        }
    )
