"""What `--sweep KEY=V,V,...` means: axes, their product, and a folder name for each run.

It reads words and makes names; whether a combination can be run is the plan's to say.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.errors import PlanRefused, SpecError
from launcher.spec.arguments import OLDER, OWNED
from launcher.spec.document import Loader, construct, syntax_error
from launcher.spec.explain import all_keys
from launcher.spec.load import Override

# Planned in seconds; what is larger is a typing error or wants several sweeps.
MOST_RUNS = 10_000
# Of a value in a folder's name, and of the whole name: far below any file system's 255 bytes.
VALUE_CHARACTERS, NAME_CHARACTERS = 40, 150
# Plain to shells, Slurm's file name patterns and container mounts alike.
UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
NEAR = 0.6
# Key or section -> why a sweep does not go over it, and the way out.
NEVER = {
    "output": ("it is the sweep's own folder", "use --output DIR; each run gets a folder in it"),
    "slurm": ("it says how a job is asked for, not what is trained", "use --set"),
    "docker": ("it says how containers are started, not what is trained", "use --set"),
}
# The same for the one job array that a sweep on Slurm is: its tasks are all alike.
NOT_IN_AN_ARRAY = ("hardware", "limits.max_restarts")


@dataclass(frozen=True)
class Axis:
    """One key and the values that it takes."""

    key: str
    """Full dotted key of the spec."""
    values: tuple[Any, ...]
    texts: tuple[str, ...]
    """The values as they were said, for people."""
    flag: str

    @property
    def short(self) -> str:
        """Last part of the key."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True)
class Combination:
    """What one run of a sweep differs in."""

    index: int
    name: str
    """Of its folder: safe, and unique by the index in front."""
    overrides: tuple[Override, ...]
    texts: Mapping[str, str]
    """Key -> value as it was said."""

    @property
    def title(self) -> str:
        """For messages: which run this is."""
        said = ", ".join(f"{key.rpartition('.')[2]}={text}" for key, text in self.texts.items())
        return f"run {self.index} ({said})"


def parse_axes(texts: Sequence[str], overrides: Sequence[Override], target: str) -> list[Axis]:
    """All `--sweep` of a command line.

    Args:
        texts: KEY=VALUE,VALUE,...
        overrides: other flags and `--set`, none of which may say a swept key.
        target: local or slurm.

    Raises:
        SpecError: for an unknown key, no value, a value twice, or keys that meet.
        PlanRefused: for more runs than can be meant, or keys that one job cannot vary.
    """
    axes = [parse_axis(text) for text in texts]
    for number, axis in enumerate(axes):
        _refuse_unswept(axis, target)
        for other in axes[:number]:
            if _meet(axis.key, other.key):
                raise SpecError(
                    "sweep_key",
                    f"{axis.flag} and {other.flag} set the same key",
                    fix="put all its values into one --sweep",
                )
        for override in overrides:
            if _meet(axis.key, override.key) and override.value is not None:
                raise SpecError(
                    "sweep_key",
                    f"{axis.flag} and {override.flag} set the same key",
                    fix="keep one of the two",
                )
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_RUNS:
        raise PlanRefused(
            "sweep_too_large",
            f"the sweep has {count:,} runs, {MOST_RUNS:,} are the most",
            fix="leave out values, or make several sweeps of it",
        )
    return axes


def parse_axis(text: str) -> Axis:
    """`KEY=VALUE,VALUE,...`, its values read as `--set` reads them.

    Raises:
        SpecError: for an unknown key, no value, or a value twice.
    """
    said, equals, values = text.partition("=")
    said = said.strip()
    if not equals or not said:
        raise SpecError(
            "bad_sweep",
            f"--sweep {text!r} has no KEY=VALUE,VALUE",
            fix="write --sweep learning_rate=1e-4,2e-4",
        )
    flag = f"--sweep {said}"
    nodes = _items(values, flag)
    parsed = tuple(construct(Loader(""), node, (), {}, flag) for node in nodes)
    texts = tuple(_said(node, f"[{values}]") for node in nodes)
    seen: dict[str, str] = {}
    for value, word in zip(parsed, texts, strict=True):
        same = _canonical(value)
        if same in seen:
            raise SpecError(
                "bad_sweep",
                f"{flag} has the value {word} twice" + _otherwise(seen[same], word),
                fix="keep one; to repeat a run, sweep over its seed",
            )
        seen[same] = word
    return Axis(full_key(said), parsed, texts, flag)


