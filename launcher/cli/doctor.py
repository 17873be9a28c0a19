"""`doctor`: is this machine, or the cluster, ready?"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from launcher.cli.options import make_request, plan_options
from launcher.cli.readiness import LEAST_FREE_BYTES, Check, show
from launcher.errors import ExitCode
from launcher.facts.gpus import probe_gpus
from launcher.facts.versions import TESTED_VERSIONS, installed_versions
from launcher.render.text import bytes_text

PYTHON = (3, 11)


@click.command(context_settings={"max_content_width": 100})
@click.option(
    "--wait",
    "wait_seconds",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="Slurm: how long the check may take, its place in the queue included.",
)
@plan_options
def doctor(wait_seconds: int, **arguments: Any) -> int:
    """Say whether a run could start: here, or with --on slurm on the nodes of a cluster.

    On Slurm a tiny real job asks the nodes. Its answer is remembered for the cluster, the
    partition and the file system of the output folder.
    """
    request = make_request(arguments)
    if request.target == "slurm":
        from launcher.cli.doctor_cluster import check_cluster

        checks = check_cluster(request, wait_seconds)
    else:
        checks = check_here(Path.cwd())
    show(checks, as_json=request.json)
    return ExitCode.DONE if all(check.ok for check in checks) else ExitCode.ENVIRONMENT


def check_here(folder: Path) -> list[Check]:
    """This machine: interpreter, packages, GPUs, compiler, space."""
    version = sys.version_info
    gpus = probe_gpus()
    compiler = shutil.which("g++") or shutil.which("c++")
    free = shutil.disk_usage(folder).free
    found = ", ".join(sorted({gpu.name for gpu in gpus}))
    return [
        Check(
            "python",
            version[:2] >= PYTHON,
            f"{version.major}.{version.minor}.{version.micro}",
            "training needs 3.11 or newer",
        ),
        _packages_here(),
        # Not an error: CPU rehearsals and login nodes have none.
        Check("gpus", True, f"{len(gpus)} ({found})" if gpus else "none: --device cpu rehearses"),
        Check(
            "compiler",
            compiler is not None,
            compiler or "no g++",
            "DeepSpeed builds an extension with it: apt-get install g++",
        ),
        Check(
            "space",
            free >= LEAST_FREE_BYTES,
            f"{bytes_text(free)} free for {folder}",
            "free some, or use --output on another disk",
        ),
    ]


def _packages_here() -> Check:
    """Installed versions against those that the rules were tested with."""
    there = installed_versions()
    missing = [name for name in TESTED_VERSIONS if name not in there]
    other = [
        f"{name} {there[name]} (tested: {tested})"
        for name, tested in TESTED_VERSIONS.items()
        # A local label such as +cpu or +cu128 is the same release.
        if name in there and there[name].split("+")[0] != tested
    ]
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"untested: {', '.join(other)}"] if other else []
    detail = "; ".join(parts) or "all as tested"
    return Check("packages", not missing, detail, "pip install -c constraints.txt '.[train]'")
