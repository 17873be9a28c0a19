"""Where a container stands: the daemon that starts it, and its part among several nodes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from urllib.parse import urlsplit

NODE_MODULE = "launcher.launch.node"
# Below the range that kernels take ports from for outgoing connections.
FIRST_PORT, PORTS = 12_000, 20_000
# Nodes that a person or a cloud starts come up minutes apart; those that this launcher
# starts itself, seconds.
WAIT_SECONDS = 1800
STARTED_WAIT_SECONDS = 180


@dataclass(frozen=True)
class Place:
    """One container's place; the default is the only one, on this machine."""

    daemon: str | None = None
    """URL of the Docker daemon that starts it; None for the client's own choice."""
    rank: int = 0
    """Number of its node."""
    nodes: int = 1
    address: str = ""
    """By which the other nodes reach this one."""
    endpoint: str = ""
    """Address and port of the first node's rendezvous."""
    network: str = "host"
    """Docker network of a run on several nodes: ranks take ports as they need them."""
    wait_seconds: int = WAIT_SECONDS
    """How long it waits for the first node."""

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The first node's address without brackets, and its port."""
        host, _, port = self.endpoint.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def port(self) -> int:
        """Port of the rendezvous."""
        return self.host_and_port[1]

    def options(self) -> tuple[str, ...]:
        """Options of `docker run`."""
        return (f"--network={self.network}",) if self.nodes > 1 else ()

    def arguments(self) -> tuple[str, ...]:
        """Module and options of the program inside; nothing for a node that is the only one."""
        if self.nodes == 1:
            return ()
        return (
            NODE_MODULE,
            f"--rank={self.rank}",
            f"--address={self.address}",
            f"--endpoint={self.endpoint}",
            f"--wait={self.wait_seconds}",
        )


# On this machine, and the only one.
HERE = Place()


def client(daemon: str | None) -> tuple[str, ...]:
    """Docker's client, and which daemon it asks."""
    return ("docker",) if daemon is None else ("docker", f"--host={daemon}")


def address_of(daemon: str) -> str | None:
    """Name or address in a daemon's URL; None where it is on this machine (unix://)."""
    return urlsplit(daemon).hostname


def port_of(run_directory: str) -> int:
    """The rendezvous' port, one for one run directory: two runs on the same nodes differ."""
    return FIRST_PORT + zlib.crc32(run_directory.encode()) % PORTS


def endpoint(address: str, port: int) -> str:
    """Both in one, an address of version 6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
