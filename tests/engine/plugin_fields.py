"""Print the engine plugins that accelerate builds for a run, as a rank would: every field.

Started by torchrun with our environment, and by `accelerate launch` with accelerate.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from launcher.plan.types import plan_from_json
from launcher.runs.directory import RunDirectory
from launcher.train.__main__ import set_environment


def main(folder: str, ours: str) -> None:
    run = RunDirectory(Path(folder))
    plan = plan_from_json(json.loads(run.plan.read_text()))
    if ours == "ours":
        set_environment(plan, run)
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    found = {}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        found["fsdp"] = fields(FullyShardedDataParallelPlugin())
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        found["deepspeed"] = fields(DeepSpeedPlugin())
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        found["mesh"] = fields(ParallelismConfig())
    found["mixed_precision"] = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if int(os.environ.get("RANK", "0")) == 0:
        (run.path / f"plugins-{ours}.json").write_text(json.dumps(found, sort_keys=True))


def fields(plugin: object) -> dict[str, str]:
    """Every field as text; addresses of callables are left out."""
    names = [field.name for field in dataclasses.fields(plugin)]
    values = {name: getattr(plugin, name) for name in names}
    return {
        name: getattr(value, "__qualname__", None) or repr(getattr(value, "config", value))
        for name, value in values.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
