"""Read a spec file and overrides into a `Spec`, with errors that point at the line.

It decides syntax and types only. No file but the spec is opened, nothing is probed.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from launcher.errors import SpecError
from launcher.spec.arguments import OLDER, OWNED, choices, kind_fits, sft_fields
from launcher.spec.schema import Spec, TrainingSpec

Key = tuple[str | int, ...]
UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f]")
NOT_UNICODE = re.compile(r"[\ud800-\udfff]")  # undecodable bytes of argv; halves of YAML escapes
MAX_NAME_BYTES = 255  # of one path component, on every usual file system
# YAML 1.1 reads 2e-4 as text, 12:00:00 as 43200, 010 as 8 and 2024-05-01 as a date; nobody who
# writes these in a spec means that, and YAML 1.2 agrees.
INTEGER = re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+)$")
FLOAT = re.compile(
    r"^([-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+"
    r"|[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_INTEGER_TAG, _FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_REPLACED_TAGS = (_INTEGER_TAG, _FLOAT_TAG, "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's numbers, and without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_INTEGER_TAG, INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT_TAG, FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Override:
    """One value from the command line."""

    key: str
    """Dotted key of the spec."""
    value: Any
    """Already a YAML value."""
    flag: str
    """How the user said it, for messages."""


@dataclass(frozen=True)
class LoadedSpec:
    """A spec and where each of its values came from."""

    spec: Spec
    origin: str
    """The spec file's path, as given."""
    directory: Path
    """Folder that the spec's relative paths start from."""
    said: Mapping[str, str]
    """Dotted key -> where the user said it (file:line or flag)."""


def load_spec(path: Path, overrides: Sequence[Override] = (), origin: str = "") -> LoadedSpec:
    """Read `path`, lay `overrides` over it and check every key and type.

    Raises:
        SpecError: with file and line, or the flag, and the nearest valid name.
    """
    origin = origin or str(path)
    if "\x00" in str(path):
        raise SpecError("spec_not_found", f"no spec file {origin!r}", fix="name it without nulls")
    data, places = _read(path, origin)
    base = path.parent.resolve()
    _anchor(data, base)
    for override in overrides:
        _lay_over(data, places, override)
    spec = _validate(data, places, origin)
    _check_extra_fields(spec.training, places, origin)
    _check_choices(spec, places, origin)
    _check_names(spec, places, origin)
    said = {".".join(map(str, key)): place for key, place in places.items() if key}
    return LoadedSpec(spec=spec, origin=origin, directory=base, said=said)


# --- reading ------------------------------------------------------------------------------


def _read(path: Path, origin: str) -> tuple[dict[str, Any], dict[Key, str]]:
    """The file's mapping, and file:line for every key in it."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, Loader=_Loader)
        places: dict[Key, str] = {(): origin}
        data = {} if node is None else _construct(_Loader(""), node, (), places, origin)
    except FileNotFoundError:
        raise SpecError(
            "spec_not_found",
            f"no spec file {origin}",
            fix="check the path, or start one with: sftlaunch init",
        ) from None
    except IsADirectoryError:
        raise SpecError(
            "spec_not_found",
            f"{origin} is a folder",
            fix=f"name the file in it: {origin}/sft.yaml",
        ) from None
    except OSError as error:
        raise SpecError(
            "spec_unreadable", f"{origin}: {error.strerror}", fix="check the file's permissions"
        ) from None
    except UnicodeDecodeError as error:
        raise SpecError(
            "bad_yaml", f"{origin}: not UTF-8 at byte {error.start}", fix="save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise _syntax_error(error, origin) from None
    except RecursionError:
        raise SpecError(
            "bad_yaml", f"{origin}: nested without end", fix="remove the alias to itself"
        ) from None
    if not isinstance(data, dict):
        raise SpecError(
            "bad_yaml",
            f"{origin}: the spec is a {_yaml_type(data)}, not a mapping",
            fix="write key: value lines, such as `model: NAME`",
        )
    return data, places


def _construct(loader: Any, node: Any, key: Key, places: dict[Key, str], origin: str) -> Any:
    """A node's value; duplicate and non-text keys are errors (YAML lets them pass)."""
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, item, (*key, index), places, origin)
            for index, item in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node, origin)
    _refuse_duplicates(node, origin)
    loader.flatten_mapping(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value)
        line = f"{origin}:{key_node.start_mark.line + 1}"
        if key_node.tag == "tag:yaml.org,2002:bool":
            name = {"true": "on", "false": "off"}.get(name.lower(), name)
        places[(*key, name)] = line
        result[name] = _construct(loader, value_node, (*key, name), places, origin)
    return result


