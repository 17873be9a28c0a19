"""The process group and accelerate's view of it, made before `SFTConfig`.

On CPU accelerate would silently run plain DDP where FSDP was asked for and one process
where DeepSpeed was (accelerate 1.15, state.py), so the state is configured by hand there.
On GPU the trainer's own path is taken.
"""

from __future__ import annotations

import os
from typing import Any

from launcher.errors import PlanRefused
from launcher.plan.types import Plan

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
# MULTI_GPU is what accelerate turns into FSDP where an FSDP plugin is there.
DISTRIBUTED_TYPES = {
    "ddp": "MULTI_CPU",
    "fsdp": "MULTI_GPU",
    "fsdp1": "MULTI_GPU",
    "hsdp": "MULTI_GPU",
    "zero1": "DEEPSPEED",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}


def configure_state(plan: Plan) -> None:
    """Create accelerate's shared state: on CPU by hand, on GPU by leaving it to the trainer."""
    if plan.strategy == "single":
        # accelerate makes a process group, and DDP, of any torchrun start.
        for name in TORCHRUN_VARIABLES:
            os.environ.pop(name, None)
    if plan.topology.device != "cpu":
        return
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if plan.strategy == "single":
        PartialState(cpu=True)
        return
    state = PartialState(backend="gloo")
    state.distributed_type = DistributedType(DISTRIBUTED_TYPES[plan.strategy])


def check_world(plan: Plan) -> None:
    """Refuse to train on another number of ranks than planned.

    Raises:
        PlanRefused: where WORLD_SIZE differs (a launcher that dropped its process count).
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.topology.gpus:
        raise PlanRefused(
            "world_size",
            f"{world} ranks were started, {plan.topology.gpus} were planned",
            why="the effective batch would be another",
            fix="start as many ranks as the plan says, or plan again with --gpus",
        )


def wrapped_type(model: Any) -> str:
    """Name of the engine around the model: single, DDP, FSDP1, FSDP2 or DeepSpeed."""
    names = {base.__name__ for base in type(model).__mro__}
    for name, engine in (
        ("DeepSpeedEngine", "DeepSpeed"),
        ("FSDPModule", "FSDP2"),
        ("FullyShardedDataParallel", "FSDP1"),
        ("DistributedDataParallel", "DDP"),
    ):
        if name in names:
            return engine
    return "single"


EXPECTED_WRAP = {
    "single": "single",
    "ddp": "DDP",
    "zero1": "DeepSpeed",
    "zero2": "DeepSpeed",
    "zero3": "DeepSpeed",
    "fsdp": "FSDP2",
    "hsdp": "FSDP2",
    "fsdp1": "FSDP1",
}


def check_engine(plan: Plan, model: Any) -> str:
    """The wrapped type, asserted to be the one that was asked for.

    Raises:
        PlanRefused: where another engine than planned wraps the model.
    """
    found, expected = wrapped_type(model), EXPECTED_WRAP[plan.strategy]
    if found != expected:
        raise PlanRefused(
            "engine",
            f"the model is wrapped by {found}, {plan.strategy} means {expected}",
            why="the engine did not start as asked",
            fix="check the versions with the tested ones, and report this with the log",
        )
    return found
