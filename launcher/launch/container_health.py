"""The image's health check: 0 where the run's record says that it goes well, else 1."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from launcher.runs.directory import RunDirectory

# The launcher refreshes its sign every few seconds; ranks that are stuck end by themselves.
SILENT_SECONDS = 120.0


def main() -> int:
    """Look at the run named by the environment; without one there is nothing to be ill."""
    folder = os.environ.get("SFTLAUNCH_RUN_DIRECTORY")
    if folder is None:
        return 0
    run = RunDirectory(Path(folder))
    try:
        state = run.read_status().get("state")
        silent = time.time() - run.presence.stat().st_mtime
    except (OSError, json.JSONDecodeError):
        return 1
    return int(state == "failed" or silent > SILENT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
