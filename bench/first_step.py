"""Time to the first logged step of the same small LoRA run on CPU, paired, median of 5.

One rank against `trl sft` (aim: 0.65), two ranks against a hand-written script under torchrun
(bar: 1.0, aim: 0.85). `trl sft --num_processes 2 --cpu` silently runs one rank, so it is not
asked for two; the script's log says its world size, which is checked.
`python -m bench.first_step`
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

from bench.pairs import Pair, measure, until
from launcher.assets import asset

RUNS = 5
MODEL = asset("recipes", "tiny", "model")
ROWS = asset("recipes", "tiny", "data", "train.jsonl")
SCRIPT = Path(__file__).with_name("hand_written.py")
TOOLS = Path(sys.executable).parent
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
COUNTER = itertools.count()


def ours(folder: Path, ranks: int) -> float:
    """Seconds until metrics.jsonl has a line."""
    run = folder / f"ours-{next(COUNTER)}"
    settings = {
        "batch.global_batch_size": 8 * ranks,
        "batch.micro_batch_size": 8,
        "training.max_steps": 20,
        "training.max_length": 128,
        "lora.rank": 16,
    }
    argv = [str(TOOLS / "sftlaunch"), "run", str(spec(folder)), "--device", "cpu"]
    argv += ["--gpus", str(ranks), "--output", str(run)]
    argv += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    metrics = run / "metrics.jsonl"
    return until(
        argv, folder / "ours.log", lambda: metrics.is_file() and "\n" in metrics.read_text(), {}
    )


def spec(folder: Path) -> Path:
    """The run as a spec."""
    path = folder / "sft.yaml"
    path.write_text(f"model: {MODEL}\ndataset: {ROWS}\nmethod: lora\n")
    return path


def trl(folder: Path) -> float:
    """Seconds until `trl sft` logs a loss, with the same settings."""
    log = folder / "trl.log"
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_bytes(ROWS.read_bytes())
    argv = [str(TOOLS / "trl"), "sft", "--model_name_or_path", str(MODEL)]
    argv += ["--dataset_name", str(data), "--output_dir", str(folder / f"trl-{next(COUNTER)}")]
    argv += ["--use_peft", "--lora_r", "16", "--lora_target_modules", "all-linear"]
    argv += ["--assistant_only_loss", "--max_length", "128", "--max_steps", "20"]
    argv += ["--per_device_train_batch_size", "8", "--logging_steps", "1", "--use_cpu"]
    argv += ["--bf16", "False", "--gradient_checkpointing", "False", "--report_to", "none"]
    argv += ["--learning_rate", "2e-4", "--eval_strategy", "no", "--dtype", "float32"]
    return until(argv, log, lambda: "'loss':" in log.read_text(errors="replace"), ENVIRONMENT)


def hand_written(folder: Path) -> float:
    """Seconds until the script logs a loss on two ranks."""
    log = folder / "script.log"
    argv = [str(TOOLS / "torchrun"), "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    argv += [str(MODEL), str(ROWS), str(folder / f"script-{next(COUNTER)}")]
    seconds = until(argv, log, lambda: "'loss':" in log.read_text(errors="replace"), ENVIRONMENT)
    if "world size 2" not in log.read_text(errors="replace"):
        raise RuntimeError("the script did not run two ranks")
    return seconds


def main() -> int:
    """Measure and print both ratios."""
    with tempfile.TemporaryDirectory(prefix="sftlaunch-first-step-") as name:
        folder = Path(name)
        one: Pair = measure(lambda: ours(folder, 1), lambda: trl(folder), RUNS)
        sys.stdout.write(one.line("sftlaunch, 1 rank", "trl sft") + "\n")
        two: Pair = measure(lambda: ours(folder, 2), lambda: hand_written(folder), RUNS)
        sys.stdout.write(two.line("sftlaunch, 2 ranks (ddp)", "script under torchrun") + "\n")
    return int(one.ratio > 0.65 or two.ratio > 1.0)


if __name__ == "__main__":
    sys.exit(main())
