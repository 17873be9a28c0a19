"""Durations as people write them: 90s, 30m, 12h, 1d, 1h30m, 12:00:00, 1-00:00:00 or seconds."""

from __future__ import annotations

import re

UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
WORDS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
MOST_SECONDS = 10 * 365 * 86_400
EXAMPLES = "90s, 30m, 12h, 1h30m, 1d or 12:00:00"


def seconds(text: str | int) -> int:
    """A duration in seconds.

    Args:
        text: with units, as a clock (days-hours:minutes:seconds), or a number of seconds.

    Raises:
        ValueError: for anything else, and for nothing at all.
    """
    written = str(text).strip()
    match = CLOCK.fullmatch(written) or WORDS.fullmatch(written)
    if written.isdecimal():
        total = int(written)
    elif match and written:
        parts = zip(UNITS.values(), match.groups(), strict=True)
        total = sum(unit * int(number or 0) for unit, number in parts)
    else:
        raise ValueError(f"{written!r} is no duration; write {EXAMPLES}")
    if total > MOST_SECONDS:
        raise ValueError(f"{written!r} is more than ten years")
    if total <= 0:
        raise ValueError(f"{written!r} is no time at all; write {EXAMPLES}")
    return total
