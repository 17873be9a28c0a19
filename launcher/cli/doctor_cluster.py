"""`doctor --on slurm`: a tiny real job asks the nodes, and what they say is judged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from launcher import __version__
from launcher.cli.options import Request
from launcher.cli.readiness import LEAST_FREE_BYTES, Check
from launcher.cli.run import Decided, decide
from launcher.launch import check_job
from launcher.launch.slurm import Job, check
from launcher.render.slurm import check_script
from launcher.render.text import bytes_text

# Ports of rendezvous: 12000 and the 20000 after it (slurm/job.sbatch).
RENDEZVOUS_PORTS = range(12_000, 32_000)
MOST_NODES = 2
SAY_SECONDS = 5.0


def check_cluster(request: Request, wait_seconds: int) -> list[Check]:
    """What the nodes of a cluster say; the answer is remembered.

    Raises:
        Refusal: where no job can be queued at all, or none was over in time.
    """
    decided = decide(request)
    assert decided.slurm is not None  # noqa: S101 - the target is Slurm
    slurm, topology = decided.planned.spec.slurm, decided.plan.topology
    check(decided.plan, slurm)
    beside = check_job.existing_folder(decided.output)
    with check_job.check_folder(beside) as (folder, word):
        nodes = min(topology.nodes, MOST_NODES)
        script = check_script(slurm, topology, str(folder), word, nodes, decided.slurm)
        answers = check_job.run_check(script, folder, wait_seconds, Waiting())
    checks = judge(answers, decided, beside)
    failed = [check.name for check in checks if not check.ok]
    check_job.remember(check_job.place(beside, slurm.partition), failed)
    return checks


class Waiting:
    """Says now and then what a check waits for."""

    def __init__(self) -> None:
        self.next_time = time.monotonic() + SAY_SECONDS

    def __call__(self, job: Job) -> None:
        """Say it, where it is time."""
        if time.monotonic() < self.next_time:
            return
        self.next_time = time.monotonic() + SAY_SECONDS
        click.echo(f"job {job.number} {job.state.lower()} ({job.reason})", err=True)


def judge(answers: check_job.Answers, decided: Decided, folder: Path) -> list[Check]:
    """The table from what the nodes have said."""
    found = {name: answer for name, answer in answers.nodes.items() if answer is not None}
    checks = [_folder(answers, folder), _interpreter(answers, found, decided)]
    if not found:
        return checks
    if decided.planned.spec.slurm.container is None:
        checks.append(_packages(found))
    return [*checks, _name(found), _port(found), _port_range(found), _space(found, decided, folder)]


def _folder(answers: check_job.Answers, folder: Path) -> Check:
    blind = [name for name in answers.nodes if name not in answers.seen]
    names = ", ".join(answers.seen)
    why = check_job.EXIT_WORDS.get(answers.exit_code, f"said nothing (job {answers.state.lower()})")
    return Check(
        "folder",
        bool(answers.seen) and not blind,
        f"{', '.join(blind) or 'no node'} {why}: {folder}"
        if blind or not answers.seen
        else f"{names} {_verb(answers.seen, 'see')} {folder} and can write there",
        "use --output on a file system that all nodes share",
    )


def _verb(names: tuple[str, ...], word: str) -> str:
    return word if len(names) > 1 else f"{word}s"


def _interpreter(
    answers: check_job.Answers, found: Mapping[str, dict[str, Any]], decided: Decided
) -> Check:
    assert decided.slurm is not None  # noqa: S101 - the target is Slurm
    silent = [name for name in answers.seen if name not in found]
    other = [name for name, answer in found.items() if answer["version"] != __version__]
    python = decided.slurm.python
    if silent or not found:
        detail = f"{', '.join(silent) or 'no node'} could not run {python} with this package"
    elif other:
        detail = f"{', '.join(other)} has another version of this package"
    else:
        detail = f"{python} with sftlaunch {__version__}"
    return Check(
        "interpreter",
        not silent and not other and bool(found),
        detail,
        "install it where all nodes see it, such as the home or a project folder",
    )


def _packages(found: Mapping[str, dict[str, Any]]) -> Check:
    missing = sorted({name for answer in found.values() for name in answer["missing"]})
    return Check(
        "packages",
        not missing,
        f"missing: {', '.join(missing)}" if missing else "the training packages are there",
        "pip install 'sftlaunch[train]' for that interpreter, or set slurm.container",
    )


def _name(found: Mapping[str, dict[str, Any]]) -> Check:
    lost = [name for name, answer in found.items() if answer["resolved"] is None]
    return Check(
        "name",
        not lost,
        f"{', '.join(lost)} cannot resolve the first node's address"
        if lost
        else "the first node's address resolves",
        "mend the cluster's DNS or /etc/hosts",
    )


def _port(found: Mapping[str, dict[str, Any]]) -> Check:
    wrong = [f"{name}: {answer['met']}" for name, answer in found.items() if answer["met"]]
    good = "it is free" if len(found) == 1 else "the nodes reach each other"
    return Check(
        "port",
        not wrong,
        "; ".join(wrong) or f"rendezvous port of the check's job: {good}",
        "let ports 12000 to 31999 pass between the nodes; look at firewalls",
    )


def _port_range(found: Mapping[str, dict[str, Any]]) -> Check:
    taken = {
        f"{low} to {high}"
        for low, high in (answer["outgoing_ports"] for answer in found.values())
        if low < RENDEZVOUS_PORTS.stop and high >= RENDEZVOUS_PORTS.start
    }
    return Check(
        "port range",
        not taken,
        f"outgoing connections use ports {', '.join(sorted(taken))}"
        if taken
        else "outgoing connections take no rendezvous port",
        "raise net.ipv4.ip_local_port_range above 32000",
    )


def _space(found: Mapping[str, dict[str, Any]], decided: Decided, folder: Path) -> Check:
    free = min(answer["free_bytes"] for answer in found.values())
    needed = decided.plan.storage.total_bytes or LEAST_FREE_BYTES
    return Check(
        "space",
        free >= needed,
        f"{bytes_text(free)} free for {folder}, {bytes_text(needed)} needed",
        "free some, lower checkpoints.keep, or use --output on another disk",
    )
