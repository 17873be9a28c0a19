"""What one node finds: `python -m launcher.launch.node_check FOLDER ADDRESS PORT`.

Runs on every node of the check job, under the interpreter that the ranks will have, and
leaves `NODE.json` in the folder. Nothing here is judged; `launcher.cli.doctor` does that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.runs.directory import write_atomic

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
MEET_SECONDS = 10.0
TRY_SECONDS = 0.2


def look(folder: Path, address: str, port: int, number: int, nodes: int) -> dict[str, Any]:
    """All that this node can say.

    Args:
        folder: that the runs are to lie in.
        address: of the first node.
        port: that a rendezvous of this job would use.
        number: of this node, from 0.
        nodes: of the job.
    """
    resolved = _resolve(address)
    met = _host(port, nodes - 1) if number == 0 else _join(address, port)
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "missing": [name for name in PACKAGES if find_spec(name) is None],
        "resolved": resolved,
        "met": met,
        "outgoing_ports": [int(word) for word in PORT_RANGE.read_text().split()],
        "free_bytes": shutil.disk_usage(folder).free,
    }


def _resolve(address: str) -> str | None:
    try:
        return str(socket.getaddrinfo(address, None)[0][4][0])
    except OSError:
        return None


def _host(port: int, others: int) -> str:
    """Listen as a rendezvous does; empty where all others came, else what was wrong."""
    with contextlib.closing(socket.socket()) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            return f"port {port}: {error.strerror}"
        server.listen(others + 1)
        server.settimeout(MEET_SECONDS)
        for _ in range(others):
            try:
                server.accept()[0].close()
            except TimeoutError:
                return f"port {port}: another node did not reach it within {MEET_SECONDS:g} s"
    return ""


def _join(address: str, port: int) -> str:
    deadline = time.monotonic() + MEET_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=TRY_SECONDS * 10).close()
        except OSError as error:
            if time.monotonic() > deadline:
                return f"{address} port {port}: {error.strerror or error}"
            time.sleep(TRY_SECONDS)
        else:
            return ""


def main(arguments: list[str]) -> None:
    """Look, and write it down."""
    folder, address, port = arguments
    number, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    found = look(Path(folder), address, int(port), number, nodes)
    write_atomic(Path(folder) / f"{os.environ['SLURMD_NODENAME']}.json", json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
