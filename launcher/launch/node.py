"""What a container of several nodes runs: `python -m launcher.launch.node --rank N ... RUN`.

One torchrun a node; the first node holds the rendezvous and writes the run's record. The
others wait until its port answers: from then on the record has this attempt's number, and
the run directory shows whether they see the same one.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import EnvironmentNotReady, ExitCode
from launcher.launch.inside import Speaker
from launcher.launch.local import (
    END_GRACE_SECONDS,
    StopSignals,
    launch,
    next_attempt,
    own_torchrun,
    run_ranks,
)
from launcher.launch.processes import end_all
from launcher.plan.types import Plan, plan_from_json
from launcher.render.docker_place import endpoint
from launcher.render.torchrun import launch_environment, rank_options
from launcher.runs.directory import RunDirectory

ASK_SECONDS = 1.0
CONNECT_SECONDS = 5.0
# Until a file that the first node has written is seen here (caches of network file systems).
RECORD_SECONDS = 90.0
# For ranks to fail by themselves, and say why, once one of another node has failed.
PEER_GRACE_SECONDS = 20.0
LOOK_SECONDS = 2.0
SIOCGIFADDR = 0x8915  # linux/sockios.h
SOMEWHERE = ("192.0.2.1", 9)  # a documentation address (RFC 5737): nothing is sent to it


@dataclass(frozen=True)
class Node:
    """This node's part."""

    rank: int
    host: str
    """The first node's address; empty on the first node where nothing was said."""
    port: int
    said_address: str
    wait_seconds: float

    @property
    def address(self) -> str:
        """By which the other nodes reach this one: as was said, or as the way to them goes."""
        return self.said_address or own_address(self.host)


def main(arguments: list[str]) -> int:
    """Run this node's ranks to their end; exit codes are those of `sftlaunch run`."""
    node, run = _parse(arguments)
    if run.read_status().get("state") == "completed":
        return ExitCode.DONE  # started again after the last word was written
    plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    try:
        return _first(node, plan, run) if node.rank == 0 else _other(node, plan, run)
    except EnvironmentNotReady as refusal:
        sys.stderr.write(f"error: {refusal}\n")
        return refusal.exit_code


def _parse(arguments: list[str]) -> tuple[Node, RunDirectory]:
    parser = argparse.ArgumentParser(prog="launcher.launch.node", allow_abbrev=False)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", default="")
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--wait", type=float, required=True)
    parser.add_argument("run", type=Path)
    said = parser.parse_args(arguments)
    host, _, port = said.endpoint.rpartition(":")
    node = Node(said.rank, host.strip("[]"), int(port), said.address, said.wait)
    return node, RunDirectory(said.run)


def _first(node: Node, plan: Plan, run: RunDirectory) -> int:
    attempt = next_attempt(run)
    peers, speaker = Peers(plan, run, attempt), Speaker(run)

    def look() -> None:
        peers.poll()
        speaker.poll()

    argv = torchrun_of(node, plan, run, attempt)
    code, failure = launch(plan, run, environment_of(node, plan), look, argv)
    speaker.close()
    if failure is not None:
        sys.stderr.write(f"error: {failure.error}\n")
    return code


def _other(node: Node, plan: Plan, run: RunDirectory) -> int:
    with StopSignals() as stop:
        attempt = wait_for_first(node, run, lambda: stop.asked)
        if attempt is None:
            return ExitCode.PREEMPTED
        argv = torchrun_of(node, plan, run, attempt)
        peers = Peers(plan, run, attempt)
        environment = environment_of(node, plan)
        code = run_ranks(
            plan, run, attempt, argv, environment, stop=stop, on_poll=peers.poll, node=node.rank
        )
    state = run.read_status().get("state")
    if state == "completed":
        return ExitCode.DONE
    if state == "preempted":
        return ExitCode.PREEMPTED
    return ExitCode.RUN_FAILED if code or stop.asked else ExitCode.DONE


