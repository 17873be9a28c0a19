"""Pair commands: A B A B ..., medians and the median of the ratios pair by pair."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.launch.processes import MARK, end_all


@dataclass(frozen=True)
class Pair:
    """Seconds of two commands, run in turn."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of first / second, pair by pair."""
        return statistics.median(a / b for a, b in zip(self.first, self.second, strict=True))

    def line(self, first: str, second: str) -> str:
        """One line of a report."""
        a, b = statistics.median(self.first), statistics.median(self.second)
        return (
            f"{first}: median {a:.3f} s (min {min(self.first):.3f}, max {max(self.first):.3f}); "
            f"{second}: median {b:.3f} s (min {min(self.second):.3f}, max {max(self.second):.3f}); "
            f"ratio {self.ratio:.3f} over {len(self.first)} pairs"
        )


def measure(
    first: Callable[[], float], second: Callable[[], float], runs: int, warmup: int = 1
) -> Pair:
    """Run two measurements in turn after a warm-up of each."""
    for _ in range(warmup):
        first()
        second()
    pairs = [(first(), second()) for _ in range(runs)]
    return Pair(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def whole(argv: Sequence[str], cwd: Path | None = None) -> float:
    """Seconds of a whole process that must succeed."""
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cwd)
    return time.perf_counter() - started


def until(
    argv: Sequence[str],
    log: Path,
    seen: Callable[[], bool],
    env: dict[str, str],
    limit: float = 120,
) -> float:
    """Seconds from a process's start until `seen`; the process and its children are ended then."""
    with log.open("wb") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(
            argv,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env, MARK: str(log)},
            start_new_session=True,
        )
        try:
            while not seen():
                if process.poll() is not None and not seen():
                    raise RuntimeError(f"{argv[0]} ended early: {log.read_text()[-800:]}")
                if time.perf_counter() - started > limit:
                    raise TimeoutError(f"{argv[0]} took more than {limit} s")
                time.sleep(0.005)
            return time.perf_counter() - started
        finally:
            end_all(str(log), 0)
            process.wait()
