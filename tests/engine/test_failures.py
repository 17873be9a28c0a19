"""When a rank fails, is killed, or the user stops the run: what is said and what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.cells import Cell, prepare
from launcher.launch.processes import members

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

PROGRAM = str(Path(sys.executable).with_name("sftlaunch"))
TWO_RANKS = ["--gpus", "2", "--strategy", "ddp", "--device", "cpu", "--output", "run"]
QUIET = ["--set", "evaluation.exact_match=false", "--set", "samples.prompts=[]"]


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [PROGRAM, *TWO_RANKS, *QUIET, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: Path, process: subprocess.Popen) -> None:
    metrics = folder / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status(folder: Path) -> dict:
    return json.loads((folder / "run/status.json").read_text())


def test_the_first_failing_ranks_own_error_is_shown(tmp_path) -> None:
    process = start(tmp_path, "--set", "training.adam_beta1=5.0")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "failed first: ValueError: Invalid beta parameter at index 0: 5.0" in err
    assert "ChildFailedError" not in out + err
    assert "Traceback" not in out + err
    log = err.rsplit("full log: ", 1)[1].splitlines()[0]
    assert "Traceback" in (tmp_path / log).read_text()
    assert status(tmp_path)["state"] == "failed"
    assert members(str(tmp_path / "run")) == []


def test_a_killed_rank_ends_the_run(tmp_path) -> None:
    process = start(tmp_path)
    wait_for_step(tmp_path, process)
    os.kill(max(members(str(tmp_path / "run"))), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    # By the number where the agent has seen it before the peer's error.
    assert "failed first: it was ended" in err
    assert "memory ran out" in err
    assert status(tmp_path)["state"] == "failed"
    assert members(str(tmp_path / "run")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_leaves_no_process(tmp_path, number) -> None:
    process = start(tmp_path)
    wait_for_step(tmp_path, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    step = status(tmp_path)["step"]
    assert f"checkpoint-{step} is whole; go on with: sftlaunch resume run" in err
    assert "Traceback" not in err
    assert status(tmp_path)["state"] == "preempted"
    assert members(str(tmp_path / "run")) == []


def test_stop_after_a_time_then_resume(tmp_path) -> None:
    process = start(tmp_path, "--stop-after", "3s", "--set", "training.max_steps=30")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped by --stop-after 3 s" in err
    assert status(tmp_path)["state"] == "preempted"
    done = subprocess.run(
        [PROGRAM, "resume", "run", "--set", "limits.stop_after=null"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert status(tmp_path)["state"] == "completed"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 31))


def test_a_stop_before_the_training_leaves_nothing_running(tmp_path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/logs/attempt-1/launcher.log").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "there is no checkpoint yet; go on with: sftlaunch resume run" in err
    assert members(str(tmp_path / "run")) == []


def test_another_number_of_ranks_than_planned_is_refused(tmp_path) -> None:
    run, variables = prepare(Cell("ddp", "lora", 2, 4), tmp_path)
    argv = [sys.executable, "-m", "launcher.train", str(run.path)]
    environment = {**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(argv, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    error = json.loads(run.rank_error(1, 0).read_text())
    assert "1 ranks were started, 2 were planned" in error["message"]


def test_torchrun_by_hand_runs_the_same_directory(tmp_path) -> None:
    run, variables = prepare(Cell("ddp", "lora", 2, 4), tmp_path)
    environment = {**os.environ, **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    script = str(run.path / "command.sh")
    done = subprocess.run(
        ["bash", script], env=environment, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert run.read_status()["state"] == "completed"
    assert len([m for m in run.read_metrics() if "loss" in m]) == 3


def test_a_batch_that_is_not_the_planned_one_stops_the_run(tmp_path) -> None:
    run, variables = prepare(Cell("ddp", "lora", 2, 4), tmp_path)
    plan = json.loads(run.plan.read_text())
    plan["worker"]["training_arguments"]["gradient_accumulation_steps"] = 1
    run.plan.write_text(json.dumps(plan))
    argv = [sys.executable, "-m", "launcher.train.agent", "2", str(run.path)]
    environment = {**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(argv, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    error = json.loads(run.rank_error(1, 0).read_text())
    assert "the first step saw 8 sequences, the plan says 16" in error["message"]
    assert not run.final.exists()
