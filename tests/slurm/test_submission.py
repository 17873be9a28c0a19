"""What reaches a real cluster: hostile names, containers, and what is refused before it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, command
from tests.slurm.conftest import Queued, sft
from tests.support import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]
Launch = Callable[..., Queued]
TINY = str(ROOT / "recipes" / "tiny" / "sft.yaml")
HOSTILE = """it's "x" $(touch pwned) `touch pwned` ; touch pwned & !x @RUN@ #"""
BACKSLASH = "\\"
TOKEN = "hf_" + "notToBeWritten" * 2
TOKEN_DIGEST = hashlib.sha256(TOKEN.encode()).hexdigest()
HAS_TOKEN = 'printf %s "$HF_TOKEN" | sha256sum >"$run/token"'
# Stand-ins for what no test machine has: they check their arguments, then run the command.
APPTAINER = """\
#!/usr/bin/env bash
set -euo pipefail
[ "$1" = exec ] && shift
while [[ $1 == --* ]]; do
  case $1 in
  --bind=*:*) printf '%s\\n' "$1" >>"$SEEN" ;;
  --pwd=*) cd "${1#--pwd=}" ;;
  *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
printf 'image %s\\ntoken %s\\n' "$1" "$APPTAINERENV_STAND_IN_TOKEN" >>"$SEEN"
shift
exec "$@"
"""
PYXIS = """\
#!/usr/bin/env bash
set -euo pipefail
kept=()
for word in "$@"; do
  case $word in
  --container-image=* | --container-mounts=*:* | --container-workdir=/* | --container-env=*)
    printf '%s\\n' "$word" >>"$SEEN" ;;
  --container-*) echo "unknown option $word" >&2; exit 2 ;;
  *) kept+=("$word") ;;
  esac
done
exec @SRUN@ "${kept[@]}"
"""


def test_hostile_names_are_only_names(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a token in the environment reaches the job by its name, and no file."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    queued = launch(
        f"--set=slurm.before=[{_yaml(HAS_TOKEN)}]",
        f"--set=slurm.account={_yaml(HOSTILE)}",
        f"--set=slurm.mail.user={_yaml(HOSTILE)}",
        f"--set=slurm.directives.comment={_yaml(f'{HOSTILE} {BACKSLASH} %j')}",
        name=HOSTILE,
        steps=2,
    )
    shown = command("squeue", "--noheader", "--states=all", f"--jobs={queued.job}", "--format=%j")
    assert shown == HOSTILE
    said = command("squeue", "--noheader", "--states=all", f"--jobs={queued.job}", "--format=%k")
    assert said == f"{HOSTILE} \\ %j"
    queued.until_over("completed")
    assert not list(tmp_path.rglob("pwned"))
    assert [path.name for path in tmp_path.iterdir()] == [HOSTILE]
    assert (queued.run.path / "token").read_text("utf-8").split()[0] == TOKEN_DIGEST
    for path in queued.run.path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert (queued.run.path / "logs" / f"slurm-{queued.job}.log").is_file()


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_containers(
    runtime: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, seen = tmp_path / "programs", tmp_path / "seen"
    programs.mkdir()
    name, text = {
        "apptainer": ("apptainer", APPTAINER),
        "pyxis": ("srun", PYXIS.replace("@SRUN@", command("which", "srun"))),
    }[runtime]
    (programs / name).write_text(text, encoding="utf-8")
    (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("STAND_IN_TOKEN", "not-to-be-written")
    container = f"{{runtime: {runtime}, image: an image, environment: [STAND_IN_TOKEN]}}"
    # In one of them rows are made ready in a step of the same container.
    prepare = {"apptainer": "step", "pyxis": "none"}[runtime]
    flags = (f"--set=slurm.container={container}", f"--set=slurm.prepare={prepare}")
    queued = launch(*flags, steps=2)
    queued.until_over("completed")
    assert queued.status["prepared"] is (prepare == "step")
    lines = seen.read_text("utf-8").splitlines()
    mounts = [line for line in lines if line.startswith(("--bind=", "--container-mounts="))]
    assert any(f"{queued.run.path}:{queued.run.path}" in line for line in mounts)
    images = [line for line in lines if line.endswith("an image")]
    # Each node's ranks, and the preparation once.
    assert len(images) == {"apptainer": 3, "pyxis": 1}[runtime]
    if runtime == "apptainer":
        assert "token not-to-be-written" in lines
    else:
        assert "--container-env=STAND_IN_TOKEN" in lines
    for path in queued.run.path.glob("*.*"):
        assert "not-to-be-written" not in path.read_text("utf-8"), path


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--set=slurm.partition=nowhere",), 2, ("'nowhere'", "main, urgent, short")),
        (("--nodes=4", "--gpus=4"), 3, ("4 nodes", "main gives 2")),
        (("--set=slurm.time_limit=2d",), 3, ("2d", "1-00:00:00")),
        (
            ("--nodes=1", "--set=slurm.partition=short", "--set=slurm.time_limit=1h"),
            3,
            ("00:10:00", "short"),
        ),
        (("--set=slurm.partition=short",), 3, ("2 nodes", "short gives 1")),
        (("--set=slurm.reservation=never",), 3, ("would not take", "eservation")),
        (("--set=slurm.cpus_per_node=99",), 3, ("would not take",)),
        (("--set=slurm.constraint=gold",), 3, ("would not take",)),
        (("--device=cuda", "--gpus=32", "--gpu=h100-80gb"), 3, ("16 GPUs per node", "has 8")),
    ],
)
def test_refused_before_it_queues(
    flags: tuple[str, ...], code: int, words: tuple[str, ...], cluster: Cluster, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    base = ("--gpus=2", "--nodes=2", "--device=cpu", "--on=slurm", f"--output={output}")
    done = sft(TINY, *base, *flags)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    assert "Traceback" not in done.stderr
    assert not output.exists()
    assert command("squeue", "--noheader", "--name=run") == ""


def test_an_account_that_does_not_exist(cluster: Cluster, tmp_path: Path) -> None:
    """By a stand-in for accounting, which this cluster does without."""
    (tmp_path / "bin").mkdir()
    sacctmgr = tmp_path / "bin" / "sacctmgr"
    sacctmgr.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        "*--noheader*associations*format=account*) printf 'physics\\nchemistry\\nphysics\\n' ;;\n"
        "*) exit 2 ;;\nesac\n"
    )
    sacctmgr.chmod(0o755)
    output = tmp_path / "run"
    asked = (TINY, "--gpus=1", "--device=cpu", "--on=slurm", "--detach", f"--output={output}")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = sft(*asked, "--set=slurm.account=alchemy", PATH=path)
    assert (done.returncode, output.exists()) == (2, False), done.stderr
    assert "account 'alchemy' does not exist" in done.stderr
    assert "chemistry, physics" in done.stderr
    assert sft(*asked, "--set=slurm.account=physics", PATH=path).returncode == 0
    assert sft("cancel", str(output), "--now").returncode == 0


