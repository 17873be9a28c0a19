"""What a real daemon refuses, or a missing one: one message with the fix, nothing left."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from launcher.errors import EnvironmentNotReady
from launcher.facts.probe import Facts
from launcher.launch import docker
from launcher.plan.make import make_plan
from launcher.render.docker import shared_memory_bytes
from launcher.spec.schema import Spec
from tests.docker.conftest import recipe, sft
from tests.docker.engine import BASE, IMAGE, Engine

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]
NOBODY = 65534
GPUS = ("--device=cuda", "--gpu=h100-80gb")
OTHER, NONE = "sftlaunch:other-version", "sftlaunch:is-not-here"


@pytest.fixture(scope="module")
def other_version(engine: Engine) -> str:
    """An image that says that it holds another version."""
    label = f"--label={docker.VERSION_LABEL}=0.0.1"
    subprocess.run(
        ["docker", "build", f"--tag={OTHER}", label, "-"],
        input=f"FROM {BASE}\n",
        text=True,
        check=True,
        capture_output=True,
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
    )
    return OTHER


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ((f"--set=docker.image={NONE}",), "no_image", "sftlaunch image build --cpu"),
        ((f"--set=docker.image={OTHER}",), "image_version", "holds sftlaunch 0.0.1"),
        (("--set=docker.mounts=[/is/not/here:/data:ro]",), "mount_missing", "docker.mounts"),
        (GPUS, "no_nvidia_runtime", "nvidia-container-toolkit"),
    ],
)
def test_refused(
    flags: tuple[str, ...], code: str, said: str, engine: Engine, other_version: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    done = sft(*recipe(4), "--gpus=2", "--on=docker", f"--output={output}", "--json", *flags)
    assert done.returncode == 4, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == code
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not output.exists()
    assert engine.docker("ps", "--all", "--quiet") == ""


def test_no_daemon(engine: Engine, tmp_path: Path) -> None:
    nowhere = f"unix://{tmp_path}/socket"
    done = sft(*recipe(4), "--on=docker", f"--output={tmp_path / 'run'}", DOCKER_HOST=nowhere)
    assert done.returncode == 4
    assert f"the Docker daemon of {nowhere} does not answer" in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_permission_on_the_socket(engine: Engine) -> None:
    os.seteuid(NOBODY)
    try:
        with pytest.raises(EnvironmentNotReady) as refused:
            docker.ask(["docker", "version"])
    finally:
        os.seteuid(0)
    assert refused.value.code == "docker_permission"


def test_a_model_that_only_root_may_read(engine: Engine, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    rows.chmod(0o600)
    flags = (f"--dataset={rows}", "--set=dataset.eval_path=null", "--set=loss=all")
    done = sft(*recipe(4), "--on=docker", f"--output={tmp_path / 'run'}", *flags)
    assert done.returncode == 4, done.stderr
    assert f"{rows} cannot be read by user 1000" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_container_that_fails_at_once_is_heard(engine: Engine, tmp_path: Path) -> None:
    """Before any rank: what it printed is shown, and kept though the container is gone."""
    nothing, output = tmp_path / "nothing", tmp_path / "run"
    nothing.mkdir()
    hidden = f"--set=docker.mounts=['{nothing}:/opt/sftlaunch/lib:ro']"
    done = sft(*recipe(4), "--gpus=2", "--on=docker", f"--output={output}", hidden)
    assert done.returncode == 1, done.stderr
    assert "No module named 'launcher'" in done.stderr
    assert "No module named 'launcher'" in (output / "logs" / "container.log").read_text()
    assert engine.docker("ps", "--all", "--quiet") == ""


def test_loaders_with_large_batches_fit_into_the_computed_shared_memory(engine: Engine) -> None:
    """Two ranks' data loaders with everything fetched ahead; Docker's own 64 MiB fail."""
    rows, length, workers = 64, 32_768, 4
    spec = {
        "model": "m",
        "hardware": {"gpus": 2, "device": "cpu"},
        "batch": {"micro_batch_size": rows, "global_batch_size": 2 * rows},
        "training": {"max_length": length, "dataloader_num_workers": workers},
    }
    facts = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)
    plan = make_plan(Spec.model_validate(spec), facts).plan
    computed = f"--shm-size={shared_memory_bytes(plan)}"
    for limit, code in ((computed, 0), ("--shm-size=64m", 1)):
        ran = engine.ask(
            *("run", "--rm", limit, "--user=4321", "--entrypoint=python", IMAGE, "-c", LOADERS),
            *map(str, (rows, length, workers)),
        )
        assert ran.returncode == code, ran.stderr[-2000:]


LOADERS = """
import os, sys, time
from torch.utils.data import DataLoader, Dataset
import torch
rows, length, workers = map(int, sys.argv[1:])
class Rows(Dataset):
    def __len__(self):
        return rows * workers * 3
    def __getitem__(self, index):
        return [torch.zeros(length, dtype=torch.int64)] * 3
def rank():
    batches = iter(DataLoader(Rows(), batch_size=rows, num_workers=workers, prefetch_factor=2))
    next(batches)
    time.sleep(4)  # meanwhile the workers fill what they may
    return sum(1 for _ in batches)
child = os.fork()
if child == 0:
    os._exit(int(rank() != workers * 3 - 1))
try:
    rank()
finally:
    failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(int(failed != 0))
"""
