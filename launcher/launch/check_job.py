"""A tiny real job that asks the nodes what no login node can know, and who asked before.

What a job found is kept in a small file under the user's cache folder, for each cluster,
partition and file system: `run --on slurm` looks there and asks no job again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import EnvironmentNotReady
from launcher.launch.slurm import SUBMIT_SECONDS, Job, ask, fields, look, refusal_words
from launcher.runs.directory import write_atomic

POLL_SECONDS = 0.5
WORD = "word"
MOUNTS = Path("/proc/self/mountinfo")
EXIT_WORDS = {41: "does not see the folder", 42: "may not write in the folder"}


@dataclass(frozen=True)
class Answers:
    """What came back of a check job."""

    job: int
    nodes: dict[str, dict[str, Any] | None]
    """Node -> what it found; None where its interpreter said nothing."""
    seen: tuple[str, ...]
    """Nodes that see the folder and can write there."""
    exit_code: int
    state: str


def existing_folder(output: str) -> Path:
    """The folder that an output lies in, or will be made in."""
    path = Path(os.path.abspath(output))  # noqa: PTH100 - keeps links
    return next(folder for folder in (path.parent, *path.parents) if folder.is_dir())


@contextmanager
def check_folder(beside: Path) -> Iterator[tuple[Path, str]]:
    """A folder where the runs will lie, and a word in it that only this folder holds."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".sftlaunch-check-", dir=beside))
    except OSError as error:
        raise EnvironmentNotReady(
            "output_unwritable",
            f"{beside} cannot be written: {error.strerror}",
            fix="use --output with a folder that you may write",
        ) from None
    try:
        word = secrets.token_hex(8)
        (folder / WORD).write_text(word, encoding="utf-8")
        yield folder, word
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_check(
    script: str, folder: Path, wait_seconds: float, on_poll: Callable[[Job], None]
) -> Answers:
    """Queue the check and wait for its answers; no job of it stays behind.

    Args:
        script: of `launcher.render.slurm.check_script`.
        folder: of `check_folder`.
        wait_seconds: for the whole of it, the queue included.
        on_poll: told the job now and then.

    Raises:
        EnvironmentNotReady: not queued, or not over in time.
    """
    done = ask(["sbatch", "--parsable"], SUBMIT_SECONDS, text=script, folder=Path("/"))
    if done.returncode:
        raise EnvironmentNotReady(
            "not_queued",
            f"the check was not queued: {refusal_words(done.stderr)}",
            fix="correct slurm: in the spec, or try again",
        )
    number = int(done.stdout.split(";")[0])
    try:
        _wait(number, wait_seconds, on_poll)
        return _answers(number, folder)
    finally:
        ask(["scancel", "--quiet", str(number)])


def _wait(number: int, wait_seconds: float, on_poll: Callable[[Job], None]) -> None:
    deadline = time.monotonic() + wait_seconds
    while (job := look(number)) is not None and job.alive:
        on_poll(job)
        if time.monotonic() > deadline:
            raise EnvironmentNotReady(
                "check_waits",
                f"the check (job {number}) was not over within {wait_seconds:g} s: "
                f"{job.state.lower()}, {job.reason}",
                fix="ask again when nodes are free, or wait longer with --wait",
            )
        time.sleep(POLL_SECONDS)


def _answers(number: int, folder: Path) -> Answers:
    found = fields(ask(["scontrol", "show", "job", "--oneliner", str(number)]).stdout)
    names = ask(["scontrol", "show", "hostnames", found.get("NodeList", "")]).stdout.split()
    return Answers(
        job=number,
        nodes={name: _answer(folder / f"{name}.json") for name in names},
        seen=tuple(name for name in names if (folder / f"{name}.seen").exists()),
        exit_code=int(found.get("ExitCode", "0:0").split(":")[0]),
        state=found.get("JobState", ""),
    )


def _answer(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def place(folder: Path, partition: str | None) -> str:
    """What an answer holds for: cluster, partition and file system."""
    lines = ask(["scontrol", "show", "config"]).stdout.splitlines()
    pairs = (line.partition("=") for line in lines)
    names = {key.strip(): value.strip() for key, _, value in pairs}
    return " ".join((names.get("ClusterName", "?"), partition or "-", file_system(folder)))


def file_system(folder: Path) -> str:
    """Source and mount point of the file system that a folder lies on."""
    real = folder.resolve()
    best = ("", "?")
    for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point, source = before.split()[4], after.split()[1]
        if real.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, source)
    return f"{best[1]}@{best[0]}"


def remember(where: str, failed: list[str]) -> None:
    """Keep what a check found; a cache that cannot be written is done without."""
    known = {**_known(), where: {"time": round(time.time()), "failed": failed}}
    try:
        _cache().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_cache(), json.dumps(known, indent=1) + "\n")
    except OSError:
        return


def remembered(where: str) -> list[str] | None:
    """Names of the checks that failed the last time; None where nobody asked."""
    answer = _known().get(where)
    return None if answer is None else list(answer["failed"])


def _known() -> dict[str, Any]:
    return _answer(_cache()) or {}


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "sftlaunch" / "clusters.json"
