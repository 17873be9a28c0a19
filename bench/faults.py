"""Runs that are killed, stopped, starved of disk and fed damaged files: is anything lost?

Each case starts a real run by `sftlaunch`, does something bad to it at a random moment, and
goes on with `sftlaunch resume` until it is complete. Its losses are compared with those of
an undisturbed run of the same seed. `python -m bench.faults` runs them all and writes
docs/faults.md with `--write`; `--only NAME` runs one kind. It takes an hour or more: `--log FILE`
goes on with what was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.assets import asset
from launcher.errors import ExitCode
from launcher.launch.processes import members
from launcher.runs.checkpoints import SEAL, checkpoint_folders, newest_whole
from launcher.runs.directory import RunDirectory

STEPS = 24
EVERY = 4
GLOBAL_BATCH = 16
BOUND = 1e-5
START_TIMEOUT_SECONDS = 120
END_TIMEOUT_SECONDS = 300
MOST_RESUMES = 4
HELD_OUT = asset("recipes", "tiny", "data", "eval.jsonl")
INJECT = Path(__file__).resolve().parent / "inject"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "faults.md"
# What every run here has in common: a small model, no evaluation, a checkpoint often.
SETTINGS = {
    "training.max_steps": STEPS,
    "training.warmup_steps": 0,
    "training.learning_rate": 1e-3,
    "batch.global_batch_size": GLOBAL_BATCH,
    "batch.micro_batch_size": 4,
    "checkpoints.every_steps": EVERY,
    "checkpoints.keep": 2,
    "evaluation.exact_match": "false",
    "dataset.eval_path": "null",
    "samples.prompts": "[]",
    "limits.stuck_after": "60s",
}


@dataclass(frozen=True)
class Setting:
    """What is disturbed."""

    strategy: str
    method: str

    @property
    def name(self) -> str:
        """Short name."""
        return f"{self.strategy}-{self.method}"


@dataclass
class Attempt:
    """A run on its way: its directory, its launcher, and what happened to it."""

    run: RunDirectory
    process: subprocess.Popen[bytes]
    rng: random.Random
    notes: list[str] = field(default_factory=list)

    def ranks(self) -> list[int]:
        """Processes that train, lowest rank first."""
        found = sorted(self.run.path.glob("logs/attempt-*/rank-*.log"))
        last = [path for path in found if path.parent == found[-1].parent] if found else []
        return [pid for path in last for pid in _holders(path)]

    def step(self) -> int:
        """Last step that was logged."""
        steps = [m["step"] for m in self.run.read_metrics() if "loss" in m]
        return max(steps, default=0)

    def wait_until(self, reached: Callable[[], bool], timeout: float) -> bool:
        """Whether it came to that before the run ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if reached():
                return True
            time.sleep(0.01)
        return reached()

    def at_random_step(self) -> int:
        """Wait for a random step past the first checkpoint, and a random moment in it."""
        wanted = self.rng.randint(EVERY, STEPS - 4)
        self.wait_until(lambda: self.step() >= wanted, START_TIMEOUT_SECONDS)
        time.sleep(self.rng.random() * 0.2)
        return self.step()

    def in_a_save(self) -> int:
        """Wait until a checkpoint is being written."""
        wanted = self.rng.choice(range(2 * EVERY, STEPS - EVERY + 1, EVERY))
        folder = self.run.checkpoints / f"checkpoint-{wanted}"
        self.wait_until(folder.exists, START_TIMEOUT_SECONDS)
        return self.step()

    def end(self) -> int:
        """Exit code of the launcher; one that does not end is noted and killed."""
        try:
            return self.process.wait(END_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.notes.append(f"did not end within {END_TIMEOUT_SECONDS} s")
            kill_everything(self)
            return self.process.wait()


def _holders(log: Path) -> list[int]:
    """Processes whose standard output is a file."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "fd" / "1").readlink() == log:
                    found.append(int(entry.name))
    return found


# --- faults: each disturbs a run and returns the exit codes that it may end with ---


def kill_one(attempt: Attempt) -> tuple[int, ...]:
    """SIGKILL to a random rank at a random moment."""
    attempt.at_random_step()
    os.kill(attempt.rng.choice(attempt.ranks()), signal.SIGKILL)
    return (ExitCode.RUN_FAILED,)


def kill_in_save(attempt: Attempt) -> tuple[int, ...]:
    """SIGKILL to a random rank while a checkpoint is written."""
    attempt.in_a_save()
    time.sleep(attempt.rng.random() * 0.05)
    os.kill(attempt.rng.choice(attempt.ranks()), signal.SIGKILL)
    return (ExitCode.RUN_FAILED,)


def kill_all(attempt: Attempt) -> tuple[int, ...]:
    """SIGKILL to every process of the run, the launcher too."""
    attempt.at_random_step()
    kill_everything(attempt)
    return (-signal.SIGKILL,)


def kill_everything(attempt: Attempt) -> None:
    """SIGKILL to the launcher and all that it started."""
    attempt.process.kill()
    # Again: what is being forked right now is not on the first list.
    while pids := members(str(attempt.run.path)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def kill_launcher(attempt: Attempt) -> tuple[int, ...]:
    """SIGKILL to the launcher alone: the ranks save and stop."""
    attempt.at_random_step()
    attempt.process.kill()
    deadline = time.monotonic() + END_TIMEOUT_SECONDS
    while members(str(attempt.run.path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if attempt.run.read_status()["state"] != "preempted":
        attempt.notes.append("the ranks did not save")
    return (-signal.SIGKILL,)


def _stop(
    number: signal.Signals, whom: str, times: int = 1
) -> Callable[[Attempt], tuple[int, ...]]:
    def fault(attempt: Attempt) -> tuple[int, ...]:
        attempt.at_random_step()
        for _ in range(times):
            ranks = attempt.ranks()
            targets = {"one": [attempt.rng.choice(ranks)], "all": ranks}.get(
                whom, [attempt.process.pid]
            )
            for pid in targets:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.05)
        return (ExitCode.PREEMPTED,)

    return fault


def interrupt_twice(attempt: Attempt) -> tuple[int, ...]:
    """A second Ctrl-C ends all at once."""
    attempt.at_random_step()
    attempt.process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    attempt.process.send_signal(signal.SIGINT)
    return (ExitCode.RUN_FAILED, ExitCode.PREEMPTED)


def damage(how: str) -> Callable[[Attempt], tuple[int, ...]]:
    """Kill the run, then damage the newest whole checkpoint's largest file."""

    def fault(attempt: Attempt) -> tuple[int, ...]:
        attempt.wait_until(lambda: attempt.step() > 2 * EVERY + 1, START_TIMEOUT_SECONDS)
        codes = kill_all(attempt)
        newest, _ = newest_whole(attempt.run.checkpoints, contents=False)
        if newest is None:
            attempt.notes.append("no checkpoint to damage")
            return codes
        name = max(newest.record["files"], key=lambda n: newest.record["files"][n]["bytes"])
        path = newest.path / name
        content = bytearray(path.read_bytes())
        if how == "truncate":
            path.write_bytes(content[: len(content) // 2])
        elif how == "empty":
            path.write_bytes(b"")
        else:
            content[attempt.rng.randrange(len(content))] ^= 1 << attempt.rng.randrange(8)
            path.write_bytes(content)
        return codes

    return fault


def unseal(attempt: Attempt) -> tuple[int, ...]:
    """Kill the run, then take the newest checkpoint's seal."""
    codes = kill_all(attempt)
    newest, _ = newest_whole(attempt.run.checkpoints, contents=False)
    if newest is not None:
        (newest.path / SEAL).unlink()
    return codes


def fails_by_itself(attempt: Attempt) -> tuple[int, ...]:
    """Nothing to do: what was injected ends the run."""
    return (ExitCode.RUN_FAILED,)


def stops_by_itself(attempt: Attempt) -> tuple[int, ...]:
    """Nothing to do: a rank gets its signal from what was injected."""
    return (ExitCode.PREEMPTED,)


def restarts_by_itself(attempt: Attempt) -> tuple[int, ...]:
    """SIGKILL to a random rank of a run that may start again: it completes in one go."""
    kill_one(attempt)
    return ()


FAULTS: dict[str, Callable[[Attempt], tuple[int, ...]]] = {
    "SIGKILL one rank": kill_one,
    "SIGKILL one rank in a save": kill_in_save,
    "SIGKILL all": kill_all,
    "SIGKILL the launcher": kill_launcher,
    "SIGTERM the launcher": _stop(signal.SIGTERM, "launcher"),
    "SIGTERM one rank": _stop(signal.SIGTERM, "one"),
    "SIGTERM all ranks": _stop(signal.SIGTERM, "all"),
    "SIGTERM all ranks twice": _stop(signal.SIGTERM, "all", 2),
    "SIGUSR1 the launcher": _stop(signal.SIGUSR1, "launcher"),
    "SIGUSR1 one rank": _stop(signal.SIGUSR1, "one"),
    "SIGUSR1 all ranks twice": _stop(signal.SIGUSR1, "all", 2),
    "Ctrl-C": _stop(signal.SIGINT, "launcher"),
    "Ctrl-C twice": interrupt_twice,
    "truncated file": damage("truncate"),
    "empty file": damage("empty"),
    "flipped bit": damage("flip"),
    "missing seal": unseal,
    "NaN in one rank": fails_by_itself,
    "one rank hangs": fails_by_itself,
    "SIGKILL one rank, --max-restarts 1": restarts_by_itself,
    "slow disk, SIGTERM": _stop(signal.SIGTERM, "launcher"),
    "SIGUSR1 one rank in an evaluation": stops_by_itself,
    "SIGUSR1 one rank while sampling": stops_by_itself,
}
# Fault -> environment of the first attempt (bench/inject), and its extra arguments.
INJECTED: dict[str, dict[str, str]] = {
    "NaN in one rank": {"BENCH_POISON": "nan 11 1"},
    "one rank hangs": {"BENCH_POISON": "hang 11 1"},
    "slow disk, SIGTERM": {"BENCH_SLOW_FSYNC": "0.3"},
    "SIGUSR1 one rank in an evaluation": {"BENCH_POISON": "evaluation 9 1"},
    "SIGUSR1 one rank while sampling": {"BENCH_POISON": "samples 10 1"},
}
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "one rank hangs": ("--set", "limits.stuck_after=15s"),
    "SIGKILL one rank, --max-restarts 1": ("--max-restarts", "1"),
    "SIGUSR1 one rank in an evaluation": (
        *("--set", f"dataset.eval_path={HELD_OUT}", "--set", "evaluation.every_steps=3"),
    ),
    "SIGUSR1 one rank while sampling": (
        *("--set", "samples.prompts=[one, two, three, four]", "--set", "samples.every_steps=5"),
        *("--set", "samples.max_new_tokens=4"),
    ),
}
DAMAGES = ("truncated file", "empty file", "flipped bit", "missing seal")
# Faults of the file system, which need a mount of their own.
DISK_FULL = "disk full in a save"
SETTINGS_UNDER_TEST = tuple(
    Setting(strategy, method)
    for strategy in ("ddp", "fsdp", "zero3")
    for method in ("lora", "full")
)


@dataclass
class Result:
    """One disturbed run."""

    fault: str
    setting: Setting
    seed: int
    recovered: bool
    resumes: int
    steps_lost: int
    """Steps that were trained and had to be trained again, at most at one disturbance."""
    difference: float | None
    """Largest loss difference of any step from the undisturbed run."""
    notes: list[str]

    @property
    def good(self) -> bool:
        """Recovered, nothing lost beyond a save interval, the same curve."""
        same = self.difference is not None and self.difference <= BOUND
        # Where the newest checkpoint itself is destroyed, the one before it is an interval older.
        most = 2 * EVERY if self.fault in DAMAGES else EVERY
        return self.recovered and same and self.steps_lost <= most and not self.notes


def start(setting: Setting, folder: Path, seed: int, fault: str = "") -> Attempt:
    """Start a run in `folder`, with what the fault injects."""
    argv = [*_launcher(), "--strategy", setting.strategy, "--method", setting.method]
    argv += ["--gpus", "2", "--device", "cpu", "--output", str(folder)]
    for key, value in SETTINGS.items():
        argv += ["--set", f"{key}={value}"]
    argv += ARGUMENTS.get(fault, ())
    injected = INJECTED.get(fault, {})
    if injected:
        paths = (str(INJECT), os.environ.get("PYTHONPATH", ""))
        injected = {**injected, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return _attempt(argv, folder, seed, injected)


def resume(folder: Path, seed: int) -> Attempt:
    """Go on with the run in `folder`."""
    return _attempt([*_launcher(), "resume", str(folder)], folder, seed)


def _launcher() -> list[str]:
    return [sys.executable, "-c", "from launcher.cli import main; main()"]


def _attempt(
    argv: Sequence[str], folder: Path, seed: int, environment: Mapping[str, str] | None = None
) -> Attempt:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder.parent,
            env={**os.environ, **(environment or {})},
        )
    return Attempt(RunDirectory(folder), process, random.Random(seed))


def losses(run: RunDirectory) -> dict[int, float]:
    """Loss of every step."""
    return {m["step"]: m["loss"] for m in run.read_metrics() if "loss" in m}


def reference(setting: Setting, folder: Path) -> dict[int, float]:
    """Losses of the undisturbed run."""
    attempt = start(setting, folder / f"reference-{setting.name}", 0)
    code = attempt.end()
    if code != ExitCode.DONE:
        raise RuntimeError(f"the undisturbed run {setting.name} exited {code}")
    return losses(attempt.run)


def disturb(
    fault: str, setting: Setting, folder: Path, seed: int, undisturbed: dict[int, float]
) -> Result:
    """Start, disturb, go on until complete."""
    path = folder / f"{fault.replace(' ', '-')}-{setting.name}-{seed}"
    attempt = start(setting, path, seed, fault)
    allowed = FAULTS[fault](attempt)
    return follow_up(fault, setting, attempt, allowed, undisturbed, seed)


def follow_up(
    fault: str,
    setting: Setting,
    attempt: Attempt,
    allowed: tuple[int, ...],
    undisturbed: dict[int, float],
    seed: int,
) -> Result:
    """Resume until the run is complete, and compare."""
    run, notes = attempt.run, attempt.notes
    code = attempt.end()
    if code not in (*allowed, ExitCode.DONE):
        notes.append(f"exit {code}")
    if left := members(str(run.path)):
        notes.append(f"{len(left)} processes left")
    lost = resumes = 0
    while code != ExitCode.DONE and resumes < MOST_RESUMES:
        reached = max(losses(run), default=0)
        newest, _ = newest_whole(run.checkpoints)
        lost = max(lost, reached - (newest.step if newest else 0))
        resumes += 1
        code = resume(run.path, seed).end()
    found = losses(run)
    same = found.keys() == undisturbed.keys()
    difference = max(abs(found[s] - undisturbed[s]) for s in found) if same else None
    complete = run.read_status().get("state") == "completed" and (run.final).is_dir()
    return Result(fault, setting, seed, complete, resumes, lost, difference, notes)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes (needs root)."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(setting: Setting, folder: Path, seed: int, undisturbed: dict[int, float]) -> Result:
    """Fill the disk so that a later save fails, then make room and go on."""
    with small_disk(folder / f"disk-{setting.name}-{seed}", 400 * 2**20) as disk:
        attempt = start(setting, disk / "run", seed)
        attempt.wait_until(lambda: len(_sealed(attempt.run)) > 0, START_TIMEOUT_SECONDS)
        ballast = disk / "ballast"
        _fill(ballast, leave=1 << attempt.rng.randint(12, 18))
        code = attempt.end()
        whole, _ = newest_whole(attempt.run.checkpoints)
        if code != ExitCode.DONE and whole is None:
            attempt.notes.append("no whole checkpoint was left")
        ballast.unlink()
        allowed = (ExitCode.RUN_FAILED,)
        return follow_up(DISK_FULL, setting, attempt, allowed, undisturbed, seed)


def _sealed(run: RunDirectory) -> list[Path]:
    return [path for path in checkpoint_folders(run.checkpoints) if (path / SEAL).is_file()]


def _fill(path: Path, leave: int) -> None:
    """Take all space but a little."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"\0" * 65_536)
    size = path.stat().st_size
    os.truncate(path, max(0, size - leave))


def as_markdown(results: Sequence[Result]) -> str:
    """One line a fault and setting; several seeds in one."""
    lines = [
        "| fault | run | seeds | recovered | most steps lost | largest loss difference | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.fault, result.setting.name), []).append(result)
    for (fault, name), group in groups.items():
        differences = [r.difference for r in group]
        known = [d for d in differences if d is not None]
        shown = f"{max(known):.1e}" if len(known) == len(group) else "curves differ in length"
        notes = "; ".join(note for r in group for note in r.notes)
        lines.append(
            f"| {fault} | {name} | {len(group)} | {sum(r.recovered for r in group)} "
            f"| {max(r.steps_lost for r in group)} | {shown} | {notes} |"
        )
    good = sum(r.good for r in results)
    lines.append(f"\n{len(results)} faults, {good} recovered with nothing lost or wrong.")
    return "\n".join(lines) + "\n"


def seeds(number: int, count: int) -> range:
    """Every run draws its own moment; the number makes it the same next time."""
    return range(number * count, (number + 1) * count)


def say(result: Result, log: Path | None) -> None:
    """One line a run, on standard output and into the log."""
    row = {**dataclasses.asdict(result), "setting": result.setting.name, "good": result.good}
    line = json.dumps(row) + "\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    if log is not None:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(line)


def read_results(log: Path | None) -> list[Result]:
    """What an earlier start has logged."""
    names = {setting.name: setting for setting in SETTINGS_UNDER_TEST}
    found = []
    for line in log.read_text(encoding="utf-8").splitlines() if log and log.is_file() else ():
        row = json.loads(line)
        row.pop("good")
        found.append(Result(**{**row, "setting": names[row["setting"]]}))
    return found


INTRO = f"""# Faults: what happens to a run on its worst night

Made by `python -m bench.faults --write`: real runs of the recipe tiny's model on two CPU ranks,
{STEPS} steps with a checkpoint every {EVERY}, disturbed at a random moment and resumed with
`sftlaunch resume` until complete. "Steps lost" were trained and had to be trained again: at most
the save interval, and at most two where the newest checkpoint itself is destroyed. The loss
difference is the largest of any step from an undisturbed run (bound {BOUND:.0e}). A kind that a
run lacks was not tried for it.

"""


def main() -> int:
    """Disturb everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="kinds of fault")
    parser.add_argument("--settings", nargs="*", help="such as fsdp-lora")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--thin", type=int, default=1, help="only every Nth kind in each setting")
    parser.add_argument("--write", action="store_true", help="write docs/faults.md")
    parser.add_argument("--log", type=Path, help="results so far; what is in it is not run again")
    options = parser.parse_args()
    kinds = options.only or [*FAULTS, DISK_FULL]
    results = read_results(options.log)
    done = Counter((result.fault, result.setting) for result in results)
    with tempfile.TemporaryDirectory(prefix="sftlaunch-faults-") as name:
        folder = Path(name)
        for place, setting in enumerate(SETTINGS_UNDER_TEST):
            if options.settings and setting.name not in options.settings:
                continue
            todo = [
                (fault, seed)
                for number, fault in enumerate(kinds)
                for seed in seeds(number * len(SETTINGS_UNDER_TEST) + place, options.seeds)
                if number % options.thin == place % options.thin
            ]
            todo = [(fault, seed) for fault, seed in todo if not done[fault, setting]]
            undisturbed = reference(setting, folder) if todo else {}
            for fault, seed in todo:
                if fault == DISK_FULL:
                    result = fill_disk(setting, folder, seed, undisturbed)
                else:
                    result = disturb(fault, setting, folder, seed, undisturbed)
                results.append(result)
                say(result, options.log)
    text = as_markdown(results)
    sys.stdout.write(text)
    if options.write:
        DOCUMENT.write_text(INTRO + text, encoding="utf-8")
    return int(not all(result.good for result in results))


if __name__ == "__main__":
    sys.exit(main())
