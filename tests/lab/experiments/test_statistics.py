import math

import pytest

from ademamix.lab.experiments.statistics import (
    clearly_below,
    difference,
    diverged,
    final_losses,
    mean_and_error,
    shown,
    table_of,
)


def test_the_mean_and_its_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0 / math.sqrt(3)))
    assert mean_and_error([1.0]) == (1.0, math.inf)
    assert mean_and_error([1.0, math.inf]) == (math.inf, 0.0)


def test_the_joint_standard_error_is_that_of_both_means():
    gap, error = difference([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert (gap, error) == pytest.approx((5.0, math.sqrt(1 / 3 + 4 / 3)))


def test_clearly_below_wants_twice_the_joint_error_and_more_than_one_seed():
    low, high = [1.0, 1.1, 1.2], [1.3, 1.4, 1.5]
    joint = difference(low, high)[1]
    assert clearly_below(low, high)
    assert not clearly_below(high, low)
    assert not clearly_below(low, [x + 1.9 * joint for x in low])
    assert clearly_below(low, [x + 2.1 * joint for x in low])
    assert not clearly_below([1.0], [9.0])
    assert clearly_below(low, [math.inf, 2.0])  # a run that diverged is above everything
    assert not clearly_below([math.inf, 2.0], [math.inf, 2.0])


def test_samples_for_people():
    assert shown([1.0, 2.0, 3.0]) == "2.0000 ± 0.5774"
    assert shown([1.0]) == "1.0000"
    assert table_of({"a": [1.0, 3.0]}, ("", "mean", "each")) == [
        ("", "mean", "each"),
        ("a", "2.0000 ± 1.0000", "1.0000, 3.0000"),
    ]


def test_a_seed_that_diverged_is_counted_and_makes_no_mean():
    lost = [1.0, math.inf, 2.0]
    assert shown(lost) == "diverged in 1 of 3 seeds"
    assert shown([math.inf]) == "diverged"
    assert table_of({"a": lost}, ()) == [(), ("a", "diverged in 1 of 3 seeds", "1.0000, diverged, 2.0000")]
    assert diverged({"a": [1.0], "b": lost, "c": [math.inf]}) == "b diverged in 1 of 3 seeds, c diverged"
    assert diverged({"a": [1.0]}) == ""
    assert final_losses([1.0, 2.0, 3.0], lost) == ("AdEMAMix diverged in 1 of 3 seeds",) * 2


def test_a_difference_of_single_seeds_has_no_error_to_show():
    gain = "AdEMAMix ends 0.5000 nats below AdamW"
    assert final_losses([2.0], [1.5]) == (gain, f"{gain} (2.0000 and 1.5000)")
