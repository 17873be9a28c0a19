"""All ranks must see one run directory: checkpoints are written by all and sealed by one."""

from __future__ import annotations

import socket
import time
import uuid

from launcher.runs.directory import RunDirectory
from launcher.train.control import Ranks

# A name that a node has never looked for is asked of the file server (nfs(5), data and
# metadata coherence): this is for a slow one, not for a cache to expire.
PATIENCE_SECONDS = 5.0
POLL_SECONDS = 0.1


class FolderNotSharedError(RuntimeError):
    """A node does not see the run directory of the first rank."""


def check_shared(run: RunDirectory, ranks: Ranks) -> None:
    """Let every rank look for a file that the first one has just written; collective.

    Raises:
        FolderNotSharedError: on all ranks, with the hosts that do not see it.
    """
    token = ranks.from_first(f".seen-{uuid.uuid4().hex}")
    path = run.path / token
    if ranks.rank == 0:
        path.touch()
    ranks.wait()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    blind = [host for host in ranks.gather(None if path.exists() else socket.gethostname()) if host]
    if ranks.rank == 0:
        path.unlink()
    if blind:
        raise FolderNotSharedError(
            f"{', '.join(dict.fromkeys(blind))} cannot see {run.path} of the first rank's host: "
            "all nodes must share the output folder; use --output on a file system that they share"
        )
