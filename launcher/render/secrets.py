"""What looks like a secret, so that it is written nowhere. Secrets pass by variable name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

HIDDEN = "***"
# pad_token and its like are words of a vocabulary.
_NAME = (
    r"[\w.-]*(?:(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD"
    r"|CREDENTIALS?|ACCESS_?KEY)"
)
NAME = re.compile(rf"{_NAME}\Z", re.IGNORECASE)
# NAME=value or NAME: value, quoted or not; a value that the shell looks up is none.
ASSIGNED = re.compile(rf"({_NAME}[\"']?\s*[=:]\s*)([\"']?)([^\s\"',;$`}}\]]+)", re.IGNORECASE)
# Forms of their own: Hugging Face, OpenAI and the like, GitHub, GitLab, AWS, Slack.
KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}|xox[baprs]-[\w-]{10,})"
)
# Shorter values of variables are words that stand elsewhere, too.
LEAST_LENGTH = 8


def hide(text: str, environment: Mapping[str, str]) -> str:
    """`text` with everything that looks like a secret replaced.

    Args:
        text: a command line, or a value of the spec.
        environment: values of its variables with a secret's name are secrets wherever they stand.
    """
    for value in sorted(_values(environment), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return KNOWN.sub(HIDDEN, ASSIGNED.sub(rf"\1\2{HIDDEN}", text))


def _values(environment: Mapping[str, str]) -> Iterable[str]:
    return (
        value
        for name, value in environment.items()
        if NAME.match(name) and len(value) >= LEAST_LENGTH
    )
