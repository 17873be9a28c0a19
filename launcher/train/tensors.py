"""The training state as named tensors, in one form for every engine.

`model.NAME` is a trainable parameter, `optimizer.NAME.KEY` a piece of its optimizer state,
each with the shape that one process would see. torch's distributed checkpoint stores and
reshards them, so what one strategy or number of ranks has saved, another can load. Frozen
base weights are not part of it: they are loaded from the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from launcher.train.health import UnhealthyStepError
from launcher.train.state import wrapped_type

# What engines and wrappers put into parameter names.
WRAPPERS = ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Parameters of an optimizer that ZeRO rebuilds at once; each is whole on every rank then.
PARAMETERS_AT_ONCE = 16


class StateMismatchError(RuntimeError):
    """The checkpoint holds other tensors than this run trains."""


def save_tensors(trainer: Any, folder: Path, group: Any) -> None:
    """Write the training state; collective.

    Args:
        trainer: after its model was wrapped.
        folder: does not exist yet.
        group: process group of all ranks, on CPU; None for one process.
    """
    _shard_again(trainer.model_wrapped)
    gather = GATHERED.get(wrapped_type(trainer.model_wrapped))
    tensors = gather(trainer) if gather else dict(_live_tensors(trainer))
    _refuse_not_finite(tensors, group)
    dcp.save(
        tensors,
        storage_writer=dcp.FileSystemWriter(folder),
        process_group=group,
        no_dist=group is None,
    )


def _shard_again(model: Any) -> None:
    """Put back FSDP2's sharded parameters where a forward without a backward came last.

    After an evaluation or a sample the root module's parameters are whole ones: other objects
    than those that the optimizer knows, so that their state would be left out.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _refuse_not_finite(tensors: Mapping[str, Any], group: Any) -> None:
    """Weights that are not finite must not become a checkpoint; all ranks agree on it."""
    bad = torch.zeros(())
    for name, tensor in tensors.items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if name.startswith("model.") and not bool(torch.isfinite(local).all()):
            bad += 1
    if group is not None:
        dist.all_reduce(bad, group=group)
    if bad:
        raise UnhealthyStepError("this step is unhealthy: weights are not finite after it")


def load_tensors(trainer: Any, folder: Path) -> None:
    """Read the training state into the wrapped model and its optimizer.

    Every rank reads for itself what it needs. Saved dtypes are cast to the run's own.

    Raises:
        StateMismatchError: where names or shapes differ.
    """
    load = SCATTERED.get(wrapped_type(trainer.model_wrapped))
    if load is not None:
        load(trainer, folder)
        return
    initialise(inner_optimizer(trainer))
    tensors = _without_unsaved(dict(_live_tensors(trainer)), folder)
    _check_same(tensors, folder)
    _read(tensors, folder)
    _put_back_numbers(trainer, tensors)


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a saved training state."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}


def inner_optimizer(trainer: Any) -> Any:
    """The optimizer under accelerate's and DeepSpeed's."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def trainable(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Trainable parameters under the names of the bare model."""
    for name, parameter in trainer.model_wrapped.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers have added."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "") if wrapper != "module." else name.removeprefix(wrapper)
    return name


def initialise(optimizer: Any) -> None:
    """Make an optimizer allocate its state, without a change to any weight.

    A step with zero gradients and learning rate 0; what it counts is loaded over.
    """
    waiting = [p for group in optimizer.param_groups for p in group["params"]]
    if all(optimizer.state.get(parameter) for parameter in waiting):
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(lr) if torch.is_tensor(lr := group["lr"]) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad = None


def _live_tensors(trainer: Any) -> Iterator[tuple[str, Any]]:
    """The tensors that training itself uses: loading into them is all there is to do."""
    state = inner_optimizer(trainer).state
    for name, parameter in trainable(trainer):
        yield f"model.{name}", parameter.detach()
        for key, value in sorted(state.get(parameter, {}).items()):
            yield (
                f"optimizer.{name}.{key}",
                value if torch.is_tensor(value) else torch.tensor(value),
            )


def _put_back_numbers(trainer: Any, tensors: Mapping[str, Any]) -> None:
    """Optimizer state that is a plain number (8-bit optimizers count their steps so)."""
    state = inner_optimizer(trainer).state
    for name, parameter in trainable(trainer):
        for key, value in state.get(parameter, {}).items():
            if not torch.is_tensor(value) and f"optimizer.{name}.{key}" in tensors:
                state[parameter][key] = type(value)(tensors[f"optimizer.{name}.{key}"].item())


