"""What can go wrong before a run starts, as values: what, why, the fix, the exit code.

Everything that a user can mend is raised as a `Refusal`; the command line prints it in
one line and exits with its code. Anything else that escapes is a defect of the launcher.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command; the table is part of the public interface."""

    DONE = 0
    RUN_FAILED = 1
    BAD_SPEC = 2
    PLAN_REFUSED = 3
    ENVIRONMENT = 4
    PREEMPTED = 75


class Refusal(Exception):  # noqa: N818 - a refusal is an answer, not a fault
    """A refusal with its reason and its fix.

    Args:
        code: stable snake_case name, for programs (`unknown_key`).
        what: what is wrong, in the user's words, with file, line or flag.
        why: the reason, without blame; may be empty where `what` says it all.
        fix: what to type or change.
        source: where the rule comes from (issue, documentation, file and version).
    """

    exit_code = ExitCode.BAD_SPEC

    def __init__(self, code: str, what: str, *, why: str = "", fix: str, source: str = "") -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.why = why
        self.fix = fix
        self.source = source

    @property
    def message(self) -> str:
        """What and why, without the fix."""
        return "; ".join(part for part in (self.what, self.why) if part)

    def __str__(self) -> str:
        return f"{self.message}; {self.fix}"

    def as_json(self) -> dict[str, str]:
        """The `error` object of the `--json` contract."""
        return {
            "code": self.code,
            "message": self.message,
            "fix": self.fix,
            "source": self.source,
        }


class SpecError(Refusal):
    """The spec or the command line is wrong (exit 2)."""


class PlanRefused(Refusal):
    """The plan cannot work, or cannot fit (exit 3)."""

    exit_code = ExitCode.PLAN_REFUSED


class EnvironmentNotReady(Refusal):
    """Something that the plan needs is not on this machine (exit 4)."""

    exit_code = ExitCode.ENVIRONMENT
