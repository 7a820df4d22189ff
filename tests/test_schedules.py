import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ademamix.schedules import alpha_schedule, beta3_schedule, half_life, log_time_alpha, log_time_weight

BETAS = st.floats(0.0, 0.99999)


def test_half_life_is_where_an_ema_has_halved() -> None:
    for beta in (0.5, 0.9, 0.9999):
        assert beta ** half_life(beta) == pytest.approx(0.5, rel=1e-12)
    assert half_life(0.0) == 0.0


def test_alpha_grows_linearly_and_stays() -> None:
    assert [alpha_schedule(t, 8.0, 4) for t in (1, 2, 3, 4, 5, 100)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert alpha_schedule(1, 8.0) == 8.0


@given(beta1=BETAS, beta3=BETAS, warmup=st.integers(1, 10_000))
def test_beta3_is_between_its_ends_and_linear_in_half_life(beta1: float, beta3: float, warmup: int) -> None:
    low, high = sorted((beta1, beta3))
    for step in {1, (warmup + 1) // 2, warmup}:
        beta = float(beta3_schedule(step, low, high, warmup))
        assert low - 1e-12 <= beta <= high
        if 1e-6 < beta < high:
            share = step / warmup
            expected = (1 - share) * half_life(low) + share * half_life(high)
            # ln beta loses relative digits as beta approaches 1: eps / (1 - beta) = 2e-16 / 1e-5.
            assert math.log(0.5) / math.log(beta) == pytest.approx(expected, rel=1e-9)
    assert float(beta3_schedule(warmup + 1, low, high, warmup)) == pytest.approx(high, abs=1e-12)
    assert beta3_schedule(1, beta1, beta3) == beta3


def test_the_paper_s_beta3_in_the_middle_of_its_warmup() -> None:
    # h(0.9) = 6.5788, h(0.9999) = 6931.1; half way 3468.8, so beta3 = 0.5 ** (1 / 3468.8).
    assert beta3_schedule(500, 0.9, 0.9999, 1000) == pytest.approx(0.99980020, abs=1e-8)


@pytest.mark.parametrize("steps", [1000, 8000])
def test_log_time_memory_is_the_same_share_of_a_run_of_any_length(steps: int) -> None:
    """The gradients of a run's first half weigh (1/2)^delta of all, up to delta (delta + 1) / 2 of one step in t."""
    old = 0.0
    for t in range(1, steps + 1):
        old += log_time_weight(t, 8.0) * ((1.0 if t <= steps // 2 else 0.0) - old)
    assert old == pytest.approx(0.5**8, rel=40 / steps)


def test_log_time_alpha() -> None:
    assert [log_time_alpha(t, 0.5) for t in (3, 8, 99)] == pytest.approx([2.0, 3.0, 10.0], rel=1e-15)
    assert log_time_alpha(5, 1.0) == 1.0


def test_schedules_take_arrays_of_steps() -> None:
    steps = np.arange(1, 21)
    for values, single in (
        (alpha_schedule(steps, 5.0, 10), lambda t: alpha_schedule(t, 5.0, 10)),
        (beta3_schedule(steps, 0.9, 0.999, 10), lambda t: beta3_schedule(t, 0.9, 0.999, 10)),
        (log_time_weight(steps, 8.0), lambda t: log_time_weight(t, 8.0)),
    ):
        np.testing.assert_array_equal(values, [single(int(t)) for t in steps])
