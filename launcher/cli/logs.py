"""`logs`: what one rank has printed, also while it prints."""

from __future__ import annotations

import time
from pathlib import Path

import click

from launcher.cli.on_slurm import has_job
from launcher.cli.which import which_run
from launcher.errors import ExitCode, SpecError
from launcher.runs.directory import NOT_OVER, RunDirectory

FOLLOW_SECONDS = 0.5
# The controller is asked about a queue that may be long; others ask it, too.
ASK_SECONDS = 5.0


@click.command()
@click.argument("run_name", required=False, metavar="[RUN]")
@click.option(
    "-f", "--follow", is_flag=True, help="Go on as the log grows, and into the next attempt."
)
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--attempt", type=click.IntRange(min=1), help="Attempt; the last one by default.")
def logs(run_name: str | None, follow: bool, rank: int, attempt: int | None) -> int:
    """Show one rank's log of a run. RUN is a path, a name or a job number."""
    run = which_run(run_name)
    if not follow:
        number = attempt or last_attempt(run)
        path = run.rank_log(number, rank)
        if not path.is_file():
            raise no_log(run, number, rank)
        click.echo(path.read_text(encoding="utf-8", errors="replace"), nl=False)
        return ExitCode.DONE
    try:
        _follow(run, rank, attempt)
    except KeyboardInterrupt:
        click.echo("", err=True)
    return ExitCode.DONE


def last_attempt(run: RunDirectory) -> int:
    """Number of the attempt that runs, or ran last."""
    return int(run.read_status().get("attempt") or 1)


def no_log(run: RunDirectory, number: int, rank: int) -> SpecError:
    """There is no such log; names those that there are, the preparation's among them."""
    paths = [*sorted(run.logs(number).glob("*.log")), *sorted((run.path / "logs").glob("*.log"))]
    there = ", ".join(str(path.relative_to(run.path)) for path in paths) or "none"
    return SpecError(
        "no_log", f"attempt {number} has no log of rank {rank}", fix=f"there are: {there}"
    )


class Growing:
    """A log that is read as far as it goes, again and again."""

    def __init__(self, path: Path) -> None:
        self.path, self.position, self.shown = path, 0, False

    def show(self) -> bool:
        """Print what is new; whether there was anything."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as stream:
            stream.seek(self.position)
            text = stream.read()
        self.position += len(text)
        click.echo(text.decode("utf-8", errors="replace"), nl=False)
        self.shown = self.shown or bool(text)
        return bool(text)


def _follow(run: RunDirectory, rank: int, attempt: int | None) -> None:
    """Show a log until its run is over; without `attempt`, every attempt from the last one on.

    Raises:
        SpecError: where the run is over and there was no such log.
    """
    number = attempt or last_attempt(run)
    log = Growing(run.rank_log(number, rank))
    alive = Alive(run)
    while True:
        # Looked at first: what is written before the end must be shown after it.
        goes_on, last = alive(), last_attempt(run)
        if log.show():
            continue
        if attempt is None and last > number:
            number = last
            click.echo(f"--- attempt {number}", err=True)
            log = Growing(run.rank_log(number, rank))
        elif not goes_on or (attempt is not None and last > attempt):
            break
        else:
            time.sleep(FOLLOW_SECONDS)
    if not log.shown and not log.path.is_file():
        raise no_log(run, number, rank)


class Alive:
    """Whether a run goes on: by its record, and by its job where that one was queued again."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.answer, self.next_time = run, False, 0.0

    def __call__(self) -> bool:
        """Look; the controller is asked now and then only."""
        record = self.run.read_status()
        if record.get("state") in NOT_OVER:
            return True
        if not has_job(record) or record.get("state") == "completed":
            return False
        if time.monotonic() >= self.next_time:
            from launcher.launch.slurm import current_job

            job = current_job(self.run)
            self.answer = job is not None and job.alive
            self.next_time = time.monotonic() + ASK_SECONDS
        return self.answer
