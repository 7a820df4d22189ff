import math
from itertools import pairwise
from typing import get_args

import pytest

from ademamix.lab.config import Shape
from ademamix.lab.training.schedule import lr_factor

SHAPES = get_args(Shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_is_linear_and_ends_at_the_peak(shape):
    assert [lr_factor(t, 100, 4, shape) for t in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_every_shape_falls_from_the_peak_to_the_final_value(shape, final):
    factors = [lr_factor(t, 200, 10, shape, final) for t in range(10, 201)]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(final, abs=1e-12)
    assert all(a >= b for a, b in pairwise(factors))


def test_cosine_is_half_of_one_plus_cosine():
    for t in range(21, 121):
        assert lr_factor(t, 120, 20, "cosine") == pytest.approx(math.cos(math.pi * (t - 20) / 200) ** 2, abs=1e-12)


def test_linear_loses_the_same_in_every_step():
    factors = [lr_factor(t, 50, 10, "linear", 0.2) for t in range(10, 51)]
    assert [a - b for a, b in pairwise(factors)] == pytest.approx([0.8 / 40] * 40)


def test_wsd_is_constant_until_its_last_fifth():
    factors = [lr_factor(t, 100, 10, "wsd") for t in range(10, 101)]
    assert factors[:71] == [1.0] * 71
    assert factors[71:] == pytest.approx([1 - k / 20 for k in range(1, 21)])


def test_a_run_of_one_step_has_a_learning_rate():
    assert [lr_factor(1, 1, 0, shape, 0.5) for shape in ("cosine", "linear", "wsd")] == [0.5, 0.5, 1.0]


def test_no_warmup_starts_just_below_the_peak():
    assert lr_factor(1, 100, 0, "linear") == pytest.approx(0.99)
