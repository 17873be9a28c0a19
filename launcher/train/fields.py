"""Write the list of `SFTConfig` fields that the spec checks names and types against.

Run by `make fields` whenever TRL moves; its output is committed, so that planning needs
no TRL. Printed as JSON: field -> accepted JSON kinds, plus TRL's version.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing

KINDS = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}


def json_kinds(annotation: object) -> list[str]:
    """JSON kinds that a dataclass annotation accepts; containers by their origin."""
    if annotation is typing.Any:
        return ["any"]
    if annotation in KINDS:
        return [KINDS[annotation]]
    origin = typing.get_origin(annotation)
    if origin is list or annotation is list:
        return ["list"]
    if origin is dict or annotation is dict:
        return ["dict"]
    if origin is typing.Literal:
        return sorted({KINDS[type(value)] for value in typing.get_args(annotation)})
    return sorted({kind for part in typing.get_args(annotation) for kind in json_kinds(part)})


def choices() -> dict[str, list[str]]:
    """Fields that take one of a closed list of names."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    return {
        "lr_scheduler_type": sorted(str(kind.value) for kind in SchedulerType),
        "optim": sorted(str(kind.value) for kind in OptimizerNames),
    }


def main() -> None:
    """Print the list to standard output."""
    import trl

    hints = typing.get_type_hints(trl.SFTConfig)
    fields = {
        field.name: json_kinds(hints[field.name])
        for field in dataclasses.fields(trl.SFTConfig)
        if field.init
    }
    listing = {"trl": trl.__version__, "choices": choices(), "fields": dict(sorted(fields.items()))}
    sys.stdout.write(json.dumps(listing, indent=1) + "\n")


if __name__ == "__main__":
    main()
