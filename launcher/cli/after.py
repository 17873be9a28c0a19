"""`generate`: ask a finished run's model."""

from __future__ import annotations

import subprocess
import sys

import click

from launcher.cli.which import which_run
from launcher.errors import ExitCode, SpecError


@click.command()
@click.argument("run_name", required=False, metavar="[RUN]")
@click.option("--prompt", required=True, help="What to ask.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
def generate(run_name: str | None, prompt: str, max_new_tokens: int) -> int:
    """Answer a prompt with the trained adapter or model."""
    run = which_run(run_name)
    if not run.final.is_dir():
        raise SpecError(
            "not_finished",
            f"{run.path} has no final model",
            fix=f"see: sftlaunch status {run.path}",
        )
    # A process of its own: this one must not import torch.
    argv = [
        sys.executable,
        "-m",
        "launcher.train.answer",
        str(run.path),
        prompt,
        str(max_new_tokens),
    ]
    finished = subprocess.run(argv, check=False, stderr=subprocess.PIPE, text=True)
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no output"])[-1]
        raise SpecError(
            "generate", f"generation failed: {last}", fix="check the run's final folder"
        )
    return ExitCode.DONE
