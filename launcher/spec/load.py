"""Read a spec file and overrides into a `Spec`, with errors that point at the line.

It decides syntax and types only. No file but the spec is opened, nothing is probed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launcher.errors import SpecError
from launcher.spec.document import Key, Loader, construct, read_document, syntax_error
from launcher.spec.explain import explain, most_telling
from launcher.spec.schema import Spec
from launcher.spec.values import check_choices, check_extra_fields, check_names


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


@dataclass(frozen=True)
class Source:
    """A spec as it was said and not yet checked: a base for any number of overrides."""

    data: Mapping[str, Any]
    """Plain YAML values, local paths made absolute."""
    places: Mapping[Key, str]
    """Key -> where the user said it."""
    origin: str
    directory: Path

    def with_overrides(self, overrides: Sequence[Override]) -> Source:
        """The same with more values laid over it."""
        data, places = copy.deepcopy(dict(self.data)), dict(self.places)
        for override in overrides:
            _lay_over(data, places, override)
        return Source(data, places, self.origin, self.directory)

    def checked(self) -> LoadedSpec:
        """The spec.

        Raises:
            SpecError: with file and line, or the flag, and the nearest valid name.
        """
        places = dict(self.places)
        spec = _validate(dict(self.data), places, self.origin)
        check_extra_fields(spec.training, places, self.origin)
        check_choices(spec, places, self.origin)
        check_names(spec, places, self.origin)
        said = {".".join(map(str, key)): place for key, place in places.items() if key}
        return LoadedSpec(spec=spec, origin=self.origin, directory=self.directory, said=said)


def read_source(path: Path, origin: str = "") -> Source:
    """Read `path` once.

    Raises:
        SpecError: where it is not there, or no YAML mapping.
    """
    origin = origin or str(path)
    if "\x00" in str(path):
        raise SpecError("spec_not_found", f"no spec file {origin!r}", fix="name it without nulls")
    data, places = read_document(path, origin)
    base = path.parent.resolve()
    _anchor(data, base)
    return Source(data, places, origin, base)


def load_spec(path: Path, overrides: Sequence[Override] = (), origin: str = "") -> LoadedSpec:
    """Read `path`, lay `overrides` over it and check every key and type.

    Raises:
        SpecError: with file and line, or the flag, and the nearest valid name.
    """
    return read_source(path, origin).with_overrides(overrides).checked()


def _anchor(data: dict[str, Any], base: Path) -> None:
    """Make local paths of the file absolute, where something stands at them.

    A name that is not found beside the spec is left as it is: it may be on the Hub.
    """
    for section, keys in (("model", ("path",)), ("dataset", ("path", "eval_path"))):
        value = data.get(section)
        if isinstance(value, str):
            data[section] = local_path(value, base)
        elif isinstance(value, dict):
            more = value.get("sources")
            for mapping in (value, *(more if isinstance(more, list) else ())):
                _anchor_keys(mapping, keys, base)


def _anchor_keys(mapping: Any, keys: Sequence[str], base: Path) -> None:
    for key in keys:
        if isinstance(mapping, dict) and isinstance(mapping.get(key), str):
            mapping[key] = local_path(mapping[key], base)


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
        node = yaml.compose(value, Loader=Loader)
        parsed = None if node is None else construct(Loader(""), node, (), {}, flag)
    except yaml.YAMLError as error:
        raise syntax_error(error, flag) from None
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


def _validate(data: dict[str, Any], places: dict[Key, str], origin: str) -> Spec:
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise explain(most_telling(error, data), data, places, origin) from None
