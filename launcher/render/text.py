"""A plan and a run's end as people read them: units, rounded numbers, wrapped lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.plan.adapter import METHODS
from launcher.plan.batch import equation
from launcher.plan.types import Advice, Memory, Plan, Storage, Time
from launcher.render.quote import shell_line
from launcher.spec.schema import CheckpointSpec, Spec

LABEL_WIDTH = 10
MAX_DEFAULTS = 40


def plan_lines(
    plan: Plan, spec: Spec, *, parameters: int | None, rows: int | None, output: str, width: int
) -> list[str]:
    """The plan as lines of at most `width` columns.

    Args:
        plan: with its command.
        spec: resolved.
        parameters: of the base model; None where unknown.
        rows: of the dataset; None where unknown.
        output: the run directory, as the user named it.
        width: columns of the terminal.
    """
    lines: list[str] = []
    for label, text in entries(plan, spec, parameters, rows, output):
        lines += entry(label, text, width)
    return lines


def entry(label: str, text: str, width: int) -> list[str]:
    """One labelled entry with a hanging indent; long words (paths) are never broken."""
    return textwrap.wrap(
        text,
        width=max(width, LABEL_WIDTH + 20),
        initial_indent=f"{label:<{LABEL_WIDTH}} ",
        subsequent_indent=" " * (LABEL_WIDTH + 1),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [label]


def entries(
    plan: Plan, spec: Spec, parameters: int | None, rows: int | None, output: str
) -> Iterator[tuple[str, str]]:
    """The plan's lines, label and text; see `plan_lines`."""
    topology = plan.topology
    size = f", {count(parameters)} parameters" if parameters else ""
    yield "model", f"{spec.model.path} ({spec.model.dtype}{size})"
    if spec.dataset:
        held = f"{rows:,} rows" if rows is not None else "rows unknown until it is loaded"
        yield "data", f"{spec.dataset.path} ({held}; loss: {spec.loss or 'by its columns'})"
    else:
        yield "data", "none given: what depends on it is unknown"
    yield "method", _method(plan, spec)
    unit = "rank" if topology.device == "cpu" else "GPU"
    where = f"{topology.gpus} {unit}{'s' if topology.gpus > 1 else ''} on "
    where += "CPU" if topology.device == "cpu" else plural(topology.nodes, "node")
    yield "strategy", f"{plan.strategy} over {where}: {plan.reasons[0]}"
    yield "batch", equation(plan.batch, topology.data_parallel_size)
    yield "memory", memory_text(plan.memory, topology.device)
    yield "time", time_text(plan.time, topology.device)
    yield "saves", saves_text(plan.storage, spec.checkpoints)
    for reason in plan.reasons[2:]:
        yield "fixed up", reason
    yield "defaults", _defaults(plan.defaults)
    yield "output", output
    for advice in plan.warnings:
        yield "warning", advice_text(advice)
    yield "command", shell_line(plan.command)


def _method(plan: Plan, spec: Spec) -> str:
    if plan.adapter.adapter_dtype is None:
        return f"{spec.method}, learning rate {spec.training.learning_rate:g}"
    parts: list[str] = [spec.method]
    uses = METHODS[spec.method].uses
    if "rank" in uses:
        parts.append(f"rank {spec.lora.rank}")
    if "virtual_tokens" in uses:
        parts.append(f"{spec.lora.virtual_tokens} virtual tokens")
    if spec.quantization != "none":
        parts.append(f"{spec.quantization} base")
    parts += [f"adapter in {plan.adapter.adapter_dtype}"]
    return ", ".join([*parts, f"learning rate {spec.training.learning_rate:g}"])


def _defaults(defaults: Mapping[str, Any]) -> str:
    hidden = ("output", "loss")
    said = [
        f"{key.removeprefix('training.')} {value_text(value)}"
        for key, value in defaults.items()
        if key not in hidden
    ]
    return ", ".join(said[:MAX_DEFAULTS]) or "none"


