"""Click only: options in, calls, printing. Nothing here decides."""

from __future__ import annotations

from launcher.cli.app import main

__all__ = ["main"]
