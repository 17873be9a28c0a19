"""What a container runs: `python -m launcher.launch.inside RUN`.

The run was planned and written outside; here its ranks are started, watched and stopped as
on any machine. A container that Docker starts again goes on from the last whole checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from launcher.errors import ExitCode
from launcher.launch.local import launch
from launcher.plan.types import plan_from_json
from launcher.render.text import progress_text
from launcher.render.torchrun import launch_environment, torchrun_argv
from launcher.runs.directory import RunDirectory

SAY_SECONDS = 10.0


def main(arguments: list[str]) -> int:
    """Run the ranks to their end; exit codes are those of `sftlaunch run`."""
    run = RunDirectory(Path(arguments[0]))
    if run.read_status().get("state") == "completed":
        return ExitCode.DONE  # started again after the last word was written
    plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    # The plan's own command starts this container.
    argv = torchrun_argv(plan.topology, plan.worker.limits, str(run.path), run.path.name)
    plan = dataclasses.replace(plan, command=argv)
    processors = len(os.sched_getaffinity(0))
    environment = launch_environment(plan.topology, processors, plan.worker.limits["max_restarts"])
    speaker = Speaker(run)
    code, failure = launch(plan, run, environment, speaker.poll)
    speaker.close()
    if failure is not None:
        sys.stderr.write(f"error: {failure.error}\n")
    return code


class Speaker:
    """Plain progress lines, for the container's log."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.said, self.next = "", 0.0

    def poll(self) -> None:
        """Say what is new, now and then."""
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + SAY_SECONDS
        self._say(progress_text(self.run.read_status(), self.run.read_metrics()))

    def close(self) -> None:
        """Say how the run ended, however short it was."""
        status = self.run.read_status()
        total = f"/{status['max_steps']}" if status.get("max_steps") else ""
        self._say(f"{status.get('state')} at step {status.get('step') or 0}{total}")

    def _say(self, text: str) -> None:
        if text != self.said:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
            self.said = text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