def advice_text(advice: Advice) -> str:
    """A warning with its fix."""
    return f"{advice.message}; {advice.fix}" if advice.fix else advice.message


def memory_text(memory: Memory, device: str) -> str:
    """Predicted memory with its interval, and whether it fits."""
    if memory.peak_reserved_bytes is None:
        return "unknown: the model is not here"
    peak, low, high = (
        gibibytes(number)
        for number in (memory.peak_reserved_bytes, memory.low_bytes or 0, memory.high_bytes or 0)
    )
    if device == "cpu":
        return "not predicted on CPU"
    text = f"{peak} GiB per GPU ({low} to {high})"
    if memory.gpu_memory_bytes is None:
        return f"{text}; the GPU is unknown, name it with --gpu"
    verdict = "fits" if memory.fits else "may not fit"
    return f"{text} of {gibibytes(memory.gpu_memory_bytes)} GiB: {verdict}"


def time_text(time: Time, device: str) -> str:
    """Steps and duration as far as they are known."""
    steps = plural(time.steps, "step") if time.steps is not None else "steps unknown"
    if device == "cpu":
        return f"{steps}; their duration is not predicted on CPU"
    if time.total_seconds is None or time.seconds_per_step is None:
        return f"{steps}; duration {time.basis}"
    return f"{steps}, {time.seconds_per_step:.2f} s each, {duration(time.total_seconds)} in all"


def saves_text(storage: Storage, checkpoints: CheckpointSpec) -> str:
    """How often, how many, how large."""
    text = f"every {plural(checkpoints.every_steps or 0, 'step')}, the last {checkpoints.keep} kept"
    if storage.checkpoint_bytes is None or storage.total_bytes is None:
        return f"{text}; their size is unknown"
    one, total = bytes_text(storage.checkpoint_bytes), bytes_text(storage.total_bytes)
    return f"{text}, {one} each, {total} in all with the final save"


def bytes_text(number: int) -> str:
    """A size on disk: 3.5 MB, 1.2 TB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def plural(number: int, noun: str) -> str:
    """`1 node`, `1,200 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count(number: float) -> str:
    """Parameters: 1.9 M, 8.03 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def gibibytes(number: int) -> str:
    """Bytes in GiB, one decimal, two below 1."""
    size = number / 2**30
    return f"{size:.1f}" if size >= 1 else f"{size:.2f}"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 5 h 12 min."""
    seconds = round(seconds)
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:  # noqa: PLR2004 - an hour
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def value_text(value: Any) -> str:
    """A default's value, short."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def progress_text(status: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """One line on where a run stands."""
    step, total = status.get("step") or 0, status.get("max_steps")
    last = next((m for m in reversed(metrics) if m.get("loss") is not None), None)
    if status.get("stage") != "training" or last is None or not total:
        return str(status.get("stage") or status.get("state") or "starting")
    step = max(step, last["step"])
    parts = [f"step {step}/{total}", f"loss {last['loss']:.4f}"]
    parts.append(f"lr {last['learning_rate']:.2e}")
    if last.get("grad_norm") is not None:
        parts.append(f"grad norm {last['grad_norm']:.2f}")
    if last.get("tokens_per_second"):
        parts.append(f"{last['tokens_per_second']:,.0f} tokens/s")
    if last.get("gpu_memory_bytes"):
        parts.append(f"{gibibytes(last['gpu_memory_bytes'])} GiB")
    left = seconds_left(metrics, total)
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def seconds_left(metrics: Sequence[Mapping[str, Any]], total: int) -> float | None:
    """Time left at the speed of the last logged steps; None until two are known."""
    timed = [m for m in metrics if m.get("samples_per_second") and "loss" in m][-10:]
    if len(timed) < 2:  # noqa: PLR2004 - a speed needs two points
        return None
    elapsed = timed[-1]["time"] - timed[0]["time"]
    steps = timed[-1]["step"] - timed[0]["step"]
    return float((total - timed[-1]["step"]) * elapsed / steps) if steps else None
