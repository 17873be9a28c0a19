"""One of several nodes: how it finds the first one, and says what keeps it from it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import EnvironmentNotReady
from launcher.facts.probe import Facts
from launcher.launch import node as module
from launcher.launch.host_check import port_taken
from launcher.launch.node import (
    Node,
    Peers,
    interface_of,
    knock,
    own_address,
    torchrun_of,
    wait_for_first,
)
from launcher.plan.make import make_plan
from launcher.plan.types import Plan
from launcher.runs.directory import RunDirectory
from launcher.spec.schema import Spec

FACTS = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(module, "ASK_SECONDS", 0.02)
    return RunDirectory(tmp_path)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def second(port: int, wait_seconds: float = 5.0) -> Node:
    return Node(1, "127.0.0.1", port, "10.0.0.5", wait_seconds)


def plan_of(**limits: int) -> Plan:
    hardware = {"gpus": 4, "nodes": 2, "device": "cpu"}
    spec = Spec.model_validate({"model": "m", "hardware": hardware, "limits": limits})
    return make_plan(spec, FACTS).plan


def test_every_node_names_its_own_address_and_one_holds_the_rendezvous(run: RunDirectory) -> None:
    argv = torchrun_of(second(29500), plan_of(), run, 3)
    assert "--rdzv-endpoint=127.0.0.1:29500" in argv
    assert "--local-addr=10.0.0.5" in argv
    assert any(word.startswith("--rdzv-conf=is_host=0,") for word in argv)
    assert f"--rdzv-id={run.path.name}.3" in argv
    assert "--nnodes=2" in argv
    assert "--nproc-per-node=2" in argv
    first = torchrun_of(Node(0, "", 29500, "", 5.0), plan_of(), run, 3)
    assert f"--rdzv-endpoint={own_address('')}:29500" in first
    assert any(word.startswith("--rdzv-conf=is_host=1,") for word in first)


def test_it_waits_for_the_first_node_s_port_and_takes_its_attempt(run: RunDirectory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    opened = threading.Event()

    def open_later() -> None:
        run.update_status(state="running", attempt=2)
        with socket.create_server(("127.0.0.1", port)):
            opened.wait(5)

    timer = threading.Timer(0.2, open_later)
    timer.start()
    started = time.monotonic()
    assert wait_for_first(second(port), run, lambda: False) == 2
    assert time.monotonic() - started >= 0.2
    opened.set()
    timer.join()


def test_an_attempt_that_it_was_part_of_is_over(run: RunDirectory, listening: int) -> None:
    run.update_status(state="running", attempt=1)
    log = run.launcher_log(1, 1)
    log.parent.mkdir(parents=True)
    log.touch()
    threading.Timer(0.2, lambda: run.update_status(attempt=2)).start()
    assert wait_for_first(second(listening), run, lambda: False) == 2


def test_a_port_that_is_closed_is_said_with_the_way_out(run: RunDirectory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(EnvironmentNotReady) as refused:
        wait_for_first(second(port, 0.1), run, lambda: False)
    assert refused.value.code == "first_node"
    assert f"node 1 does not reach the first node at 127.0.0.1:{port}" in refused.value.what
    assert "refused" in refused.value.why
    assert "docker.addresses" in refused.value.fix


def test_another_folder_of_the_same_name_is_told(
    run: RunDirectory, listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECORD_SECONDS", 0.05)
    with pytest.raises(EnvironmentNotReady) as refused:
        wait_for_first(second(listening), run, lambda: False)
    assert refused.value.code == "not_shared"


def test_a_stop_ends_the_waiting(run: RunDirectory) -> None:
    assert wait_for_first(second(1), run, lambda: True) is None


def test_addresses_and_interfaces_of_this_machine(listening: int) -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.200") is None
    assert own_address("nowhere.invalid") == "127.0.0.1"
    assert knock("127.0.0.1", listening) is None
    assert "in use" in (port_taken(listening) or "")


@pytest.mark.parametrize("sign", ["error record", "next attempt"])
def test_ranks_end_where_another_node_s_have_failed(
    sign: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(module, "end_all", lambda folder, grace: ended.append(folder))
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(module, "PEER_GRACE_SECONDS", 0.05)
    run.update_status(state="running", attempt=1)
    run.logs(1).mkdir(parents=True)
    peers = Peers(plan_of(), run, 1)
    restarting = Peers(plan_of(max_restarts=1), run, 1)
    peers.poll()
    assert not ended
    if sign == "error record":
        run.rank_error(1, 3).write_text("{}")
    else:
        run.update_status(attempt=2)
    for _ in range(3):
        time.sleep(0.05)
        peers.poll()
        restarting.poll()
    assert ended == [str(run.path)]
