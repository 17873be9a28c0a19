"""Which rank failed first, and what its error means.

Ranks record their own errors; the earliest one is the cause, the others fail because it
is gone. `PATTERNS` turns known errors into cause and fix.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.runs.directory import RunDirectory

# Errors of a rank whose peer is gone: never the cause where another rank has its own.
SECONDARY = re.compile(
    r"Connection (reset|closed) by peer|Broken pipe|NCCL (communicator was )?abort|"
    r"recvValue failed|DistBackendError|Gloo.*(timed out|closed)",
    re.IGNORECASE,
)
LOG_TAIL_LINES = 15
# Room that a rank's record of its error needs at most.
RECORD_BYTES = 2**16
# Innermost frames of a rank that waits for others.
WAITING = re.compile(r"torch/(distributed|autograd)/|train/control\.py")
# The first line of what faulthandler's timer writes.
TIMER = re.compile(r"Timeout \([\d:.]+\)!\n")
FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# One entry of torch elastic's ChildFailedError: its root cause comes first.
KILLED = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", re.DOTALL)
SIGKILL = 9
# A rank's last line where it left by itself, in whatever way.
LEFT = "this rank has left"


@dataclass(frozen=True)
class Pattern:
    """A known error."""

    pattern: str
    cause: str
    fix: str
    source: str


PATTERNS = (
    Pattern(
        r"step( \d+)? is unhealthy",
        "the loss or the gradients went wrong there; the checkpoints before it are good",
        "look at those rows, or lower training.learning_rate; to go on past it: "
        "--set health.policy=skip",
        "launcher.train.health",
    ),
    Pattern(
        r"CUDA out of memory|OutOfMemoryError",
        "the GPU's memory is full",
        "use --micro-batch-size 1, a shorter training.max_length, or more GPUs with fsdp",
        "torch.cuda.OutOfMemoryError",
    ),
    Pattern(
        r"No space left on device|unexpected pos|file write failed",
        "the disk is full",
        "free space, or lower checkpoints.keep",
        "errno ENOSPC",
    ),
    Pattern(
        r"Cannot allocate memory|DefaultCPUAllocator: (can't allocate|not enough) memory",
        "the machine's memory is full",
        "use fewer ranks, or a smaller micro batch",
        "torch c10 CPU allocator",
    ),
    Pattern(
        r"Expected to mark a variable ready only once",
        "unused-parameter search together with reentrant checkpointing",
        "leave training.gradient_checkpointing_kwargs to the plan",
        "torch DDP reducer; PEFT under DDP",
    ),
    Pattern(
        r"Could not find the transformer layer class",
        "the layer class that FSDP wraps is not in the model",
        "report the model's architecture; use --strategy ddp meanwhile",
        "accelerate 1.15 set_auto_wrap_policy",
    ),
    Pattern(
        r"Target modules .* not found in the base model",
        "the LoRA targets match nothing",
        "use lora.target_modules: all-linear",
        "PEFT 0.21",
    ),
    Pattern(
        r"(no|not) .*(g\+\+|c\+\+) |command 'g\+\+'|Ninja is required|ninja not being installed"
        r"|CUDAMismatchException",
        "DeepSpeed builds an extension at first use and found no compiler or no ninja",
        "install one: apt-get install g++ ninja-build",
        "deepspeed op_builder",
    ),
    Pattern(
        r"assistant mask|no assistant (tokens|masks)|generation markers|\{% generation %\}",
        "the chat template does not mark the assistant's tokens",
        "use loss: all, or a template with {% generation %} markers",
        "TRL 1.16 assistant_only_loss",
    ),
    Pattern(
        r"gated repo|401 Client Error|Repository Not Found",
        "the Hub refuses the model or dataset",
        "accept its licence on the Hub and set HF_TOKEN in the environment",
        "huggingface_hub",
    ),
    Pattern(
        r"offline mode is enabled|LocalEntryNotFoundError|couldn't connect to",
        "the model or dataset is not in the cache, and the Hub is out of reach",
        "download it first where there is a network, or give a local path",
        "huggingface_hub",
    ),
    Pattern(
        r"JSON parse error|DatasetGenerationError|CSV parse error|Parquet magic bytes"
        r"|KeyError: '(text|messages|prompt|completion|role|content)'",
        "a row is broken, or lacks what the dataset's form asks for",
        "correct or remove it; the traceback in the log says what was being read",
        "datasets 5.2 builder.py; TRL 1.16 SFTTrainer._prepare_dataset",
    ),
    Pattern(
        r"DataLoader worker .* killed|Bus error|unable to (open|allocate) shared memory",
        "shared memory is full",
        "raise /dev/shm (Docker: --shm-size or --ipc=host)",
        "torchtitan#853",
    ),
    Pattern(
        r"Watchdog caught collective operation timeout|Timed out waiting|timed out after",
        "a rank did not reach a collective in time",
        "look for the rank whose log stops first",
        "torch ProcessGroupNCCL watchdog",
    ),
)


@dataclass(frozen=True)
class Failure:
    """The first failing rank and why."""

    rank: int | None
    error: str
    """The rank's own words, one line."""
    cause: str
    fix: str
    log: str
    """The log to read, relative to the run directory."""
    secondary: tuple[int, ...]
    """Ranks that failed because of it."""

    def as_json(self) -> dict[str, Any]:
        """For status.json."""
        return {
            "rank": self.rank,
            "message": self.error,
            "cause": self.cause,
            "fix": self.fix,
            "log": self.log,
        }


