"""What several test folders share: fake models, rows, and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cli.app import _run

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(__file__).parent / "golden" / "models"
# Eight bytes of length, then an empty JSON object: the smallest file that is safetensors.
EMPTY_WEIGHTS = (2).to_bytes(8, "little") + b"{}"
HEAVY = ("torch", "transformers", "accelerate", "rich", "peft", "trl", "datasets", "deepspeed")
# Names that a shell, YAML or a careless format string would read as something else.
HOSTILE_NAMES = (
    "two words",
    "it's",
    'say "hi"',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned #",
    "a && touch pwned",
    "$HOME",
    "back\\slash\\",
    "*?[a-z]",
    "-rf",
    "--help",
    "{run_directory}",
    "%s %(name)s",
    "Ünïcödé 模型",
    "a: b # c",
    "!!python/object",
    "'",
    "~root",
)


@dataclass(frozen=True)
class Outcome:
    """What one command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as exactly one JSON value."""
        return json.loads(self.out)


def sftlaunch(*arguments: str) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _run(list(arguments))
    return Outcome(int(code), out.getvalue(), err.getvalue())


def make_model(folder: Path, shape: str = "tiny", *, chat_template: bool = True) -> Path:
    """A folder that probes as a model of `tests/golden/models/SHAPE` without its weights."""
    folder.mkdir(parents=True)
    config = (MODELS / shape / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config, encoding="utf-8")
    settings = {"chat_template": "{{ messages }}"} if chat_template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(EMPTY_WEIGHTS)
    return folder


def write_rows(file: Path, number: int = 8, **row: Any) -> Path:
    """A JSON Lines file of equal rows; prompt and completion unless told otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row or {"prompt": "What is 1 + 1? ", "completion": "2"})
    file.write_text(f"{line}\n" * number, encoding="utf-8")
    return file


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; folders end in a slash."""
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": (
            b"" if path.is_dir() else path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
    }
