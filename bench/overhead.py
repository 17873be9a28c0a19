"""What the safety costs: the ranks' agreement, the stuck-rank timer, the checksums.

One run on two CPU ranks; about every second step, drawn with a seed, goes without agreement and
timer, so that both kinds of step see the same machine in the same minutes. `python -m
bench.overhead` gives, over several runs,

- the time that a step spends in agreement and timer, as a share of the median step: this is an
  upper bound, for it holds the wait for the slower rank, which would come a little later anyway;
- the ratio of the medians of both kinds of step, which is what is asked for, but noisy: the
  steps themselves differ by more;
- the time of the checksums as a share of the training between two checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.cells import Cell, prepare

STEPS = 120
# Imports, caches and the first steps' allocations are no part of a step.
WARM_UP_STEPS = 10
RESULT = "overhead.json"
SETTINGS: tuple[tuple[str, Any], ...] = (
    ("training.max_steps", STEPS),
    ("dataset.eval_path", None),
    ("batch.global_batch_size", 32),
    ("checkpoints.every_steps", STEPS // 2),
)
# The share of a checkpoint is reported for this many steps between two, the default.
STEPS_BETWEEN_CHECKPOINTS = 200


def patch(run: Path) -> None:  # noqa: C901 - one closure over one clock
    """Time every step of rank 0, and leave the safety out of every second one."""
    from launcher.train import callbacks, checkpoint
    from launcher.train.process import rank_of

    agree, beat = callbacks.AgreementCallback.on_pre_optimizer_step, callbacks.Heartbeat.beat
    begin, end = callbacks.RecordCallback.on_train_begin, callbacks.RecordCallback.on_step_end
    times: dict[str, list[float]] = {"with": [], "without": [], "inside": [], "checksums": []}
    state = {"step": 0, "since": 0.0, "inside": 0.0}
    rng = random.Random(run.name)  # the same draws in every rank
    guarded = [True, *(rng.random() < 0.5 for _ in range(STEPS))]

    def timed(function: Any, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        function(*args, **kwargs)
        state["inside"] += time.perf_counter() - started

    def on_pre_optimizer_step(self: Any, *args: Any, **kwargs: Any) -> None:
        if guarded[state["step"]]:
            timed(agree, self, *args, **kwargs)
        else:
            self.trainer._micro_losses = []  # noqa: SLF001

    def beat_now_and_then(self: Any, *args: Any) -> None:
        if guarded[state["step"]]:
            timed(beat, self, *args)

    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        state["since"] = time.perf_counter()

    def on_step_end(self: Any, *args: Any, **kwargs: Any) -> None:
        end(self, *args, **kwargs)
        now = time.perf_counter()
        if state["step"] >= WARM_UP_STEPS:
            kind = "with" if guarded[state["step"]] else "without"
            times[kind].append(now - state["since"])
            if kind == "with":
                times["inside"].append(state["inside"])
        state["since"], state["step"], state["inside"] = now, state["step"] + 1, 0.0
        if state["step"] == STEPS and rank_of() == 0:
            (run / RESULT).write_text(json.dumps(times))

    whole = checkpoint.digests

    def digests(*args: Any) -> Any:
        started = time.perf_counter()
        found = whole(*args)
        times["checksums"].append(time.perf_counter() - started)
        return found

    callbacks.AgreementCallback.on_pre_optimizer_step = on_pre_optimizer_step
    callbacks.Heartbeat.beat = beat_now_and_then
    callbacks.RecordCallback.on_train_begin = on_train_begin
    callbacks.RecordCallback.on_step_end = on_step_end
    checkpoint.digests = digests


def run_once(folder: Path, strategy: str, number: int) -> dict[str, list[float]]:
    """Times in seconds of one run's steps, by kind, and of its checksums."""
    cell = Cell(strategy, "lora", 2, 8, SETTINGS, f"overhead-{number}")
    run, variables = prepare(cell, folder)
    argv = [sys.executable, "-m", "bench.overhead", "--agent", "2", str(run.path)]
    subprocess.run(
        argv, env={**os.environ, **variables}, check=True, capture_output=True, timeout=600
    )
    found: dict[str, list[float]] = json.loads((run.path / RESULT).read_text())
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--agent", nargs=2, metavar=("RANKS", "RUN"), help="a run's own agent")
    options = parser.parse_args()
    if options.agent:
        from launcher.train import agent

        patch(Path(options.agent[1]))
        return agent.main(options.agent)
    with tempfile.TemporaryDirectory(prefix="sftlaunch-overhead-") as folder:
        for strategy in ("ddp", "fsdp"):
            ratios, inside, shares, step = [], [], [], 0.0
            for number in range(options.runs):
                times = run_once(Path(folder), strategy, number)
                step = statistics.median(times["without"])
                ratios.append(statistics.median(times["with"]) / step)
                inside.append(statistics.median(times["inside"]) / step)
                checksum = statistics.median(times["checksums"])
                shares.append(checksum / (step * STEPS_BETWEEN_CHECKPOINTS))
            sys.stdout.write(
                f"{strategy}: step {step * 1000:.0f} ms; in agreement and timer "
                f"{statistics.median(inside):.2%} ({', '.join(f'{i:.2%}' for i in inside)}); "
                f"with them {statistics.median(ratios):.4f} of without "
                f"({', '.join(f'{r:.4f}' for r in ratios)}); "
                f"checksums {statistics.median(shares):.4%} of {STEPS_BETWEEN_CHECKPOINTS} steps\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
