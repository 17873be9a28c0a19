"""What `--detach` leaves behind: `python -m launcher.launch.attendant RUN`.

It waits for the end of a run's container, keeps its log and removes it. Where it is ended
itself, nothing happens to the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.launch.docker import see_out
from launcher.runs.directory import RunDirectory

if __name__ == "__main__":
    see_out(RunDirectory(Path(sys.argv[1])))
