"""Rows prepared once give the run that rows tokenised by the ranks give, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.directory import RunDirectory
from launcher.runs.prepared import RECORD, read_record
from tests.engine.hub import hub
from tests.support import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
TINY = str(ROOT / "recipes" / "tiny" / "sft.yaml")
MODEL = ROOT / "recipes" / "tiny" / "model"
# A share held out, rows cut so short that TRL drops some, evaluation and exact match.
SETTINGS = (
    "--device=cpu",
    "--gpus=2",
    "--strategy=ddp",
    "--set=training.max_steps=3",
    "--set=training.max_length=20",
    "--set=dataset.eval_path=null",
    "--set=dataset.eval_share=0.01",
    "--set=evaluation.every_steps=2",
    "--set=samples.prompts=[]",
)
SAME = ("step", "loss", "eval_loss", "grad_norm", "tokens", "exact_match", "held_out_rows")


def sft(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
    )


def curve(run: RunDirectory) -> list[dict[str, Any]]:
    return [{name: m.get(name) for name in SAME} for m in run.read_metrics()]


def test_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    plain, ready = RunDirectory(tmp_path / "plain"), RunDirectory(tmp_path / "ready")
    made = sft("data", "prepare", TINY, *SETTINGS, f"--output={ready.path}", "--json")
    assert made.returncode == 0, made.stderr
    rows = json.loads(made.stdout)["rows"]
    assert 0 < rows["train"] < 2376, (
        "TRL dropped none of them: the settings test less than they say"
    )
    assert [path.name for path in ready.path.iterdir()] == ["prepared"]
    first = (ready.prepared / RECORD).stat().st_mtime_ns
    for run in (plain, ready):
        done = sft(TINY, *SETTINGS, f"--output={run.path}")
        assert done.returncode == 0, done.stderr
    assert [run.read_status()["prepared"] for run in (plain, ready)] == [False, True]
    assert curve(plain) == curve(ready)
    assert {"loss", "eval_loss", "exact_match"} <= {k for m in ready.read_metrics() for k in m}
    # Nothing was tokenised again, and nothing is while nothing has changed.
    assert (ready.prepared / RECORD).stat().st_mtime_ns == first


def test_ranks_are_offline_where_all_was_prepared(tmp_path: Path) -> None:
    """A rank that asked the Hub for anything would ask a closed port, and fail."""
    output = tmp_path / "run"
    steps = (TINY, "--device=cpu", "--gpus=1", f"--output={output}", "--set=samples.prompts=[]")
    settings = ("--set=training.max_steps=1", "--set=evaluation.exact_match=false")
    assert sft("data", "prepare", *steps, *settings).returncode == 0
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "def tell():\n"
        "    if 'launcher.train' in sys.orig_argv:\n"
        f"        with open({str(tmp_path / 'seen')!r}, 'w') as stream:\n"
        "            from huggingface_hub import constants\n"
        "            import datasets.config\n"
        "            print(constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE,\n"
        "                  os.environ['TRANSFORMERS_OFFLINE'], file=stream)\n"
        "atexit.register(tell)\n",
        encoding="utf-8",
    )
    done = sft(*steps, *settings, PYTHONPATH=f"{tmp_path}:{ROOT}", HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text().split() == ["True", "True", "1"]


def test_what_has_changed_is_prepared_again(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    line = json.dumps({"messages": turns}) + "\n"
    rows.write_text(line * 8, encoding="utf-8")
    run = RunDirectory(tmp_path / "run")
    command = (
        "data",
        "prepare",
        f"--model={MODEL}",
        f"--dataset={rows}",
        f"--output={run.path}",
        "--device=cpu",
        "--set=dataset.eval_path=null",
        "--set=evaluation.exact_match=false",
    )
    assert sft(*command).returncode == 0
    assert read_record(run)["rows"] == {"train": 8}
    rows.write_text(line * 9, encoding="utf-8")
    # What one that was killed has left goes with the next.
    (run.path / ".prepared.1").mkdir()
    assert sft(*command).returncode == 0
    assert read_record(run)["rows"] == {"train": 9}
    assert [path.name for path in run.path.iterdir()] == ["prepared"]
    rows.write_text(line * 300 + '{"messages": 7}\n', encoding="utf-8")
    failed = sft(*command, "--json")
    assert failed.returncode == 1, failed.stderr
    assert "the preparation failed" in json.loads(failed.stdout)["error"]["message"]
    assert "Traceback" not in failed.stderr
    assert "correct or remove" in failed.stderr
    assert read_record(run)["rows"] == {"train": 9}


def test_a_model_of_the_hub_is_fetched_once_and_trained_offline(tmp_path: Path) -> None:
    repository, output = tmp_path / "repository", tmp_path / "run"
    shutil.copytree(MODEL, repository)
    for name in ("pytorch_model.bin", "weights.gguf"):
        (repository / name).write_bytes(b"what transformers does not load")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    arguments = (TINY, "--model=lab/tiny", "--device=cpu", "--gpus=1", f"--output={output}")
    settings = ("--set=training.max_steps=1", "--set=evaluation.exact_match=false")
    quiet = ("--set=samples.prompts=[]",)
    with hub("lab/tiny", repository) as (address, asked):
        made = sft("data", "prepare", *arguments, *settings, *quiet, HF_ENDPOINT=address, **home)
        assert made.returncode == 0, made.stderr
    assert sorted(asked) == sorted(path.name for path in MODEL.iterdir())
    # Nobody answers at that address any more.
    done = sft(*arguments, *settings, *quiet, HF_ENDPOINT=address, **home)
    assert done.returncode == 0, done.stderr
    assert RunDirectory(output).read_status()["prepared"] is True
