"""Faults inside a run's processes, for bench.faults: on PYTHONPATH, steered by the environment.

BENCH_SLOW_FSYNC=SECONDS makes every fsync take that much longer. BENCH_POISON="KIND STEP RANK"
patches the trainer as soon as it is imported (bench.poison).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from typing import Any

TARGET = "launcher.train.trainer"


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs a function once a module was imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module's own spec, its loader followed by the patch."""
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            from bench.poison import poison

            kind, step, rank = os.environ["BENCH_POISON"].split()
            poison(module.CheckedTrainer, kind, int(step), int(rank))

        spec.loader.exec_module = exec_module
        return spec


def slow_fsync(seconds: float) -> None:
    """A file system that takes its time."""
    quick = os.fsync

    def fsync(descriptor: Any) -> None:
        time.sleep(seconds)
        quick(descriptor)

    os.fsync = fsync


if os.environ.get("BENCH_SLOW_FSYNC"):
    slow_fsync(float(os.environ["BENCH_SLOW_FSYNC"]))
if os.environ.get("BENCH_POISON"):
    sys.meta_path.insert(0, AfterImport())
