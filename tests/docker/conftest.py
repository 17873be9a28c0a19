"""A daemon with the project's image for all tests of this folder, and how they use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.render.docker import container_name
from launcher.runs.checkpoints import newest_whole
from launcher.runs.directory import RunDirectory
from tests.docker.engine import IMAGE, KEPT, Engine, Preparation, missing
from tests.support import ROOT

WAIT_SECONDS = 120.0
POLL_SECONDS = 0.1
SHORT = (
    "evaluation.exact_match=false",
    "samples.prompts=[]",
    "limits.stuck_after=60s",
    f"docker.image={IMAGE}",
)
PREPARATION = pytest.StashKey[Preparation]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests last: their image is built meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("docker") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with the image where a test will ask for it."""
    asked = any(item.get_closest_marker("docker") for item in session.items)
    if asked and not session.config.option.collectonly and missing() is None:
        # Not pytest's folder, which only its owner may enter: containers are other users.
        folder = Path(KEPT or tempfile.mkdtemp(prefix="sftlaunch-docker-"))
        made = Preparation(Engine(folder))
        session.config.stash[PREPARATION] = made
        session.config.add_cleanup(made.stop)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what the preparation took."""
    made = config.stash.get(PREPARATION, None)
    if made is not None:
        parts = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in made.seconds.items())
        terminalreporter.write_line(f"Docker, beside the other tests: {parts}")


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The daemon, with the image in it, as the one that this process's client talks to."""
    why = missing()
    if why is not None:
        # A check of a commit that silently left these out would prove nothing.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    found = request.config.stash[PREPARATION].wait()
    before = {name: os.environ.get(name) for name in found.environment}
    os.environ.update(found.environment)
    yield found
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@dataclass(frozen=True)
class Contained:
    """A run in a container."""

    run: RunDirectory
    engine: Engine
    process: subprocess.Popen[str] | None = None
    """The launcher that watches it; None where nobody does."""

    @property
    def status(self) -> dict[str, Any]:
        return self.run.read_status()

    @property
    def name(self) -> str:
        return container_name(str(self.run.path))

    @property
    def losses(self) -> dict[int, float]:
        """Step -> training loss."""
        metrics = self.run.read_metrics()
        return {m["step"]: m["loss"] for m in metrics if m.get("loss") is not None}

    @property
    def saved(self) -> int:
        newest, _ = newest_whole(self.run.checkpoints)
        return newest.step if newest else 0

    def until(self, what: str, holds: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited for {what}\n{self.told()}"
            time.sleep(POLL_SECONDS)

    def until_step(self, step: int) -> None:
        self.until(f"step {step}", lambda: max(self.losses, default=0) >= step)

    def until_gone(self, state: str) -> None:
        self.until("the container's end", lambda: not self.there())
        assert self.status["state"] == state, self.told()

    def there(self) -> bool:
        """Whether the daemon knows the container, running or not."""
        return bool(self.engine.docker("ps", "--all", "--quiet", f"--filter=name={self.name}"))

    def inspect(self, template: str) -> str:
        return self.engine.docker("container", "inspect", f"--format={template}", self.name)

    def wait(self) -> tuple[int, str]:
        """Exit code and words of the launcher that watches."""
        assert self.process is not None
        out, err = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, out + err

    def told(self) -> str:
        """All that a person would look at."""
        logs = sorted(self.run.path.glob("logs/**/*"))
        texts = [f"--- {p.name}\n{p.read_text()[-1500:]}" for p in logs if p.is_file()]
        return "\n".join([json.dumps(self.status, indent=1), *texts])


Launch = Callable[..., Contained]


@pytest.fixture
def launch(engine: Engine, tmp_path: Path) -> Iterator[Launch]:
    """Start the recipe tiny in a container, two ranks; what is left is removed."""
    started: list[Contained] = []

    def start(
        *flags: str, steps: int = 8, watch: bool = False, folder: Path = tmp_path
    ) -> Contained:
        output = folder / "run"
        arguments = [*recipe(steps), "--gpus=2", "--on=docker", f"--output={output}", *flags]
        if watch:
            process = popen(*arguments)
            started.append(Contained(RunDirectory(output), engine, process))
        else:
            done = sft(*arguments, "--detach")
            assert done.returncode == 0, done.stderr
            started.append(Contained(RunDirectory(output), engine))
        return started[-1]

    yield start
    for one in started:
        if one.process is not None:
            one.process.kill()
            one.process.wait()
        engine.docker("rm", "--force", one.name)


def recipe(steps: int) -> list[str]:
    """Arguments of a short run of the recipe tiny."""
    settings = (*SHORT, f"training.max_steps={steps}")
    spec = str(ROOT / "recipes" / "tiny" / "sft.yaml")
    return [spec, "--device=cpu", *(f"--set={setting}" for setting in settings)]


def popen(*arguments: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, as leader of a group as on a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def sft(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
        env={**environment(), **more},
    )


def environment() -> dict[str, str]:
    """Of a launcher: this checkout's, without the Hub."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
