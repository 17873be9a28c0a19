"""A plan on the terminal: where its spec is from, and its lines."""

from __future__ import annotations

from collections.abc import Iterable

import click


def show_lines(recipe: str | None, lines: Iterable[str], *, to_stderr: bool) -> None:
    """Print a plan, warnings in yellow.

    Args:
        recipe: the built-in one, where no spec was given.
        lines: of the plan.
        to_stderr: where standard output is for JSON.
    """
    if recipe:
        click.echo(
            f"No spec was given and there is no ./sft.yaml: the built-in recipe {recipe}.",
            err=to_stderr,
        )
    for line in lines:
        styled = click.style(line, fg="yellow") if line.startswith("warning") else line
        click.echo(styled, err=to_stderr)
