"""`--on docker` where Docker says no: one message, the fix, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import __version__
from tests.support import sftlaunch, tree

IMAGE = '[{"Id": "sha256:1", "RepoDigests": [], "Config": {"Labels": {"%s": "%s"}}}]'
VERSION_LABEL = "org.opencontainers.image.version"
# What a client prints on standard error, verb -> text; exit code 1 where there is one.
NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock."
NO_RIGHT = "permission denied while trying to connect to the Docker daemon socket"
NO_GPU = 'could not select device driver "" with capabilities: [[gpu]].'
NO_MOUNT = "invalid mount config for type bind: bind source path does not exist: /x."


@pytest.fixture
def docker(bare_machine: Path, monkeypatch: pytest.MonkeyPatch):
    """A client on PATH that prints what it is told to."""
    folder = bare_machine.parent / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def tell(version: str = __version__, **errors: str) -> Path:
        program = folder / "docker"
        inspected = IMAGE % (VERSION_LABEL, version)
        program.write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"errors = {errors!r}\n"
            "word = next((e for e in errors if e in sys.argv[1:3]), None)\n"
            "if word:\n    sys.exit(errors[word])\n"
            f"if 'inspect' in sys.argv and 'image' in sys.argv:\n    print({inspected!r})\n"
            "elif 'inspect' in sys.argv:\n    sys.exit('No such container')\n"
        )
        program.chmod(0o755)
        return bare_machine

    return tell


def test_the_whole_script_is_shown(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(bare_machine))
    done = sftlaunch("plan", "--on=docker", "--device=cpu")
    assert done.code == 0, done.err
    assert f"sftlaunch:{__version__}-cpu" in done.out
    assert "--read-only" in done.out
    assert "under files of --json, for machines without ssh: compose.yaml" in done.out.lower()
    assert tree(bare_machine) == {}


def test_without_docker_nothing_is_written(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(bare_machine))
    done = sftlaunch("--on=docker", "--device=cpu", "--json")
    assert (done.code, done.json["error"]["code"]) == (4, "no_docker")
    assert tree(bare_machine) == {}


@pytest.mark.parametrize(
    ("image", "errors", "code", "said"),
    [
        (__version__, {"image": NO_DAEMON}, "docker_down", "systemctl start docker"),
        (__version__, {"image": NO_RIGHT}, "docker_permission", "group docker"),
        (__version__, {"image": "No such image: x"}, "no_image", "sftlaunch image build --cpu"),
        ("0.0.1", {}, "image_version", "0.0.1"),
    ],
)
def test_what_docker_lacks_is_said_before_anything_is_written(
    image: str, errors: dict[str, str], code: str, said: str, docker
) -> None:
    machine = docker(image, **errors)
    done = sftlaunch("--on=docker", "--device=cpu", "--json")
    assert (done.code, done.json["error"]["code"]) == (4, code)
    assert said in done.err
    assert tree(machine) == {}


@pytest.mark.parametrize(
    ("text", "code"), [(NO_GPU, "no_nvidia_runtime"), (NO_MOUNT, "mount_missing")]
)
def test_what_docker_refuses_leaves_no_half_run(text: str, code: str, docker) -> None:
    machine = docker(__version__, run=text)
    done = sftlaunch("--on=docker", "--device=cpu", "--json")
    assert (done.code, done.json["error"]["code"]) == (4, code)
    assert tree(machine).keys() <= {"runs/"}


TOKEN = "hf_abcdefghijklmnop"


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        (f"environment=[HF_TOKEN={TOKEN}]", "value_in_spec", "name the variable alone (HF_TOKEN)"),
        ("environment=[A B]", "bad_value", "the name of a variable alone"),
        ("mounts=[data:/data]", "bad_value", "SOURCE[:TARGET[:ro]]"),
        ("mounts=['/data:data']", "bad_value", "absolute path"),
        ("mounts=['/data:/']", "bad_value", "SOURCE[:TARGET[:ro]]"),
        ("mounts=['/data:/data:readonly']", "bad_value", "SOURCE[:TARGET[:ro]]"),
        ("mounts=['/a:/b:ro:z']", "bad_value", "SOURCE[:TARGET[:ro]]"),
        ("image=--privileged", "bad_value", "the name of an image"),
        ("user=somebody", "bad_value", "docker.user"),
        ("restarts=-1", "bad_value", "docker.restarts"),
    ],
)
def test_a_wrong_spec(setting: str, code: str, said: str, bare_machine: Path) -> None:
    done = sftlaunch("--on=docker", "--device=cpu", "--json", f"--set=docker.{setting}")
    assert (done.code, done.json["error"]["code"]) == (2, code)
    assert said in done.err
    assert done.err.count("\n") == 1
    assert TOKEN not in done.err + done.out
    assert tree(bare_machine) == {}


@pytest.mark.parametrize(
    ("security", "options"),
    [
        ('["name=seccomp,profile=default"]', []),
        ('["name=userns"]', ["--userns=host"]),
        ('["name=selinux"]', ["--security-opt=label=disable"]),
        ('["name=rootless"]', ["--user=0:0"]),
    ],
)
def test_what_the_daemon_asks_for(
    security: str, options: list[str], docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker()
    from launcher.launch import docker as engine
    from launcher.render.docker import Caller

    def say(argv, limit_seconds=0):
        return subprocess.CompletedProcess(argv, 0, security, "")

    monkeypatch.setattr(engine, "ask", say)
    found = engine.as_daemon_has_it(Caller("image", 1000, 1000, "host"))
    words = [*found.daemon, *(["--user=0:0"] if found.user == 0 else [])]
    assert words == options


def test_several_nodes_without_hosts_are_scripts_to_carry_there(docker) -> None:
    machine = docker()
    asked = ("--on=docker", "--device=cpu", "--nodes=2", "--gpus=2", "--json")
    done = sftlaunch("plan", *asked)
    assert done.code == 0, done.err
    assert {"docker-node-0.sh", "docker-node-1.sh", "cloud-init-1.yaml"} <= set(done.json["files"])
    done = sftlaunch("run", *asked)
    assert (done.code, done.json["error"]["code"]) == (2, "docker_hosts")
    assert "--docker-host ssh://USER@HOST" in done.err
    assert tree(machine) == {}
