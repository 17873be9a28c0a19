"""A YAML document as plain values, with file and line for every key.

It decides how YAML is read (1.2's numbers, no duplicates), not what the keys mean.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import SpecError

Key = tuple[str | int, ...]
# YAML 1.1 reads 2e-4 as text, 12:00:00 as 43200, 010 as 8 and 2024-05-01 as a date; nobody who
# writes these in a spec means that, and YAML 1.2 agrees.
INTEGER = re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+)$")
FLOAT = re.compile(
    r"^([-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+"
    r"|[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_INTEGER_TAG, _FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_REPLACED_TAGS = (_INTEGER_TAG, _FLOAT_TAG, "tag:yaml.org,2002:timestamp")


class Loader(yaml.SafeLoader):
    """YAML with 1.2's numbers, and without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(_INTEGER_TAG, INTEGER, list("-+0123456789"))
Loader.add_implicit_resolver(_FLOAT_TAG, FLOAT, list("-+.0123456789"))


def read_document(path: Path, origin: str) -> tuple[dict[str, Any], dict[Key, str]]:
    """The file's mapping, and file:line for every key in it."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, Loader=Loader)
        places: dict[Key, str] = {(): origin}
        data = {} if node is None else construct(Loader(""), node, (), places, origin)
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
        raise syntax_error(error, origin) from None
    except RecursionError:
        raise SpecError(
            "bad_yaml", f"{origin}: nested without end", fix="remove the alias to itself"
        ) from None
    if not isinstance(data, dict):
        raise SpecError(
            "bad_yaml",
            f"{origin}: the spec is a {yaml_type(data)}, not a mapping",
            fix="write key: value lines, such as `model: NAME`",
        )
    return data, places


def construct(loader: Any, node: Any, key: Key, places: dict[Key, str], origin: str) -> Any:
    """A node's value; duplicate and non-text keys are errors (YAML lets them pass)."""
    if isinstance(node, yaml.SequenceNode):
        return [
            construct(loader, item, (*key, index), places, origin)
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
        result[name] = construct(loader, value_node, (*key, name), places, origin)
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


def syntax_error(error: yaml.YAMLError, origin: str) -> SpecError:
    """PyYAML's complaint with the line, in one sentence."""
    mark = getattr(error, "problem_mark", None)
    place = f"{origin}:{mark.line + 1}" if mark else origin
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "\\t" in problem:
        return SpecError("bad_yaml", f"{place}: a tab in the indentation", fix="indent with spaces")
    return SpecError("bad_yaml", f"{place}: {problem}", fix="correct the YAML on that line")


def yaml_type(value: Any) -> str:
    """The kind of a value, as people call it."""
    names = {bool: "true/false", int: "integer", float: "number", str: "text", list: "list"}
    return names.get(type(value), "mapping" if isinstance(value, dict) else "empty")
