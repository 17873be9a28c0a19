"""Many short DDP and FSDP runs in a row: every one must end with exit 0.

About one gloo DDP run in six used to abort after its work was done (SIGABRT at C++ static
destruction). `python -m bench.exits --runs 100`: half of them under torchrun, half forked.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.cells import Cell, prepare

WAYS = ("torchrun", "fork")
STRATEGIES = ("ddp", "fsdp")


def run_once(folder: Path, strategy: str, way: str, number: int) -> int:
    """Exit code of one two-step run."""
    settings = (("training.max_steps", 2), ("dataset.eval_path", None))
    cell = Cell(strategy, "lora", 2, 4, settings, f"{way}-{number}")
    run, variables = prepare(cell, folder)
    tools = Path(sys.executable).parent
    argv = [sys.executable, "-m", "launcher.train.agent", "2", str(run.path)]
    if way == "torchrun":
        argv = [str(tools / "torchrun"), "--standalone", "--nproc-per-node=2"]
        argv += ["-m", "launcher.train", str(run.path)]
    done = subprocess.run(
        argv, env={**os.environ, **variables}, capture_output=True, check=False, timeout=300
    )
    complete = run.read_status().get("state") == "completed"
    return done.returncode if done.returncode or complete else -1


def main() -> int:
    """Run and count exit codes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    codes: collections.Counter[tuple[str, str, int]] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="sftlaunch-exits-") as folder:
        for number in range(options.runs):
            strategy, way = STRATEGIES[number % 2], WAYS[number // 2 % 2]
            code = run_once(Path(folder), strategy, way, number)
            codes[strategy, way, code] += 1
            sys.stdout.write(f"{number + 1} {strategy} by {way}: exit {code}\n")
            sys.stdout.flush()
    for (strategy, way, code), count in sorted(codes.items()):
        sys.stdout.write(f"{strategy} by {way}: exit {code} x {count}\n")
    return int(any(code for _, _, code in codes))


if __name__ == "__main__":
    sys.exit(main())
