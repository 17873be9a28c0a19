"""What a container costs: size of the CPU image, time to Python's first line, to the first step.

Bars: 1.7 GB, 1.0 s, and 1.15 of the same run outside (two ranks, paired, median of 5). It needs
a Docker daemon with the image of `sftlaunch image build --cpu`.
`python -m bench.container [IMAGE]`
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.first_step import TOOLS, spec
from bench.pairs import measure, until
from launcher.launch.processes import end_all
from launcher.render.docker import container_name, default_image

RUNS = 5
MAX_BYTES, MAX_START_SECONDS, MAX_RATIO = 1.7e9, 1.0, 1.15
# What every run's container has, as far as it can matter to its start.
OPTIONS = ("--rm", "--init", "--read-only", "--tmpfs=/tmp:exec,mode=1777", "--cap-drop=ALL")
COUNTER = itertools.count()


def image_bytes(image: str) -> int:
    """Size of an image's layers together."""
    argv = ["docker", "image", "inspect", "--format={{.Size}}", image]
    return int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def first_line(image: str) -> float:
    """Seconds from the client's start to the first line that Python runs inside."""
    argv = ["docker", "run", *OPTIONS, "--user=4321:4321", "--entrypoint=python", image]
    argv += ["-c", "import time; print(time.time())"]
    started = time.time()
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return float(done.stdout) - started


def first_step(folder: Path, *target: str) -> float:
    """Seconds until metrics.jsonl has a line; nothing of the run stays."""
    run = folder / f"run-{next(COUNTER)}"
    settings = {
        "batch.global_batch_size": 16,
        "batch.micro_batch_size": 8,
        "training.max_steps": 200,
        "training.max_length": 128,
    }
    argv = [str(TOOLS / "sftlaunch"), "run", str(spec(folder)), "--device=cpu", "--gpus=2"]
    argv += [f"--output={run}", *target]
    argv += [f"--set={key}={value}" for key, value in settings.items()]
    metrics = run / "metrics.jsonl"
    try:
        return until(
            argv,
            folder / "log",
            lambda: metrics.is_file() and "\n" in metrics.read_text(),
            {"HF_HUB_OFFLINE": "1"},
        )
    finally:
        name = container_name(str(run))
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)
        end_all(str(run), 0)


def main() -> int:
    """Measure and print all three."""
    image = sys.argv[1] if len(sys.argv) > 1 else default_image("cpu")
    size = image_bytes(image)
    sys.stdout.write(f"{image}: {size / 1e9:.2f} GB\n")
    first_line(image)
    seconds = [first_line(image) for _ in range(RUNS)]
    start = statistics.median(seconds)
    sys.stdout.write(
        f"container start to Python's first line: median {start:.2f} s "
        f"(min {min(seconds):.2f}, max {max(seconds):.2f}) of {RUNS}\n"
    )
    with tempfile.TemporaryDirectory(prefix="sftlaunch-container-") as name:
        folder = Path(name)
        inside = ("--on=docker", f"--set=docker.image={image}")
        pair = measure(lambda: first_step(folder, *inside), lambda: first_step(folder), RUNS)
    sys.stdout.write(pair.line("first step inside", "outside") + "\n")
    return int(size > MAX_BYTES or start > MAX_START_SECONDS or pair.ratio > MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
