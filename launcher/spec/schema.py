"""The spec: every key a user may write, with its type and meaning.

It decides what may be said, not what is wise: combinations are judged by `launcher.plan`.
`None` means "not said"; the plan fills it in and says so. Units stand in the names.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from launcher.spec.durations import seconds

Strategy: TypeAlias = Literal[
    "auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp"
]
Method: TypeAlias = Literal[
    "full", "lora", "qlora", "dora", "rslora", "prefix_tuning", "prompt_tuning", "ia3"
]
Quantization: TypeAlias = Literal["none", "nf4", "8bit"]
Offload: TypeAlias = Literal["none", "optimizer", "all"]
Target: TypeAlias = Literal["local", "slurm", "docker"]
Device: TypeAlias = Literal["cuda", "cpu"]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]

ALL_LINEAR = "all-linear"
CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
# A host name, or an address of version 6 in brackets; nothing that ssh would take for an option.
DOCKER_HOST = re.compile(
    r"unix:///.+"
    r"|(?:ssh|tcp)://(?:(?P<user>[\w.][\w.-]*)(?P<password>:[^@]*)?@)?"
    r"(?:[A-Za-z0-9_][\w.-]*|\[[0-9a-fA-F:.]+\])(?::\d+)?/?",
    re.ASCII,
)
Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(gt=0, lt=1)]


def _is_duration(value: str | int) -> str | int:
    seconds(value)
    return value


Duration = Annotated[str | int, AfterValidator(_is_duration)]
# Slurm reads a bare number as minutes, this launcher as seconds: a unit must be said.
DurationText = Annotated[str, AfterValidator(_is_duration)]


def _is_one_line(value: str) -> str:
    if not value.strip() or CONTROL.search(value):
        raise ValueError("it should be one line of text without control characters")
    return value


Line = Annotated[str, AfterValidator(_is_one_line)]
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
MOUNT_PARTS = 3


def _is_variable_name(value: str) -> str:
    if not VARIABLE_NAME.fullmatch(value):
        raise ValueError("it should be the name of a variable alone, whose value is looked up")
    return value


def _is_image_name(value: str) -> str:
    if not IMAGE_NAME.fullmatch(value):
        raise ValueError("it should be the name of an image, such as registry/name:tag")
    return value


def split_mount(value: str) -> tuple[str, str, bool]:
    """SOURCE[:TARGET[:ro]] as source, target, and whether it is read-only.

    Raises:
        ValueError: where it is anything else; Docker would take a relative source for a volume.
    """
    source, *more = value.split(":")
    target = more[0] if more else source
    option = more[1] if len(more) > 1 else "rw"
    known = len(more) < MOUNT_PARTS and option in ("ro", "rw")
    if not known or not source.startswith("/") or not target.strip("/"):
        raise ValueError("it should be SOURCE[:TARGET[:ro]], both absolute paths without a colon")
    if not target.startswith("/"):
        raise ValueError(f"its target {target} should be an absolute path")
    return source, target, option == "ro"


def _is_mount(value: str) -> str:
    split_mount(value)
    return value


def _is_docker_host(value: str) -> str:
    """A daemon's address as Docker's client takes it; no secret may stand in it."""
    found = DOCKER_HOST.fullmatch(value)
    if not found:
        raise ValueError("it should be ssh://USER@HOST[:PORT], tcp://HOST:PORT or unix:///PATH")
    if found["password"] is not None:
        raise ValueError("it holds a password; use a key of ssh")
    return value


VariableName = Annotated[
    str,
    AfterValidator(_is_variable_name),
    Field(json_schema_extra={"pattern": f"^{VARIABLE_NAME.pattern}$"}),
]
ImageName = Annotated[str, AfterValidator(_is_image_name)]
Mount = Annotated[Line, AfterValidator(_is_mount)]
UserNumbers = Annotated[str, Field(pattern=r"^[0-9]{1,9}(:[0-9]{1,9})?$")]
DockerHost = Annotated[Line, AfterValidator(_is_docker_host)]
# A host's name, or its address without brackets.
Address = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*|[0-9a-fA-F:.]+)$")]
DirectiveName = Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")]


class Section(BaseModel):
    """A mapping of the spec: unknown keys and loose types are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSpec(Section):
    """The base model."""

    path: str = Field(description="A local folder (relative to the spec file) or a Hub name.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Dtype | None = Field(None, description="Dtype the weights are loaded in.")
    attn_implementation: str | None = Field(
        None, description="eager, sdpa, flash_attention_2, flash_attention_3, flex_attention."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that ships with the model.")


Weight = Annotated[float, Field(gt=0)]


class SourceSpec(Section):
    """More training rows, mixed with those of `dataset.path`."""

    path: str = Field(description="A local file or folder (relative to the spec), or a Hub name.")
    name: str | None = Field(None, description="Configuration name of a Hub dataset.")
    split: str = Field("train", description="Split that is trained on.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Renamed columns; those of `dataset` if empty."
    )
    weight: Weight | None = Field(None, description="How often its rows come; 1 if unset.")


class DatasetSpec(Section):
    """Training rows, and the rows held out for evaluation."""

    path: str = Field(description="A local file or folder (relative to the spec), or a Hub name.")
    name: str | None = Field(None, description="Configuration name of a Hub dataset.")
    split: str = Field("train", description="Split that is trained on.")
    eval_path: str | None = Field(None, description="A local file of held-out rows.")
    eval_split: str | None = Field(None, description="Split that is evaluated on.")
    eval_share: Share | None = Field(None, description="Share of the rows held out, 0 to 1.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Renamed columns: what the loader expects -> yours."
    )
    drop_bad: bool | None = Field(
        None, description="Leave out rows that cannot be used; a run ends at one otherwise."
    )
    sources: list[SourceSpec] | None = Field(
        None, description="More training rows: all of them, or by weight where one is set."
    )
    weight: Weight | None = Field(None, description="How often rows of `path` come; 1 if unset.")

    def places(self) -> list[str]:
        """Every path or Hub name that rows come from."""
        named = [self.path, self.eval_path, *(more.path for more in self.sources or ())]
        return [name for name in named if name]

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DatasetSpec:
        said = [k for k in ("eval_path", "eval_split", "eval_share") if getattr(self, k)]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} exclude each other; keep one")
        return self


class LoraSpec(Section):
    """The adapter; keys that the method does not use are refused by the plan."""

    rank: Count | None = Field(None, description="Rank of the update matrices.")
    alpha: Count | None = Field(None, description="Scaling numerator; alpha / rank scales.")
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Dropout on the adapter's input, 0 to 1."
    )
    target_modules: str | list[str] | None = Field(
        None, description="all-linear, or names of linear modules (one, or a list)."
    )
    virtual_tokens: Count | None = Field(
        None, description="Prefix and prompt tuning: number of virtual tokens."
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        """One name becomes a list: PEFT reads a bare text as a pattern of the whole path."""
        return [value] if isinstance(value, str) and value != ALL_LINEAR else value


class HardwareSpec(Section):
    """Where it runs. `gpus` counts all nodes together."""

    gpus: Count | None = Field(None, description="Total number of GPUs (ranks on CPU).")
    nodes: Count | None = Field(None, description="Number of nodes.")
    gpus_per_node: Count | None = Field(None, description="GPUs on each node.")
    gpu: str | None = Field(None, description="GPU to plan for, such as h100-80gb.")
    device: Device | None = Field(None, description="cuda, or cpu for a rehearsal.")


class BatchSpec(Section):
    """The effective batch, always in sequences."""

    global_batch_size: Count | None = Field(
        None, description="Sequences per optimizer step over all GPUs."
    )
    micro_batch_size: Count | Literal["auto"] = Field(
        "auto", description="Sequences per GPU per forward pass."
    )


class TrainingSpec(Section):
    """Hyperparameters. Any other `SFTConfig` field may stand here too, by its own name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Count | None = Field(None, description="Optimizer steps; overrides the epochs.")
    max_length: Count | None = Field(None, description="Tokens; longer rows are cut.")
    packing: bool | None = None
    optim: str | None = None
    lr_scheduler_type: str | None = None
    warmup_steps: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Steps, or a share of all steps where below 1."
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None  # numpy's range
    gradient_checkpointing: bool | None = None
    bf16: bool | None = None
    fp16: bool | None = None

    def sft_fields(self) -> dict[str, Any]:
        """The keys beyond the named ones, as the user wrote them."""
        return dict(self.__pydantic_extra__ or {})


class CheckpointSpec(Section):
    """Intermediate checkpoints."""

    every_steps: Count | None = Field(None, description="Optimizer steps between two.")
    keep: Count = Field(3, description="How many of the newest are kept.")


class LimitsSpec(Section):
    """When a run ends by itself, and how often it starts again."""

    stop_after: Duration | None = Field(
        None, description="Save and stop after this time, such as 90s, 30m or 12h."
    )
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="How often failed ranks start again, from the last whole checkpoint."
    )
    stuck_after: Duration = Field(
        "10m", description="A rank without progress for this long ends, its stacks in the log."
    )


class HealthSpec(Section):
    """What happens at a step whose loss or gradient is not finite or explodes."""

    policy: Literal["stop", "skip", "ignore"] = Field(
        "stop", description="stop the run, skip the step, or ignore it."
    )


class EvaluationSpec(Section):
    """Evaluation on the held-out rows."""

    every_steps: Count | None = Field(None, description="Optimizer steps between two.")
    early_stopping_patience: Count | None = Field(
        None, description="Evaluations without improvement before the run stops."
    )
    exact_match: bool = Field(
        False, description="Greedy answers to the held-out prompts, before and after."
    )


class SamplesSpec(Section):
    """Generations at fixed prompts."""

    prompts: list[str] = Field(default_factory=list)
    every_steps: Count | None = Field(None, description="Optimizer steps between two.")
    max_new_tokens: Count = Field(64, description="Tokens generated at most.")


class ContainerSpec(Section):
    """A container that each node's ranks run in."""

    runtime: Literal["pyxis", "apptainer"]
    image: Line
    mounts: list[Line] = Field(
        default_factory=list,
        description="SOURCE:TARGET[:OPTIONS]; the run, and a local model and data, come by "
        "themselves.",
    )
    environment: list[VariableName] = Field(
        default_factory=list, description="Variables to pass, by name only."
    )
    workdir: Line | None = Field(None, description="Working directory inside.")


class MailSpec(Section):
    """Who is told of a job's fate by mail."""

    user: Line | None = None
    events: list[Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "ALL"]] = Field(
        default_factory=list, description="What Slurm writes about."
    )