def full_key(said: str) -> str:
    """The key of the spec that a key, or the last part of one, means.

    Raises:
        SpecError: where it means none or several.
    """
    keys = list(dict.fromkeys(all_keys()))
    if said in keys or "." in said:
        return said  # a longer one is judged with the spec
    found = [key for key in keys if key.rpartition(".")[2] == said]
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecError(
            "sweep_key", f"--sweep {said} may mean {' or '.join(found)}", fix="write the whole key"
        )
    raise SpecError("unknown_key", f"--sweep {said}: there is no such key", fix=_hint(said, keys))


def combinations(axes: Sequence[Axis]) -> list[Combination]:
    """The product of all values, the last axis first to change."""
    count = math.prod(len(axis.values) for axis in axes)
    width = len(str(count - 1))
    short = Counter(axis.short for axis in axes)
    labels = [axis.short if short[axis.short] == 1 else axis.key for axis in axes]
    places = itertools.product(*(range(len(axis.values)) for axis in axes))
    return [
        Combination(
            index,
            f"{index:0{width}}-{_folder(labels, list(_texts(axes, place)))}",
            tuple(
                Override(axis.key, axis.values[at], axis.flag)
                for axis, at in zip(axes, place, strict=True)
            ),
            dict(zip((axis.key for axis in axes), _texts(axes, place), strict=True)),
        )
        for index, place in enumerate(places)
    ]


def _texts(axes: Sequence[Axis], place: Sequence[int]) -> Iterator[str]:
    return (axis.texts[at] for axis, at in zip(axes, place, strict=True))


def _folder(labels: Sequence[str], texts: Sequence[str]) -> str:
    parts = (f"{label}={_safe(text)}" for label, text in zip(labels, texts, strict=True))
    return "+".join(parts)[:NAME_CHARACTERS]


def _safe(text: str) -> str:
    """A value as part of a file name; the index before it keeps names apart."""
    safe = UNSAFE.sub("-", text)
    if safe != text:
        safe = safe.strip("-.")
    return safe[:VALUE_CHARACTERS] or "-"


def _items(values: str, flag: str) -> list[yaml.Node]:
    """The values between commas: those in brackets and quotes are YAML's to tell."""
    if not values.strip() or values.rstrip().endswith(","):
        raise SpecError(
            "bad_sweep",
            f"{flag} has {'no value' if not values.strip(' ,') else 'an empty value at its end'}",
            fix=f"write {flag}=VALUE,VALUE",
        )
    try:
        node = yaml.compose(f"[{values}]", Loader=Loader)
    except yaml.YAMLError as error:
        raise syntax_error(error, flag) from None
    if not isinstance(node, yaml.SequenceNode):
        raise SpecError("bad_sweep", f"{flag} is no list of values", fix="quote the values")
    return list(node.value)


def _said(node: yaml.Node, whole: str) -> str:
    """A value's own words, on one line."""
    if isinstance(node, yaml.ScalarNode):
        return " ".join(str(node.value).split()) or "''"
    return " ".join(whole[node.start_mark.index : node.end_mark.index].split())


def _canonical(value: Any) -> str:
    """A text that is the same for equal values: 1 and 1.0, not 1 and true."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else value
    return json.dumps(value, sort_keys=True, default=repr)


def _otherwise(first: str, second: str) -> str:
    return f" (also as {first})" if first != second else ""


def _hint(said: str, keys: Sequence[str]) -> str:
    if said in OLDER:
        return f"did you mean {OLDER[said][0]}?"
    if said in OWNED:
        return f"use {OWNED[said]}"
    by_last = {key.rpartition(".")[2]: key for key in keys}
    near = difflib.get_close_matches(said, by_last, n=1, cutoff=NEAR)
    if near:
        return f"did you mean {by_last[near[0]]}?"
    return "write a key of the spec, such as training.learning_rate; sftlaunch schema lists them"


def _meet(one: str, other: str) -> bool:
    """Whether setting both would set one of them twice."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _refuse_unswept(axis: Axis, target: str) -> None:
    section = axis.key.partition(".")[0]
    if section in NEVER:
        why, fix = NEVER[section]
        raise SpecError("sweep_key", f"{axis.flag} cannot be swept", why=why, fix=fix)
    if target == "slurm" and any(_meet(axis.key, key) for key in NOT_IN_AN_ARRAY):
        raise PlanRefused(
            "sweep_key",
            f"{axis.flag} cannot be swept in one job",
            why="all tasks of a job array ask for the same nodes and start the same ranks",
            fix=f"make one sweep a value, with --set {axis.key}=... and an --output of its own",
        )
