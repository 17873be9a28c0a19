"""Read a saved model back in a process of its own: `python -m launcher.train.reload RUN FOLDER`.

The base is built from its configuration without memory (meta device), the adapter or model
is read from the folder, and names and shapes must be exactly those that this fresh model
has. Every tensor is read whole and must be finite. Prints what is wrong and exits 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.runs.directory import RunDirectory
from launcher.train.__main__ import read_plan
from launcher.train.packages import leave_out_unused

SHOWN = 3


def problems(run: RunDirectory, folder: Path) -> list[str]:
    """What is wrong with a saved adapter or model; empty where nothing is."""
    plan = read_plan(run)
    leave_out_unused([plan])
    found: list[str] = []
    saved: dict[str, tuple[int, ...]] = {}
    for name, tensor in saved_tensors(folder):
        saved[name] = tuple(tensor.shape)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            found.append(f"{name} is not finite")
    expected, tied = expected_shapes(plan.worker.model, folder, plan.worker.peft is not None)
    missing = sorted(expected.keys() - saved.keys() - tied)
    surplus = sorted(saved.keys() - expected.keys())
    shapes = [n for n in sorted(saved.keys() & expected.keys()) if saved[n] != expected[n]]
    found += _some(missing, "missing") + _some(surplus, "not part of the model")
    found += _some(shapes, "of another shape")
    _check_tokenizer(folder)
    return found


def saved_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and contents of every saved tensor, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


def expected_shapes(
    model: Mapping[str, Any], folder: Path, adapter: bool
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes that a fresh model has by name, and names that may be absent (tied weights)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = {"pretrained_model_name_or_path": str(folder), "revision": None}
    if adapter:
        source = {"pretrained_model_name_or_path": model["path"], "revision": model["revision"]}
    trust = model["trust_remote_code"]
    config = AutoConfig.from_pretrained(**source, trust_remote_code=trust)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        if not adapter:
            state = fresh.state_dict()
            return _shapes(state), _aliases(state, fresh)
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

        peft_model = get_peft_model(fresh, PeftConfig.from_pretrained(folder))
    return _shapes(get_peft_model_state_dict(peft_model)), set()


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _aliases(state: Mapping[str, Any], model: Any) -> set[str]:
    """Names under which a parameter appears a second time."""
    first = {name for name, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    return set(state) - first


def _check_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder)


def _some(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{', '.join(names[:SHOWN])}{more}: {what}"]


def main(arguments: list[str]) -> int:
    """Check, and say what is wrong on standard error."""
    run, folder = arguments
    found = problems(RunDirectory(Path(run)), Path(folder))
    sys.stderr.write("".join(f"{problem}\n" for problem in found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
