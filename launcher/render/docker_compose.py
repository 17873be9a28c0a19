"""compose.yaml's one service, read off the argv of `docker run`: no value has a second home."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from launcher.render.docker_place import client

RUN = (*client(None), "run")
NOT_IN_PROJECT = re.compile(r"[^a-z0-9_-]")


def _mount(value: str) -> dict[str, Any]:
    """A value of `--mount` as compose's long form."""
    (fields,) = csv.reader([value])
    pairs = (field.partition("=") for field in fields)
    said = {name: text for name, _, text in pairs}
    mount: dict[str, Any] = {key: said[key] for key in ("type", "source", "target")}
    if "readonly" in said:
        mount["read_only"] = True
    if said["type"] == "bind":
        # As `docker run --mount` does: a source that is missing is an error, not a new folder.
        mount["bind"] = {"create_host_path": False}
    return mount


def _gpus(value: str) -> dict[str, Any]:
    device = {"driver": "nvidia", "count": int(value), "capabilities": ["gpu"]}
    return {"resources": {"reservations": {"devices": [device]}}}


def _pair(value: str) -> dict[str, str]:
    name, _, rest = value.partition("=")
    return {name: rest}


# Option of `docker run` -> key of compose, and how its value is written there.
ONE: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "--name": ("container_name", str),
    "--hostname": ("hostname", str),
    "--restart": ("restart", str),
    "--init": ("init", lambda _: True),
    "--stop-timeout": ("stop_grace_period", lambda value: f"{value}s"),
    "--shm-size": ("shm_size", int),
    "--ipc": ("ipc", str),
    "--userns": ("userns_mode", str),
    "--user": ("user", str),
    "--read-only": ("read_only", lambda _: True),
    "--gpus": ("deploy", _gpus),
    "--network": ("network_mode", str),
    "--workdir": ("working_dir", str),
    "--entrypoint": ("entrypoint", lambda value: [value]),
}
MANY: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "--tmpfs": ("tmpfs", str),
    "--cap-drop": ("cap_drop", str),
    "--cap-add": ("cap_add", str),
    "--group-add": ("group_add", str),
    "--security-opt": ("security_opt", lambda value: value.replace("=", ":", 1)),
    "--device": ("devices", lambda value: f"{value}:{value}"),
    "--mount": ("volumes", _mount),
    "--env": ("environment", str),
}
PAIRS: Mapping[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "--label": ("labels", _pair),
    "--ulimit": ("ulimits", lambda value: {k: int(v) for k, v in _pair(value).items()}),
}
LOG = "--log-opt"
LEFT_OUT = ("--detach",)


def compose_text(argv: tuple[str, ...]) -> str:
    """The service's YAML.

    Args:
        argv: of `docker run` on this machine, every option with its value in one word.

    Raises:
        KeyError: for an option that has no place in the tables above.
    """
    service: dict[str, Any] = {}
    rest = list(argv[len(RUN) :])
    while rest[0].startswith("--"):
        option, _, value = rest.pop(0).partition("=")
        if option not in LEFT_OUT:
            _add(service, option, value)
    image, *command = rest
    service = {"image": image, "command": command, **service}
    project = NOT_IN_PROJECT.sub("-", service["container_name"].lower())
    lines = [f"name: {project}", "services:", "  run:"]
    for key, value in service.items():
        lines += _lines(key, value)
    return "\n".join(lines)


def _lines(key: str, value: Any) -> list[str]:
    """One key of the service; a list of mappings has a line for each."""
    if isinstance(value, list) and isinstance(value[0], dict):
        return [f"    {key}:", *(f"      - {_flow(item)}" for item in value)]
    return [f"    {key}: {_flow(value)}"]


def _add(service: dict[str, Any], option: str, value: str) -> None:
    if option in MANY:
        key, written = MANY[option]
        service.setdefault(key, []).append(written(value))
    elif option in PAIRS:
        key, pair = PAIRS[option]
        service.setdefault(key, {}).update(pair(value))
    elif option == LOG:
        # Options belong to a driver, and compose names it: Docker's default is this one.
        log = service.setdefault("logging", {"driver": "json-file", "options": {}})
        log["options"].update(_pair(value))
    else:
        key, written = ONE[option]
        service[key] = written(value)


def _flow(value: Any) -> str:
    """JSON, which is YAML; a dollar that compose must not take for a variable stands doubled."""
    return json.dumps(value).replace("$", "$$")