def _scalar(loader: Any, node: Any, origin: str) -> Any:
    try:
        value = loader.construct_object(node)
        if isinstance(value, str):
            value.encode()
    except (ValueError, OverflowError):  # PyYAML lets int() and datetime() raise theirs
        raise SpecError(
            "bad_yaml",
            f"{origin}:{node.start_mark.line + 1}: {str(node.value)[:60]!r} cannot be read",
            why="its YAML type cannot hold it",
            fix="correct the value, or quote it as text",
        ) from None
    return value


def _refuse_duplicates(node: Any, origin: str) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise SpecError(
                "bad_yaml", f"{origin}:{line}: a key must be a word", fix="quote it or rename it"
            )
        if key_node.value in seen:
            raise SpecError(
                "duplicate_key",
                f"{origin}:{line}: {key_node.value} is already set on line {seen[key_node.value]}",
                fix="keep one of the two",
            )
        seen[key_node.value] = line


def _syntax_error(error: yaml.YAMLError, origin: str) -> SpecError:
    mark = getattr(error, "problem_mark", None)
    place = f"{origin}:{mark.line + 1}" if mark else origin
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "\\t" in problem:
        return SpecError("bad_yaml", f"{place}: a tab in the indentation", fix="indent with spaces")
    return SpecError("bad_yaml", f"{place}: {problem}", fix="correct the YAML on that line")


def _anchor(data: dict[str, Any], base: Path) -> None:
    """Make local paths of the file absolute, where something stands at them.

    A name that is not found beside the spec is left as it is: it may be on the Hub.
    """
    for section, keys in (("model", ("path",)), ("dataset", ("path", "eval_path"))):
        value = data.get(section)
        if isinstance(value, str):
            data[section] = local_path(value, base)
        elif isinstance(value, dict):
            for key in keys:
                if isinstance(value.get(key), str):
                    value[key] = local_path(value[key], base)


def local_path(name: str, base: Path) -> str:
    """`name` as an absolute path where it is one below `base`, else unchanged."""
    if not name or "\x00" in name:
        return name
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises on ~unknown
    looks_local = name.startswith((".", "/", "~"))
    full = base / path
    try:
        return os.path.normpath(full) if looks_local or full.exists() else name
    except OSError:
        return name


# --- overrides ----------------------------------------------------------------------------