def test_a_typed_secret_is_in_no_file(cluster: Cluster, tmp_path: Path) -> None:
    """The script's first comment repeats the command line."""
    output = tmp_path / "run"
    asked = (TINY, "--gpus=1", "--device=cpu", "--on=slurm", "--detach", f"--output={output}")
    refused = sft(*asked, f"--set=slurm.before=['export HF_TOKEN={TOKEN}']")
    assert (refused.returncode, output.exists()) == (2, False), refused.stderr
    assert "looks like a secret" in refused.stderr
    assert TOKEN not in refused.stderr
    # Overridden by a later one, so that only the command line holds it.
    done = sft(*asked, f"--set=samples.prompts=['{TOKEN}']", "--set=samples.prompts=[]")
    assert done.returncode == 0, done.stderr
    assert sft("cancel", str(output), "--now").returncode == 0
    for path in output.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert "***" in (output / "job.sbatch").read_text("utf-8").splitlines()[1]


def test_a_controller_that_is_down_is_said_soon(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "down"
    folder.mkdir()
    text = (cluster.folder / "slurm.conf").read_text("utf-8")
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort="))
    (folder / "slurm.conf").write_text(text.replace(port, "SlurmctldPort=1"), encoding="utf-8")
    started = time.monotonic()
    output = tmp_path / "run"
    done = sft(
        TINY,
        "--device=cpu",
        "--on=slurm",
        f"--output={output}",
        SLURM_CONF=str(folder / "slurm.conf"),
    )
    assert (done.returncode, output.exists()) == (4, False), done.stderr
    assert "controller does not answer" in done.stderr
    assert time.monotonic() - started < 15


def test_a_job_that_cannot_be_queued_leaves_nothing(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch that passes the test and then fails, as a full queue does."""
    (tmp_path / "bin").mkdir()
    refusing = tmp_path / "bin" / "sbatch"
    real = command("which", "sbatch")
    refusing.write_text(
        f'#!/bin/sh\ncase $1 in --test-only) exec {real} "$@";; esac\n'
        "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2\nexit 1\n"
    )
    refusing.chmod(0o755)
    output = tmp_path / "run"
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = sft(TINY, "--device=cpu", "--on=slurm", f"--output={output}", PATH=path)
    assert (done.returncode, output.exists()) == (4, False), done.stderr
    assert "QOSMaxSubmitJobPerUserLimit" in done.stderr


def test_a_name_that_does_not_resolve_fails_at_once(launch: Launch, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    getent = programs / "getent"
    getent.write_text("#!/bin/sh\nexit 2\n")
    getent.chmod(0o755)
    queued = launch(f"--set=slurm.before=[{_yaml(f'export PATH={programs}:$PATH')}]")
    queued.until_over("failed")
    assert "does not resolve" in queued.status["error"]["message"]
    assert queued.status["stage"] == queued.status["error"]["message"]


def test_status_says_the_place_in_the_queue(launch: Launch, tmp_path: Path) -> None:
    holder = command("sbatch", "--parsable", "--exclusive", "-N2", "--wrap=sleep 60", "-o/dev/null")
    try:
        queued = launch(name="waits")
        queued.until("its turn", lambda: "1 in the queue" in sft("status", str(queued.job)).stdout)
        assert "waits" in sft("status", "waits").stdout
        done = sft("cancel", "waits")
        assert done.returncode == 0, done.stderr
        assert queued.status["state"] == "preempted"
        assert command("squeue", "--noheader", f"--jobs={queued.job}") == ""
    finally:
        subprocess.run(["scancel", holder], check=False)


def _yaml(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
