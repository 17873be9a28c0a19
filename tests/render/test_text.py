"""Numbers and lines as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.render.text import (
    count,
    duration,
    entry,
    gibibytes,
    plural,
    progress_text,
    seconds_left,
    value_text,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (3661, "1 h 1 min"),
        (18720, "5 h 12 min"),
        (200_000, "55 h 33 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (999, "999"),
        (1_915_648, "1.92 M"),
        (8_030_261_248, "8.03 B"),
        (1.2e12, "1.2 T"),
        (2e3, "2 K"),
    ],
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("size", "text"), [(2**30, "1.0"), (80 * 2**30, "80.0"), (2**29, "0.50"), (0, "0.00")]
)
def test_gibibytes(size: int, text: str) -> None:
    assert gibibytes(size) == text


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1 node"), (2, "2 nodes"), (0, "0 nodes"), (12345, "12,345 nodes")]
)
def test_plural(number: int, text: str) -> None:
    assert plural(number, "node") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "on"), (False, "off"), (2e-4, "0.0002"), (1.0, "1"), (3, "3"), ("cosine", "cosine")],
)
def test_value_text(value: object, text: str) -> None:
    assert value_text(value) == text


@given(st.text("ab c-/", max_size=200), st.integers(1, 200))
def test_an_entry_keeps_every_word_whole(text: str, width: int) -> None:
    lines = entry("label", text, width)
    words = " ".join(lines).split()
    assert words == ["label", *text.split()]
    longest = max((len(word) for word in text.split()), default=0)
    assert all(len(line) <= max(width, 30, 11 + longest) for line in lines)


def _metric(step: int, time: float, **more: float) -> dict[str, float]:
    values = {"step": step, "time": time, "loss": 1.5, "learning_rate": 1e-4}
    return {**values, "samples_per_second": 2.0, **more}


def test_time_left_needs_two_steps_and_is_the_speed_of_the_last() -> None:
    assert seconds_left([], 10) is None
    assert seconds_left([_metric(1, 0.0)], 10) is None
    assert seconds_left([_metric(1, 0.0), _metric(3, 4.0)], 10) == 14.0
    assert seconds_left([_metric(3, 0.0), _metric(3, 4.0)], 10) is None


def test_progress_says_the_stage_until_there_is_a_step() -> None:
    assert progress_text({"stage": "loading model"}, []) == "loading model"
    assert progress_text({}, []) == "starting"
    status = {"stage": "training", "step": 2, "max_steps": 10}
    metrics = [_metric(2, 1.0, grad_norm=0.5, tokens_per_second=12345.6)]
    line = progress_text(status, metrics)
    assert line.startswith("step 2/10  loss 1.5000  lr 1.00e-04")
    assert "12,346 tokens/s" in line
