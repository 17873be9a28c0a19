"""The options that `run` and `plan` share, and their way into spec overrides.

One table: flag -> key of the spec. Past `Request` nothing knows Click.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from launcher.assets import asset
from launcher.errors import SpecError
from launcher.spec.load import LoadedSpec, Override, Source, parse_set, read_source
from launcher.spec.schema import Device, Method, Offload, Strategy, Target

Command = TypeVar("Command", bound=Callable[..., Any])
BUILT_IN_RECIPE = "tiny"
DEFAULT_SPEC = "sft.yaml"


class OneOf(click.Choice[str]):
    """One of some words; a misspelt one is told the nearest."""

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Check the value."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = difflib.get_close_matches(str(value), self.choices, n=1)
            if not near:
                raise
            said = error.message.rstrip(".")
            self.fail(f"{said}; did you mean {near[0]}?", param, ctx)


class MicroBatch(click.ParamType[Any]):
    """A positive integer, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Check the value."""
        if value == "auto" or (isinstance(value, int) and value > 0):
            return value
        if str(value).isdecimal() and int(value) > 0:
            return int(value)
        return self.fail(f"{value!r} is neither a positive number nor auto.", param, ctx)


POSITIVE = click.IntRange(min=1)
# Flag, key of the spec, Click type, metavar, help.
OPTIONS: tuple[tuple[str, str, Any, str | None, str], ...] = (
    ("--gpus", "hardware.gpus", POSITIVE, "N", "GPUs in total (ranks with --device cpu)."),
    ("--nodes", "hardware.nodes", POSITIVE, "N", "Nodes that they stand in."),
    ("--gpus-per-node", "hardware.gpus_per_node", POSITIVE, "N", "GPUs of each node."),
    ("--gpu", "hardware.gpu", str, "NAME", "Plan for this GPU, such as h100-80gb."),
    (
        "--strategy",
        "strategy",
        OneOf(get_args(Strategy)),
        None,
        "How the run is distributed.",
    ),
    (
        "--offload",
        "offload",
        OneOf(get_args(Offload)),
        None,
        "What waits in host memory.",
    ),
    ("--model", "model", str, "PATH", "Base model: a folder or a Hub name."),
    ("--dataset", "dataset", str, "PATH", "Training rows: a file, a folder or a Hub name."),
    ("--method", "method", OneOf(get_args(Method)), None, "What is trained."),
    (
        "--global-batch-size",
        "batch.global_batch_size",
        POSITIVE,
        "N",
        "Sequences per optimizer step, over all GPUs.",
    ),
    (
        "--micro-batch-size",
        "batch.micro_batch_size",
        MicroBatch(),
        None,
        "Sequences per GPU per forward.",
    ),
    ("--output", "output", str, "DIR", "The run directory."),
    (
        "--stop-after",
        "limits.stop_after",
        str,
        "DURATION",
        "Save and stop after this time, such as 90s or 12h.",
    ),
    (
        "--max-restarts",
        "limits.max_restarts",
        click.IntRange(min=0),
        "N",
        "Start failed ranks again, from the last whole checkpoint.",
    ),
    (
        "--chain",
        "slurm.chain",
        click.IntRange(min=2),
        "N",
        "Slurm: N jobs that continue one another, where requeue is not allowed.",
    ),
    (
        "--device",
        "hardware.device",
        OneOf(get_args(Device)),
        None,
        "cuda, or cpu to rehearse.",
    ),
)


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    spec: str | None
    overrides: tuple[Override, ...]
    target: str
    resume: str
    json: bool
    detach: bool = False
    """Slurm: whether the command ends once the job is queued."""
    sweep: tuple[str, ...] = ()
    """KEY=VALUE,VALUE,... as they were said; empty for a single run."""

    @property
    def output_said(self) -> bool:
        """Whether the output folder came from a flag."""
        return any(override.key == "output" for override in self.overrides)


def plan_options(command: Command) -> Command:
    """Add SPEC and the shared options."""
    decorators: list[Any] = [
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any key of the spec, such as training.seed=1.",
        ),
        click.option(
            "--sweep",
            "sweep",
            multiple=True,
            metavar="KEY=V,V,...",
            help="One run a value, and a run a combination where it is said again.",
        ),
        click.option(
            "--resume",
            default="auto",
            show_default=True,
            metavar="auto|never|PATH",
            help="Go on with the run in the output folder, or from PATH (a run, a checkpoint).",
        ),
        click.option(
            "--on",
            "target",
            type=OneOf(get_args(Target)),
            default="local",
            show_default=True,
            help="Where it runs.",
        ),
        click.option(
            "--docker-host",
            "docker_hosts",
            multiple=True,
            metavar="URL",
            help="Docker of another machine, such as ssh://user@host; once a node.",
        ),
        click.option("--detach", is_flag=True, help="Slurm, Docker: do not wait for the end."),
        *(
            click.option(flag, _parameter_name(key), type=kind, metavar=metavar, help=text)
            for flag, key, kind, metavar, text in reversed(OPTIONS)
        ),
        click.argument("spec_path", required=False, metavar="[SPEC]"),
    ]
    for decorator in decorators:
        command = decorator(command)
    return command


def make_request(arguments: dict[str, Any]) -> Request:
    """Click's values as one value object; `--set` wins over the other flags."""
    overrides = []
    for flag, key, *_ in OPTIONS:
        value = arguments[_parameter_name(key)]
        if value is not None:
            overrides.append(Override(key=key, value=value, flag=f"{flag} {value}"))
    overrides += _implied(overrides)
    hosts = list(arguments["docker_hosts"])
    if hosts:
        overrides.append(Override("docker.hosts", hosts, "--docker-host"))
    overrides += [parse_set(text) for text in arguments["settings"]]
    return Request(
        spec=arguments["spec_path"],
        overrides=tuple(overrides),
        target=_target(arguments["target"], docker=bool(hosts)),
        resume=arguments["resume"],
        detach=arguments["detach"],
        json=arguments["as_json"],
        sweep=arguments["sweep"],
    )


