"""Steps that went wrong: found where they are, and never where training is only rough."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.train.control import Agreement
from launcher.train.health import (
    LEAST_STEPS,
    MOST_OVERFLOWS_IN_A_ROW,
    MOST_SKIPS_IN_A_ROW,
    ROWS_SHOWN,
    STEPS_ABOVE,
    WINDOW_STEPS,
    Health,
    name_rows,
)


def saw(loss: float = 2.0, grad_norm: float = 1.0, *, stop: bool = False) -> Agreement:
    """A step as all ranks know it."""
    return Agreement(stop, loss, grad_norm, finite=math.isfinite(loss) and math.isfinite(grad_norm))


def after(steps: int, **step: float) -> Health:
    """A judge that saw so many healthy steps."""
    health = Health("stop")
    for _ in range(steps):
        assert health.problem(saw(**step)) is None
    return health


# After steps of loss 2 and gradient norm 1.
EXPLODES = saw(4.1, 101.0)


@pytest.mark.parametrize("steps", [0, 1, LEAST_STEPS, 200])
@pytest.mark.parametrize(
    ("loss", "norm"),
    [
        (math.nan, 1.0),
        (math.inf, 1.0),
        (-math.inf, 1.0),
        (2.0, math.nan),
        (2.0, math.inf),
        (math.nan, math.nan),
    ],
)
def test_what_is_not_finite_is_always_found(steps: int, loss: float, norm: float) -> None:
    found = after(steps).problem(saw(loss, norm))
    assert found is not None
    assert "not finite" in found
    assert f"loss {loss:.4g}" in found
    assert f"gradient norm {norm:.4g}" in found


def test_one_rank_s_nan_counts_though_the_mean_is_finite() -> None:
    """The ranks agree on `finite` apart from the mean."""
    assert after(3).problem(Agreement(False, 2.0, 1.0, finite=False)) is not None


@pytest.mark.parametrize(
    ("loss", "norm", "found"),
    [
        (4.1, 101.0, True),
        (100.0, 1e9, True),
        (0.1, 1001.0, True),
        (4.0, 1000.0, False),  # not above
        (1e9, 100.0, False),  # one hard batch
        (1e9, 1.0, False),
        (1.0, 0.5, False),
    ],
)
def test_a_single_step_that_explodes(loss: float, norm: float, found: bool) -> None:
    problem = after(LEAST_STEPS).problem(saw(loss, norm))
    assert (problem is not None) == found
    if problem is not None:
        assert "explodes" in problem
        assert f"loss {loss:.4g} after 2 at the first step" in problem
        assert f"gradient norm {norm:.4g} with a median of 1" in problem


def test_a_loss_that_stays_high_explodes() -> None:
    health = after(LEAST_STEPS)
    for _ in range(STEPS_ABOVE - 1):
        assert health.problem(saw(4.1)) is None
    assert health.problem(saw(3.9)) is None, "the row is broken"
    verdicts = [health.problem(saw(4.1)) for _ in range(STEPS_ABOVE)]
    assert verdicts[:-1] == [None] * (STEPS_ABOVE - 1)
    assert "explodes" in (verdicts[-1] or "")


@pytest.mark.parametrize("steps", range(LEAST_STEPS))
def test_the_first_steps_have_no_median_to_be_held_against(steps: int) -> None:
    assert after(steps).problem(EXPLODES) is None
    assert after(LEAST_STEPS).problem(EXPLODES) is not None


def test_a_loss_is_held_against_the_first_step_and_not_the_last() -> None:
    health = after(1, loss=2.0)
    for _ in range(20):
        assert health.problem(saw(0.1)) is None
    assert health.problem(saw(3.9, 900.0)) is None
    assert health.problem(saw(4.1, 900.0)) is not None


def test_an_unhealthy_first_step_is_not_the_measure() -> None:
    health = Health("skip")
    assert health.problem(saw(math.nan)) is not None
    for _ in range(LEAST_STEPS):
        assert health.problem(saw(2.0)) is None
    assert health.first_loss == 2.0


@given(st.lists(st.sampled_from([saw(math.nan), saw(2.0, math.inf), EXPLODES]), max_size=200))
def test_unhealthy_steps_do_not_become_usual(bad: list[Agreement]) -> None:
    """However many there are, the median and the first loss stay those of healthy steps."""
    health = after(LEAST_STEPS)
    before = (health.first_loss, list(health.norms))
    assert all(health.problem(step) is not None for step in bad)
    assert (health.first_loss, list(health.norms)) == before
    assert health.problem(EXPLODES) is not None
    assert health.problem(saw()) is None


def test_norms_that_grow_slowly_become_usual() -> None:
    health = after(LEAST_STEPS)
    for step in range(300):
        assert health.problem(saw(3.0, 1.05**step)) is None
    assert len(health.norms) == WINDOW_STEPS


@given(st.lists(st.tuples(st.floats(0.1, 4.0), st.floats(1.0, 999.0)), max_size=60))
def test_rough_training_is_never_stopped(steps: list[tuple[float, float]]) -> None:
    """A loss up to twice the first, gradient norms that differ by less than a thousand."""
    health = after(1, loss=2.0, grad_norm=1.0)
    assert [found for step in steps if (found := health.problem(saw(*step)))] == []


# --- the loss scaler of fp16 --------------------------------------------------------------


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_an_overflow_is_the_scaler_s_to_mend(norm: float) -> None:
    health = after(LEAST_STEPS)
    before = _saved(health)
    for _ in range(MOST_OVERFLOWS_IN_A_ROW):
        assert health.problem(saw(2.0, norm), scaled=True) is None
    before["in_a_row"][1] = MOST_OVERFLOWS_IN_A_ROW
    assert _saved(health) == before, "it is no step to measure others by"
    assert "not finite" in (health.problem(saw(2.0, norm), scaled=True) or "")


def test_a_scale_that_works_ends_the_row_of_overflows() -> None:
    health = after(LEAST_STEPS)
    for _ in range(3):
        for _ in range(MOST_OVERFLOWS_IN_A_ROW):
            assert health.problem(saw(2.0, math.inf), scaled=True) is None
        assert health.problem(saw(), scaled=True) is None


@pytest.mark.parametrize("step", [saw(math.nan), saw(math.inf, math.inf), EXPLODES])
def test_a_scaler_excuses_nothing_else(step: Agreement) -> None:
    assert after(LEAST_STEPS).problem(step, scaled=True) is not None


# --- policies -----------------------------------------------------------------------------


def test_so_many_steps_in_a_row_may_be_skipped_and_no_more() -> None:
    health = Health("skip")
    verdicts = []
    for _ in range(MOST_SKIPS_IN_A_ROW + 2):
        assert health.problem(saw(math.nan)) is not None
        verdicts.append(health.may_skip())
    assert verdicts == [True] * MOST_SKIPS_IN_A_ROW + [False] * 2
    assert health.skipped == MOST_SKIPS_IN_A_ROW + 2


def test_a_healthy_step_ends_the_row_but_not_the_count() -> None:
    health = Health("skip")
    for turn in range(1, 4):
        for _ in range(MOST_SKIPS_IN_A_ROW):
            assert health.problem(saw(math.nan)) is not None
            assert health.may_skip()
        assert health.problem(saw()) is None
        assert (health.skipped, health.skipped_in_a_row) == (turn * MOST_SKIPS_IN_A_ROW, 0)


@pytest.mark.parametrize("policy", ["stop", "skip", "ignore"])
def test_the_verdict_does_not_depend_on_the_policy(policy: str) -> None:
    """What is done about it is the trainer's; a stop request changes nothing either."""
    health = Health(policy)
    assert health.problem(saw(math.nan)) is not None
    assert health.problem(saw(stop=True)) is None
    assert health.problem(saw(math.nan, stop=True)) is not None
    assert health.skipped == 0


