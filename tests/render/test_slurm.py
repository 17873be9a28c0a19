"""Job scripts: real bash before and after filling, and nothing in them is executed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.assets import asset
from launcher.errors import SpecError
from launcher.facts.probe import Facts
from launcher.plan.make import make_plan
from launcher.render.files import with_files
from launcher.render.sbatch import OWNED, clock, directive_value
from launcher.render.slurm import SCRIPT, Origin
from launcher.spec.durations import seconds
from launcher.spec.schema import Spec
from tests.support import HOSTILE_NAMES, ROOT

ORIGIN = Origin("sftlaunch run", "/opt/sft/bin/python", "/opt/sft/lib")
TEMPLATE = asset("slurm", SCRIPT)
GOLDEN = sorted(ROOT.glob("tests/golden/cases/*/expected/job.sbatch"))
WITHIN = ("two words", "it's", 'say "hi"', "$(touch pwned)", "`id`", "a; id", "!x @RUN@ #")
CONTROL = ("new\nline", "a\rb", "tab\there", "\x1b[31m", "", " ", "a\u2028b")
CONTAINERS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"runtime": "pyxis", "image": "an $(touch pwned) image", "environment": ["HF_TOKEN"]},
    {"runtime": "apptainer", "image": 'it\'s "quoted".sif', "environment": ["HF_TOKEN"]},
)


def render(slurm: dict[str, Any], run_directory: str = "/runs/x", **hardware: Any) -> str:
    spec = Spec.model_validate(
        {"model": "m", "hardware": {"gpus": 4, "nodes": 2, **hardware}, "slurm": slurm}
    )
    facts = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)
    return with_files(make_plan(spec, facts), run_directory, 8, ORIGIN).files[SCRIPT]


def check_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def directives_of(script: str) -> dict[str, str]:
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert lines == sorted(lines)
    words = [shlex.split(line.removeprefix("#SBATCH "), comments=False) for line in lines]
    assert all(len(each) == 1 for each in words), lines
    pairs = (each[0].removeprefix("--").partition("=") for each in words)
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize("path", [TEMPLATE, *GOLDEN], ids=lambda p: p.parents[1].name)
def test_scripts_are_clean_bash(path: Path) -> None:
    check_bash(path)


def test_there_is_a_golden_script_of_each_kind() -> None:
    texts = [path.read_text("utf-8") for path in GOLDEN]
    for mark in ("--container-image", "apptainer", "--no-requeue", "--gpus-per-node", "--gres"):
        assert any(mark in text for text in texts), mark


@pytest.mark.parametrize("container", CONTAINERS, ids=["none", "pyxis", "apptainer"])
@pytest.mark.parametrize("name", WITHIN)
def test_hostile_names_stay_text(
    name: str, container: dict[str, Any] | None, tmp_path: Path
) -> None:
    slurm = {
        **dict.fromkeys(("partition", "account", "qos", "constraint", "reservation"), name),
        **dict.fromkeys(("exclude", "gpu_type", "network_interface"), name),
        "mail": {"user": name},
        "directives": {"comment": name},
        "container": container,
    }
    script = render(slurm, f"/runs/{name}")
    (tmp_path / SCRIPT).write_text(script, encoding="utf-8")
    check_bash(tmp_path / SCRIPT)
    said = directives_of(script)
    assert said["chdir"] == f"/runs/{name}"
    assert {said[key] for key in ("partition", "account", "comment", "job-name")} == {name}
    # All but the last three stanzas only assign; a shell that runs them must run nothing else.
    body = script.split("# Beside the ranks")[0]
    shown = f"{body}\nprintf '%s' \"$run\""
    done = subprocess.run(["bash", "-c", shown], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.decode() == f"/runs/{name}"
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT]


@pytest.mark.parametrize(
    "name", ["new\nline", "a\rb", "tab\there", "\x1b[31m", "", " ", "a\u2028b"]
)
@pytest.mark.parametrize("key", ["partition", "account", "qos", "exclude", "network_interface"])
def test_control_characters_are_refused(key: str, name: str) -> None:
    with pytest.raises(ValueError, match=key):
        Spec.model_validate({"model": "m", "slurm": {key: name}})


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1))
@settings(max_examples=200, deadline=None)
def test_directive_values_hold_anything_of_one_line(text: str) -> None:
    quoted = directive_value(text)
    assert shlex.split(quoted, comments=False) == [text] or "\\" in text


@pytest.mark.parametrize("name", sorted(OWNED))
def test_directives_do_not_repeat_the_plan(name: str) -> None:
    with pytest.raises(SpecError, match=name):
        render({"directives": {name: 1}})


@pytest.mark.parametrize(
    "slurm",
    [
        {"time_limit": "30s"},
        {"time_limit": "10m", "warning": "10m"},
        {"container": {"runtime": "pyxis", "image": "i", "mounts": ["/a:/a,/b:/b"]}},
    ],
)
def test_what_slurm_cannot_be_told(slurm: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        render(slurm)


def test_a_mount_path_with_a_colon_is_refused() -> None:
    with pytest.raises(SpecError, match="cannot be mounted"):
        render({"container": {"runtime": "pyxis", "image": "i"}}, "/runs/a:b")


@pytest.mark.parametrize("name", ["%j", "100%", "back\\slash"])
def test_file_name_patterns_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="percent sign or a backslash"):
        render({}, f"/runs/{name}")


def test_secrets_pass_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_write_me")
    for container in CONTAINERS:
        script = render({"container": container} if container else {})
        assert "hf_do_not_write_me" not in script
        assert ("HF_TOKEN" in script) == (container is not None)


def test_per_node_variables_are_not_expanded_in_the_batch_shell() -> None:
    script = TEMPLATE.read_text("utf-8")
    for variable in ("SLURM_PROCID", "SLURM_LOCALID", "SLURMD_NODENAME"):
        assert variable not in script
    quoted = re.findall(r"^node='\n[^']+'$", script, re.MULTILINE)
    assert len(quoted) == 1
    assert script.count("SLURM_NODEID") == quoted[0].count("SLURM_NODEID") == 1


@pytest.mark.parametrize(
    ("limit", "warning", "signal"),
    [(None, None, None), ("12h", None, "180"), ("2m", None, "60"), ("12h", "20m", "1200")],
)
def test_the_warning_leaves_time_to_save(
    limit: str | None, warning: str | None, signal: str | None
) -> None:
    said = directives_of(render({"time_limit": limit, "warning": warning}))
    assert said.get("signal") == (None if signal is None else f"B:USR1@{signal}")


@given(st.integers(60, 10**7))
def test_times_are_read_back(total: int) -> None:
    assert seconds(clock(total)) == total


def test_cpu_runs_ask_for_no_gpus() -> None:
    assert "gres" not in directives_of(render({}, device="cpu"))
    assert directives_of(render({"gpu_type": "h100"}))["gres"] == "gpu:h100:2"
    typed = directives_of(render({"gpu_type": "h100", "gpus_as": "gpus-per-node"}))
    assert typed["gpus-per-node"] == "h100:2"


def test_hostile_names_of_the_suite_are_covered() -> None:
    """Whatever names other tests think of, sbatch's quoting takes them too."""
    for name in HOSTILE_NAMES:
        assert shlex.split(directive_value(name), comments=False) == [name]
