"""The files of a run: read back alike, whole, and without the placeholder of their folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launcher.facts.probe import Facts
from launcher.plan.engine import RUN_DIRECTORY
from launcher.plan.make import Planned, make_plan
from launcher.plan.types import plan_from_json
from launcher.render.files import run_files, with_files
from launcher.spec.load import load_spec
from launcher.spec.schema import Spec
from tests.support import HOSTILE_NAMES

FACTS = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)
# Text that one YAML or another takes for something else.
LOOKALIKES = (
    *("1e5", "2e-4", ".5", "-.inf", ".nan", "010", "0x1f", "1_000", "12:30", "2024-05-01", "1e400"),
    *("yes", "No", "on", "null", "~", "true", "=", "<<", "- a", "a: b", "# x", "", " x ", "a\nb"),
    *("\x85", "a\u2028b", "\u2029", "\ufeff", "\x00", "\x1b[31m", "\U0001f600"),
)


def _planned(**values: object) -> Planned:
    spec = {"model": "someone/model", "hardware": {"gpus": 4}, "strategy": "zero3", **values}
    return make_plan(Spec.model_validate(spec), FACTS)


@pytest.mark.parametrize("text", [*LOOKALIKES, *HOSTILE_NAMES])
def test_text_in_spec_yaml_is_read_back_as_the_same_text(text: str, tmp_path: Path) -> None:
    planned = _planned(samples={"prompts": [text, "x"]}, model={"path": "a/b", "revision": text})
    (tmp_path / "spec.yaml").write_text(
        with_files(planned, "/runs/x", 8).files["spec.yaml"], encoding="utf-8"
    )
    again = load_spec(tmp_path / "spec.yaml").spec
    assert again.model.revision == text
    assert again.samples.prompts == [text, "x"]


def test_plan_json_lists_the_other_files_and_is_read_back() -> None:
    plan = with_files(_planned(), "/runs/x", 8)
    files = run_files(plan)
    assert set(files) == {
        "accelerate.yaml",
        "command.sh",
        "deepspeed.json",
        "plan.json",
        "spec.yaml",
    }
    values = json.loads(files["plan.json"])
    assert values["files"] == {name: files[name] for name in files if name != "plan.json"}
    assert plan_from_json(values).as_json() == plan.as_json()


@pytest.mark.parametrize("folder", ["/runs/x", "/runs/two words", "/runs/{}", "/runs/a: b #c"])
def test_the_run_directory_stands_in_place_of_its_placeholder(folder: str) -> None:
    plan = with_files(_planned(), folder, 8)
    config = yaml.safe_load(plan.files["accelerate.yaml"])
    assert config["deepspeed_config"]["deepspeed_config_file"] == f"{folder}/deepspeed.json"
    assert not [name for name, text in plan.files.items() if RUN_DIRECTORY in text]


def test_every_file_ends_in_a_newline() -> None:
    for name, text in run_files(with_files(_planned(), "/runs/x", 8)).items():
        assert text.endswith("\n"), name


def test_the_same_spec_renders_the_same_bytes() -> None:
    first, second = (run_files(with_files(_planned(), "/runs/x", 8)) for _ in range(2))
    assert first == second
