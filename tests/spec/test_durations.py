"""Durations: every way of writing one means the same seconds, and anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from launcher.spec.durations import EXAMPLES, UNITS, seconds
from launcher.spec.schema import LimitsSpec


@pytest.mark.parametrize(
    ("written", "total"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("12h", 43_200),
        ("1d", 86_400),
        ("1h30m", 5400),
        ("1d2h3m4s", 93_784),
        ("0h5m", 300),
        ("100h", 360_000),
        ("0:00:01", 1),
        ("12:00:00", 43_200),
        ("100:00:00", 360_000),
        ("1-00:00:00", 86_400),
        ("2-03:04:05", 183_845),
        ("90", 90),
        (90, 90),
        ("  90s\n", 90),
    ],
)
def test_what_people_write(written: str | int, total: int) -> None:
    assert seconds(written) == total


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "soon",
        "s",
        "h30m",
        "90x",
        "1.5h",
        "1,5h",
        "-90s",
        "-1",
        "+90",
        "1e3",
        "inf",
        "30m1h",
        "1h1h",
        "1h 30m",
        "1h30",
        "90S",
        "1 day",
        "12:00",
        "1:2:3",
        "12:00:00:00",
        "-12:00:00",
        "1-12:00",
        "1d-00:00:00",
        "½h",
        "²",
        -90,
        1.5,
        True,
        None,
    ],
)
def test_anything_else_is_refused_with_examples(written: object) -> None:
    with pytest.raises(ValueError, match="is no duration") as caught:
        seconds(written)  # type: ignore[arg-type]
    assert EXAMPLES in str(caught.value)
    assert repr(str(written).strip()) in str(caught.value)


@pytest.mark.parametrize("written", ["0", "0s", "0d0h0m0s", "00:00:00", "0-00:00:00", 0])
def test_no_time_at_all_is_refused(written: str | int) -> None:
    with pytest.raises(ValueError, match="is no time at all"):
        seconds(written)


PARTS = st.tuples(*(st.none() | st.integers(0, 999) for _ in UNITS))


@given(PARTS)
def test_units_add_up(parts: tuple[int | None, ...]) -> None:
    units = list(zip(UNITS, parts, strict=True))
    written = "".join(f"{number}{unit}" for unit, number in units if number is not None)
    total = sum(UNITS[unit] * (number or 0) for unit, number in units)
    if total:
        assert seconds(written) == total
    else:
        with pytest.raises(ValueError, match="is no "):
            seconds(written)


@given(st.integers(1, 10**7))
def test_every_form_of_a_time_is_that_time(total: int) -> None:
    minutes, second = divmod(total, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    forms = (
        total,
        str(total),
        f"{total}s",
        f"{hours}:{minute:02}:{second:02}",
        f"{days}-{hour:02}:{minute:02}:{second:02}",
        f"{days}d{hour}h{minute}m{second}s",
        f"{hours}h{minute}m{second}s",
    )
    assert {seconds(form) for form in forms} == {total}


@given(st.text("0123456789dhms:- .x٣", max_size=12) | st.text(max_size=8))
def test_any_text_is_whole_seconds_or_refused(written: str) -> None:
    try:
        total = seconds(written)
    except ValueError:
        return
    assert isinstance(total, int)
    assert total > 0


@pytest.mark.parametrize("key", ["stop_after", "stuck_after"])
def test_the_spec_keeps_a_duration_as_it_was_written(key: str) -> None:
    assert getattr(LimitsSpec(**{key: "1h30m"}), key) == "1h30m"
    assert getattr(LimitsSpec(**{key: 90}), key) == 90
    for wrong in ("soon", "0s", -1, 1.5, ["1h"]):
        with pytest.raises(ValidationError):
            LimitsSpec(**{key: wrong})