# --- a resumed run ------------------------------------------------------------------------

STEPS = st.lists(
    st.builds(
        saw,
        loss=st.sampled_from([0.5, 1.0, 2.0, 5.0, 50.0, math.nan]),
        grad_norm=st.sampled_from([0.1, 1.0, 30.0, 1e5, math.inf]),
    ),
    max_size=70,
)


def _saved(health: Health) -> dict[str, Any]:
    """Its state as a file gives it back."""
    state: dict[str, Any] = json.loads(json.dumps(health.state()))
    return state


@given(STEPS, STEPS)
def test_a_resumed_run_judges_as_if_it_had_not_stopped(
    before: list[Agreement], later: list[Agreement]
) -> None:
    whole, resumed = Health("skip"), Health("skip")
    # The last step is a calm one: rows that a resume cuts are the next test's.
    for step in (*before, saw(0.1, 0.1)):
        if whole.problem(step) is not None:
            whole.may_skip()
    resumed.load_state(_saved(whole))
    assert (resumed.first_loss, resumed.norms) == (whole.first_loss, whole.norms)
    assert resumed.norms.maxlen == WINDOW_STEPS
    assert resumed.skipped == whole.skipped
    assert [resumed.problem(step) for step in later] == [whole.problem(step) for step in later]
    assert _saved(resumed) == _saved(whole)


def test_the_state_of_a_new_run_is_a_new_run() -> None:
    fresh = Health("stop")
    fresh.load_state(_saved(Health("stop")))
    assert fresh == Health("stop")


@pytest.mark.parametrize(
    ("step", "row", "scaled"),
    [
        (saw(math.nan), MOST_SKIPS_IN_A_ROW, False),
        (saw(2.0, math.inf), MOST_OVERFLOWS_IN_A_ROW, True),
        (saw(4.1), STEPS_ABOVE - 1, False),
    ],
    ids=["skips", "overflows", "high losses"],
)
def test_a_row_of_bad_steps_is_not_forgotten_by_a_resume(
    step: Agreement, row: int, scaled: bool
) -> None:
    """A checkpoint may be due, or a stop asked for, in the middle of the row."""

    def goes_on(health: Health) -> bool:
        return health.problem(step, scaled=scaled) is None or health.may_skip()

    health, resumed = after(LEAST_STEPS), Health("skip")
    assert all(goes_on(health) for _ in range(row))
    resumed.load_state(_saved(health))
    if step.finite or scaled:
        assert health.problem(step, scaled=scaled) is not None
        assert resumed.problem(step, scaled=scaled) is not None
    else:
        assert not goes_on(health)
        assert not goes_on(resumed)


# --- rows ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=80))
def test_rows_are_named_in_order_and_the_rest_is_counted(rows: list[int]) -> None:
    text = name_rows(rows)
    shown = ", ".join(map(str, sorted(rows)[:ROWS_SHOWN]))
    assert text.startswith(f"rows {shown}")
    assert (f" and {len(rows) - ROWS_SHOWN} more" in text) == (len(rows) > ROWS_SHOWN)
    assert text.endswith("(counted from 0)")
    assert name_rows(list(reversed(rows))) == text