def _without_unsaved(tensors: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Leave out the optimizer state of parameters that had none when the checkpoint was made.

    A parameter that has never had a gradient has no state; it starts with an empty one.
    """
    saved = saved_shapes(folder)
    with_state = {name.rpartition(".")[0] for name in saved if name.startswith("optimizer.")}
    kept = {}
    for name, tensor in tensors.items():
        if not name.startswith("optimizer.") or name.rpartition(".")[0] in with_state:
            kept[name] = tensor
        elif name.endswith(".step"):
            tensor.zero_()
    return kept


def _check_same(tensors: Mapping[str, Any], folder: Path) -> None:
    _compare({name: tuple(tensor.shape) for name, tensor in tensors.items()}, saved_shapes(folder))


def _compare(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    lost, new = sorted(saved.keys() - here.keys()), sorted(here.keys() - saved.keys())
    other = [name for name in sorted(here.keys() & saved.keys()) if here[name] != saved[name]]
    problems = [
        f"{len(names)} {what}, such as {names[0]}"
        for names, what in (
            (lost, "tensors of the checkpoint are not in this run"),
            (new, "tensors of this run are not in the checkpoint"),
            (other, "tensors have another shape"),
        )
        if names
    ]
    if problems:
        raise StateMismatchError("; ".join(problems))


def _read(tensors: dict[str, Any], folder: Path) -> None:
    dcp.load(
        tensors,
        storage_reader=dcp.FileSystemReader(folder),
        planner=DefaultLoadPlanner(),
        no_dist=True,
    )


# --- ZeRO: DeepSpeed keeps flat partitions, and hands out and takes whole tensors ---


def _zero_tensors(trainer: Any) -> dict[str, Any]:
    """This rank's share of the whole tensors, on the CPU; collective, one tensor at a time."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    world, rank = dist.get_world_size(), dist.get_rank()
    _link_zero(trainer.model_wrapped.optimizer)
    step = _zero_step(trainer)
    share: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(trainable(trainer)):
        whole = {f"model.{name}": safe_get_full_fp32_param(parameter)}
        for key in _zero_keys(trainer):
            full = safe_get_full_optimizer_state(parameter, key)
            whole[f"optimizer.{name}.{key}"] = full
        if index % world == rank:
            share |= {key: tensor.detach().cpu().clone() for key, tensor in whole.items()}
            share[f"optimizer.{name}.step"] = step.clone()
    return share


def _load_zero(trainer: Any, folder: Path) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _initialise_zero(trainer)
    keys = _zero_keys(trainer)
    named = list(trainable(trainer))
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named}
    here: dict[str, Any] = {f"model.{name}": shape for name, shape in shapes.items()}
    here |= {f"optimizer.{n}.{key}": shape for n, shape in shapes.items() for key in keys}
    here |= {f"optimizer.{name}.step": () for name in shapes}
    _compare(here, saved_shapes(folder))
    step = torch.zeros(())
    for start in range(0, len(named), PARAMETERS_AT_ONCE):
        some = named[start : start + PARAMETERS_AT_ONCE]
        wanted = {
            f"{prefix}": torch.empty(shapes[name], dtype=torch.float32)
            for name, _ in some
            for prefix in (f"model.{name}", *(f"optimizer.{name}.{key}" for key in keys))
        }
        steps = {f"optimizer.{name}.step": step for name, _ in some}
        _read({**wanted, **steps}, folder)
        for name, parameter in some:
            safe_set_full_fp32_param(parameter, wanted[f"model.{name}"])
            for key in keys:
                value = wanted[f"optimizer.{name}.{key}"]
                safe_set_full_optimizer_state(parameter, value, key)
    for state in inner_optimizer(trainer).state.values():
        if "step" in state:
            state["step"] = step.clone() if torch.is_tensor(state["step"]) else int(step)
    _refresh_low_precision(trainer)


def _zero_keys(trainer: Any) -> list[str]:
    """Names of the optimizer's per-parameter tensors, such as exp_avg."""
    for state in inner_optimizer(trainer).state.values():
        return sorted(k for k, v in state.items() if torch.is_tensor(v) and v.dim() > 0)
    return []


