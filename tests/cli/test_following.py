"""`status --watch` and `logs --follow`, and jobs that only the accounting remembers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest

from launcher.runs.directory import RunDirectory, append_line
from tests.support import ROOT, sftlaunch

COMMAND = [sys.executable, "-m", "launcher"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
# Stand-ins for a cluster whose controller has forgotten job 77 and whose accounting has not.
FORGOTTEN = "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
SACCT = """\
#!/bin/sh
case "$*" in
*--jobs=77*) echo "77|OUT_OF_MEMORY|0:125|{run}" ;;
*--name=lost*) echo "70|TIMEOUT|0:0|/nowhere"; echo "77|OUT_OF_MEMORY|0:125|{run}" ;;
esac
"""


def make_run(path: Path, **status: object) -> RunDirectory:
    run = RunDirectory(path)
    run.create({"plan.json": "{}"})
    run.update_status(**status)
    return run


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_watch_piped_prints_what_is_new_and_ends_with_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", state="running", stage="loading the model")
    make_run(tmp_path / "runs" / "b", state="completed", step=7)
    process = start("status", "--watch", cwd=tmp_path)
    assert process.stdout is not None
    first = {process.stdout.readline() for _ in range(2)}
    assert any("loading the model" in line for line in first)
    run.update_status(state="completed", step=9)
    rest, _ = process.communicate(timeout=20)
    (line,) = rest.splitlines()
    assert line.startswith("runs/a  completed  step 9")
    assert "\x1b" not in "".join(first) + rest
    assert process.returncode == 0


def test_watch_on_a_terminal_redraws_and_leaves_cleanly(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", state="running", stage="loading the model")
    child = pexpect.spawn(
        sys.executable,
        ["-m", "launcher", "status", "--watch"],
        cwd=str(tmp_path),
        env={**os.environ, **ENVIRONMENT, "COLUMNS": "60"},
        encoding="utf-8",
        timeout=20,
        dimensions=(24, 60),
    )
    child.expect("loading the model")
    run.update_status(stage="tokenising " + "x" * 200)
    # Up by the one line that was there, and a new one that does not wrap.
    child.expect(r"\x1b\[1A\r\x1b\[J(runs/a  running  tokenising x+)\r\n")
    assert len(child.match[1]) == 59
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert run.read_status()["state"] == "running"


def test_logs_follow_waits_and_goes_into_the_next_attempt(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", state="queued")
    process = start("logs", "a", "--follow", "--rank=1", cwd=tmp_path)
    assert process.stdout is not None
    time.sleep(0.5)
    for number in (1, 2):
        run.logs(number).mkdir(parents=True)
        run.rank_log(number, 1).write_text(f"words of {number}\n", encoding="utf-8")
        run.update_status(state="running", attempt=number)
        assert process.stdout.readline() == f"words of {number}\n"
    run.update_status(state="completed")
    out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == ("", 0)
    assert "attempt 2" in err


def test_logs_follow_leaves_cleanly_and_says_what_there_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", state="running", attempt=1)
    run.logs(1).mkdir(parents=True)
    run.rank_log(1, 0).write_text("hello\n", encoding="utf-8")
    (run.path / "logs" / "prepare.log").touch()
    process = start("logs", "-f", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "hello\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0
    run.update_status(state="failed")
    gone = start("logs", "-f", "--rank=5", cwd=tmp_path)
    _, err = gone.communicate(timeout=20)
    assert gone.returncode == 2
    assert "logs/attempt-1/rank-0.log, logs/prepare.log" in err


@pytest.fixture
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    programs = tmp_path / "programs"
    programs.mkdir()
    run = make_run(tmp_path / "far|away" / "lost", state="running", slurm={"job": 77, "jobs": [77]})
    texts = {"squeue": FORGOTTEN, "scontrol": FORGOTTEN, "sacct": SACCT.format(run=run.path)}
    for name, text in texts.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run


@pytest.mark.parametrize("name", ["77", "lost"])
def test_a_forgotten_job_is_found_by_the_accounting(name: str, forgotten: RunDirectory) -> None:
    found = sftlaunch("status", name)
    assert found.code == 0, found.err
    assert f"{forgotten.path}  running" in found.out
    assert "OUT_OF_MEMORY" in found.out
    assert "slurm.directives.mem" in found.out
    record = sftlaunch("status", name, "--json").json
    assert (record["job"]["number"], record["job"]["over"]) == (77, True)
    # Reading writes nothing: another cluster may know the job.
    assert forgotten.read_status()["state"] == "running"
    # What is over is not watched for ever.
    assert sftlaunch("status", name, "--watch").code == 0


def test_without_accounting_it_is_said_that_nobody_knows(
    forgotten: RunDirectory, tmp_path: Path
) -> None:
    (tmp_path / "programs" / "sacct").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert sftlaunch("status", "77").code == 2
    told = sftlaunch("status", str(forgotten.path))
    assert "not in this cluster's queue any more" in told.out


def test_a_torn_last_line_is_shown_when_it_is_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", state="running", stage="training", max_steps=4, step=1)
    append_line(run.metrics, {"step": 1, "loss": 2.5, "learning_rate": 0.1, "time": 1.0})
    with run.metrics.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 2, "lo')
    assert "step 1/4  loss 2.5" in sftlaunch("status", str(run.path)).out
    assert json.loads(sftlaunch("status", str(run.path), "--json").out)["step"] == 1
