"""Which Docker hosts a run's nodes stand on, as it was asked for."""

from __future__ import annotations

import dataclasses

from launcher.errors import SpecError
from launcher.render.docker import Cache, Caller
from launcher.render.docker_nodes import Nodes, places_of
from launcher.render.docker_place import STARTED_WAIT_SECONDS, Place, address_of, endpoint
from launcher.spec.schema import DockerSpec, Spec


def with_nodes_of_hosts(spec: Spec) -> Spec:
    """A spec with as many nodes as hosts, where nothing else was said."""
    hardware = spec.hardware
    if len(spec.docker.hosts) < 2 or hardware.nodes is not None:  # noqa: PLR2004 - several
        return spec
    nodes = len(spec.docker.hosts)
    return spec.model_copy(update={"hardware": hardware.model_copy(update={"nodes": nodes})})


def on_hosts(spec: Spec, run_directory: str, nodes: int, caller: Caller) -> Caller | Nodes:
    """Who starts each node's container.

    Args:
        spec: resolved.
        run_directory: absolute path.
        nodes: of the plan.
        caller: who starts one on this machine.

    Raises:
        SpecError: hosts or addresses that are not one a node.
    """
    docker = spec.docker
    _refuse_uneven(docker, nodes)
    if not docker.hosts and nodes == 1:
        return caller
    places = places_of(spec, run_directory, nodes)
    if not docker.hosts:
        return Nodes(tuple(dataclasses.replace(caller, place=place) for place in places))
    addresses = docker.addresses or _addresses(docker.hosts)
    return Nodes(
        tuple(
            _on_host(caller, place, url, addresses, run_directory)
            for place, url in zip(places, docker.hosts, strict=True)
        )
    )


def _addresses(hosts: list[str]) -> list[str]:
    """By which the nodes reach each other: the hosts' names in their URLs.

    Several daemons of this machine have one of its own each: torch tells nodes apart by address
    and process number (torch 2.13, _NodeDesc), and in containers those are all small.
    """
    from launcher.launch.node import own_address

    found = [address_of(url) for url in hosts]
    if not any(found):
        return [f"127.0.0.{rank + 1}" for rank in range(len(hosts))]
    return [address or own_address("") for address in found]


def _on_host(
    caller: Caller, place: Place, url: str, addresses: list[str], run_directory: str
) -> Caller:
    """The caller for one host. What lies on this machine says nothing about that one."""
    there = dataclasses.replace(
        place,
        daemon=url,
        address=addresses[place.rank],
        endpoint=endpoint(addresses[0], place.port),
        wait_seconds=STARTED_WAIT_SECONDS,
    )
    # Ranks tell their neighbours by the host's name: two containers must differ in it.
    name = address_of(url) or f"{caller.host}-{place.rank}"
    from launcher.launch.container_user import OWN_CACHE

    # The run directory is what all of them share.
    cache = Cache(f"{run_directory}/{OWN_CACHE}", "HF_HOME")
    return dataclasses.replace(
        caller, host=name.replace(":", "-"), caches=(cache,), devices=(), place=there
    )


def _refuse_uneven(docker: DockerSpec, nodes: int) -> None:
    hosts = [url.rstrip("/") for url in docker.hosts]
    twice = next((url for url in hosts if hosts.count(url) > 1), None)
    if twice is not None:
        raise SpecError(
            "docker_hosts",
            f"{twice} is named twice",
            why="each node needs a machine of its own",
            fix="name another host, or use --nodes 1 with all its GPUs",
        )
    if hosts and len(hosts) != nodes:
        raise SpecError(
            "docker_hosts",
            f"{nodes} node{'s' if nodes > 1 else ''} and {len(hosts)} Docker host"
            f"{'s' if len(hosts) > 1 else ''}",
            why="each node is one host",
            fix=f"use --docker-host {nodes} times, or --nodes {len(hosts)}",
        )
    if docker.addresses and len(docker.addresses) != nodes:
        raise SpecError(
            "docker_hosts",
            f"docker.addresses has {len(docker.addresses)} of {nodes} addresses",
            fix="give one a node, in the order of docker.hosts",
        )


def refuse_without_hosts(nodes: Nodes) -> None:
    """Refuse to start what no daemon was named for.

    Raises:
        SpecError: with the two ways there are.
    """
    if nodes.callers[0].place.daemon is None:
        number = len(nodes.callers)
        raise SpecError(
            "docker_hosts",
            f"{number} nodes need {number} Docker hosts, and none was named",
            fix="use --docker-host ssh://USER@HOST once a node; without ssh, --dry-run --json has "
            "a docker-node-K.sh and a cloud-init file for each of them",
        )