def _target(said: str, *, docker: bool) -> str:
    """Where it runs; a Docker host says that by itself.

    Raises:
        SpecError: Slurm and a Docker host at once.
    """
    if docker and said == "slurm":
        raise SpecError(
            "docker_hosts", "--on slurm and --docker-host exclude each other", fix="keep one"
        )
    return "docker" if docker else said


def _implied(overrides: list[Override]) -> list[Override]:
    """A flag for the total asks for another layout than the file's: that one is dropped."""
    keys = {override.key for override in overrides}
    if "hardware.gpus" in keys and "hardware.gpus_per_node" not in keys:
        return [Override(key="hardware.gpus_per_node", value=None, flag="--gpus")]
    return []


def _parameter_name(key: str) -> str:
    return key.replace(".", "_")


def load_request(request: Request) -> tuple[LoadedSpec, str | None]:
    """The spec that was asked for, and the recipe's name where nothing was.

    Raises:
        SpecError: where the file or a value is wrong.
    """
    source, recipe = find_spec(request)
    return source.with_overrides(request.overrides).checked(), recipe


def find_spec(request: Request) -> tuple[Source, str | None]:
    """The same as it was said, before any override.

    Raises:
        SpecError: where there is none, or it is no YAML mapping.
    """
    if request.spec is not None:
        _refuse_mistyped_command(request.spec)
        return read_source(Path(request.spec), request.spec), None
    if Path(DEFAULT_SPEC).is_file():
        return read_source(Path(DEFAULT_SPEC), DEFAULT_SPEC), None
    recipe = asset("recipes", BUILT_IN_RECIPE, DEFAULT_SPEC)
    if not recipe.is_file():
        raise SpecError(
            "spec_not_found", "no spec was given and there is no ./sft.yaml", fix="sftlaunch init"
        )
    return read_source(recipe, f"recipe {BUILT_IN_RECIPE}"), BUILT_IN_RECIPE


def _refuse_mistyped_command(name: str) -> None:
    """A bare word that is no file was meant as a command."""
    if not name.isidentifier() or Path(name).exists():
        return
    from launcher.cli.app import COMMANDS

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise SpecError(
        "spec_not_found",
        f"{name} is neither a command nor a spec file",
        fix=f"{hint}commands are {', '.join(COMMANDS)}",
    )