class SlurmSpec(Section):
    """How a Slurm job is asked for, and how it goes on after an end that was not its own."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    time_limit: DurationText | None = Field(None, description="Such as 12h, 90m or 1-00:00:00.")
    gpu_type: Line | None = Field(None, description="Type of GPU by the cluster's name for it.")
    gpus_as: Literal["gres", "gpus-per-node"] = Field(
        "gres", description="Option that asks for GPUs; gres works everywhere."
    )
    cpus_per_node: Count | None = Field(None, description="Processors of each node's one task.")
    constraint: Line | None = None
    exclusive: bool = Field(False, description="No other job on the nodes.")
    reservation: Line | None = None
    exclude: Line | None = Field(None, description="Nodes to keep away from, such as n[3,7].")
    mail: MailSpec = MailSpec()
    array_throttle: Count | None = Field(None, description="Runs of a sweep at one time.")
    requeue: bool = Field(True, description="Whether the job may be queued again.")
    max_requeues: Annotated[int, Field(ge=0, le=10_000)] = Field(
        20, description="How often a job starts again, whatever ended it."
    )
    chain: Annotated[int, Field(ge=2, le=1000)] | None = Field(
        None, description="Jobs that continue one another, where requeue is not allowed."
    )
    warning: DurationText | None = Field(
        None, description="Time before the limit at which the ranks save and stop."
    )
    network_interface: Line | None = Field(
        None, description="Interface of NCCL and gloo; only where they choose wrongly."
    )
    prepare: Literal["step", "job", "none"] = Field(
        "step",
        description="Where rows are tokenised once, before the ranks: as a step of the job on its "
        "first node, as a job of its own without GPUs, or not apart.",
    )
    prepare_partition: Line | None = Field(
        None, description="Partition of that job; the run's own without it."
    )
    directives: dict[DirectiveName, str | int | bool] = Field(
        default_factory=dict, description="Further sbatch options, such as {mem: 0}."
    )
    before: list[Line] = Field(
        default_factory=list, description="Lines of bash before the ranks, such as module load."
    )
    container: ContainerSpec | None = None


class DockerSpec(Section):
    """How containers are started."""

    image: ImageName | None = Field(None, description="sftlaunch:VERSION if unset, -cpu on CPU.")
    user: UserNumbers | None = Field(
        None,
        description="Numbers of the user and group inside, such as '1000:1000'; who calls if "
        "unset, and for root the owner of the output folder's parent, or 1000.",
    )
    mounts: list[Mount] = Field(
        default_factory=list,
        description="SOURCE[:TARGET[:ro]]; the run, a local model and data, and the Hub cache "
        "come by themselves.",
    )
    environment: list[VariableName] = Field(
        default_factory=list,
        description="Variables to pass, by name only; those of the Hub and of trackers come by "
        "themselves.",
    )
    restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="How often Docker starts a failed container again; it resumes."
    )
    hosts: list[DockerHost] = Field(
        default_factory=list,
        description="Daemons that start the containers, such as ssh://user@host, one a node; the "
        "first is the rendezvous.",
    )
    addresses: list[Address] | None = Field(
        None,
        description="By which the nodes find each other, one a node; those in hosts without it.",
    )
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="Port of the rendezvous on the first node; by the run's path if unset."
    )


class Spec(Section):
    """One supervised fine-tuning run."""

    model: ModelSpec
    dataset: DatasetSpec | None = Field(None, description="Needed to run, not to plan.")
    method: Method = "lora"
    lora: LoraSpec = LoraSpec()
    quantization: Quantization | None = Field(
        None, description="none, nf4 (double quantisation) or 8bit."
    )
    strategy: Strategy = "auto"
    offload: Offload = "none"
    hardware: HardwareSpec = HardwareSpec()
    batch: BatchSpec = BatchSpec()
    training: TrainingSpec = TrainingSpec()
    loss: Literal["assistant", "completion", "all"] | None = Field(
        None, description="Which tokens are trained on; by the shape of the data if unset."
    )
    checkpoints: CheckpointSpec = CheckpointSpec()
    limits: LimitsSpec = LimitsSpec()
    health: HealthSpec = HealthSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    samples: SamplesSpec = SamplesSpec()
    trackers: list[str] = Field(default_factory=list, description="tensorboard, wandb, ...")
    slurm: SlurmSpec = SlurmSpec()
    docker: DockerSpec = DockerSpec()
    output: str | None = Field(None, description="The run directory.")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        """`model: NAME` and `dataset: FILE` are the mappings with only a path."""
        if not isinstance(data, dict):
            return data
        short = {k: {"path": v} for k in ("model", "dataset") if isinstance(v := data.get(k), str)}
        return {**data, **short}
