"""`docker run` of a plan: what stands in it, and that hostile names stay names."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.facts.probe import Facts
from launcher.plan.make import make_plan
from launcher.render.docker import PASSED, SCRIPT, Cache, Caller, container_name, docker_argv
from launcher.render.files import with_files
from launcher.spec.schema import Spec
from tests.support import HOSTILE_NAMES

CALLER = Caller(
    "sftlaunch@sha256:12",
    1000,
    1001,
    "node",
    (Cache("/home/me/.cache/huggingface", "HF_HOME"), Cache("/data/hub", "HF_HUB_CACHE", False)),
    ("/dev/infiniband",),
    (2000,),
    ("--userns=host",),
)
FACTS = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)


def plan_of(run: str = "/runs/x", docker: dict[str, Any] | None = None, **spec: Any) -> Any:
    values = {"model": "m", "hardware": {"gpus": 2}, "docker": docker or {}, **spec}
    planned = make_plan(Spec.model_validate(values), FACTS)
    plan = with_files(planned, run, 8, CALLER)
    return plan, docker_argv(plan, planned.spec, run, CALLER)


def mounts(argv: tuple[str, ...]) -> list[dict[str, str]]:
    """Values of `--mount` as Docker reads them: CSV, then pairs."""
    found = []
    for word in argv:
        if word.startswith("--mount="):
            (fields,) = csv.reader([word.removeprefix("--mount=")])
            found.append(dict((*field.split("=", 1), "")[:2] for field in fields))
    return found


def test_what_a_container_run_gets_wrong_by_default_is_right() -> None:
    _, argv = plan_of()
    for word in (
        "--init",
        "--gpus=2",
        "--user=1000:1001",
        "--group-add=2000",
        "--userns=host",
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--ulimit=memlock=-1",
        "--device=/dev/infiniband",
        "--hostname=node",
        "sftlaunch@sha256:12",
    ):
        assert word in argv
    (timeout,) = [int(w.split("=")[1]) for w in argv if w.startswith("--stop-timeout=")]
    plan, _ = plan_of()
    assert timeout > plan.worker.limits["shutdown_timeout_seconds"]


def test_shared_memory_grows_with_what_loaders_hold() -> None:
    def shared(**training: Any) -> int:
        _, argv = plan_of(training=training)
        return next(int(w.split("=")[1]) for w in argv if w.startswith("--shm-size="))

    assert shared() >= 2**29
    loaders = {"dataloader_num_workers": 8, "max_length": 131_072}
    assert shared(**loaders) > shared()


def test_a_restart_policy_only_where_it_is_asked_for() -> None:
    assert not any(word.startswith("--restart") for word in plan_of()[1])
    assert "--restart=on-failure:3" in plan_of(docker={"restarts": 3})[1]


def test_on_cpu_there_are_no_gpus_to_ask_for() -> None:
    _, argv = plan_of(hardware={"gpus": 2, "device": "cpu"})
    assert not any(word.startswith(("--gpus", "--device")) for word in argv)


def test_variables_go_by_name() -> None:
    _, argv = plan_of(docker={"environment": ["HF_TOKEN", "AB"]})
    named = [word for word in argv if word.startswith("--env=") and word.count("=") == 1]
    assert named == [f"--env={name}" for name in sorted({"AB", *PASSED})]
    assert "HF_TOKEN" in PASSED


def test_model_and_data_are_read_only_and_the_run_is_not() -> None:
    found = mounts(plan_of(model="/models/m", dataset="/data/t.jsonl")[1])
    by_target = {mount["target"]: "readonly" in mount for mount in found}
    assert by_target == {
        "/runs/x": False,
        "/models/m": True,
        "/data/t.jsonl": True,
        "/home/me/.cache/huggingface": False,
        "/data/hub": True,
    }


def test_caches_are_where_their_variables_say() -> None:
    _, argv = plan_of()
    assert "--env=HF_HOME=/home/me/.cache/huggingface" in argv
    assert "--env=HF_HUB_CACHE=/data/hub" in argv


def test_a_checkpoint_to_start_from_is_mounted() -> None:
    plan, _ = plan_of()
    worker = dataclasses.replace(plan.worker, resume_from="/runs/old/checkpoints/checkpoint-8")
    planned = make_plan(Spec.model_validate({"model": "m"}), FACTS)
    moved = dataclasses.replace(plan, worker=worker)
    (found,) = [
        mount
        for mount in mounts(docker_argv(moved, planned.spec, "/runs/x", CALLER))
        if mount["target"].startswith("/runs/old")
    ]
    assert "readonly" in found


@pytest.mark.parametrize("mount", ["/a:/b:ro", "/a:/b", "/a"])
def test_mounts_of_the_spec(mount: str) -> None:
    last = mounts(plan_of(docker={"mounts": [mount]})[1])[-1]
    assert last["source"] == "/a"
    assert last["target"] == ("/b" if ":" in mount else "/a")
    assert ("readonly" in last) == mount.endswith(":ro")


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "a,b", 'a"b,c', "new\nline"])
def test_hostile_names_stay_names(name: str, tmp_path: Path) -> None:
    run = f"/runs/{name}"
    plan, argv = plan_of(run, model=f"/models/{name}")
    assert mounts(argv)[0] == {"type": "bind", "source": run, "target": run}
    assert argv[-1] == run
    assert container_name(run) != container_name(f"{run}x")
    assert set(container_name(run)) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
    )
    read_back = run_by_hand(plan.files[SCRIPT], tmp_path)
    assert tuple(read_back) == argv[1:]
    assert not (tmp_path / "pwned").exists()


def run_by_hand(script: str, folder: Path) -> list[str]:
    """Run docker.sh with a `docker` that writes down its last argv."""
    path = folder / "docker.sh"
    path.write_text(script)
    fake = folder / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(folder / 'argv')!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(path)],
        env={"PATH": f"{fake.parent}:/usr/bin:/bin"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads((folder / "argv").read_text())
    return found


def test_the_script_is_clean(tmp_path: Path) -> None:
    path = tmp_path / "docker.sh"
    path.write_text(plan_of()[0].files[SCRIPT])
    shellcheck = Path(sys.executable).with_name("shellcheck")
    program = str(shellcheck) if shellcheck.is_file() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
