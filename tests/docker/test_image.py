"""What is in the image and what is not, and that any user can use it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher import __version__
from tests.docker.engine import IMAGE, Engine

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]
MAX_BYTES = 1.7e9
READ_ONLY = ("--read-only", "--tmpfs=/tmp:exec,mode=1777", "--cap-drop=ALL")
# What a build needs and a run does not, what pip and apt leave, and what only a build may see.
LEFT_OUT = """
for name in gcc g++ cc c++ pip pip3; do command -v $name; done
find /var/lib/apt/lists /var/cache /tmp /run /root/.cache -type f 2>/dev/null
find / -xdev -name pip.conf -o -xdev -name '*.whl' -o -xdev -path '*/pip/*'
find /opt/sftlaunch/lib/*/site-packages/launcher -name '*.py' | while read -r file; do
  name=${file##*/}
  ls "${file%/*}/__pycache__/${name%.py}".*.pyc >/dev/null || echo "$file has no bytecode"
done
"""


@pytest.fixture(scope="module")
def inspected(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(engine.docker("image", "inspect", IMAGE))[0]
    return found


def test_size_and_labels(inspected: dict[str, Any]) -> None:
    assert inspected["Size"] <= MAX_BYTES, inspected["Size"]
    labels = inspected["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"]
    assert inspected["Config"]["User"] == "1000:1000"
    assert inspected["Config"]["Healthcheck"]["Test"][0] == "CMD"
    assert inspected["Config"]["Entrypoint"][0].endswith("tini")


def test_nothing_of_the_build_stays(engine: Engine) -> None:
    done = engine.ask("run", "--rm", "--user=0", "--entrypoint=bash", IMAGE, "-c", LEFT_OUT)
    assert (done.stdout, done.stderr) == ("", "")
    history = engine.docker("history", "--no-trunc", "--format={{.CreatedBy}}", IMAGE)
    assert "COPY" in history
    assert "index-url" not in history


@pytest.mark.parametrize("user", ["4321:4321", "0:0"])
def test_any_user_without_rights(engine: Engine, user: str) -> None:
    """As Kubernetes, pyxis and apptainer run it: no entry in passwd, no home, nothing to write."""
    done = engine.ask(
        *("run", "--rm", f"--user={user}", *READ_ONLY, IMAGE),
        *("plan", "--device=cpu", "--gpus=2", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["topology"]["gpus"] == 2
    script = "import getpass, pathlib; getpass.getuser(); (pathlib.Path.home() / 'a').touch()"
    done = engine.ask(
        "run", "--rm", f"--user={user}", *READ_ONLY, "--entrypoint=python", IMAGE, "-c", script
    )
    assert done.returncode == 0, done.stderr


def test_deepspeed_finds_its_extensions_without_a_compiler(engine: Engine) -> None:
    script = (
        "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder\n"
        "CPUAdamBuilder().load(); ShareMemCommBuilder().load()"
    )
    done = engine.ask(
        "run", "--rm", "--user=4321", *READ_ONLY, "--entrypoint=python", IMAGE, "-c", script
    )
    assert done.returncode == 0, done.stderr[-2000:]
