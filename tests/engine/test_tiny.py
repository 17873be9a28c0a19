"""The recipe tiny through the command line: the whole product, once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROGRAM = str(Path(sys.executable).with_name("sftlaunch"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    started = time.monotonic()
    argv = [PROGRAM, "--gpus", "2", "--strategy", "fsdp", "--device", "cpu"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    return folder, done, time.monotonic() - started


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_it_learns_the_task(demo) -> None:
    folder, done, seconds = demo
    assert done.returncode == 0, done.stderr
    exact = [m for m in metrics(folder) if "exact_match" in m]
    assert exact[0]["step"] == 0
    assert exact[0]["exact_match"] <= 0.10
    assert exact[-1]["exact_match"] >= 0.80
    assert exact[-1]["held_out_rows"] == 200
    assert exact[-1]["stopped"] == 1.0
    assert seconds <= 180


def test_it_says_what_it_does(demo) -> None:
    _, done, _ = demo
    assert done.stdout.splitlines()[0].startswith("No spec was given")
    assert "32 sequences = 16 micro batch x 1 accumulation x 2 data parallel" in done.stdout
    assert "step " in done.stderr
    assert "\r" not in done.stderr, "a live line belongs on a terminal only"
    assert "after" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_it_leaves_a_whole_run(demo) -> None:
    folder, _, _ = demo
    run = folder / "runs/tiny"
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["engine"], status["attempt"]) == ("completed", "FSDP2", 1)
    assert (run / "final/adapter_model.safetensors").stat().st_size > 500_000
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 150}


def test_generate_answers(demo) -> None:
    folder, _, _ = demo
    argv = [PROGRAM, "generate", "runs/tiny", "--prompt", "What is the capital of France?"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Paris"


def test_status_and_logs(demo) -> None:
    folder, _, _ = demo
    argv = [PROGRAM, "status", "tiny", "--json"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["state"] == "completed"
    argv = [PROGRAM, "logs", "tiny", "--rank", "1"]
    assert subprocess.run(argv, cwd=folder, capture_output=True, check=True).stdout


def test_the_next_run_gets_its_own_folder(demo) -> None:
    folder, _, _ = demo
    argv = [PROGRAM, "plan", "--gpus", "2", "--device", "cpu"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    assert "runs/tiny-2" in done.stdout