def torchrun_of(node: Node, plan: Plan, run: RunDirectory, attempt: int) -> list[str]:
    """Argv of this node's torchrun.

    The node's own address is said to it: whichever node gets rank 0 is known to the others by
    that (torch 2.13, dynamic_rendezvous), and a container's host name is known to nobody.
    """
    head = node.host or node.address
    return own_torchrun(
        (
            "torchrun",
            f"--nnodes={plan.topology.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint(head, node.port)}",
            # Ranks of an earlier attempt must not meet those of this one.
            f"--rdzv-id={run.path.name}.{attempt}",
            f"--rdzv-conf=is_host={int(node.rank == 0)},join_timeout={node.wait_seconds:.0f}",
            f"--local-addr={node.address}",
            *rank_options(plan.topology, plan.worker.limits, str(run.path)),
        )
    )


def environment_of(node: Node, plan: Plan) -> dict[str, str]:
    """Variables of this node's ranks.

    gloo takes the interface that the host's name resolves to, which for a container is none
    that others reach; it is told the one that the other nodes' address is on.
    """
    processors = len(os.sched_getaffinity(0))
    environment = launch_environment(plan.topology, processors, plan.worker.limits["max_restarts"])
    interface = interface_of(own_address(node.host))
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        environment["GLOO_SOCKET_IFNAME"] = interface
    return environment


def wait_for_first(node: Node, run: RunDirectory, stopped: Callable[[], bool]) -> int | None:
    """Number of the attempt that the first node has begun; None where a stop came first.

    Raises:
        EnvironmentNotReady: it does not answer, or its run directory is not seen here.
    """
    deadline = time.monotonic() + node.wait_seconds
    answered: float | None = None
    why = ""
    while not stopped():
        error = knock(node.host, node.port)
        why = error or why
        answered = None if error else (answered or time.monotonic())
        begun = int(run.read_status().get("attempt") or 0)
        # One that this node was part of before is over: the first node will count on.
        if error is None and begun and not run.launcher_log(begun, node.rank).exists():
            return begun
        if answered is not None and not begun and time.monotonic() - answered > RECORD_SECONDS:
            raise not_shared(run)
        if time.monotonic() > deadline:
            raise EnvironmentNotReady(
                "first_node",
                f"node {node.rank} does not reach the first node at "
                f"{endpoint(node.host, node.port)} within {node.wait_seconds:.0f} s",
                why=why,
                fix="open all ports between the nodes, or set docker.addresses to those by which "
                "they reach each other",
            )
        time.sleep(ASK_SECONDS)
    return None


def not_shared(run: RunDirectory) -> EnvironmentNotReady:
    """A run directory that only some nodes see."""
    return EnvironmentNotReady(
        "not_shared",
        f"{run.path} is not the folder that the first node has",
        why="all ranks write one checkpoint there",
        fix="use --output on a file system that all nodes mount at the same path; a single node "
        "needs none",
    )


def knock(host: str, port: int) -> str | None:
    """Why nothing answers at an address; None where something does."""
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def own_address(host: str) -> str:
    """This machine's address on the way to a host, or to anywhere where none is said."""
    there = (host, SOMEWHERE[1]) if host else SOMEWHERE
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0])
    except OSError:  # no network at all, or a name that is not known (yet)
        return "127.0.0.1"


def interface_of(address: str) -> str | None:
    """Name of the network interface that has an address (version 4)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


class Peers:
    """Ends this node's ranks where another node's have failed, or have begun anew.

    torchrun stops the others of its own node only. Ranks on GPUs would wait in a collective
    until its timeout. Where failed ranks start again, torchrun sees to all nodes itself.
    """

    def __init__(self, plan: Plan, run: RunDirectory, attempt: int) -> None:
        self.run, self.attempt = run, attempt
        self.active = not plan.worker.limits["max_restarts"]
        self.next = 0.0
        self.since: float | None = None

    def poll(self) -> None:
        """Look, now and then."""
        now = time.monotonic()
        if not self.active or now < self.next:
            return
        self.next = now + LOOK_SECONDS
        if not self._over():
            return
        self.since = self.since or now
        if now - self.since > PEER_GRACE_SECONDS:
            self.active = False
            sys.stderr.write("ranks of another node have failed; those of this one are ended\n")
            end_all(str(self.run.path), END_GRACE_SECONDS)

    def _over(self) -> bool:
        begun = int(self.run.read_status().get("attempt") or 0)
        failed = any(self.run.logs(self.attempt).glob("rank-*.error.json"))
        return failed or begun > self.attempt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