def find_failure(run: RunDirectory, attempt: int, detail: str) -> Failure:
    """The first failing rank's error of an attempt.

    Args:
        run: the run.
        attempt: its attempt.
        detail: what the launcher saw (an exit code or a signal), where no rank left a record.
    """
    records = _records(run, attempt)
    if not records:
        return _from_logs(run, attempt, detail)
    own = [r for r in records if not SECONDARY.search(r["message"])]
    cause = None if own else _without_record(run, attempt)
    if cause is not None:
        others = tuple(r["rank"] for r in records if r["rank"] != cause.rank)
        return replace(cause, secondary=others)
    own = own or records
    first = own[0]
    text = f"{first['type']}: {first['message']}".strip()
    pattern = match(f"{text}\n{first['traceback']}")
    return Failure(
        rank=first["rank"],
        error=_one_line(text),
        cause=pattern.cause if pattern else "",
        fix=pattern.fix if pattern else "",
        log=_relative(run, attempt, first["rank"]),
        secondary=tuple(r["rank"] for r in records if r is not first),
    )


def match(text: str) -> Pattern | None:
    """The first known error in a text."""
    return next((p for p in PATTERNS if re.search(p.pattern, text, re.IGNORECASE)), None)


def _records(run: RunDirectory, attempt: int) -> list[dict[str, Any]]:
    """The ranks' error records, earliest first."""
    found = []
    for path in sorted(run.logs(attempt).glob("rank-*.error.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda record: record["time"])


def _from_logs(run: RunDirectory, attempt: int, detail: str) -> Failure:
    """Where no rank could say why: stacks, the agent's words on it, the logs' last words."""
    return _without_record(run, attempt) or _last_words(run, attempt, detail)


def _without_record(run: RunDirectory, attempt: int) -> Failure | None:
    """A cause that its rank could not write down itself."""
    logs = _rank_logs(run, attempt)
    killed = _killed(run, attempt, _agents_words(run, attempt))
    full = _full_disk(run, attempt)
    return full or _stuck(run, attempt, logs) or killed or _silent(run, attempt, logs)


def _full_disk(run: RunDirectory, attempt: int) -> Failure | None:
    """A disk without room for the very record of its rank."""
    try:
        disk = shutil.disk_usage(run.path)
    except OSError:
        return None
    pattern = match(os.strerror(errno.ENOSPC))
    # No size at all: not a disk.
    if not disk.total or disk.free >= RECORD_BYTES or pattern is None:
        return None
    log = str(run.launcher_log(attempt).relative_to(run.path))
    error = f"nothing more can be written to {run.path}"
    return Failure(None, error, pattern.cause, pattern.fix, log, ())


def _agents_words(run: RunDirectory, attempt: int) -> str:
    """What the nodes' agents printed, the first node's first."""
    paths = (run.launcher_log(attempt), *sorted(run.logs(attempt).glob("launcher-*.log")))
    return "\n".join(map(_read, paths))


def _rank_logs(run: RunDirectory, attempt: int) -> dict[int | None, str]:
    paths = run.logs(attempt).glob("rank-*.log")
    return {_rank_number(path): _read(path) for path in paths}


def _stuck(run: RunDirectory, attempt: int, logs: Mapping[int | None, str]) -> Failure | None:
    """Ranks that a timer ended: the one that was not waiting for the others is the cause."""
    frames = {rank: found for rank, log in logs.items() if (found := _stuck_at(log))}
    if not frames:
        return None
    own = {rank: frame for rank, frame in frames.items() if not WAITING.search(frame)}
    rank, frame = min((own or frames).items(), key=lambda item: item[0] or 0)
    what = "stood still" if own else "waited for the others"
    return Failure(
        rank=rank,
        error=f"no progress within limits.stuck_after: rank {rank} {what} at {frame}",
        cause="a rank never reached the collective that the others wait in",
        fix="read the stacks at the end of that log; for slow steps raise limits.stuck_after",
        log=_relative(run, attempt, rank or 0),
        secondary=tuple(sorted(r for r in frames if r is not None and r != rank)),
    )


def _stuck_at(log: str) -> str | None:
    """The main thread's innermost frame in what faulthandler's timer wrote; it comes last."""
    *_, stacks = [None, *TIMER.split(log)[1:]]
    frames = FRAME.findall(stacks.rpartition("(most recent call first)")[2]) if stacks else []
    return " line ".join(frames[0]) if frames else None


def _silent(run: RunDirectory, attempt: int, logs: Mapping[int | None, str]) -> Failure | None:
    """A rank that did not leave by itself, where others did: the agent may name only those."""
    gone = sorted(rank for rank, log in logs.items() if rank is not None and LEFT not in log)
    if not gone or len(gone) == len(logs):
        return None
    return Failure(
        rank=gone[0],
        error="it was ended from outside, without a word",
        cause="killed by a signal, or by the kernel because memory ran out",
        fix="look at the machine's memory and its kernel log (dmesg)",
        log=_relative(run, attempt, gone[0]),
        secondary=(),
    )


def _killed(run: RunDirectory, attempt: int, launcher_log: str) -> Failure | None:
    """A rank that a signal ended, as the elastic agent reports it."""
    found = KILLED.search(launcher_log)
    if not found:
        return None
    rank, number = int(found[1]), int(found[2])
    return Failure(
        rank=rank,
        error=f"it was ended by signal {number}",
        cause="killed from outside, or by the kernel because memory ran out"
        if number == SIGKILL
        else "a crash in native code, or a signal from outside",
        fix="look at the machine's memory and its kernel log (dmesg)",
        log=_relative(run, attempt, rank),
        secondary=(),
    )


def _last_words(run: RunDirectory, attempt: int, detail: str) -> Failure:
    logs = {**_rank_logs(run, attempt), None: _read(run.launcher_log(attempt))}
    pattern, source = None, None
    for rank, text in logs.items():
        pattern = match("\n".join(text.splitlines()[-LOG_TAIL_LINES:]))
        if pattern:
            source = rank
            break
    path = run.launcher_log(attempt) if source is None else run.rank_log(attempt, source)
    return Failure(
        rank=None,
        error=detail,
        cause=pattern.cause if pattern else "",
        fix=pattern.fix if pattern else "",
        log=str(path.relative_to(run.path)),
        secondary=(),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _rank_number(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))


def _relative(run: RunDirectory, attempt: int, rank: int) -> str:
    return str(run.rank_log(attempt, rank).relative_to(run.path))


def _one_line(text: str) -> str:
    return " ".join(text.split())
