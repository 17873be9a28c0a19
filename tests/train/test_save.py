"""The final save: PEFT's names, and the fresh process that reads it back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.runs.directory import RunDirectory
from launcher.train import save
from launcher.train.control import STOP_SIGNALS


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program in the interpreter's place."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(save.sys, "executable", str(program))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_of_all_processes_does_not_end_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, f"import os; os.kill(os.getpid(), {int(number)})")
    save.check_reload(RunDirectory(tmp_path), tmp_path)


def test_an_end_without_words_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "import os; os._exit(3)")
    with pytest.raises(save.IncompleteSaveError, match="exit code 3"):
        save.check_reload(RunDirectory(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("base_model.layers.0.q_proj.lora_A.default.weight", "q_proj.lora_A.weight"),
        ("base_model.layers.0.mlp.down_proj.ia3_l.default", "down_proj.ia3_l"),
        ("base_model.layers.0.default_gate.lora_A.default.weight", "default_gate.lora_A.weight"),
    ],
)
def test_the_adapters_own_name_is_in_no_saved_name(name: str, saved: str) -> None:
    assert save.ADAPTER_NAME.sub("", name).endswith(saved)
