"""The public interface: options, output, exit codes. A change here is a change for users."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher import __version__
from tests.support import ROOT, make_model, sftlaunch, tree, write_rows

pytestmark = pytest.mark.usefixtures("bare_machine")

# plan --json: key -> its own keys, None where it holds no fixed ones.
CONTRACT = {
    "strategy": None,
    "reasons": None,
    "defaults": None,
    "warnings": None,
    "topology": ("gpus", "nodes", "gpus_per_node", "data_parallel_size"),
    "batch": (
        "global_batch_size",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "tokens_per_step",
    ),
    "adapter": (
        "method",
        "use_reentrant",
        "state_dict_type",
        "quant_storage",
        "adapter_dtype",
        "find_unused_parameters",
    ),
    "memory": (
        "gpu_memory_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "low_bytes",
        "high_bytes",
        "fits",
        "parts",
    ),
    "time": ("steps", "seconds_per_step", "total_seconds", "basis"),
    "command": None,
    "files": None,
}
PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "communication",
    "workspace",
)
COMMANDS = ("run", "plan", "generate", "init", "logs", "recipes", "schema", "status")


def _spec(text: str = "", **sections: object) -> Path:
    """./sft.yaml over a fake model and eight rows."""
    make_model(Path("model"), "llama-3.1-8b")
    write_rows(Path("data.jsonl"))
    values = {"model": "model", "dataset": "data.jsonl", **sections}
    Path("sft.yaml").write_text(text + yaml.safe_dump(values), encoding="utf-8")
    return Path("sft.yaml")


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


# --- plan --json --------------------------------------------------------------------------


def test_plan_json_is_one_object_with_every_key_of_the_contract() -> None:
    done = sftlaunch("plan", "--gpus", "8", "--gpu", "h100-80gb", "--json")
    assert (done.code, done.err) == (0, "")
    plan = done.json
    for key, inner in CONTRACT.items():
        assert key in plan, key
        for name in inner or ():
            assert name in plan[key], f"{key}.{name}"
    assert set(plan["memory"]["parts"]) == set(PARTS)
    assert plan["topology"]["gpus"] == 8
    assert plan["command"][0] == "torchrun"
    assert {"accelerate.yaml", "command.sh", "spec.yaml"} <= set(plan["files"])


def test_plan_json_types() -> None:
    _spec(hardware={"gpus": 8, "gpu": "h100-80gb"}, strategy="fsdp", method="qlora")
    plan = sftlaunch("plan", "--json").json
    assert all(isinstance(value, int) for value in plan["batch"].values())
    assert all(isinstance(plan["memory"][key], int) for key in CONTRACT["memory"][:5])  # type: ignore[index]
    assert plan["memory"]["fits"] is True
    assert sum(plan["memory"]["parts"].values()) > 0
    assert plan["warnings"], "FSDP2 with a 4-bit base is experimental"
    assert all(set(each) == {"code", "message", "fix", "source"} for each in plan["warnings"])
    assert isinstance(plan["time"]["total_seconds"], float)


def test_what_depends_on_a_dataset_or_a_model_is_null_without_one() -> None:
    done = sftlaunch("plan", "--json", "--model", "someone/model", "--set", "dataset=null")
    plan = done.json
    assert plan["time"]["steps"] is None
    assert plan["time"]["total_seconds"] is None
    assert plan["memory"]["fits"] is None
    assert plan["worker"]["dataset"] is None


def test_deepspeed_file_is_there_for_zero_only() -> None:
    _spec(hardware={"gpus": 8, "gpu": "h100-80gb"})
    with_zero = sftlaunch("plan", "--json", "--strategy", "zero3").json["files"]
    without = sftlaunch("plan", "--json", "--strategy", "fsdp").json["files"]
    assert json.loads(with_zero["deepspeed.json"])["zero_optimization"]["stage"] == 3
    assert "deepspeed.json" not in without


def test_dry_run_is_the_plan() -> None:
    flags = ("--gpus", "4", "--gpu", "a100-80gb")
    assert sftlaunch("run", "--dry-run", *flags).out == sftlaunch("plan", *flags).out
    assert sftlaunch("--dry-run", "--json", *flags).json == sftlaunch("plan", "--json", *flags).json


def test_plan_and_dry_run_write_nothing(bare_machine: Path) -> None:
    _spec(hardware={"gpus": 8, "gpu": "h100-80gb"})
    before = tree(bare_machine)
    assert sftlaunch("plan").code == 0
    assert sftlaunch("--dry-run").code == 0
    assert tree(bare_machine) == before


# --- which spec ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("plan",), ("run", "--dry-run"), ("--dry-run",)])
def test_without_a_spec_the_first_line_names_the_recipe(command: tuple[str, ...]) -> None:
    done = sftlaunch(*command)
    assert done.code == 0
    assert "recipe tiny" in done.out.splitlines()[0]


def test_sft_yaml_of_this_folder_is_taken() -> None:
    _spec(training={"seed": 77})
    done = sftlaunch("plan", "--json")
    assert done.json["worker"]["training_arguments"]["seed"] == 77
    assert "recipe" not in sftlaunch("plan").out.splitlines()[0]


def test_a_named_spec_is_taken_and_its_paths_start_from_its_folder(bare_machine: Path) -> None:
    _spec()
    (bare_machine / "elsewhere").mkdir()
    os.chdir("elsewhere")
    plan = sftlaunch("plan", "../sft.yaml", "--json").json
    assert plan["worker"]["model"]["path"] == str(bare_machine / "model")
    assert plan["worker"]["dataset"]["path"] == str(bare_machine / "data.jsonl")


# --- options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "place", "value"),
    [
        (["--gpus", "4"], "topology.gpus", 4),
        (["--gpus", "16", "--nodes", "2"], "topology.gpus_per_node", 8),
        (["--nodes", "2", "--gpus-per-node", "4"], "topology.gpus", 8),
        (["--gpus", "8", "--strategy", "zero2"], "strategy", "zero2"),
        (["--gpus", "8", "--strategy", "zero3", "--offload", "all"], "offload", "all"),
        (["--method", "full"], "adapter.method", "full"),
        (["--global-batch-size", "96"], "batch.global_batch_size", 96),
        (["--micro-batch-size", "2"], "batch.micro_batch_size", 2),
        (["--micro-batch-size", "auto"], "batch.global_batch_size", 32),
        (["--device", "cpu"], "topology.device", "cpu"),
        (["--model", "someone/else"], "worker.model.path", "someone/else"),
        (["--dataset", "someone/rows"], "worker.dataset.path", "someone/rows"),
        (["--on", "local"], "strategy", "single"),
        (["--resume", "never"], "strategy", "single"),
        (["--set", "training.seed=5"], "worker.training_arguments.seed", 5),
        (["--set", "training.learning_rate=3e-5"], "worker.training_arguments.learning_rate", 3e-5),
        (["--set", "lora.target_modules=[q_proj]"], "worker.peft.target_modules", ["q_proj"]),
        (["--set", "training={seed: 6}"], "worker.training_arguments.seed", 6),
        (
            ["--set", "training.neftune_noise_alpha=5.0"],
            "worker.training_arguments.neftune_noise_alpha",
            5.0,
        ),
        (["--set", "model.revision=v1"], "worker.model.revision", "v1"),
        (["--set", "hardware.gpus=2"], "topology.gpus", 2),
        (["--gpus", "4", "--set", "hardware.gpus=2"], "topology.gpus", 2),
        (
            ["--set", "trackers=[tensorboard]"],
            "worker.training_arguments.report_to",
            ["tensorboard"],
        ),
        (["--set", 'samples.prompts=["a = b"]'], "worker.samples.prompts", ["a = b"]),
    ],
)
def test_options_reach_the_plan(flags: list[str], place: str, value: object) -> None:
    done = sftlaunch("plan", "--json", *flags)
    assert done.code == 0, done.err
    found = done.json
    for name in place.split("."):
        found = found[name]
    assert found == value


def test_output_is_the_run_directory() -> None:
    plan = sftlaunch("plan", "--json", "--output", "some/where").json
    assert plan["command"][-1] == str(Path.cwd() / "some" / "where")


def test_a_flag_wins_over_the_file() -> None:
    _spec(hardware={"gpus": 16, "nodes": 2, "gpus_per_node": 8, "gpu": "h100-80gb"})
    topology = sftlaunch("plan", "--json", "--gpus", "8").json["topology"]
    assert (topology["gpus"], topology["nodes"], topology["gpus_per_node"]) == (8, 2, 4)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = sftlaunch(command, "--help")
    assert done.code == 0
    assert "Usage: sftlaunch" in done.out


def test_the_options_of_the_interface_are_all_offered() -> None:
    wanted = [
        "--gpus",
        "--nodes",
        "--gpus-per-node",
        "--gpu",
        "--strategy",
        "--offload",
        "--model",
        "--dataset",
        "--method",
        "--global-batch-size",
        "--micro-batch-size",
        "--output",
        "--on",
        "--device",
        "--resume",
        "--set",
        "--json",
    ]
    for command in ("run", "plan"):
        text = sftlaunch(command, "--help").out
        assert [flag for flag in wanted if flag not in text] == []
    assert sftlaunch("plan", "--dry-run").out == sftlaunch("plan").out


def test_version() -> None:
    assert sftlaunch("--version").out.strip().endswith(__version__)


def test_schema_is_json_and_holds_every_section() -> None:
    properties = sftlaunch("schema").json["properties"]
    assert {"model", "dataset", "lora", "hardware", "batch", "training", "output"} <= set(
        properties
    )


def test_init_writes_a_spec_that_plans() -> None:
    assert sftlaunch("init", "--model", "it's: a #name", "--method", "qlora").code == 0
    done = sftlaunch("plan", "--json", "--dataset", "someone/rows")
    assert done.code == 0, done.err
    assert done.json["worker"]["model"]["path"] == "it's: a #name"
    again = sftlaunch("init")
    assert (again.code, "sft.yaml" in again.err) == (2, True)


def test_recipes_lists_tiny() -> None:
    assert "tiny" in sftlaunch("recipes").out


# --- refusals -----------------------------------------------------------------------------


def test_a_refusal_is_one_line_of_what_why_fix() -> None:
    done = sftlaunch("plan", "--gpus", "8", "--set", "quantization=8bit", "--strategy", "fsdp")
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        "error: lora on 8bit under fsdp does not work; integer weights cannot be sharded; "
        "use method qlora, or strategy ddp\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (("--gpus", "8", "--global-batch-size", "100"), 3, "batch_does_not_divide"),
        (("--gpu", "h1000"), 2, "unknown_gpu"),
        (("--set", "x.y=1"), 2, "unknown_key"),
        (("--strategy", "magic"), 2, "usage"),
        (("--no-such-flag",), 2, "usage"),
        (("nowhere.yaml",), 2, "spec_not_found"),
    ],
)
def test_a_refusal_in_json(arguments: tuple[str, ...], code: int, name: str) -> None:
    done = sftlaunch("plan", "--json", *arguments)
    assert done.code == code
    assert list(done.json) == ["error"]
    error = done.json["error"]
    assert list(error) == ["code", "message", "fix", "source"]
    assert error["code"] == name
    assert error["message"]
    assert error["fix"]
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--on=slurm", "--on=docker", "--resume=auto"])
def test_what_is_not_in_this_version_says_so(option: str) -> None:
    done = sftlaunch("--dry-run", option)
    if done.code:
        assert done.code == 4
        assert "not in this version" in done.err or "sbatch" in done.err or "docker" in done.err


def test_a_run_without_gpus_offers_three_ways(bare_machine: Path) -> None:
    before = tree(bare_machine)
    done = sftlaunch("--gpus", "8")
    assert done.code == 4
    for way in ("--dry-run", "--on slurm", "--device cpu"):
        assert way in done.err
    assert tree(bare_machine) == before


def test_a_run_without_a_dataset_is_refused() -> None:
    done = sftlaunch("--device", "cpu", "--set", "dataset=null")
    assert (done.code, "--dataset" in done.err) == (2, True)


# --- terminals and pipes ------------------------------------------------------------------


def test_a_reader_that_leaves_early_costs_no_traceback() -> None:
    command = f"'{sys.executable}' -m launcher plan --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def test_a_closed_standard_output_costs_no_traceback() -> None:
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m launcher plan >/dev/full"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_exit_codes_reach_the_shell() -> None:
    assert _process("plan").returncode == 0
    assert _process("plan", "--gpu", "h1000").returncode == 2
    assert _process("plan", "--gpus", "8", "--global-batch-size", "9").returncode == 3
    assert _process("--gpus", "8").returncode == 4


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _spec(hardware={"gpus": 8, "gpu": "h100-80gb"}, strategy="fsdp", method="qlora")
    for line in sftlaunch("plan").out.splitlines():
        longest = max(len(word) for word in line.split())
        assert len(line) <= max(columns, 11 + longest), line


def test_a_pipe_gets_no_escape_sequences() -> None:
    _spec(hardware={"gpus": 8, "gpu": "h100-80gb"}, strategy="fsdp", method="qlora")
    done = _process("plan")
    assert "warning" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "\x1b" not in _process("plan", "--gpu", "h1000").stderr


def _on_terminal(arguments: list[str], **environment: str) -> str:
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(
        sys.executable,
        ["-m", "launcher", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment},
        encoding="utf-8",
        timeout=30,
    )
    child.expect(pexpect.EOF)
    child.close()
    return str(child.before)


def test_no_color_is_honoured_on_a_terminal() -> None:
    assert "\x1b[31m" in _on_terminal(["plan", "--gpu", "h1000"])
    assert "\x1b" not in _on_terminal(["plan", "--gpu", "h1000"], NO_COLOR="1")
    _spec(hardware={"gpus": 8, "gpu": "h100-80gb"}, strategy="fsdp", method="qlora")
    assert "\x1b[33m" in _on_terminal(["plan"])
    assert "\x1b" not in _on_terminal(["plan"], NO_COLOR="1")


def test_a_plan_takes_a_fraction_of_a_second() -> None:
    """Three tries: the machine may be busy."""
    import time

    spent = []
    for _ in range(3):
        started = time.perf_counter()
        assert _process("plan", "--gpus", "8", "--gpu", "h100-80gb").returncode == 0
        spent.append(time.perf_counter() - started)
    assert min(spent) < 1.0
