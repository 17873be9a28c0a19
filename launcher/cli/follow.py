"""Launch a planned run and show how it goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from launcher.errors import ExitCode
from launcher.launch.local import launch
from launcher.plan.types import Plan
from launcher.render.text import duration, entry, progress_text
from launcher.render.torchrun import launch_environment
from launcher.runs.checkpoints import describe, newest_whole
from launcher.runs.directory import RunDirectory, read_lines
from launcher.runs.failures import Failure

SHOWN_CHARACTERS = 60
PLAIN_INTERVAL_SECONDS = 5.0
LIVE_INTERVAL_SECONDS = 0.25
Ended = tuple[ExitCode, Failure | None]


class StatusLine:
    """What goes on, on standard error: redrawn on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.started = time.monotonic()
        self.shown = ""
        self.next_time = 0.0

    def show(self, text: str) -> None:
        """Show it; as a plain line only what is new, now and then."""
        now = time.monotonic()
        line = self._since_start(text)
        if self.live:
            width = shutil.get_terminal_size((100, 24)).columns - 1
            click.echo(f"\r{line[:width]:<{width}}", nl=False, err=True)
        elif text != self.shown and now >= self.next_time:
            click.echo(line, err=True)
            self.next_time = now + PLAIN_INTERVAL_SECONDS
            self.shown = text

    def note(self, text: str) -> None:
        """Show a line that stays."""
        start = "\r" if self.live else ""
        click.echo(f"{start}{self._since_start(text)}", err=True)

    def close(self) -> None:
        """Leave the live line."""
        if self.live:
            click.echo("", err=True)

    def _since_start(self, text: str) -> str:
        return f"{duration(time.monotonic() - self.started):>6}  {text}"


class Progress:
    """Shows a run's state on standard error."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.line = StatusLine()
        self.notes_shown = 0
        self.next_time = 0.0

    def poll(self) -> None:
        """Show what is new, now and then; a change of stage at once."""
        now = time.monotonic()
        if now < max(self.next_time, self.line.next_time):
            return
        self.next_time = now + LIVE_INTERVAL_SECONDS
        status = self.run.read_status()
        self._show_notes(status.get("notes") or [])
        self.line.show(progress_text(status, self.run.read_metrics()))

    def _show_notes(self, notes: list[str]) -> None:
        """What the ranks have said: where they go on, which checkpoints they skipped."""
        for note in notes[self.notes_shown :]:
            self.line.note(note)
        self.notes_shown = max(self.notes_shown, len(notes))

    def close(self) -> None:
        """Leave the live line."""
        self.line.close()


def follow_here(
    plan: Plan, run: RunDirectory, output: str, cpu_count: int, as_json: bool
) -> ExitCode:
    """Launch on this machine, show, and say how it ended."""
    restarts = plan.worker.limits["max_restarts"]
    environment = launch_environment(plan.topology, cpu_count, restarts)
    start = partial(launch, plan, run, environment)
    return follow(plan, run, output, as_json, start)


def follow(
    plan: Plan, run: RunDirectory, output: str, as_json: bool, start: Callable[..., Ended]
) -> ExitCode:
    """Launch, show, and say how it ended.

    Args:
        plan: the run's.
        run: whose files are written.
        output: the run directory as people name it.
        as_json: whether the record is printed.
        start: runs to the end; called with what it calls now and then.
    """
    progress = Progress(run)
    click.echo("", err=True)
    try:
        code, failure = start(progress.poll)
    except KeyboardInterrupt:
        progress.close()
        run.update_status(state="failed", error={"message": "interrupted"})
        click.echo(
            f"interrupted twice: all ranks were ended at once; logs are in {output}/logs; "
            f"sftlaunch resume {output} goes on from the last checkpoint",
            err=True,
        )
        return ExitCode.RUN_FAILED
    progress.close()
    if as_json:
        click.echo(json.dumps(run.read_status()))
    if failure is not None:
        show_failure(failure, output)
        _show_way_on(run, output)
    elif code == ExitCode.PREEMPTED:
        _show_stop(run, output)
    elif not as_json:
        _show_result(plan, run, output)
    return code


def show_failure(failure: Failure, output: str) -> None:
    """The first failing rank's own words, with cause and fix where they are known."""
    rank = f"rank {failure.rank} failed first: " if failure.rank is not None else ""
    click.secho("error: ", fg="red", nl=False, err=True)
    click.echo(f"{rank}{failure.error}", err=True)
    if failure.cause:
        click.echo(f"  probable cause: {failure.cause}", err=True)
        click.echo(f"  fix: {failure.fix}", err=True)
    if failure.secondary:
        ranks = ", ".join(map(str, failure.secondary))
        click.echo(f"  because of it, too: rank {ranks}", err=True)
    click.echo(f"  full log: {output}/{failure.log}", err=True)


def _show_stop(run: RunDirectory, output: str) -> None:
    status = run.read_status()
    click.echo(f"{status.get('stage')} at step {status.get('step') or 0}", err=True)
    _show_way_on(run, output)


def _show_way_on(run: RunDirectory, output: str) -> None:
    """What is safe, and how to go on."""
    newest, skipped = newest_whole(run.checkpoints, contents=False)
    describe(skipped, lambda text: click.echo(f"  {text}", err=True))
    saved = f"{newest.path.name} is whole" if newest else "there is no checkpoint yet"
    click.echo(f"  {saved}; go on with: sftlaunch resume {output}", err=True)


def _show_result(plan: Plan, run: RunDirectory, output: str) -> None:
    width = shutil.get_terminal_size((100, 24)).columns
    for label, text in _result(plan, run, output):
        for line in entry(label, text, width):
            click.echo(line)


def _result(plan: Plan, run: RunDirectory, output: str) -> list[tuple[str, str]]:
    metrics = run.read_metrics()
    losses = [m["loss"] for m in metrics if m.get("loss") is not None]
    found: list[tuple[str, str]] = []
    if losses:
        found.append(("loss", f"{losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last"))
    held = [m for m in metrics if "exact_match" in m]
    if held:
        before, after = held[0], held[-1]
        found.append(
            (
                "held out",
                f"exact match {before['exact_match']:.1%} before, {after['exact_match']:.1%} after"
                f" ({after['held_out_rows']} rows); {after['stopped']:.1%} of the answers stopped",
            )
        )
    found += [("sample", text) for text in _samples(run)]
    what = "adapter" if plan.worker.peft is not None else "model"
    found.append((what, f"{output}/final"))
    found.append(("ask it", f'sftlaunch generate {output} --prompt "..."'))
    return found


def _samples(run: RunDirectory) -> list[str]:
    answers: dict[str, list[dict[str, Any]]] = {}
    for sample in read_lines(run.samples):
        answers.setdefault(sample["prompt"], []).append(sample)
    return [
        f"{prompt} -> {_short(found[0]['answer'])} before, {_short(found[-1]['answer'])} after"
        for prompt, found in answers.items()
    ]


def _short(answer: str) -> str:
    """An answer on one line, cut where a base model did not stop."""
    cut = answer if len(answer) <= SHOWN_CHARACTERS else f"{answer[:SHOWN_CHARACTERS]}..."
    return repr(cut)