def parse_set(text: str) -> Override:
    """`KEY=VALUE` of `--set`, its value read as YAML.

    Raises:
        SpecError: where there is no `=` or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError(
            "bad_set", f"--set {text!r} has no KEY=VALUE", fix="write --set training.seed=1"
        )
    flag = f"--set {key.strip()}"
    try:
        node = yaml.compose(value, Loader=_Loader)
        parsed = None if node is None else _construct(_Loader(""), node, (), {}, flag)
    except yaml.YAMLError as error:
        raise _syntax_error(error, flag) from None
    return Override(key=key.strip(), value=parsed, flag=flag)


def _lay_over(data: dict[str, Any], places: dict[Key, str], override: Override) -> None:
    value = override.value
    *parents, last = override.key.split(".")
    if not parents and last in ("model", "dataset") and isinstance(value, str):
        parents, last = [last], "path"
    if last in ("path", "eval_path") and isinstance(value, str):
        value = local_path(value, Path.cwd())
    here = data
    for depth, name in enumerate(parents):
        child = here.get(name)
        if not isinstance(child, dict):
            child = {"path": child} if isinstance(child, str) else {}
        here[name] = child
        places.setdefault(tuple(parents[: depth + 1]), override.flag)
        here = child
    here[last] = value
    places[(*parents, last)] = override.flag


# --- checking -----------------------------------------------------------------------------


def _validate(data: dict[str, Any], places: dict[Key, str], origin: str) -> Spec:
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise _explain(_most_telling(error, data), data, places, origin) from None


def _most_telling(error: ValidationError, data: dict[str, Any]) -> Mapping[str, Any]:
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


def _explain(
    problem: Mapping[str, Any], data: dict[str, Any], places: dict[Key, str], origin: str
) -> SpecError:
    """One pydantic problem as a sentence with its place and its fix."""
    key = _real_key(problem["loc"], data)
    place = _place(key, places, origin)
    name = ".".join(map(str, key))
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key, place)
    if problem["type"] == "missing":
        missing = ".".join(map(str, problem["loc"]))
        missing = missing.removesuffix(".path")
        return SpecError(
            "missing_key",
            f"{place}: {missing} is not set",
            fix=f"add `{missing}: ...`, or pass --{missing.split('.')[0]}",
        )
    given = problem.get("input")
    if given is None:
        return SpecError(
            "wrong_type", f"{place}: {name} has no value", fix=f"give {name} a value or remove it"
        )
    return SpecError(
        "wrong_type" if "type" in problem["type"] else "bad_value",
        f"{place}: {name} is {_shown(given)}",
        why=_expectation(problem),
        fix=_value_fix(problem, name, given),
    )


def _expectation(problem: Mapping[str, Any]) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ")
    return (
        text[0].lower() + text[1:].replace("Input should be", "should be").replace("Input", "value")
        if not text.startswith("Input")
        else text.replace("Input should be", "it should be")
    )


def _value_fix(problem: Mapping[str, Any], name: str, given: Any) -> str:
    if problem["type"] == "string_type" and isinstance(given, (int, float)):
        return f'quote it: {name.rsplit(".", maxsplit=1)[-1]}: "{given}"'
    expected = (problem.get("ctx") or {}).get("expected")
    if expected and isinstance(given, str):
        choices = re.findall(r"'([^']+)'", str(expected))
        near = difflib.get_close_matches(given, choices, n=1)
        return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
    return f"correct {name}"


def _unknown_key(key: Key, place: str) -> SpecError:
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


def _check_extra_fields(training: TrainingSpec, places: dict[Key, str], origin: str) -> None:
    """Names and kinds of the `SFTConfig` fields under `training:`."""
    known = sft_fields()
    for name, value in training.sft_fields().items():
        key: Key = ("training", name)
        place = _place(key, places, origin)
        if name in OWNED:
            raise SpecError(
                "owned_key",
                f"{place}: training.{name} is computed by the plan",
                fix=f"use {OWNED[name]}",
            )
        if name not in known:
            raise _unknown_key(key, place)
        if not kind_fits(value, known[name]):
            raise SpecError(
                "wrong_type",
                f"{place}: training.{name} is {_shown(value)}",
                why=f"SFTConfig.{name} takes {' or '.join(known[name])}",
                fix=f"correct training.{name}",
                source="TRL 1.16 SFTConfig",
            )
        if not _is_finite(value):
            raise SpecError(
                "bad_value",
                f"{place}: training.{name} is {_shown(value)}",
                why="it should be a finite number",
                fix=f"correct training.{name}",
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return all(_is_finite(item) for item in inner)
    return not isinstance(value, float) or math.isfinite(value)


def _check_choices(spec: Spec, places: dict[Key, str], origin: str) -> None:
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
                f"{_place(tuple(dotted.split('.')), places, origin)}: {dotted} is {_shown(one)}",
                fix=f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}",
                source=source,
            )


def _check_names(spec: Spec, places: dict[Key, str], origin: str) -> None:
    """Names that reach files and shells carry no control characters and are not empty."""
    names: dict[str, str | None] = {
        "model.path": spec.model.path,
        "output": spec.output,
        "hardware.gpu": spec.hardware.gpu,
    }
    if spec.dataset:
        names |= {"dataset.path": spec.dataset.path, "dataset.eval_path": spec.dataset.eval_path}
    for dotted, name in names.items():
        if name is None:
            continue
        place = _place(tuple(dotted.split(".")), places, origin)
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


def _place(key: Key, places: dict[Key, str], origin: str) -> str:
    while key and key not in places:
        key = key[:-1]
    return places.get(key, origin)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return f"{text[:60]} ({_yaml_type(value)})"


def _yaml_type(value: Any) -> str:
    names = {bool: "true/false", int: "integer", float: "number", str: "text", list: "list"}
    return names.get(type(value), "mapping" if isinstance(value, dict) else "empty")
