"""Going on with a run: the same one, from a whole checkpoint, at rest, also on other hardware.

Nothing trains here. A run directory is what the plan writes, its checkpoints are small files
under real seals; whatever would start ranks is refused before it does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.app import COMMANDS
from launcher.cli.going_on import find_source, set_aside_after
from launcher.errors import SpecError
from launcher.launch import local
from launcher.launch.processes import MARK
from launcher.plan.types import plan_from_json
from launcher.render.files import run_files
from launcher.runs.checkpoints import (
    SEAL,
    SET_ASIDE,
    checkpoint_folders,
    digests,
    file_names,
    folder_name,
    newest_whole,
    seal,
)
from launcher.runs.directory import RunDirectory
from tests.support import HOSTILE_NAMES, Outcome, make_model, sftlaunch, tree, write_rows

pytestmark = pytest.mark.usefixtures("bare_machine")
TWO_RANKS: dict[str, Any] = {
    "output": "run",
    "strategy": "fsdp",
    "hardware": {"gpus": 2, "device": "cpu"},
    "batch": {"global_batch_size": 32, "micro_batch_size": 16},
}


def write_spec(**sections: Any) -> None:
    """./sft.yaml over a fake model and forty rows."""
    if not Path("model").exists():
        make_model(Path("model"))
        write_rows(Path("data.jsonl"), 40)
    values = {"model": "model", "dataset": "data.jsonl", **TWO_RANKS, **sections}
    given = {key: value for key, value in values.items() if value is not None}
    Path("sft.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")


def make_run(*flags: str, steps: tuple[int, ...] = (2, 4), **sections: Any) -> RunDirectory:
    """A run of ./sft.yaml that was stopped after its last checkpoint."""
    write_spec(**sections)
    done = sftlaunch("plan", "--json", *flags)
    assert done.code == 0, done.err
    plan = plan_from_json(done.json)
    run = RunDirectory(Path(plan.command[-1]))
    run.create(run_files(plan))
    run.update_status(state="preempted", attempt=1, step=max(steps, default=0))
    for step in steps:
        make_checkpoint(run, step, plan.batch.global_batch_size)
    return run


def make_checkpoint(run: RunDirectory, step: int, total: int = 32, **record: Any) -> Path:
    folder = run.checkpoints / folder_name(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "part-0.bin").write_bytes(b"weights" * step)
    known = {"step": step, "world": 2, "global_batch_size": total, "seconds": 1.0, **record}
    seal(folder, known, digests(folder, file_names(folder)))
    return folder


def damage(folder: Path) -> None:
    (folder / "state" / "part-0.bin").write_bytes(b"w")


def refused(code: int, *arguments: str) -> str:
    """The one line of a refusal that leaves nothing behind."""
    before = tree(Path())
    done = sftlaunch(*arguments)
    assert tree(Path()) == before, "something was left behind"
    assert (done.code, done.out) == (code, ""), done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert "defect" not in done.err
    return done.err


def planned(*arguments: str) -> dict[str, Any]:
    """The plan of a dry run, which changes nothing."""
    before = tree(Path())
    done = sftlaunch(*arguments, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert tree(Path()) == before, "a dry run wrote something"
    plan: dict[str, Any] = done.json
    return plan


# --- other hardware -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "strategy", "micro", "accumulation"),
    [
        (1, "single", 16, 2),
        (2, "fsdp", 16, 1),
        (4, "fsdp", 8, 1),
        (8, "fsdp", 4, 1),
        (16, "fsdp", 2, 1),
        (32, "fsdp", 1, 1),
    ],
)
def test_the_global_batch_stays_on_another_number_of_gpus(
    gpus: int, strategy: str, micro: int, accumulation: int
) -> None:
    make_run()
    plan = planned("resume", "run", "--gpus", str(gpus))
    assert plan["topology"]["gpus"] == gpus
    assert plan["strategy"] == strategy
    batch = plan["batch"]
    assert (batch["micro_batch_size"], batch["gradient_accumulation_steps"]) == (
        micro,
        accumulation,
    )
    assert micro * accumulation * gpus == batch["global_batch_size"] == 32


def test_a_micro_batch_that_still_divides_stays() -> None:
    make_run(batch={"global_batch_size": 32, "micro_batch_size": 4})
    batch = planned("resume", "run", "--gpus", "4")["batch"]
    assert (batch["micro_batch_size"], batch["gradient_accumulation_steps"]) == (4, 2)


def test_what_is_said_wins_over_what_is_adapted() -> None:
    make_run()
    plan = planned("resume", "run", "--gpus=4", "--micro-batch-size=2", "--strategy=zero2")
    batch = plan["batch"]
    assert (batch["micro_batch_size"], batch["gradient_accumulation_steps"]) == (2, 4)
    assert plan["strategy"] == "zero2"


@pytest.mark.parametrize("gpus", ["2", "4"])
def test_a_run_on_one_gpu_goes_on_on_many(gpus: str) -> None:
    make_run("--gpus", "1", strategy=None)
    assert planned("resume", "run")["strategy"] == "single"
    plan = planned("resume", "run", "--gpus", gpus)
    assert plan["strategy"] not in ("single", "auto")
    assert plan["batch"]["global_batch_size"] == 32


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp1"])
def test_a_run_on_many_gpus_goes_on_on_one(strategy: str) -> None:
    make_run(strategy=strategy)
    plan = planned("resume", "run", "--gpus", "1")
    assert plan["strategy"] == "single"
    assert plan["batch"]["gradient_accumulation_steps"] == 2
    assert planned("resume", "run", "--gpus", "4")["strategy"] == strategy


def test_a_run_whose_mesh_needs_its_gpus_is_planned_anew() -> None:
    make_run("--gpus", "4", strategy="hsdp", batch={"global_batch_size": 32})
    plan = planned("resume", "run", "--gpus", "2")
    assert plan["strategy"] not in ("hsdp", "auto")
    assert plan["batch"]["global_batch_size"] == 32


def test_the_learning_is_the_same_on_other_hardware() -> None:
    make_run()
    before, after = planned("resume", "run"), planned("resume", "run", "--gpus", "8")
    solved = {"per_device_train_batch_size", "per_device_eval_batch_size"}
    arguments = [plan["worker"]["training_arguments"] for plan in (before, after)]
    changed = {key for key, value in arguments[0].items() if arguments[1].get(key) != value}
    assert changed <= {*solved, "gradient_accumulation_steps"}
    for key in ("model", "peft", "dataset", "loss"):
        assert before["worker"][key] == after["worker"][key]


def test_the_default_global_batch_of_a_run_is_kept_by_run_too() -> None:
    """64 is the default; on 24 GPUs it would be 72."""
    make_run(batch=None, strategy="ddp")
    assert planned("run", "--gpus", "8")["batch"]["global_batch_size"] == 64
    assert planned("run", "--gpus", "24", "--output", "new")["batch"]["global_batch_size"] == 72
    assert "64" in refused(3, "run", "--gpus", "24")


def test_the_fix_for_gpus_that_do_not_divide_can_be_followed() -> None:
    make_run()
    said = refused(3, "resume", "run", "--gpus", "3")
    assert "--global-batch-size" not in said, said


# --- which run ----------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["./run/", "{here}/run", "named", None])
def test_a_run_is_found_by_path_by_name_and_as_the_newest(argument: str | None) -> None:
    run = make_run()
    make_run(output="runs/other")
    named = make_run(output="runs/named")
    os.utime("runs/other/plan.json", (1, 1))
    said = () if argument is None else (argument.replace("{here}", str(Path.cwd())),)
    plan = planned("resume", *said)
    expected = run if argument not in ("named", None) else named
    assert plan["command"][-1] == str(expected.path)


def test_a_run_goes_on_from_any_folder_and_after_it_was_moved(bare_machine: Path) -> None:
    make_run()
    (bare_machine / "elsewhere").mkdir()
    shutil.move("run", "elsewhere/renamed")
    os.chdir("elsewhere")
    plan = planned("resume", "renamed")
    assert plan["command"][-1] == str(bare_machine / "elsewhere" / "renamed")
    assert plan["worker"]["dataset"]["path"] == str(bare_machine / "data.jsonl")


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if "/" not in name][::2])
def test_a_run_goes_on_whatever_its_name(name: str) -> None:
    run = make_run(output=f"./{name}", samples={"prompts": [name]})
    assert run.path.name == name
    plan = planned("resume", f"./{name}")
    assert plan["command"][-1] == str(run.path)
    assert plan["worker"]["samples"]["prompts"] == [name]


@pytest.mark.parametrize(
    ("method", "device"),
    [("full", "cuda"), ("lora", "cpu"), ("qlora", "cuda"), ("dora", "cpu"), ("ia3", "cuda")],
)
def test_what_a_run_wrote_down_is_the_same_run(method: str, device: str) -> None:
    """spec.yaml holds every value, and reading it back changes none."""
    sections: dict[str, Any] = {
        "method": method,
        "strategy": None,
        "hardware": {"gpus": 2, "device": device, "gpu": "h100-80gb"},
        "training": {"learning_rate": 3e-5, "num_train_epochs": 2, "warmup_steps": 10},
    }
    make_run(**sections)
    first = json.loads(Path("run/plan.json").read_text(encoding="utf-8"))
    again = planned("resume", "run")
    assert again["worker"] == first["worker"]
    assert again["strategy"] == first["strategy"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("nothing",), 2, "nothing is no run directory; there are: runs/first"),
        (("runs",), 2, "runs is no run directory"),
        (("data.jsonl",), 2, "data.jsonl is no run directory"),
        (("runs/first", "--resume", "never"), 2, "--output"),
        (("runs/first", "--gpus", "0"), 2, "--gpus"),
        (("runs/first", "--set", "training.sed=1"), 2, "training.seed"),
        (("runs/first", "--on", "docker", "--nodes", "2", "--gpus", "2"), 2, "--docker-host"),
    ],
)
def test_what_cannot_go_on(arguments: tuple[str, ...], code: int, says: str) -> None:
    make_run(output="runs/first")
    assert says in refused(code, "resume", *arguments)


def test_without_any_run_there_is_nothing_to_resume() -> None:
    assert "no runs below ./runs" in refused(2, "resume")


# --- another run in the folder ------------------------------------------------------------


def test_run_goes_on_with_the_run_in_its_folder() -> None:
    make_run()
    found, again = planned("run"), planned("resume", "run")
    for key in ("strategy", "batch", "worker", "command", "files"):
        assert found[key] == again[key]
    assert planned("run", "--gpus", "4", "--micro-batch-size", "auto")["topology"]["gpus"] == 4


@pytest.mark.parametrize(
    "flags",
    [
        ("--set", "checkpoints.keep=1", "--set", "checkpoints.every_steps=7"),
        ("--stop-after", "1h", "--max-restarts", "3"),
        ("--set", "health.policy=skip"),
        ("--set", "samples.prompts=[hello]"),
        ("--set", "training.gradient_checkpointing=true"),
        ("--strategy", "zero2"),
    ],
)
def test_how_it_runs_may_change(flags: tuple[str, ...]) -> None:
    make_run()
    planned("run", *flags)
    planned("resume", "run", *flags)


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("run", "--set training.seed=7", "training.seed was 42, is 7"),
        ("run --dry-run", "--method dora", "method was 'lora', is 'dora'"),
        ("run", "--dataset other.jsonl", "dataset.path was "),
        ("run", "--set training.neftune_noise_alpha=5.0", "training.neftune_noise_alpha was None"),
        ("resume run", "--model other", "model.path was "),
        ("resume run", "--global-batch-size 64", "batch.global_batch_size was 32, is 64"),
        ("resume run --dry-run", "--set training.max_steps=9", "training.max_steps was None, is 9"),
        ("resume run", "--gpus 1 --set lora.rank=2", "lora.rank was 16, is 2"),
    ],
)
def test_another_run_is_never_overwritten(command: str, flags: str, says: str) -> None:
    make_run()
    write_rows(Path("other.jsonl"))
    make_model(Path("other"))
    said = refused(2, *command.split(), *flags.split())
    assert "run holds another run" in said
    assert says in said
    assert "--output run-2" in said


def test_many_differences_are_counted() -> None:
    make_run()
    training = "training={seed: 1, max_steps: 2, weight_decay: 0.5, max_grad_norm: 3, optim: sgd}"
    said = refused(2, "run", "--set", training)
    assert re.search(r" was .* was .* was .*; \d more\)", said), said


def test_the_next_free_name_is_offered() -> None:
    make_run()
    Path("run-2").mkdir()
    assert "--output run-3" in refused(2, "run", "--set", "training.seed=7")
    assert "--output run-3" in refused(2, "run", "--resume", "never")


@pytest.mark.parametrize(
    ("command", "content"),
    [
        (("run",), ""),
        (("run",), "strategi: ddp\nmodel: m\n"),
        (("resume", "run"), "model: ["),
        (("resume", "run"), "\0"),
    ],
)
def test_a_run_whose_spec_cannot_be_read_is_left_alone(
    command: tuple[str, ...], content: str
) -> None:
    run = make_run()
    run.spec.write_text(content, encoding="utf-8")
    assert "spec.yaml cannot be read" in refused(2, *command)


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (("run", "--set", "training.seed=7"), 2, "output_taken"),
        (("run", "--resume", "never"), 2, "output_taken"),
        (("run", "--resume", "nowhere"), 2, "no_checkpoint"),
        (("resume", "run", "--resume", "never"), 2, "resume_never"),
        (("resume", "nothing"), 2, "run_not_found"),
        (("run", "--set", "checkpoints.keep=1000000000"), 4, "disk_space"),
    ],
)
def test_a_refusal_in_json(arguments: tuple[str, ...], code: int, name: str) -> None:
    make_run()
    before = tree(Path())
    done = sftlaunch(*arguments, "--json")
    assert (done.code, done.json["error"]["code"]) == (code, name)
    assert done.json["error"]["fix"]
    assert tree(Path()) == before


# --- a run that is complete ---------------------------------------------------------------


@pytest.fixture
def complete() -> RunDirectory:
    run = make_run()
    run.final.mkdir()
    run.update_status(state="completed", stage="done", step=4)
    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        (),
        ("sft.yaml",),
        ("resume", "run"),
        ("resume", "run", "--gpus", "4"),
        ("resume", "run", "--device", "cuda", "--set", "training.bf16=false"),
    ],
)
def test_a_complete_run_is_said_to_be_and_not_touched(
    arguments: tuple[str, ...], complete: RunDirectory
) -> None:
    before = tree(Path())
    done = sftlaunch(*arguments)
    assert (done.code, done.err) == (0, "")
    assert "run is complete (step 4, run/final)" in done.out
    assert "--output" in done.out
    assert tree(Path()) == before
    assert complete.read_status()["state"] == "completed"


def test_a_complete_run_is_one_json_object_under_json(complete: RunDirectory) -> None:
    done = sftlaunch("run", "--json")
    assert done.code == 0
    assert done.json["state"] == complete.read_status()["state"]


def test_another_run_is_refused_where_one_is_complete(complete: RunDirectory) -> None:
    assert "training.seed" in refused(2, "run", "--set", "training.seed=7")


# --- --resume PATH ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nowhere", "none that is whole"),
        ("atuo", "none that is whole"),
        ("data.jsonl", "none that is whole"),
        ("empty", "none that is whole"),
        ("old/checkpoints/checkpoint-9", "no complete.json"),
        ("old/checkpoints/checkpoint-8", "has 1 of 56 bytes"),
        ("old/checkpoints", "none that is whole"),
    ],
)
def test_a_source_without_a_whole_checkpoint_is_refused(path: str, why: str) -> None:
    old = make_run(output="old")
    damage(make_checkpoint(old, 8))
    make_run(output="empty", steps=())
    write_spec(output="new")
    said = refused(2, "run", "--resume", path)
    assert f"--resume {path}" in said
    assert why in said


def test_a_damaged_source_is_found_by_its_contents() -> None:
    old = make_run(output="old", steps=(2,))
    (old.checkpoints / "checkpoint-2/state/part-0.bin").write_bytes(b"WEIGHTSweights")
    write_spec(output="new")
    assert "damaged" in refused(2, "run", "--resume", "old/checkpoints/checkpoint-2")
    assert "none that is whole" in refused(2, "run", "--resume", "old")


@pytest.mark.parametrize("path", ["old", "old/checkpoints/checkpoint-2"])
def test_a_source_with_another_global_batch_is_refused(path: str) -> None:
    make_run(output="old")
    write_spec(output="new")
    said = refused(3, "run", "--resume", path, "--global-batch-size", "64")
    assert "global batch of 32, the plan says 64" in said
    assert "--global-batch-size 32" in said


@pytest.mark.parametrize("path", ["old", "old/checkpoints/checkpoint-2"])
def test_a_source_that_was_another_run_is_refused(path: str) -> None:
    make_run(output="old")
    write_spec(output="new")
    said = refused(2, "run", "--resume", path, "--set", "training.seed=7")
    assert "training.seed was 42, is 7" in said


def test_an_own_checkpoint_that_is_damaged_moves_nothing() -> None:
    run = make_run(steps=(2, 4, 6))
    damage(run.checkpoints / "checkpoint-4")
    refused(2, "run", "--resume", "run/checkpoints/checkpoint-4")
    refused(2, "resume", "run", "--resume", "run/checkpoints/checkpoint-5")


def test_going_back_sets_later_checkpoints_aside_and_deletes_none() -> None:
    run = make_run(steps=(2, 4, 10, 30))
    before = {path.name: tree(path) for path in checkpoint_folders(run.checkpoints)}
    set_aside_after(run, find_source("run/checkpoints/checkpoint-4"))
    newest, skipped = newest_whole(run.checkpoints)
    assert newest is not None
    assert (newest.step, skipped) == (4, ())
    aside = run.checkpoints / SET_ASIDE
    assert {path.name for path in aside.iterdir()} == {"checkpoint-10", "checkpoint-30"}
    # The run goes on, saves again, and is taken back once more.
    before["checkpoint-10.2"] = tree(make_checkpoint(run, 10, time=1.0))
    set_aside_after(run, find_source("run/checkpoints/checkpoint-2"))
    kept = [*aside.iterdir(), run.checkpoints / "checkpoint-2"]
    assert {path.name: tree(path) for path in kept} == before


def test_going_back_to_the_newest_moves_nothing() -> None:
    run = make_run()
    before = tree(run.path)
    for path in ("run", "run/checkpoints/checkpoint-4"):
        set_aside_after(run, find_source(path))
        assert tree(run.path) == before


def test_another_run_s_newest_whole_checkpoint_is_the_source() -> None:
    old = make_run(output="old")
    make_run(output="new", steps=())
    damage(make_checkpoint(old, 8))
    found = find_source("old")
    assert found.path == old.checkpoints / "checkpoint-4"
    with pytest.raises(SpecError, match="none that is whole"):
        find_source("new")


def test_another_run_s_checkpoint_does_not_get_into_a_run() -> None:
    make_run(output="old")
    make_run()
    for path in ("old", "old/checkpoints/checkpoint-2"):
        said = refused(2, "run", "--resume", path)
        assert f"--resume {path}" in said
        assert "checkpoints of its own" in said
        assert "run-2" in said


def test_where_a_run_once_started_from_is_not_forgotten() -> None:
    """It has no checkpoint of its own yet, and must not start over."""
    run = make_run(steps=())
    plan = json.loads(run.plan.read_text(encoding="utf-8"))
    plan["worker"]["resume_from"] = "/old/checkpoints/checkpoint-4"
    run.plan.write_text(json.dumps(plan), encoding="utf-8")
    for arguments in (("resume", "run"), ("run",), ("resume", "run", "--gpus", "4")):
        assert planned(*arguments)["worker"]["resume_from"] == "/old/checkpoints/checkpoint-4"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_run_whose_plan_cannot_be_read_is_refused_or_planned_again(content: str) -> None:
    run = make_run()
    run.plan.write_text(content, encoding="utf-8")
    done = sftlaunch("resume", "run", "--dry-run")
    assert done.code in (0, 2), done.err
    assert "defect" not in done.err


def test_a_dry_run_looks_at_the_source_too() -> None:
    write_spec()
    assert "--resume nowhere" in refused(2, "run", "--dry-run", "--resume", "nowhere")


def test_a_lone_checkpoint_is_refused_in_its_own_words() -> None:
    old = make_run(output="old")
    shutil.copytree(old.checkpoints / "checkpoint-4", "backup/checkpoint-4")
    write_spec(output="new")
    said = refused(2, "run", "--resume", "backup/checkpoint-4")
    assert "--resume backup/checkpoint-4" in said, said


# --- a run that is running ----------------------------------------------------------------


@pytest.fixture
def running() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the run `run` of the working folder."""
    mark = {MARK: str(Path("run").resolve())}
    # The child answers once its new environment is in place.
    argv = ["bash", "-c", "echo here; exec sleep 60"]
    with subprocess.Popen(argv, env={**os.environ, **mark}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


RUNNING_COMMANDS = [
    ("run",),
    ("run", "--dry-run"),
    ("resume", "run"),
    ("run", "--resume", "run/checkpoints/checkpoint-2"),
]


@pytest.mark.parametrize("arguments", RUNNING_COMMANDS)
def test_a_run_is_not_started_twice(
    arguments: tuple[str, ...], running: subprocess.Popen[bytes]
) -> None:
    make_run()
    said = refused(4, *arguments)
    assert f"process {running.pid}" in said
    running.kill()
    running.wait()
    planned("resume", "run")


def test_another_folder_s_processes_do_not_matter(running: subprocess.Popen[bytes]) -> None:
    make_run(output="run-2")
    planned("resume", "run-2")
    assert running.poll() is None


def test_the_commands_that_are_advised_exist(running: subprocess.Popen[bytes]) -> None:
    make_run()
    advised = re.findall(r"sftlaunch (\w+)", refused(4, "run"))
    assert "status" in advised
    assert set(advised) <= set(COMMANDS)


@pytest.mark.parametrize("output", ["run", "link/run"])
def test_what_launch_started_is_found_running(
    output: str, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real launch with a process in place of the ranks, also through a link."""
    (bare_machine / "disk").mkdir()
    (bare_machine / "link").symlink_to("disk")
    run = make_run(output=output)
    plan = plan_from_json(json.loads(run.plan.read_text(encoding="utf-8")))
    monkeypatch.setattr(local, "start_argv", lambda plan: ["sleep", "0.3"])
    seen: list[Outcome] = []

    def look() -> None:
        if not seen:
            seen.append(sftlaunch("resume", output, "--dry-run"))

    local.launch(plan, run, {}, look)
    assert seen[0].code == 4, "a second attempt would have overwritten the first"
    assert "is running" in seen[0].err


# --- space --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "--output", "new/deep/folder"), ("resume", "run")]
)
def test_checkpoints_that_will_not_fit_are_refused_before_the_start(
    arguments: tuple[str, ...],
) -> None:
    make_run()
    said = refused(4, *arguments, "--set", "checkpoints.keep=1000000000")
    assert "1000000000 checkpoints" in said
    assert "checkpoints.keep=1" in said


def test_a_large_model_s_checkpoints_are_reckoned_with() -> None:
    make_model(Path("large"), "llama-3.1-70b")
    write_spec()
    flags = ("--model", "large", "--method", "full", "--set", "checkpoints.keep=1000000")
    assert "1000000 checkpoints" in refused(4, "run", *flags)
    assert planned("run", *flags)["storage"]["total_bytes"] > 10**17


# --- limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (("--stop-after", "90s"), "stop_after_seconds", 90),
        (("--stop-after", "1h30m"), "stop_after_seconds", 5400),
        (("--stop-after", "1-00:00:00"), "stop_after_seconds", 86_400),
        (("--set", "limits.stop_after=5m"), "stop_after_seconds", 300),
        (("--set", "limits.stuck_after=2m"), "stuck_after_seconds", 120),
        ((), "stop_after_seconds", None),
        ((), "stuck_after_seconds", 600),
        (("--max-restarts", "3"), "max_restarts", 3),
        (("--max-restarts", "0"), "max_restarts", 0),
    ],
)
def test_limits_reach_the_ranks(flags: tuple[str, ...], key: str, value: int | None) -> None:
    write_spec()
    assert planned("run", *flags)["worker"]["limits"][key] == value


@pytest.mark.parametrize("text", ["soon", "", "0s", "-5m", "1.5h", "12:00"])
def test_a_stop_after_that_is_no_time_is_refused(text: str) -> None:
    write_spec()
    said = refused(2, "run", f"--stop-after={text}")
    assert "--stop-after" in said
    assert "90s, 30m, 12h" in said


@pytest.mark.parametrize("text", ["-1", "many", "1.5", "1001"])
def test_a_number_of_restarts_that_is_none_is_refused(text: str) -> None:
    write_spec()
    assert "--max-restarts" in refused(2, "run", f"--max-restarts={text}")


def test_torchrun_is_told_how_often_it_may_start_again() -> None:
    write_spec()
    plan = planned("run", "--max-restarts", "3")
    assert "--max-restarts=3" in plan["command"]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in plan["files"]["command.sh"]
    without = planned("run")
    said = [part for part in without["command"] if part.startswith("--max-restarts")]
    assert said in ([], ["--max-restarts=0"])
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in without["files"]["command.sh"]


def test_a_limit_of_the_run_stays_until_another_is_said() -> None:
    make_run("--stop-after", "1h")
    assert planned("resume", "run")["worker"]["limits"]["stop_after_seconds"] == 3600
    longer = planned("resume", "run", "--stop-after", "2h")
    assert longer["worker"]["limits"]["stop_after_seconds"] == 7200
    none = planned("resume", "run", "--set", "limits.stop_after=null")
    assert none["worker"]["limits"]["stop_after_seconds"] is None


def test_patience_at_a_stop_is_what_the_last_save_really_took() -> None:
    run = make_run(steps=())
    assert "--shutdown-timeout=120" in planned("resume", "run")["command"]
    make_checkpoint(run, 2, seconds=900.0)
    make_checkpoint(run, 4, seconds=500.0)
    (make_checkpoint(run, 6, seconds=9000.0) / SEAL).unlink()
    plan = planned("resume", "run")
    assert plan["worker"]["limits"]["shutdown_timeout_seconds"] == 1500
    assert "--shutdown-timeout=1500" in plan["command"]
    assert "--shutdown-timeout=1500" in plan["files"]["command.sh"]
