"""What is wrong with a spec, as a sentence with its place and its fix.

It turns pydantic's problems and unknown names into refusals; it checks nothing itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from launcher.errors import SpecError
from launcher.spec.arguments import OLDER, OWNED, sft_fields
from launcher.spec.document import Key, yaml_type
from launcher.spec.schema import Spec, TrainingSpec


def most_telling(error: ValidationError, data: dict[str, Any]) -> Mapping[str, Any]:
    """The first problem; of a value that may be of several types, all its expectations."""
    problems = error.errors()
    first = problems[0]
    key = _real_key(first["loc"], data)
    if problems[0]["type"] == "missing" or len(first["loc"]) == len(key):
        return {**first}
    same = [problem for problem in problems if _real_key(problem["loc"], data)[: len(key)] == key]
    depth = max(len(_real_key(problem["loc"], data)) for problem in same)
    deepest = [p for p in same if len(_real_key(p["loc"], data)) == depth]
    texts = [str(problem["msg"]).removeprefix("Input should be ") for problem in deepest]
    return {**deepest[0], "msg": f"Input should be {' or '.join(dict.fromkeys(texts))}"}


def explain(
    problem: Mapping[str, Any], data: dict[str, Any], places: dict[Key, str], origin: str
) -> SpecError:
    """One pydantic problem as a sentence with its place and its fix."""
    key = _real_key(problem["loc"], data)
    place = place_of(key, places, origin)
    name = ".".join(map(str, key))
    if problem["type"] == "extra_forbidden":
        return unknown_key(key, place)
    if problem["type"] == "missing":
        missing = ".".join(map(str, problem["loc"]))
        missing = missing.removesuffix(".path")
        return SpecError(
            "missing_key",
            f"{place}: {missing} is not set",
            fix=f"add `{missing}: ...`, or pass --{missing.split('.')[0]}",
        )
    given = problem.get("input")
    if isinstance(given, str) and "environment" in key and "=" in given:
        variable = given.partition("=")[0].strip()
        return SpecError(
            "value_in_spec",
            f"{place}: {name} holds a value",  # which may be a secret, and is not repeated
            why="a spec is written down with every run",
            fix=f"name the variable alone ({variable}), and set it where sftlaunch is called",
        )
    if given is None:
        return SpecError(
            "wrong_type", f"{place}: {name} has no value", fix=f"give {name} a value or remove it"
        )
    return SpecError(
        "wrong_type" if "type" in problem["type"] else "bad_value",
        f"{place}: {name} is {shown(given)}",
        why=_expectation(problem),
        fix=_value_fix(problem, name, given),
    )


def _expectation(problem: Mapping[str, Any]) -> str:
    """Pydantic's message, or that of a validator of ours, as part of a sentence."""
    text = str(problem["msg"]).removeprefix("Value error, ")
    return text.replace("Input should", "it should", 1)


def _value_fix(problem: Mapping[str, Any], name: str, given: Any) -> str:
    if problem["type"] == "string_type" and isinstance(given, (int, float)):
        return f'quote it: {name.rsplit(".", maxsplit=1)[-1]}: "{given}"'
    expected = (problem.get("ctx") or {}).get("expected")
    if expected and isinstance(given, str):
        choices = re.findall(r"'([^']+)'", str(expected))
        near = difflib.get_close_matches(given, choices, n=1)
        return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
    return f"correct {name}"


def unknown_key(key: Key, place: str) -> SpecError:
    """An unknown key, with the nearest valid one or the new name of an older one."""
    name, parents = str(key[-1]), [str(part) for part in key[:-1]]
    dotted = ".".join([*parents, name])
    if name in OLDER:
        new, note = OLDER[name]
        why = f"{name} is named differently here" + (f": {note}" if note else "")
        return SpecError("older_name", f"{place}: unknown key {dotted}", why=why, fix=f"use {new}")
    if not parents and name in OWNED:
        return SpecError("unknown_key", f"{place}: unknown key {dotted}", fix=f"use {OWNED[name]}")
    if not parents and name in {**TrainingSpec.model_fields, **sft_fields()}:
        return SpecError(
            "unknown_key", f"{place}: {name} stands outside its section", fix=f"use training.{name}"
        )
    valid = list(_valid_keys(parents))
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.55)
    everywhere = [full for full in all_keys() if full.split(".")[-1] == name]
    if near:
        fix = f"did you mean {'.'.join([*parents, near[0]])}?"
    elif everywhere:
        fix = f"did you mean {everywhere[0]}?"
    else:
        fix = f"valid here: {', '.join(sorted(valid))}"
    return SpecError("unknown_key", f"{place}: unknown key {dotted}", fix=fix)


def _valid_keys(parents: Sequence[str]) -> Iterator[str]:
    model: type[BaseModel] = Spec
    for name in parents:
        inner = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            # Optional sections: the model is the first member of the union.
            inner = next((a for a in getattr(inner, "__args__", ()) if _is_model(a)), None)
        if inner is None:
            return
        model = inner
    yield from model.model_fields
    if model is TrainingSpec:
        yield from (name for name in sft_fields() if name not in OWNED)


def all_keys() -> list[str]:
    """Every dotted key of the schema, two levels deep."""
    sections = [name for name in Spec.model_fields if list(_valid_keys([name]))]
    inner = [f"{s}.{name}" for s in sections for name in _valid_keys([s])]
    return [*Spec.model_fields, *inner]


def _is_model(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _real_key(loc: Sequence[str | int], data: Any) -> Key:
    """Pydantic's location without the names of union members, which users never wrote."""
    key: list[str | int] = []
    for part in loc:
        known = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if not known:
            continue
        key.append(part)
        data = data[part]
    return tuple(key)


def place_of(key: Key, places: dict[Key, str], origin: str) -> str:
    """Where a key, or the nearest of its parents, was said."""
    while key and key not in places:
        key = key[:-1]
    return places.get(key, origin)


def shown(value: Any) -> str:
    """A value and its kind, short."""
    text = repr(value) if isinstance(value, str) else str(value)
    return f"{text[:60]} ({yaml_type(value)})"
