"""`data check` on 100,000 conversations: seconds, and memory of all its processes.

Bars: 60 s on 2 cores, 2 GiB. `python -m bench.data_check [ROWS]`
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.assets import asset

ROWS = 100_000
LIMIT_SECONDS = 60.0
LIMIT_BYTES = 2 * 2**30
WORDS = (
    *("the", "what", "is", "capital", "of", "and", "plural", "sort", "digits", "please", "tell"),
    *("me", "which", "number", "follows", "kind", "thing", "opposite", "word", "larger", "city"),
    *("country", "answer", "question", "because", "where", "when", "who", "how", "many", "some"),
)


def make_rows(file: Path, rows: int) -> int:
    """Conversations of one to four questions, some with a system prompt; bytes written."""
    draw = random.Random(1)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            turns = [{"role": "system", "content": text(4, 12)}] if number % 4 == 0 else []
            for _ in range(draw.randint(1, 4)):
                turns.append({"role": "user", "content": text(5, 25)})
                turns.append({"role": "assistant", "content": text(5, 60)})
            out.write(json.dumps({"id": number, "messages": turns}) + "\n")
    return file.stat().st_size


def memory_of(mark: str) -> int:
    """Bytes that the processes started by this one hold, shared pages divided among them."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() not in (folder / "environ").read_bytes():
                continue
            for line in (folder / "smaps_rollup").read_text(encoding="utf-8").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except (OSError, ValueError):
            continue
    return total


def measure(folder: Path, rows: int) -> tuple[float, int, dict[str, object]]:
    """Seconds, peak of memory, and the report."""
    data = folder / "rows.jsonl"
    size = make_rows(data, rows)
    print(f"{rows:,} rows, {size / 1e6:.0f} MB")
    tiny = asset("recipes", "tiny", "sft.yaml")
    output = folder / "report.json"
    mark = f"{os.getpid()}-{time.time_ns()}"
    environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "BENCH": mark}
    started, peak = time.monotonic(), 0
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "data", "check", str(tiny), f"--dataset={data}",
             "--device=cpu", "--set=training.max_length=256", "--json"],
            stdout=stream,
            env=environment,
        )  # fmt: skip
        while process.poll() is None:
            peak = max(peak, memory_of(mark))
            time.sleep(0.5)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"data check ended with exit code {process.returncode}")
    return seconds, peak, json.loads(output.read_text(encoding="utf-8"))


def main() -> int:
    """Measure and print."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as name:
        load = os.getloadavg()[0]
        seconds, peak, report = measure(Path(name), rows)
    tokens = report["tokens"]["before_truncation"]  # type: ignore[index]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"processor time: {used.ru_utime + used.ru_stime:.1f} s")
    print(f"load before: {load:.1f} on {len(os.sched_getaffinity(0))} cores")
    print(f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s")
    print(f"peak of all processes: {peak / 2**20:,.0f} MiB")
    return int(seconds > LIMIT_SECONDS or peak > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
