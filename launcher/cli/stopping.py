"""How long a run may take that was asked to stop."""

from __future__ import annotations

import json

from launcher.runs.directory import RunDirectory

POLL_SECONDS = 0.2
# Beyond the ranks' own patience: the launcher writes down how it ended.
MARGIN_SECONDS = 30


def patience(run: RunDirectory) -> float:
    """Seconds within which a run that is asked to stop has saved and ended."""
    limits = json.loads(run.plan.read_text(encoding="utf-8"))["worker"]["limits"]
    return float(limits["shutdown_timeout_seconds"]) + MARGIN_SECONDS
