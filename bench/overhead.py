"""What the safety costs: the ranks' agreement, the stuck-rank timer, the checksums.

One run on two CPU ranks, all steps of one size, in blocks: of each two neighbours one, drawn with
a seed, goes without agreement and timer, so that both see the same machine in the same seconds.
(Single steps cannot be compared: the wait for the slower rank moves from a step without into the
next one with.) `python -m bench.overhead` gives, over several runs,

- the median ratio of such pairs, and its quartiles;
- the time inside agreement and timer as a share of a step: an upper bound, for it holds the wait
  for the slower rank, which would come a little later anyway;
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

# A step of most of a second, as the smallest real fine-tunes have.
GLOBAL_BATCH, MICRO_BATCH = 512, 64
BLOCK_STEPS = 3
PAIRS = 8
# Imports, caches and the first steps' allocations are no part of a step.
WARM_UP_STEPS = 4
STEPS = WARM_UP_STEPS + 2 * PAIRS * BLOCK_STEPS
RESULT = "overhead.json"
MAX_LENGTH = 16
SETTINGS: tuple[tuple[str, Any], ...] = (
    ("training.max_steps", STEPS),
    ("dataset.eval_path", None),
    ("batch.global_batch_size", GLOBAL_BATCH),
    # Shorter than every row: all batches have one shape.
    ("training.max_length", MAX_LENGTH),
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
    times: dict[str, list[Any]] = {"steps": [], "guarded": [], "inside": [], "checksums": []}
    state = {"step": 0, "since": 0.0, "inside": 0.0}
    rng = random.Random(run.name)  # the same draws in every rank
    guarded = [True] * WARM_UP_STEPS
    for _ in range(PAIRS):
        first = rng.random() < 1 / 2
        guarded += [first] * BLOCK_STEPS + [not first] * BLOCK_STEPS
    guarded.append(True)  # what comes after the last step

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
            times["steps"].append(now - state["since"])
            times["guarded"].append(guarded[state["step"]])
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


def run_once(folder: Path, strategy: str, number: int) -> dict[str, list[Any]]:
    """Times in seconds of one run's steps, by kind, and of its checksums."""
    cell = Cell(strategy, "lora", 2, MICRO_BATCH, SETTINGS, f"overhead-{number}")
    run, variables = prepare(cell, folder)
    argv = [sys.executable, "-m", "bench.overhead", "--agent", "2", str(run.path)]
    subprocess.run(
        argv, env={**os.environ, **variables}, check=True, capture_output=True, timeout=600
    )
    found: dict[str, list[Any]] = json.loads((run.path / RESULT).read_text())
    return found


def pair_ratios(times: dict[str, list[Any]]) -> list[float]:
    """Time of each block with safety over that of its neighbour without."""
    found = []
    for start in range(0, len(times["steps"]), 2 * BLOCK_STEPS):
        blocks = {
            times["guarded"][at]: statistics.median(times["steps"][at : at + BLOCK_STEPS])
            for at in (start, start + BLOCK_STEPS)
        }
        found.append(blocks[True] / blocks[False])
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
            ratios: list[float] = []
            inside, shares, step = [], [], 0.0
            for number in range(options.runs):
                times = run_once(Path(folder), strategy, number)
                ratios += pair_ratios(times)
                step = statistics.median(times["steps"])
                within = [
                    t for t, safe in zip(times["inside"], times["guarded"], strict=True) if safe
                ]
                inside.append(statistics.median(within))
                checksum = statistics.median(times["checksums"])
                shares.append(checksum / (step * STEPS_BETWEEN_CHECKPOINTS))
            low, middle, high = statistics.quantiles(ratios, n=4)
            sys.stdout.write(
                f"{strategy}: step {step * 1000:.0f} ms; with agreement and timer {middle:.4f} of "
                f"without ({len(ratios)} pairs of {BLOCK_STEPS} steps, quartiles {low:.4f} and "
                f"{high:.4f}); inside them {statistics.median(inside) * 1000:.1f} ms, "
                f"{statistics.median(inside) / step:.2%}; checksums "
                f"{statistics.median(shares):.4%} of {STEPS_BETWEEN_CHECKPOINTS} steps\n"
            )
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
