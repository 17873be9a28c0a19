"""`--sweep` from the command line: plans, refusals, the sequence here, and going on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import ExitCode
from launcher.launch.local import StopSignals
from launcher.plan.types import Plan
from launcher.runs.directory import RunDirectory, append_line
from launcher.runs.failures import Failure
from launcher.runs.sweep import SweepDirectory
from tests.support import ROOT, Outcome, make_model, sftlaunch, tree, write_rows

TINY = str(ROOT / "recipes" / "tiny" / "sft.yaml")
SWEEP = ("--sweep=learning_rate=1e-4,2e-4", "--sweep=seed=1,2,3")
SECONDS_FOR_A_THOUSAND = 5.0


class Ends(dict[int, Any]):
    """Seed -> how its run ends, completed where nothing is said; and what was started."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []


@pytest.fixture(autouse=True)
def _machine(bare_machine: Path) -> None:
    make_model(Path("model"), "llama-3.1-8b")
    write_rows(Path("data.jsonl"))
    values = {"model": "model", "dataset": "data.jsonl", "output": "runs/it"}
    values |= {"hardware": {"device": "cpu"}}
    Path("sft.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    """Stands in for the ranks."""
    ends = Ends()

    def launch(plan: Plan, run: RunDirectory, *_: Any) -> tuple[ExitCode, Failure | None]:
        seed = plan.worker.training_arguments["seed"]
        ends.order.append(seed)
        run.update_status(state="running", step=0, max_steps=2)
        append_line(run.metrics, {"step": 2, "loss": 1.0 / seed, "time": 0})
        end = ends.get(seed, "completed")
        if callable(end):
            end = end()
        failure = Failure(0, "it broke", "", "", "log", ()) if end == "failed" else None
        error = failure.as_json() if failure else None
        run.update_status(state=end, step=2, error=error)
        return ExitCode.DONE, failure

    monkeypatch.setattr("launcher.cli.sweep.local.launch", launch)
    monkeypatch.setattr("launcher.launch.local.check_environment", lambda *_: None)
    return ends


def refused(code: int, *arguments: str) -> str:
    before = tree(Path())
    done = sftlaunch(*arguments)
    assert done.code == code, (done.out, done.err)
    assert tree(Path()) == before, "a refusal wrote something"
    assert "Traceback" not in done.err
    return done.err


@pytest.mark.parametrize("command", [("plan",), ("run", "--dry-run"), ("--dry-run",)])
def test_the_plan_says_what_is_common_once(command: tuple[str, ...]) -> None:
    before = tree(Path())
    done = sftlaunch(*command, *SWEEP)
    assert done.code == 0, done.err
    assert "6 runs: learning_rate 1e-4, 2e-4 x seed 1, 2, 3" in done.out
    for label in ("model ", "strategy ", "batch ", "method "):
        assert done.out.count(f"\n{label}") == 1
    assert "5-learning_rate=2e-4+seed=3" in done.out
    assert tree(Path()) == before


def test_the_plan_as_json() -> None:
    found = sftlaunch("plan", "--json", "--on=slurm", "--set=slurm.array_throttle=2", *SWEEP).json
    assert found["sweep"]["count"] == 6
    assert found["sweep"]["jobs"] == 1
    assert "--array=0-5%2" in found["sweep"]["files"]["job.sbatch"]
    assert [run["values"]["training.seed"] for run in found["runs"]] == [1, 2, 3, 1, 2, 3]
    rates = [run["plan"]["worker"]["training_arguments"]["learning_rate"] for run in found["runs"]]
    assert rates == [1e-4] * 3 + [2e-4] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--sweep=seed=1,x",), 2, ("run 1 (seed=x)", "'x'", "integer")),
        (("--sweep=learning_rate=0.1,-1",), 2, ("run 1 (learning_rate=-1)", "greater than 0")),
        (("--sweep=method=lora,lorra",), 2, ("run 1", "did you mean lora?")),
        (("--sweep=training.sed=1",), 2, ("unknown key training.sed", "training.seed")),
        (("--sweep=global_batch_size=32,33", "--gpus=2"), 3, ("run 1", "33")),
        (("--sweep=dataset=data.jsonl,nowhere.jsonl",), 2, ("run 1", "nowhere.jsonl")),
        (("--sweep=seed=1", "--sweep=seed=2"), 2, ("set the same key",)),
        (("--sweep=seed=1,2", "--set=training.seed=3"), 2, ("set the same key",)),
        (("--sweep=gpus=1,2", "--on=slurm"), 3, ("cannot be swept in one job", "--output")),
        (("--sweep=seed=1,2", "--resume=elsewhere"), 2, ("--resume PATH",)),
        (("--sweep=seed=1,2", "--on=docker"), 4, ("docker",)),
        (("--sweep=seed=1,2", "--on=slurm", "--chain=2"), 2, ("chain",)),
        (("--sweep=seed=1,2", "--on=slurm", "--output=100%"), 2, ("percent sign",)),
        (("--sweep=seed=1,2", "--set=training.nonsense=1"), 2, ("unknown key training.nonsense",)),
    ],
)
def test_refused_before_anything_is_written(
    arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    text = refused(code, *arguments, "--dry-run")
    for word in words:
        assert word in text, text


def test_an_error_of_the_file_is_not_put_on_a_run() -> None:
    Path("sft.yaml").write_text("model: model\nmodle: x\n", encoding="utf-8")
    text = refused(2, "--sweep=seed=1,2", "--dry-run")
    assert "sft.yaml:2" in text
    assert "run 0" not in text


def test_what_all_runs_need_may_come_from_the_sweep() -> None:
    make_model(Path("other"), "llama-3.1-8b")
    Path("sft.yaml").write_text("dataset: data.jsonl\nhardware: {device: cpu}\n", encoding="utf-8")
    found = sftlaunch("plan", "--json", "--sweep=model=model,other").json
    models = [Path(run["plan"]["worker"]["model"]["path"]).name for run in found["runs"]]
    assert models == ["model", "other"]
    assert found["sweep"]["run"].endswith("runs/sweep")


def test_without_sbatch_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path.cwd()))
    assert "no sbatch" in refused(4, "--on=slurm", *SWEEP)


@pytest.mark.parametrize("holds", ["a run", "a file", "another sweep"])
def test_a_folder_that_is_taken(holds: str, ends: Ends) -> None:
    if holds == "a run":
        RunDirectory(Path("runs/it")).create({"plan.json": "{}"})
    elif holds == "a file":
        Path("runs/it").mkdir(parents=True)
        Path("runs/it/notes").touch()
    else:
        assert sftlaunch("--sweep=seed=1,2").code == 0
    text = refused(2, "--sweep=seed=1,2,3")
    assert "runs/it-2" in text
    assert {"a run": "holds a run", "a file": "no empty", "another sweep": "seed=1,2)"}[
        holds
    ] in text


def test_the_same_sweep_is_not_started_anew(ends: Ends) -> None:
    assert sftlaunch("--sweep=seed=1,2").code == 0
    assert "holds this sweep" in refused(2, "--sweep=seed=1,2", "--resume=never")


def test_a_changed_spec_is_another_sweep(ends: Ends) -> None:
    ends[2] = "preempted"
    sftlaunch("--sweep=seed=1,2")
    text = refused(2, "--sweep=seed=1,2", "--method=dora")
    assert "method was 'lora', is 'dora'" in text
    assert "run 0 (seed=1)" in text


def test_runs_in_order_whatever_becomes_of_them(ends: Ends) -> None:
    ends[2] = "failed"
    done = sftlaunch("--sweep=seed=1,2,3", "--json")
    assert done.code == ExitCode.RUN_FAILED
    assert ends.order == [1, 2, 3]
    runs = done.json["runs"]
    assert [run["state"] for run in runs] == ["completed", "failed", "completed"]
    assert [run["loss"] for run in runs] == [1.0, 0.5, 1 / 3]
    assert "it broke" in done.err
    text = sftlaunch("status", "it").out
    assert "3 runs: 1 failed, 2 completed" in text
    assert "0.3333" in text
    for run in SweepDirectory(Path("runs/it")).runs:
        assert sftlaunch("status", str(run.path)).code == 0
        assert run.spec.is_file()
        assert run.plan.is_file()


@pytest.mark.parametrize("command", [("--sweep=seed=1,2,3",), ("resume", "it")])
def test_what_is_not_complete_goes_on(command: tuple[str, ...], ends: Ends) -> None:
    ends[2] = "failed"
    sftlaunch("--sweep=seed=1,2,3")
    assert sftlaunch("resume", "it", "--dry-run").code == 0
    ends[2] = "completed"
    done = sftlaunch(*command)
    assert done.code == 0, done.err
    assert ends.order == [1, 2, 3, 2]
    assert sftlaunch(*command).code == 0  # nothing is left
    assert ends.order == [1, 2, 3, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("late", [False, True])
def test_a_stop_leaves_the_rest_unstarted(number: signal.Signals, late: bool, ends: Ends) -> None:
    def stop() -> str:
        signal.raise_signal(number)
        return "completed" if late else "preempted"

    ends[2] = stop
    done = sftlaunch("--sweep=seed=1,2,3", "--json")
    assert done.code == ExitCode.PREEMPTED
    expected = ["completed", "completed" if late else "preempted", "planned"]
    assert [run["state"] for run in done.json["runs"]] == expected
    ends[2] = "completed"
    assert sftlaunch("--sweep=seed=1,2,3").code == 0
    assert ends.order == ([1, 2, 3] if late else [1, 2, 2, 3])


def test_a_stop_is_said_also_where_a_run_has_failed(ends: Ends) -> None:
    def stop() -> str:
        signal.raise_signal(signal.SIGTERM)
        return "preempted"

    ends |= {1: "failed", 2: stop}
    assert sftlaunch("--sweep=seed=1,2,3").code == ExitCode.PREEMPTED


def test_a_signal_within_a_run_is_heard_around_it() -> None:
    with StopSignals() as around:
        with StopSignals() as within:
            signal.raise_signal(signal.SIGTERM)
        assert (within.asked, around.asked) == (True, True)


def test_a_run_that_stops_by_itself_stops_no_other(ends: Ends) -> None:
    ends[1] = "preempted"
    assert sftlaunch("--sweep=seed=1,2").code == ExitCode.PREEMPTED
    assert ends.order == [1, 2]


def test_two_launchers_do_not_run_one_sweep(ends: Ends) -> None:
    found: list[Outcome] = []

    def again() -> str:
        found.append(sftlaunch("--sweep=seed=1,2"))
        return "completed"

    ends[1] = again
    assert sftlaunch("--sweep=seed=1,2").code == 0
    assert (found[0].code, "is running" in found[0].err) == (4, True)


def test_cancel_stops_the_sequence(ends: Ends) -> None:
    def cancel() -> str:
        # From another process, as the lock is this one's.
        argv = [sys.executable, "-c", "from tests.support import sftlaunch as s; s('cancel', 'it')"]
        cancelling.append(subprocess.Popen(argv, env={"PYTHONPATH": str(ROOT)}))
        sweep = SweepDirectory(Path("runs/it"))
        deadline = time.monotonic() + 20
        while not sweep.cancelled.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return "preempted"

    cancelling: list[subprocess.Popen[bytes]] = []
    ends[1] = cancel
    done = sftlaunch("--sweep=seed=1,2", "--json")
    assert done.code == ExitCode.PREEMPTED
    assert [run["state"] for run in done.json["runs"]] == ["preempted", "planned"]
    assert cancelling[0].wait(20) == 0
    assert "is not running" in refused(2, "cancel", "it")
    ends[1] = "completed"
    assert sftlaunch("resume", "it").code == 0


def test_commands_for_one_run_name_those_of_the_sweep(ends: Ends) -> None:
    sftlaunch("--sweep=seed=1,2")
    for command in (("logs", "it"), ("generate", "it", "--prompt=x")):
        text = refused(2, *command)
        assert "is a sweep of 2 runs" in text
        assert "0-seed=1" in text


@pytest.mark.parametrize("flags", [("--sweep=seed=5",), ("--output=elsewhere",)])
def test_a_sweep_goes_on_as_it_is(flags: tuple[str, ...], ends: Ends) -> None:
    sftlaunch("--sweep=seed=1,2")
    assert "as it is" in refused(2, "resume", "it", *flags)


def test_a_global_batch_by_default_is_kept_on_other_hardware(ends: Ends) -> None:
    ends[2] = "preempted"
    sftlaunch("--sweep=seed=1,2", "--gpus=3")
    (before,) = {_batch(run) for run in SweepDirectory(Path("runs/it")).runs}
    done = sftlaunch("resume", "it", "--gpus=1")
    assert done.code == ExitCode.PREEMPTED, done.err
    assert {_batch(run) for run in SweepDirectory(Path("runs/it")).runs} == {before}


def _batch(run: RunDirectory) -> int:
    plan = json.loads(run.plan.read_text("utf-8"))
    return int(plan["batch"]["global_batch_size"])


def test_facts_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.cli.sweep import decide

    calls: list[Any] = []
    real: Callable[..., Any] = decide.probe
    monkeypatch.setattr(decide, "probe", lambda spec: calls.append(spec) or real(spec))
    assert sftlaunch("plan", *SWEEP).code == 0
    assert len(calls) == 1
    write_rows(Path("other.jsonl"))
    assert sftlaunch("plan", "--sweep=dataset=data.jsonl,other.jsonl", "--sweep=seed=1,2").code == 0
    assert len(calls) == 3


def test_a_thousand_runs_are_planned_and_written_in_time(tmp_path: Path) -> None:
    """Everything up to the call of sbatch; the better of two, as machines have other work."""
    from launcher.cli.options import Request
    from launcher.cli.sweep.decide import decide_request
    from launcher.cli.sweep.write import written

    taken = []
    for attempt in (1, 2):
        seeds = ",".join(map(str, range(1000)))
        request = Request("sft.yaml", (), "slurm", "auto", json=False, sweep=(f"seed={seeds}",))
        started = time.monotonic()
        decided = decide_request(request)
        with written(decided, range(1000)):
            taken.append(time.monotonic() - started)
        assert len(list(Path("runs/it").glob("*/plan.json"))) == 1000
        if taken[-1] < SECONDS_FOR_A_THOUSAND:
            break
        Path("runs/it").rename(tmp_path / f"slow-{attempt}")
    assert min(taken) < SECONDS_FOR_A_THOUSAND, taken


@pytest.mark.engine
def test_two_real_runs_in_sequence() -> None:
    settings = ("evaluation.exact_match=false", "samples.prompts=[]", "training.max_steps=2")
    sets = [f"--set={setting}" for setting in settings]
    done = sftlaunch(TINY, "--sweep=seed=1,2", "--device=cpu", "--output=real", "--json", *sets)
    assert done.code == 0, done.err
    first, second = done.json["runs"]
    assert (first["state"], second["state"]) == ("completed", "completed")
    assert first["loss"] != second["loss"]
    for run in SweepDirectory(Path("real")).runs:
        assert (run.final / "adapter_model.safetensors").is_file()
