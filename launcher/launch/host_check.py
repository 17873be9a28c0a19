"""What a host's container sees before a run: `python -m launcher.launch.host_check ...`.

It runs with the mounts and the network of the real one, and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path

from launcher.launch.node import own_address

INFINIBAND = Path("/sys/class/infiniband")


def main(arguments: list[str]) -> int:
    """Look, and print what was found."""
    parser = argparse.ArgumentParser(prog="launcher.launch.host_check", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--first", default="")
    parser.add_argument("--port", type=int)
    said = parser.parse_args(arguments)
    found = {
        "token": _read(said.folder / said.token),
        "writable": os.access(said.folder, os.W_OK),
        "port": None if said.port is None else port_taken(said.port),
        "resolves": not said.first or _resolves(said.first),
        "address": own_address(""),
        "infiniband": INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
    }
    sys.stdout.write(f"{json.dumps(found)}\n")
    return 0


def port_taken(port: int) -> str | None:
    """Why a port cannot be listened on; None where it can."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As torch's store: a connection that is long closed does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
