"""What a run on several nodes, or on a machine without ssh, is given: scripts and their kin."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.on_hosts import on_hosts
from launcher.errors import SpecError
from launcher.facts.probe import Facts
from launcher.plan.make import make_plan
from launcher.plan.types import Plan, plan_from_json
from launcher.render.docker import Cache, Caller, docker_argv
from launcher.render.docker_compose import compose_text
from launcher.render.docker_nodes import Nodes, check_argv
from launcher.render.docker_place import HERE, Place, address_of, port_of
from launcher.render.files import with_files
from launcher.spec.schema import Spec
from tests.support import HOSTILE_NAMES, ROOT

CALLER = Caller(
    "registry.example/sft:1", 1000, 1001, "laptop", (Cache("/home/me/cache", "HF_HOME"),)
)
FACTS = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)
HOSTS = ["ssh://me@gpu-a", "ssh://gpu-b:2222"]
RUN = "/runs/x"
# User data of the smallest kind of cloud, before it is packed.
USER_DATA_BYTES = 16 * 1024


def target_of(
    run: str = RUN, docker: dict[str, Any] | None = None, nodes: int = 2, **more: Any
) -> tuple[Plan, Spec, Caller | Nodes]:
    values = {
        "model": "/models/m",
        "dataset": "/data/t.jsonl",
        "hardware": {"gpus": 2 * nodes, "nodes": nodes},
        "docker": docker or {},
        **more,
    }
    planned = make_plan(Spec.model_validate(values), FACTS)
    target = on_hosts(planned.spec, run, nodes, CALLER)
    return with_files(planned, run, 8, target), planned.spec, target


def argvs(docker: dict[str, Any], run: str = RUN, nodes: int = 2) -> list[tuple[str, ...]]:
    plan, spec, target = target_of(run, docker, nodes)
    assert isinstance(target, Nodes)
    return [docker_argv(plan, spec, run, caller) for caller in target.callers]


def option(argv: tuple[str, ...], name: str) -> str:
    (value,) = [word.removeprefix(f"{name}=") for word in argv if word.startswith(f"{name}=")]
    return value


def test_each_host_has_its_node_and_the_first_is_the_rendezvous() -> None:
    first, second = argvs({"hosts": HOSTS})
    assert (first[1], second[1]) == tuple(f"--host={host}" for host in HOSTS)
    assert (option(first, "--rank"), option(second, "--rank")) == ("0", "1")
    assert option(first, "--endpoint") == option(second, "--endpoint") == f"gpu-a:{port_of(RUN)}"
    assert (option(first, "--address"), option(second, "--address")) == ("gpu-a", "gpu-b")
    assert option(first, "--hostname") != option(second, "--hostname")
    for argv in (first, second):
        assert "--network=host" in argv
        assert argv[-1] == RUN
        assert not any("/home/me/cache" in word for word in argv), "it lies on this machine"


def test_addresses_and_port_as_they_are_said() -> None:
    docker = {"hosts": HOSTS, "addresses": ["10.0.0.4", "fd00::5"], "port": 29500}
    first, second = argvs(docker)
    assert option(second, "--endpoint") == "10.0.0.4:29500"
    assert (option(first, "--address"), option(second, "--address")) == ("10.0.0.4", "fd00::5")


def test_two_runs_on_the_same_hosts_take_different_ports() -> None:
    assert port_of("/runs/a") != port_of("/runs/b")
    assert port_of("/runs/a") == port_of("/runs/a")


def test_one_host_has_a_container_like_any_other() -> None:
    (argv,) = argvs({"hosts": HOSTS[:1]}, nodes=1)
    assert argv[:3] == ("docker", f"--host={HOSTS[0]}", "run")
    assert "launcher.launch.inside" in argv
    assert "--network=host" not in argv


def test_where_nothing_is_said_docker_is_asked_as_before() -> None:
    plan, spec, target = target_of(nodes=1)
    assert isinstance(target, Caller)
    assert target.place is HERE
    assert docker_argv(plan, spec, RUN, target)[:2] == ("docker", "run")


@pytest.mark.parametrize(
    ("docker", "nodes"),
    [
        ({"hosts": HOSTS}, 3),
        ({"hosts": HOSTS}, 1),
        ({"hosts": [*HOSTS, f"{HOSTS[0]}/"]}, 3),
        ({"addresses": ["10.0.0.4"]}, 2),
    ],
)
def test_hosts_that_do_not_match_the_nodes_are_refused(docker: dict[str, Any], nodes: int) -> None:
    with pytest.raises(SpecError) as refusal:
        target_of(docker=docker, nodes=nodes)
    assert refusal.value.code == "docker_hosts"


@pytest.mark.parametrize(
    "url",
    [
        "gpu-a",
        "http://gpu-a",
        "ssh://",
        "ssh://-oProxyCommand=x",
        "ssh://a:b@c",
        "ssh://a b",
        "unix://",
    ],
)
def test_what_is_no_host_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"it should be|password"):
        Spec.model_validate({"model": "m", "docker": {"hosts": [url]}})


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ssh://me@gpu-a:22", "gpu-a"),
        ("ssh://10.0.0.4", "10.0.0.4"),
        ("tcp://[fd00::5]:2376", "fd00::5"),
        ("unix:///var/run/docker.sock", None),
    ],
)
def test_the_address_in_a_url(url: str, address: str | None) -> None:
    Spec.model_validate({"model": "m", "docker": {"hosts": [url]}})
    assert address_of(url) == address


def test_the_check_has_the_mounts_of_the_run() -> None:
    plan, spec, target = target_of(docker={"hosts": HOSTS, "mounts": ["/scratch"]})
    assert isinstance(target, Nodes)
    first, second = (
        check_argv(plan, spec, "/shared", ".token", caller) for caller in target.callers
    )
    for path in ("/shared", "/models/m", "/data/t.jsonl", "/scratch"):
        assert any(f"source={path}," in word for word in second)
    assert "--rm" in first
    assert option(first, "--port") == str(port_of(RUN))
    assert not any(word.startswith("--port") for word in second)


# --- scripts that are carried to a node ----------------------------------------------------


def run_script(text: str, folder: Path, **environment: str) -> tuple[int, list[str], str]:
    """Run a node's script with a `docker` that writes down its last argv; code, argv, errors."""
    folder.mkdir(exist_ok=True)
    path, record = folder / "node.sh", folder / "argv"
    path.write_text(text)
    fake = folder / "bin" / "docker"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(record)!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(path)],
        env={"PATH": f"{fake.parent}:/usr/bin:/bin", "HOME": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    argv: list[str] = json.loads(record.read_text()) if record.exists() else []
    return done.returncode, argv, done.stderr


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "a,b", "new\nline", "bell\x07"])
def test_a_node_s_script_holds_all_that_the_node_needs(name: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / name
    model = tmp_path / f"model {name}"
    model.mkdir(parents=True)
    plan, _, _ = target_of(str(run), nodes=1, model=str(model), dataset=None)
    script = plan.files["docker-node-0.sh"]
    code, argv, said = run_script(script, tmp_path / "node")
    assert code == 0, said
    assert not list(tmp_path.rglob("pwned"))
    assert argv[-3:] == ["-m", "launcher.launch.inside", str(run)]
    assert "--restart=on-failure:3" in argv
    carried = plan_from_json(json.loads((run / "plan.json").read_text()))
    assert carried.worker == plan.worker
    assert (run / "spec.yaml").read_text() == plan.files["spec.yaml"]
    assert sorted(path.name for path in run.iterdir()) == [
        "accelerate.yaml",
        "plan.json",
        "spec.yaml",
    ]
    user_data = yaml.safe_load(plan.files["cloud-init.yaml"])["write_files"][0]
    assert content_of(user_data) == script


def content_of(file: dict[str, str]) -> str:
    """A file of cloud-init's write_files, as cloud-init reads it."""
    if file.get("encoding") == "b64":
        import base64

        return base64.b64decode(file["content"]).decode()
    return file["content"]


def test_the_first_node_s_address_may_be_said_on_the_node(tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan, _, _ = target_of(str(run), model="/", dataset=None)
    second = plan.files["docker-node-1.sh"]
    code, _, said = run_script(second, tmp_path / "a")
    assert (code, "SFTLAUNCH_FIRST_NODE" in said) == (4, True)
    assert not run.exists()
    code, argv, said = run_script(second, tmp_path / "b", SFTLAUNCH_FIRST_NODE="10.9.8.7")
    assert code == 0, said
    assert f"--endpoint=10.9.8.7:{port_of(str(run))}" in argv
    code, argv, _ = run_script(plan.files["docker-node-0.sh"], tmp_path / "c")
    assert code == 0
    assert f"--endpoint=:{port_of(str(run))}" in argv


def test_rows_that_are_not_on_the_node_are_named(tmp_path: Path) -> None:
    plan, _, _ = target_of(str(tmp_path / "run"), nodes=1, model="/", dataset="/nowhere/t.jsonl")
    code, _, said = run_script(plan.files["docker-node-0.sh"], tmp_path / "node")
    assert (code, "/nowhere/t.jsonl is not on this node" in said) == (4, True)


def test_the_hub_s_cache_is_kept_on_the_node() -> None:
    from_hub = target_of(nodes=1, model="someone/model")[0].files["docker-node-0.sh"]
    assert "HF_HOME=" in from_hub
    assert "HF_HOME=" not in target_of(nodes=1)[0].files["docker-node-0.sh"]


@pytest.mark.parametrize("hosts", [None, HOSTS])
def test_scripts_are_clean(hosts: list[str] | None, tmp_path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    program = str(shellcheck) if shellcheck.is_file() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    plan, _, _ = target_of(docker={"hosts": hosts} if hosts else {}, model="someone/model")
    paths = [ROOT / "docker" / "node.sh"]
    for name in (name for name in plan.files if name.endswith(".sh")):
        paths.append(tmp_path / name)
        paths[-1].write_text(plan.files[name])
    assert len(paths) == (2 if hosts else 3)
    done = subprocess.run([program, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for path in paths:
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_user_data_is_a_script_at_each_boot_and_small() -> None:
    plan, _, _ = target_of(docker={"addresses": ["10.0.0.4", "10.0.0.5"]})
    for rank in (0, 1):
        text = plan.files[f"cloud-init-{rank}.yaml"]
        assert text.startswith("#cloud-config\n")
        assert len(text.encode()) < USER_DATA_BYTES
        script, boot = yaml.safe_load(text)["write_files"]
        assert script["content"] == plan.files[f"docker-node-{rank}.sh"]
        assert boot["path"].startswith("/var/lib/cloud/scripts/per-boot/")
        assert script["path"] in boot["content"]
        subprocess.run(["sh", "-n"], input=boot["content"], text=True, check=True)


# --- compose -------------------------------------------------------------------------------


def service_of(plan: Plan) -> dict[str, Any]:
    service: dict[str, Any] = yaml.safe_load(plan.files["compose.yaml"])["services"]["run"]
    return service


def test_compose_says_what_docker_run_says() -> None:
    docker = {"restarts": 2, "environment": ["HF_TOKEN"], "mounts": ["/a,b:/c:ro"]}
    plan, spec, target = target_of(nodes=1, docker=docker)
    assert isinstance(target, Caller)
    argv, service = docker_argv(plan, spec, RUN, target), service_of(plan)
    assert service["image"] == CALLER.image
    assert [*service["entrypoint"], *service["command"]] == ["python", *argv[-3:]]
    assert service["container_name"] == option(argv, "--name")
    assert service["restart"] == "on-failure:2"
    assert service["read_only"] is service["init"] is True
    assert service["stop_grace_period"] == f"{option(argv, '--stop-timeout')}s"
    assert service["shm_size"] == int(option(argv, "--shm-size"))
    said = [word.removeprefix("--env=") for word in argv if word.startswith("--env=")]
    assert service["environment"] == said
    (gpus,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (gpus["count"], gpus["capabilities"]) == (2, ["gpu"])
    assert {mount["target"]: mount.get("read_only", False) for mount in service["volumes"]} == {
        RUN: False,
        "/models/m": True,
        "/data/t.jsonl": True,
        "/home/me/cache": False,
        "/c": True,
    }
    assert not any(mount["bind"]["create_host_path"] for mount in service["volumes"])


def test_a_dollar_is_not_a_variable_of_compose() -> None:
    plan, _, _ = target_of("/runs/$HOME", nodes=1)
    assert service_of(plan)["command"][-1] == "/runs/$$HOME"


def test_a_project_s_name_as_compose_takes_it() -> None:
    text = target_of("/runs/Llama-3.1", nodes=1)[0].files["compose.yaml"]
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*", yaml.safe_load(text)["name"])


def test_an_option_without_a_place_in_compose_is_an_error() -> None:
    plan, spec, target = target_of(nodes=1)
    assert isinstance(target, Caller)
    argv = docker_argv(plan, spec, RUN, target)
    compose_text(argv)
    with pytest.raises(KeyError):
        compose_text((*argv[:3], "--something=new", *argv[3:]))


def test_a_place_is_only_said_where_there_are_several() -> None:
    assert HERE.options() == HERE.arguments() == ()
    there = dataclasses.replace(Place(), rank=1, nodes=2, endpoint="[fd00::1]:123")
    assert there.host_and_port == ("fd00::1", 123)
