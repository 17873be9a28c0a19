"""`init`, `recipes` and `schema`: the first minute."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml

from launcher.assets import asset
from launcher.errors import ExitCode, SpecError
from launcher.spec.schema import Spec

SCHEMA_FILE = "sft.schema.json"
TEMPLATE = """\
# yaml-language-server: $schema={schema}
# Every key: sftlaunch schema. What would happen: sftlaunch plan. Run it: sftlaunch.
model: {model}
dataset: {dataset}
method: {method}
batch: {{global_batch_size: 64}}
training: {{num_train_epochs: 1, max_length: 2048}}
output: runs/first
"""


@click.command()
@click.option("--model", default="path/or/hub-name", show_default=True, help="Base model.")
@click.option("--dataset", default="data/train.jsonl", show_default=True, help="Training rows.")
@click.option("--method", default="lora", show_default=True, help="full, lora, qlora, ...")
def init(model: str, dataset: str, method: str) -> int:
    """Write a first sft.yaml, and the schema that editors complete it with."""
    target = Path("sft.yaml")
    if target.exists():
        raise SpecError(
            "spec_exists", "sft.yaml is already here", fix="edit it, or remove it first"
        )
    values = {"model": model, "dataset": dataset, "method": method}
    quoted = {key: yaml.safe_dump(value).split("\n")[0] for key, value in values.items()}
    try:
        Path(SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
        target.write_text(TEMPLATE.format(schema=SCHEMA_FILE, **quoted), encoding="utf-8")
    except OSError as error:
        raise SpecError(
            "spec_unwritable", f"sft.yaml: {error.strerror}", fix="go to a folder you may write"
        ) from None
    click.echo("Wrote sft.yaml. Set model and dataset in it, then: sftlaunch plan")
    return ExitCode.DONE


@click.command()
def schema() -> int:
    """Print the JSON schema of the spec, for editors."""
    click.echo(schema_text(), nl=False)
    return ExitCode.DONE


def schema_text() -> str:
    """The JSON schema, with the short forms that the loader takes."""
    values = Spec.model_json_schema()
    for name in ("model", "dataset"):
        values["properties"][name] = {"anyOf": [{"type": "string"}, values["properties"][name]]}
    return json.dumps(values, indent=1) + "\n"


@click.command()
def recipes() -> int:
    """List the recipes that come with the launcher."""
    for folder in sorted(asset("recipes").iterdir()):
        spec = folder / "sft.yaml"
        if spec.is_file():
            first = spec.read_text(encoding="utf-8").splitlines()
            comment = next(
                (line for line in first if line.startswith("# ") and "$schema" not in line), ""
            )
            click.echo(f"{folder.name:<12} {comment.removeprefix('# ')}")
            click.echo(f"{'':<12} sftlaunch {spec}")
    return ExitCode.DONE