def _zero_step(trainer: Any) -> Any:
    for state in inner_optimizer(trainer).state.values():
        if "step" in state:
            return torch.as_tensor(state["step"], dtype=torch.float32).cpu().reshape(())
    return torch.zeros(())


def _initialise_zero(trainer: Any) -> None:
    """Allocate the partitions' optimizer state, and link it to the parameters."""
    zero, optimizer = trainer.model_wrapped.optimizer, inner_optimizer(trainer)
    if hasattr(zero, "sub_group_to_group_id"):
        # ZeRO-3 hands its optimizer one sub-group at a time, and none in between.
        for number, partition in enumerate(zero.fp32_partitioned_groups_flat):
            group = optimizer.param_groups[zero.sub_group_to_group_id[number]]
            if not optimizer.state.get(partition):
                group["params"] = [partition]
                initialise(optimizer)
                group["params"] = []
    else:
        initialise(optimizer)
    _link_zero(zero)


def _link_zero(zero: Any) -> None:
    """Let parameters find their optimizer state (ZeRO-1 and 2).

    DeepSpeed 0.19 links once, after the step of the first parameter group, and so misses
    the state of all other groups.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False  # noqa: SLF001
        zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001


def _refresh_low_precision(trainer: Any) -> None:
    """Copy the loaded float32 masters to the weights that the forward uses."""
    zero = trainer.model_wrapped.optimizer
    if hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
        return
    pairs = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
    for weights, masters in pairs:
        if weights is not None:
            weights.data.copy_(masters.data)


# --- FSDP1: flat shards, which torch gathers and takes apart ---


def _fsdp1_tensors(trainer: Any) -> dict[str, Any]:
    """This rank's share of the whole tensors; collective. Every rank gathers all of them."""
    world, rank = dist.get_world_size(), dist.get_rank()
    state = _fsdp1_optimizer(trainer)["state"]
    tensors: dict[str, Any] = {}
    with _whole_parameters(trainer, writeback=False):
        for index, (name, parameter) in enumerate(trainable(trainer)):
            if index % world != rank:
                continue
            tensors[f"model.{name}"] = parameter.detach().cpu().clone()
            tensors |= {f"optimizer.{name}.{k}": v.cpu() for k, v in state[name].items()}
    return tensors


def _load_fsdp1(trainer: Any, folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    optimizer = inner_optimizer(trainer)
    initialise(optimizer)
    gathered = _fsdp1_optimizer(trainer)
    state = {
        f"optimizer.{name}.{key}": value
        for name, values in gathered["state"].items()
        for key, value in values.items()
    }
    with _whole_parameters(trainer, writeback=True):
        weights = {f"model.{name}": p.detach() for name, p in trainable(trainer)}
        tensors = {**weights, **state}
        _check_same(tensors, folder)
        _read(tensors, folder)
    with _whole_optimizer(trainer):
        flat = FullyShardedDataParallel.optim_state_dict_to_load(
            trainer.model_wrapped, optimizer, gathered
        )
    optimizer.load_state_dict(flat)


def _fsdp1_optimizer(trainer: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with _whole_optimizer(trainer):
        found: dict[str, Any] = FullyShardedDataParallel.optim_state_dict(
            trainer.model_wrapped, inner_optimizer(trainer)
        )
    return found


def _whole_parameters(trainer: Any, *, writeback: bool) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    # On GPU the whole model waits in host memory, where there is room for it.
    return FullyShardedDataParallel.summon_full_params(
        trainer.model_wrapped, writeback=writeback, offload_to_cpu=_on_gpu(trainer)
    )


def _whole_optimizer(trainer: Any) -> Any:
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        FullyShardedDataParallel,
        StateDictType,
    )

    return FullyShardedDataParallel.state_dict_type(
        trainer.model_wrapped,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=_on_gpu(trainer), rank0_only=False),
        FullOptimStateDictConfig(offload_to_cpu=_on_gpu(trainer), rank0_only=False),
    )


def _on_gpu(trainer: Any) -> bool:
    return bool(trainer.accelerator.device.type != "cpu")


# Engines whose own tensors are flat pieces: how they are made whole, and taken apart again.
GATHERED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "DeepSpeed": _zero_tensors,
    "FSDP1": _fsdp1_tensors,
}
SCATTERED: dict[str, Callable[[Any, Path], None]] = {
    "DeepSpeed": _load_zero,
    "FSDP1": _load_fsdp1,
}
