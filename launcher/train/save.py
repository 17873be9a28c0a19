"""The final save: whole, checked, and in place only when it is.

Rank 0 writes to a folder beside the final one and renames it after the check, so that
`final/` is either absent or complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.plan.types import Plan
from launcher.runs.directory import RunDirectory
from launcher.train.control import STOP_SIGNALS
from launcher.train.process import held_back, rank_of

# transformers pickles the whole argument object there; weights need none of it.
NOT_KEPT = ("training_args.bin",)
# Variables that would make a child process take itself for a rank.
OF_THIS_RANK = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC",
    "ACCELERATE_",
    "FSDP_",
)
SHOWN_LINES = 3
# PEFT's name of the one adapter, in the middle of a parameter's name (LoRA) or at its end (IA3).
ADAPTER_NAME = re.compile(r"\.default(?=\.|$)")
ADAPTER_FILE = "adapter_model.safetensors"


class IncompleteSaveError(RuntimeError):
    """What was written is not what was trained."""


def save_final(plan: Plan, run: RunDirectory, trainer: Any) -> None:
    """Save the adapter or the model with its tokenizer to `final/`; collective.

    Raises:
        IncompleteSaveError: where tensors are missing, empty or not the adapter's.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        # Under SHARDED_STATE_DICT save_model writes nothing and says nothing.
        plugin.set_state_dict_type("FULL_STATE_DICT")
    temporary = run.path / ".final"
    if rank_of() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))
    trainer.accelerator.wait_for_everyone()
    if rank_of() == 0:
        for name in NOT_KEPT:
            (temporary / name).unlink(missing_ok=True)
        check_saved(temporary, adapter=plan.worker.peft is not None)
        check_reload(run, temporary)
        shutil.rmtree(run.final, ignore_errors=True)
        temporary.rename(run.final)


def save_fsdp1(trainer: Any, folder: str) -> None:
    """Save an FSDP1 model or adapter whole, gathered parameter by parameter; collective.

    Upstream's way fails twice: its full state dict offloads to the CPU, which on CPU
    tensors is a segmentation fault (torch 2.13, _full_post_state_dict_hook), and PEFT 0.21
    looks for adapter keys under the wrapped modules' names, finds none and writes an
    adapter without tensors (tuners_utils, _get_tuner_state_dict_key_prefixes).
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    on_gpu = trainer.accelerator.device.type != "cpu"
    module = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    with FullyShardedDataParallel.summon_full_params(
        trainer.model_wrapped, writeback=False, offload_to_cpu=on_gpu, rank0_only=on_gpu
    ):
        if rank_of() != 0:
            return
        tensors = [*module.named_parameters(), *_kept_buffers(module)]
        state = {
            name.replace("_fsdp_wrapped_module.", ""): tensor.detach().cpu().clone()
            for name, tensor in tensors
            if not hasattr(module, "peft_config") or tensor.requires_grad
        }
    trainer._save(folder, state_dict=state)  # noqa: SLF001 - writes what belongs beside them
    if hasattr(module, "peft_config"):
        from safetensors.torch import save_file

        adapter = {ADAPTER_NAME.sub("", name): tensor for name, tensor in state.items()}
        save_file(adapter, f"{folder}/{ADAPTER_FILE}", metadata={"format": "pt"})


def _kept_buffers(module: Any) -> Iterator[tuple[str, Any]]:
    """Buffers that belong into a state dict."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix=prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:  # noqa: SLF001
                yield name, buffer


def check_reload(run: RunDirectory, folder: Path) -> None:
    """Let a fresh process read what was saved, without this one's memory of it.

    Raises:
        IncompleteSaveError: with what that process says.
    """
    argv = [sys.executable, "-m", "launcher.train.reload", str(run.path), str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_THIS_RANK)}
    # Whoever asks all processes of a job to stop would end this one, and the save with it.
    with held_back(STOP_SIGNALS):
        done = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        words = " ".join(done.stderr.strip().splitlines()[-SHOWN_LINES:])
        raise IncompleteSaveError(
            "what was saved does not load in a fresh process: "
            f"{words or f'it ended with exit code {done.returncode}'}"
        )


def check_saved(folder: Path, *, adapter: bool) -> None:
    """Tensors are there, none is empty, and an adapter holds no base weights."""
    from safetensors import safe_open

    files = sorted(folder.glob(ADAPTER_FILE if adapter else "model*.safetensors"))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    if not shapes:
        raise IncompleteSaveError(f"no tensors were saved to {folder.name}")
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise IncompleteSaveError(f"{len(empty)} tensors were saved empty, such as {empty[0]}")
    if adapter:
        base = [name for name in shapes if ".base_layer." in name]
        if base:
            raise IncompleteSaveError(f"the adapter holds base weights, such as {base[0]}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        promised = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        missing = sorted(promised - set(shapes))
        if missing:
            raise IncompleteSaveError(f"{len(missing)} tensors are missing, such as {missing[0]}")
