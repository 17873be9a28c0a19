"""`doctor --on slurm`: a real job asks the nodes, once, and a run knows what it found."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, command
from tests.slurm.conftest import sft
from tests.support import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]
TINY = str(ROOT / "recipes" / "tiny" / "sft.yaml")
NAMES = ["folder", "interpreter", "packages", "name", "port", "port range", "space"]


def doctor(tmp_path: Path, *flags: str) -> tuple[int, dict[str, dict[str, Any]]]:
    asked = ("--on=slurm", "--device=cpu", "--gpus=2", "--nodes=2", f"--output={tmp_path / 'run'}")
    done = sft("doctor", TINY, *asked, *flags, "--json", XDG_CACHE_HOME=str(tmp_path / "cache"))
    checks = json.loads(done.stdout).get("checks", [])
    assert not list(tmp_path.glob(".sftlaunch*")), "the check left its folder behind"
    assert command("squeue", "--noheader", "--name=sftlaunch-doctor") == ""
    return done.returncode, {check["name"]: check for check in checks}


def test_asked_once_and_remembered(cluster: Cluster, tmp_path: Path) -> None:
    queue = (
        TINY,
        "--on=slurm",
        "--device=cpu",
        "--gpus=1",
        "--detach",
        f"--output={tmp_path / 'run'}",
        "--set=slurm.directives={hold: true}",
    )
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = sft(*queue, **cache)
    assert "nobody has asked the nodes" in first.stderr, first.stderr
    code, checks = doctor(tmp_path)
    assert (code, list(checks)) == (0, NAMES), checks
    assert "n1, n2 see" in checks["folder"]["detail"]
    assert "reach each other" in checks["port"]["detail"]
    second = sft(*queue[:-2], f"--output={tmp_path / 'two'}", queue[-1], **cache)
    assert second.returncode == 0, second.stderr
    assert "asked" not in second.stderr
    elsewhere = sft(
        *queue[:-2], f"--output={tmp_path / 'three'}", "--set=slurm.partition=urgent", **cache
    )
    assert "nobody has asked" in elsewhere.stderr, "another partition was never asked"
    for name in ("run", "two", "three"):
        assert sft("cancel", str(tmp_path / name), "--now").returncode == 0


def test_nodes_that_see_another_folder(cluster: Cluster, tmp_path: Path) -> None:
    gone = f"rm -rf {tmp_path}/.sftlaunch-check-*"
    code, checks = doctor(tmp_path, f"--set=slurm.before=['{gone}']")
    assert (code, list(checks)) == (4, ["folder", "interpreter"])
    assert "does not see" in checks["folder"]["detail"]
    assert "share" in checks["folder"]["fix"]
    cache = tmp_path / "cache"
    run = (TINY, "--on=slurm", "--device=cpu", "--gpus=1", "--detach", f"--output={tmp_path}/run")
    told = sft(*run, XDG_CACHE_HOME=str(cache))
    assert "not ready when they were asked (folder" in told.stderr
    assert sft("cancel", str(tmp_path / "run"), "--now").returncode == 0


def test_a_port_that_is_taken(cluster: Cluster, tmp_path: Path) -> None:
    """Something listens where the check's own job would meet: the number is the job's."""
    last = max([0, *map(int, command("squeue", "--noheader", "--states=all", "-o%A").split())])
    taken = []
    for number in range(last + 1, last + 4):
        listener = socket.socket()
        listener.bind(("0.0.0.0", 12_000 + number % 20_000))
        listener.listen()
        taken.append(listener)
    code, checks = doctor(tmp_path)
    for listener in taken:
        listener.close()
    assert code == 4
    assert [name for name, check in checks.items() if not check["ok"]] == ["port"]
    assert os.strerror(98) in checks["port"]["detail"]


def test_a_queue_that_is_full_is_not_waited_for_without_end(
    cluster: Cluster, tmp_path: Path
) -> None:
    holder = command("sbatch", "--parsable", "--exclusive", "-N2", "--wrap=sleep 60", "-o/dev/null")
    try:
        asked = ("--on=slurm", "--device=cpu", "--wait=2", f"--output={tmp_path / 'run'}")
        done = sft("doctor", TINY, *asked, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 4, done.stdout
        assert "not over within 2 s" in done.stderr
        assert command("squeue", "--noheader", "--name=sftlaunch-doctor") == ""
        assert not (tmp_path / "cache").exists()
    finally:
        command("scancel", holder)
