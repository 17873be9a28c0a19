"""What `--detach` leaves behind: `python -m launcher.launch.attendant RUN`.

It waits for the end of a run's container, keeps its log and removes it. Where it is ended
itself, nothing happens to the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.launch import docker, docker_hosts
from launcher.runs.directory import RunDirectory

if __name__ == "__main__":
    run = RunDirectory(Path(sys.argv[1]))
    if docker_hosts.daemons_of(run) == [None]:
        docker.see_out(run)
    else:
        docker_hosts.see_out(run)
