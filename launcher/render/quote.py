"""The one place that quotes for a shell, and the one that unquotes for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping


def shell_line(argv: Iterable[str]) -> str:
    """An argv as one shell line that a real shell reads back unchanged."""
    return " ".join(shlex.quote(argument) for argument in argv)


def shell_block(argv: Iterable[str]) -> str:
    """The same, one option a line, for scripts that people read."""
    lines: list[str] = []
    option_open = False
    for argument in argv:
        quoted = shlex.quote(argument)
        if option_open and not argument.startswith("-"):
            lines[-1] += f" {quoted}"
        else:
            lines.append(quoted)
        option_open = argument.startswith("-") and "=" not in argument
    return " \\\n  ".join(lines)


def exports(environment: Mapping[str, str]) -> str:
    """`export` lines, sorted."""
    return "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment.items())
    )
