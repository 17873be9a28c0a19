"""`--docker-host`: what it asks for, and what is refused before any host is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.runs.directory import RunDirectory
from tests.support import sftlaunch, tree

CPU = ("--device=cpu", "--gpus=2")
TWO = ("--docker-host=ssh://me@gpu-a", "--docker-host=ssh://gpu-b")


def test_two_hosts_are_two_nodes_in_docker(bare_machine: Path) -> None:
    done = sftlaunch("plan", *CPU, *TWO, "--json")
    assert done.code == 0, done.err
    assert done.json["topology"]["nodes"] == 2
    assert done.json["command"][:3] == ["docker", "--host=ssh://me@gpu-a", "run"]
    script = done.json["files"]["docker.sh"]
    assert script.count("--host=ssh://gpu-b run") + script.count("--host=ssh://gpu-b \\") == 1
    assert "docker-node-0.sh" not in done.json["files"]
    assert tree(bare_machine) == {}


def test_the_spec_says_the_same(bare_machine: Path) -> None:
    (bare_machine / "sft.yaml").write_text("model: m\ndocker: {hosts: [ssh://a, ssh://b]}\n")
    on_docker = sftlaunch("plan", "sft.yaml", *CPU, "--on=docker", "--json")
    assert on_docker.json["topology"]["nodes"] == 2
    here = sftlaunch("plan", "sft.yaml", *CPU, "--json")
    assert here.json["topology"]["nodes"] == 1, "hosts are for --on docker"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ((*TWO, "--nodes=1"), "docker_hosts", "1 node and 2 Docker hosts"),
        ((*TWO[:1], "--nodes=2"), "docker_hosts", "2 nodes and 1 Docker host;"),
        ((*TWO[:1], *TWO[:1]), "docker_hosts", "named twice"),
        ((*TWO, "--on=slurm"), "docker_hosts", "exclude each other"),
        (("--docker-host=gpu-a",), "bad_value", "ssh://USER@HOST"),
        (("--docker-host=ssh://me:word@gpu-a",), "bad_value", "password"),
        ((*TWO, "--set=docker.port=0"), "bad_value", "docker.port"),
        ((*TWO, "--set=docker.addresses=[a b, c]"), "bad_value", "docker.addresses"),
        ((*TWO, "--set=docker.addresses=[10.0.0.4]"), "docker_hosts", "1 of 2 addresses"),
    ],
)
def test_refused_before_a_host_is_asked(
    flags: tuple[str, ...], code: str, said: str, bare_machine: Path
) -> None:
    done = sftlaunch("run", *CPU, *flags, "--json")
    assert (done.code, done.json["error"]["code"]) == (2, code), done.err
    assert said in done.err
    assert tree(bare_machine) == {}


def test_a_host_that_is_not_there_is_named(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bare_machine.parent / "bin"
    folder.mkdir()
    program = folder / "docker"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if 'gpu-b' in sys.argv[1]:\n"
        "    sys.exit('error during connect: ... stderr=ssh: gpu-b: Name not known')\n"
        "print('x')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    done = sftlaunch("run", *CPU, *TWO, "--json")
    assert (done.code, done.json["error"]["code"]) == (4, "docker_down"), done.err
    assert "the Docker daemon of ssh://gpu-b does not answer; ssh: gpu-b: Name not" in done.err
    assert "docker --host ssh://gpu-b version" in done.err
    assert tree(bare_machine) == {}


def test_a_run_whose_host_is_gone_can_go_on_elsewhere(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.cli.on_docker import refuse_in_container

    monkeypatch.setenv("PATH", str(bare_machine))  # no docker at all
    run = RunDirectory(bare_machine)
    run.update_status(state="running", docker={"container": "x", "hosts": ["ssh://gone"]})
    refuse_in_container(run)
