"""Values that the schema's types let through and upstream or a file system would not."""

from __future__ import annotations

import difflib
import math
import os
import re
from typing import Any

from launcher.errors import SpecError
from launcher.spec.arguments import OWNED, choices, kind_fits, sft_fields
from launcher.spec.document import Key
from launcher.spec.explain import place_of, shown, unknown_key
from launcher.spec.schema import Spec, TrainingSpec

UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f]")
NOT_UNICODE = re.compile(r"[\ud800-\udfff]")  # undecodable bytes of argv; halves of YAML escapes
MAX_NAME_BYTES = 255  # of one path component, on every usual file system


def check_extra_fields(training: TrainingSpec, places: dict[Key, str], origin: str) -> None:
    """Names and kinds of the `SFTConfig` fields under `training:`."""
    known = sft_fields()
    for name, value in training.sft_fields().items():
        key: Key = ("training", name)
        place = place_of(key, places, origin)
        if name in OWNED:
            raise SpecError(
                "owned_key",
                f"{place}: training.{name} is computed by the plan",
                fix=f"use {OWNED[name]}",
            )
        if name not in known:
            raise unknown_key(key, place)
        if not kind_fits(value, known[name]):
            raise SpecError(
                "wrong_type",
                f"{place}: training.{name} is {shown(value)}",
                why=f"SFTConfig.{name} takes {' or '.join(known[name])}",
                fix=f"correct training.{name}",
                source="TRL 1.16 SFTConfig",
            )
        if not _is_finite(value):
            raise SpecError(
                "bad_value",
                f"{place}: training.{name} is {shown(value)}",
                why="it should be a finite number",
                fix=f"correct training.{name}",
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return all(_is_finite(item) for item in inner)
    return not isinstance(value, float) or math.isfinite(value)


def check_choices(spec: Spec, places: dict[Key, str], origin: str) -> None:
    """Values that upstream would refuse only after the model is loaded."""
    for dotted, (known, source) in choices().items():
        value: Any = spec
        for name in dotted.split("."):
            value = getattr(value, name)
        for one in value if isinstance(value, list) else [value]:
            if one is None or one in known or "/" in one:
                continue
            near = difflib.get_close_matches(one, known, n=1)
            raise SpecError(
                "bad_value",
                f"{place_of(tuple(dotted.split('.')), places, origin)}: {dotted} is {shown(one)}",
                fix=f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}",
                source=source,
            )


def check_names(spec: Spec, places: dict[Key, str], origin: str) -> None:
    """Names that reach files and shells carry no control characters and are not empty."""
    names: dict[str, str | None] = {
        "model.path": spec.model.path,
        "output": spec.output,
        "hardware.gpu": spec.hardware.gpu,
    }
    if spec.dataset:
        names |= {"dataset.path": spec.dataset.path, "dataset.eval_path": spec.dataset.eval_path}
        more = spec.dataset.sources or ()
        names |= {f"dataset.sources.{at}.path": one.path for at, one in enumerate(more)}
    for dotted, name in names.items():
        if name is None:
            continue
        place = place_of(tuple(dotted.split(".")), places, origin)
        if not name.strip():
            raise SpecError("bad_name", f"{place}: {dotted} is empty", fix=f"set {dotted}")
        if UNSAFE_NAME.search(name):
            raise SpecError(
                "bad_name",
                f"{place}: {dotted} holds a control character ({name!r})",
                fix="rename it without newlines, tabs or other control characters",
            )
        if NOT_UNICODE.search(name):
            raise SpecError(
                "bad_name",
                f"{place}: {dotted} is not valid UTF-8 ({name!r})".encode(
                    "ascii", "backslashreplace"
                ).decode(),
                fix="rename it",
            )
        if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in name.split("/")):
            raise SpecError(
                "bad_name",
                f"{place}: {dotted} is too long",
                why=f"a file name has at most {MAX_NAME_BYTES} bytes",
                fix="use a shorter name",
            )
