"""What `doctor` has found: a table of ok and not ok, with fixes."""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import asdict, dataclass

import click

LEAST_FREE_BYTES = 10**9
NAME_WIDTH = 12


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def show(checks: list[Check], *, as_json: bool) -> None:
    """The table, or one JSON object."""
    if as_json:
        record = {"ok": all(c.ok for c in checks), "checks": [asdict(c) for c in checks]}
        click.echo(json.dumps(record, indent=1))
        return
    width = shutil.get_terminal_size((100, 24)).columns
    for check in checks:
        verdict = click.style("ok ", fg="green") if check.ok else click.style("not ok", fg="red")
        text = check.detail if check.ok else f"{check.detail}; {check.fix}"
        first, *rest = textwrap.wrap(text, max(30, width - NAME_WIDTH - 8)) or [""]
        click.echo(f"{check.name:<{NAME_WIDTH}} {verdict}{' ' * (4 if check.ok else 1)}{first}")
        for line in rest:
            click.echo(f"{'':<{NAME_WIDTH + 8}}{line}")
