"""Four nodes, each with a host name, an address and mounts of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, SeparateHosts, command, without_namespaces
from tests.slurm.conftest import SHORT, Queued, sft
from tests.support import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]
TINY = str(ROOT / "recipes" / "tiny" / "sft.yaml")
SAME_CURVE = 1e-5


def test_four_nodes_train_as_one_process_does(
    four_nodes: Cluster, launch: Callable[..., Queued], tmp_path: Path
) -> None:
    queued = launch(nodes=4, steps=4)
    alone = sft(
        TINY,
        "--gpus=1",
        "--device=cpu",
        f"--output={tmp_path / 'alone'}",
        *(f"--set={setting}" for setting in (*SHORT, "training.max_steps=4")),
    )
    assert alone.returncode == 0, alone.stderr
    queued.until_over("completed")
    expected = Queued(type(queued.run)(tmp_path / "alone")).losses
    assert queued.losses.keys() == expected.keys()
    assert max(abs(queued.losses[step] - expected[step]) for step in expected) < SAME_CURVE
    plan = json.loads(queued.run.plan.read_text("utf-8"))
    assert (plan["topology"]["nodes"], queued.status["engine"]) == (4, "FSDP2")
    assert len(list(queued.run.logs(1).glob("rank-*.log"))) == 4


@pytest.fixture
def hosts(four_nodes: Cluster) -> SeparateHosts:
    if not isinstance(four_nodes, SeparateHosts):
        pytest.skip(f"nodes share this host: {without_namespaces()}")
    return four_nodes


def test_the_nodes_are_hosts_of_their_own(hosts: SeparateHosts) -> None:
    said = command("srun", "--nodes=4", "--ntasks-per-node=1", "hostname", "--all-ip-addresses")
    assert sorted(said.split()) == sorted(hosts.address(name)[1] for name in hosts.names)


def test_a_node_that_does_not_see_the_folder(hosts: SeparateHosts, tmp_path: Path) -> None:
    """One of two nodes has another file system there: the doctor names it."""
    folder = tmp_path / "private"
    folder.mkdir()
    asked = ("--on=slurm", "--device=cpu", "--gpus=2", "--nodes=2", "--json")
    arguments = ("doctor", TINY, *asked, f"--output={folder / 'run'}")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    hosts.within("n2", "mount", "-t", "tmpfs", "tmpfs", str(folder))
    bad = sft(*arguments, **cache)
    assert bad.returncode == 4, bad.stdout
    first = json.loads(bad.stdout)["checks"][0]
    assert (first["name"], first["ok"]) == ("folder", False)
    assert first["detail"].startswith("n2 does not see the folder")
    hosts.within("n2", "umount", str(folder))
