"""A cluster for all tests of this folder that ask for one, and how they use it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.checkpoints import newest_whole
from launcher.runs.directory import RunDirectory
from tests.slurm.cluster import Cluster, SeparateHosts, command, missing, without_namespaces
from tests.support import ROOT

WAIT_SECONDS = 90.0
POLL_SECONDS = 0.1
SHORT = ("evaluation.exact_match=false", "samples.prompts=[]", "limits.stuck_after=60s")
# Seconds of imports that most tests have no use for; those of tests/slurm/test_prepare.py do.
UNPREPARED = "--set=slurm.prepare=none"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        # A check of a commit that silently left these out would prove nothing.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    # Not pytest's folder, which only its owner may enter: munge asks for an open path.
    folder = Path(tempfile.mkdtemp(prefix="sftlaunch-slurm-"))
    made = Cluster(folder)
    before = os.environ.get("SLURM_CONF")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="module")
def four_nodes(cluster: Cluster) -> Iterator[Cluster]:
    """Another cluster, of four nodes with addresses of their own where this machine can."""
    folder = Path(tempfile.mkdtemp(prefix="sftlaunch-slurm-"))
    made = Cluster(folder, 4) if without_namespaces() else SeparateHosts(folder, 4)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)
        os.environ.update(cluster.environment)


@dataclass(frozen=True)
class Queued:
    """A run on the cluster."""

    run: RunDirectory

    @property
    def status(self) -> dict[str, Any]:
        return self.run.read_status()

    @property
    def job(self) -> int:
        return int(self.status["slurm"]["jobs"][0])

    @property
    def ends(self) -> list[str]:
        """How its attempts ended."""
        return [attempt["end"] for attempt in self.status.get("attempts", [])]

    @property
    def losses(self) -> dict[int, float]:
        """Step -> training loss."""
        metrics = self.run.read_metrics()
        return {m["step"]: m["loss"] for m in metrics if m.get("loss") is not None}

    def until(self, what: str, holds: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited for {what}\n{self.told()}"
            time.sleep(POLL_SECONDS)

    def until_step(self, step: int) -> None:
        self.until(f"step {step}", lambda: max(self.losses, default=0) >= step)

    def until_over(self, state: str) -> None:
        def over() -> bool:
            gone = not command("squeue", "--noheader", f"--jobs={self.job}", "--format=%T")
            return gone and self.status.get("state") not in ("queued", "running")

        self.until("the job's end", over)
        assert self.status["state"] == state, self.told()

    @property
    def saved(self) -> int:
        newest, _ = newest_whole(self.run.checkpoints)
        return newest.step if newest else 0

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of this run's training processes."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
                argv = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            settings = dict(word.split(b"=", 1) for word in words if b"=" in word)
            mine = settings.get(b"SFTLAUNCH_RUN") == str(self.run.path).encode()
            if mine and b"RANK" in settings and b"launcher.train" in argv:
                found[int(settings[b"RANK"])] = int(entry.name)
        return found

    def kill_rank(self, rank: int) -> None:
        os.kill(self.ranks()[rank], signal.SIGKILL)

    def freeze(self) -> None:
        """Let no rank write anything more, until it is killed or goes on."""
        for pid in self.ranks().values():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let frozen ranks go on; one that was killed is gone."""
        for pid in self.ranks().values():
            os.kill(pid, signal.SIGCONT)

    def tear_newest(self) -> int:
        """Cut the newest whole checkpoint's largest file short; its step."""
        newest, _ = newest_whole(self.run.checkpoints)
        assert newest is not None
        files = [path for path in newest.path.rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        return newest.step

    def told(self) -> str:
        """All that a person would look at."""
        logs = sorted(self.run.path.glob("logs/**/*"))
        texts = [f"--- {p.name}\n{p.read_text()[-1500:]}" for p in logs if p.is_file()]
        return "\n".join([json.dumps(self.status, indent=1), *texts])


@pytest.fixture
def launch(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Queued]]:
    """Queue the recipe tiny on two nodes of one rank each; what is left is cancelled."""
    started: list[Queued] = []

    def start(*flags: str, name: str = "run", steps: int = 8, nodes: int = 2) -> Queued:
        output = tmp_path / name
        done = sft(
            str(ROOT / "recipes" / "tiny" / "sft.yaml"),
            f"--gpus={nodes}",
            f"--nodes={nodes}",
            "--device=cpu",
            "--on=slurm",
            "--detach",
            f"--output={output}",
            *(f"--set={setting}" for setting in (*SHORT, f"training.max_steps={steps}")),
            *(
                []
                if any("--strategy" in flag for flag in flags) or nodes == 1
                else ["--strategy=fsdp"]
            ),
            *([] if any("slurm.prepare" in flag for flag in flags) else [UNPREPARED]),
            *flags,
        )
        assert done.returncode == 0, done.stderr
        started.append(Queued(RunDirectory(output)))
        return started[-1]

    yield start
    for queued in started:
        jobs = queued.status.get("slurm", {}).get("jobs", [])
        subprocess.run(["scancel", *map(str, jobs)], capture_output=True, check=False, timeout=20)


def sft(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
            **environment,
        },
    )
