"""`image build`: the project's container image, from a checkout or from an installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from launcher import __version__
from launcher.assets import assets_root, copy_sources
from launcher.errors import EnvironmentNotReady, ExitCode, SpecError
from launcher.render.docker import default_image, image_build_argv

BUILDX_MISSING = "buildx component is missing"


@click.group()
def image() -> None:
    """The container image that runs use with --on docker."""


@image.command(context_settings={"max_content_width": 100})
@click.option("--cpu", is_flag=True, help="A plain Debian base and no CUDA.")
@click.option("--base", metavar="IMAGE", help="Base image, with a Python of 3.11 or newer.")
@click.option("--tag", metavar="NAME", help="Name of the image; sftlaunch:VERSION without it.")
@click.option("--push", metavar="NAME", help="Push it under this name, too.")
@click.option(
    "--find-links", type=click.Path(exists=True, file_okay=False), help="Folder of wheels to use."
)
@click.option(
    "--pip-config", type=click.Path(exists=True, dir_okay=False), help="pip.conf for the build."
)
@click.option(
    "--certificates",
    type=click.Path(exists=True, dir_okay=False),
    help="Certificates of the package index, for the build only.",
)
def build(base: str | None, tag: str | None, push: str | None, **options: Any) -> int:
    """Build the image; no configuration or certificate of the build stays in it."""
    from launcher.launch import docker

    docker.ask(["docker", "version"])
    cpu, wheels = options["cpu"], options["find_links"]
    name = tag or default_image("cpu" if cpu else "cuda")
    secrets = {"pip": options["pip_config"], "certificates": options["certificates"]}
    with tempfile.TemporaryDirectory(prefix="sftlaunch-image-") as folder:
        context = Path(folder)
        copy_sources(context, Path(wheels) if wheels else None)
        argv = image_build_argv(
            name,
            str(context),
            cpu=cpu,
            base=base,
            revision=_revision(),
            secrets={key: value for key, value in secrets.items() if value},
        )
        _run(argv)
    if push:
        _run(["docker", "tag", name, push])
        _run(["docker", "push", push])
    click.echo(
        f"built      {name} (sftlaunch {__version__}){f', pushed as {push}' if push else ''}"
    )
    return ExitCode.DONE


def _run(argv: list[str]) -> None:
    """Show Docker's own progress; its last words are the error."""
    process = subprocess.Popen(
        argv,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stderr is not None  # noqa: S101 - it is a pipe
    last: list[str] = []
    for line in process.stderr:
        sys.stderr.write(line)
        last = [*last[-20:], line.strip()]
    if process.wait() == 0:
        return
    text = "\n".join(last)
    if BUILDX_MISSING in text:
        raise EnvironmentNotReady(
            "no_buildx", "this Docker client cannot build", fix="install docker-buildx"
        )
    words = next((line for line in reversed(last) if line), "no output")
    raise SpecError(
        "image_build", f"{' '.join(argv[:2])} failed: {words}", fix="the output above says where"
    )


def _revision() -> str:
    """Commit of the checkout; unknown in an installed package."""
    if not (assets_root() / ".git").exists():
        return "unknown"
    done = subprocess.run(
        ["git", "-C", str(assets_root()), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
