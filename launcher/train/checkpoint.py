"""Checkpoints of a running session: written by all ranks, sealed by the first.

state/               trainable parameters and optimizer state (launcher.train.tensors)
adapter_*            the adapter as PEFT loads it, where one is trained
trainer_state.json   step, epoch and log history, as transformers writes it
progress.pt          scheduler, loss scaler, token count, health
random-R.pt          random states of rank R
complete.json        the seal, written last
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from launcher import __version__
from launcher.plan.types import Plan
from launcher.runs.checkpoints import (
    SEAL,
    Checkpoint,
    Skipped,
    check_contents,
    checkpoint_folders,
    describe,
    digests,
    file_names,
    folder_name,
    read_seal,
    remove_unsealed,
    rotate,
    seal,
    set_aside,
)
from launcher.runs.directory import RunDirectory
from launcher.train.control import Ranks
from launcher.train.health import Health
from launcher.train.order import rows_digest
from launcher.train.save import NOT_KEPT
from launcher.train.tensors import inner_optimizer, load_tensors, save_tensors

STATE = "state"
TRAINER_STATE = "trainer_state.json"
PROGRESS = "progress.pt"
VERSIONS = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed")
# Random states cannot be carried to another number of ranks: each rank draws anew there.
RESEED_STRIDE = 1_000_003


class CheckpointStore:
    """Writes, finds and reads the checkpoints of one run."""

    def __init__(self, plan: Plan, run: RunDirectory, ranks: Ranks, health: Health) -> None:
        self.plan, self.run, self.ranks, self.health = plan, run, ranks, health
        self._digest: str | None = None

    def find(self, say: Callable[[str], object]) -> Checkpoint | None:
        """The newest whole checkpoint, the same on every rank; collective.

        Args:
            say: told by rank 0 what was skipped, and why.
        """
        found, skipped = self._newest_whole()
        if self.ranks.rank == 0:
            describe(skipped, say)
            remove_unsealed(self.run.checkpoints)
            set_aside(self.run.checkpoints, skipped)
        source = self.plan.worker.resume_from
        if found is not None or source is None:
            return found
        other = self._whole(Path(source))
        if isinstance(other, Checkpoint):
            return other
        raise RuntimeError(f"{source} cannot be resumed from: {other.reason}")

    def _newest_whole(self) -> tuple[Checkpoint | None, list[Skipped]]:
        folders = checkpoint_folders(self.run.checkpoints) if self.ranks.rank == 0 else None
        skipped: list[Skipped] = []
        for folder in self.ranks.from_first(folders):
            found = self._whole(folder)
            if isinstance(found, Checkpoint):
                return found, skipped
            skipped.append(found)
        return None, skipped

    def _whole(self, folder: Path) -> Checkpoint | Skipped:
        """A folder's checkpoint; its files are read by all ranks, each a share of them."""
        seal_of_first = read_seal(folder) if self.ranks.rank == 0 else None
        found: Checkpoint | Skipped = self.ranks.from_first(seal_of_first)
        if isinstance(found, Skipped):
            return found
        mine = list(found.record["files"])[self.ranks.rank :: self.ranks.world]
        problems = self.ranks.gather(check_contents(found, mine))
        return next((problem for problem in problems if problem is not None), found)

    def save(self, trainer: Any) -> Checkpoint:
        """Write, seal and rotate; collective. What fails leaves the earlier ones as they are."""
        started = time.monotonic()
        folder = self.run.checkpoints / folder_name(trainer.state.global_step)
        if self.ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.ranks.wait()
        try:
            self._write(trainer, folder)
            checkpoint = self._seal(trainer, folder, started)
        except BaseException:
            # A full disk (each writer has an error of its own for it): what was written is of
            # no use, and its space is. A sealed one stays: only its peers' word was missing.
            if not (folder / SEAL).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.ranks.rank == 0:
            best = trainer.state.best_global_step
            protected = {folder_name(best)} if best else set()
            keep = self.plan.worker.checkpoints["keep"]
            rotate(self.run.checkpoints, keep, protected, trainer.state.global_step)
        return checkpoint

    def load(self, trainer: Any, checkpoint: Checkpoint) -> None:
        """Put parameters, optimizer and schedule back; the trainer does step and position.

        Raises:
            RuntimeError: where the data is not what the checkpoint's position counts in.
        """
        rows = checkpoint.record["rows"]
        if trainer.order is not None and rows not in (None, trainer.order.rows):
            raise RuntimeError(
                f"the dataset has {trainer.order.rows:,} rows, {checkpoint.path.name} was made "
                f"with {rows:,}: rows would be seen twice or skipped"
            )
        digest = checkpoint.record["rows_digest"]
        if digest is not None and digest != self._rows_digest(trainer):
            raise RuntimeError(
                f"the dataset's rows, or how they become tokens, are not those that "
                f"{checkpoint.path.name} was made with: this would be another run"
            )
        load_tensors(trainer, checkpoint.path / STATE)
        progress = torch.load(checkpoint.path / PROGRESS, map_location="cpu", weights_only=True)
        _load_scheduler(trainer, progress["scheduler"])
        put_back_loss_scale(trainer, progress["scaler"])
        trainer._total_train_tokens = progress["tokens"]  # noqa: SLF001 - TRL's only counter
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "early_stopping_patience_counter"):
                callback.early_stopping_patience_counter = progress["patience"]
                trainer.nothing_left = progress["patience"] >= callback.early_stopping_patience
        self.health.load_state(progress["health"])
        trainer.owed = set(progress["owed"])

    def _rows_digest(self, trainer: Any) -> str | None:
        """Of the prepared rows; computed once, for they do not change in a run."""
        if self._digest is None and trainer.order is not None:
            self._digest = rows_digest(trainer.train_dataset)
        return self._digest

    def load_random(self, checkpoint: Checkpoint) -> None:
        """This rank's random states, or new ones where the number of ranks is another."""
        if int(checkpoint.record["world"]) != self.ranks.world:
            seed = self.plan.worker.training_arguments["seed"]
            set_random(seed + RESEED_STRIDE * (checkpoint.step + 1) + self.ranks.rank)
            return
        path = checkpoint.path / f"random-{self.ranks.rank}.pt"
        restore_random(torch.load(path, map_location="cpu", weights_only=True))

    def _write(self, trainer: Any, folder: Path) -> None:
        if self.plan.worker.peft is not None:
            trainer.save_model(str(folder), _internal_call=True)
        save_tensors(trainer, folder / STATE, self.ranks.group)
        torch.save(random_states(), folder / f"random-{self.ranks.rank}.pt")
        if self.ranks.rank != 0:
            return
        for name in NOT_KEPT:
            (folder / name).unlink(missing_ok=True)
        trainer.state.save_to_json(str(folder / TRAINER_STATE))
        patience = [
            callback.early_stopping_patience_counter
            for callback in trainer.callback_handler.callbacks
            if hasattr(callback, "early_stopping_patience_counter")
        ]
        progress = {
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": loss_scale(trainer),
            "tokens": trainer._total_train_tokens,  # noqa: SLF001 - TRL's only counter
            "patience": patience[0] if patience else 0,
            "health": self.health.state(),
            "owed": sorted(trainer.owed),
        }
        torch.save(progress, folder / PROGRESS)

    def _seal(self, trainer: Any, folder: Path, started: float) -> Checkpoint:
        """Checksums by all ranks, each a share of the files; then rank 0's seal."""
        self.ranks.wait()
        names = self.ranks.from_first(file_names(folder) if self.ranks.rank == 0 else None)
        mine = names[self.ranks.rank :: self.ranks.world]
        files: dict[str, Any] = {}
        for part in self.ranks.gather(digests(folder, mine)):
            files |= part
        record = self._record(trainer, started)
        if self.ranks.rank == 0:
            seal(folder, record, files)
        self.ranks.wait()
        return Checkpoint(folder, {**record, "files": files})

    def _record(self, trainer: Any, started: float) -> dict[str, Any]:
        batch = self.plan.batch
        return {
            "step": trainer.state.global_step,
            "epoch": trainer.state.epoch,
            "rows": trainer.order.rows if trainer.order else None,
            "rows_digest": self._rows_digest(trainer),
            "world": self.ranks.world,
            "global_batch_size": batch.global_batch_size,
            "micro_batch_size": batch.micro_batch_size,
            "gradient_accumulation_steps": batch.gradient_accumulation_steps,
            "strategy": self.plan.strategy,
            "method": self.plan.adapter.method,
            "seconds": round(time.monotonic() - started, 3),
            "time": time.time(),
            "versions": {"sftlaunch": __version__, **_versions()},
        }


def _load_scheduler(trainer: Any, state: dict[str, Any]) -> None:
    """Go on with the schedule; its lists hold one entry for each of the optimizer's groups.

    All groups share one learning rate (transformers 5.23, create_optimizer), but their number
    differs between engines: DeepSpeed drops a group that is empty.
    """
    groups = inner_optimizer(trainer).param_groups
    lists = {key: value[:1] * len(groups) for key, value in state.items() if type(value) is list}
    trainer.lr_scheduler.load_state_dict({**state, **lists})
    for group in groups:
        group["lr"] = state["_last_lr"][0]


def loss_scale(trainer: Any) -> dict[str, Any] | None:
    """State of the fp16 loss scaler: torch's, or DeepSpeed's own; None without one."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None:
        return {"kind": "torch", **scaler.state_dict()}
    scaler = _deepspeed_scaler(trainer)
    return None if scaler is None else {"kind": "deepspeed", **_numbers(scaler)}


def put_back_loss_scale(trainer: Any, state: Mapping[str, Any] | None) -> None:
    """Go on with a loss scale; one of another engine starts anew, and finds its scale again."""
    values = dict(state or {})
    kind = values.pop("kind", None)
    scaler = getattr(trainer.accelerator, "scaler", None)
    if kind == "torch" and scaler is not None:
        scaler.load_state_dict(values)
    elif kind == "deepspeed" and (own := _deepspeed_scaler(trainer)) is not None:
        vars(own).update(values)


def _deepspeed_scaler(trainer: Any) -> Any:
    """The dynamic loss scaler of a DeepSpeed optimizer under fp16 (deepspeed 0.19)."""
    scaler = getattr(getattr(trainer.model_wrapped, "optimizer", None), "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _numbers(scaler: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(scaler).items() if type(value) in (int, float)}


def random_states() -> dict[str, Any]:
    """States of every generator that training draws from."""
    import numpy as np

    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave."""
    import numpy as np

    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def set_random(seed: int) -> None:
    """Seed every generator that training draws from."""
    from transformers import set_seed

    set_seed(seed % 2**32)


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except ImportError:
            continue
    return found
