import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ademamix.lab.experiments.common import decide
from ademamix.lab.experiments.statistics import (
    Budgets,
    Paired,
    against,
    budgets_for,
    crossing,
    grouped,
    jointly,
    mean_and_error,
    paired,
    shown,
    slopes,
    table_of,
    too_low,
)

LOST = math.inf  # the loss of a run that diverged


@pytest.mark.parametrize("level", [0.95, 0.9875])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_interval_is_that_of_a_paired_t_test(count: int, level: float) -> None:
    a, b = np.random.default_rng(count).normal(2.0, 0.1, (2, count)).tolist()
    pair, test = paired(a, b, level), stats.ttest_rel(a, b)
    low, high = test.confidence_interval(level)
    assert (pair.mean - pair.half, pair.mean + pair.half) == pytest.approx((low, high), rel=1e-9)
    assert (pair.lower or pair.higher) == (test.pvalue < 1 - level)
    assert (pair.below, pair.count) == (sum(x < y for x, y in zip(a, b, strict=True)), count)


def test_95_of_100_intervals_hold_the_true_difference_however_far_seeds_are_apart() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0.0, 10.0, (2000, 1, 8))  # alike on both sides
    a, b = np.moveaxis(seeds + rng.normal(0.0, 0.1, (2000, 2, 8)), 1, 0)
    pairs = [paired((x + 0.05).tolist(), y.tolist()) for x, y in zip(a, b, strict=True)]
    held = sum(abs(pair.mean - 0.05) <= pair.half for pair in pairs)
    assert abs(held - 1900) < 4 * math.sqrt(2000 * 0.95 * 0.05)  # four standard deviations of a binomial count


def test_a_difference_within_seeds_is_seen_where_seeds_differ_by_more() -> None:
    seeds = [1.0, 1.5, 0.7, 2.0]
    pair = paired([s - d for s, d in zip(seeds, (0.010, 0.012, 0.009, 0.011), strict=True)], seeds)
    assert (pair.verdict, (-pair).verdict) == ("helps", "hurts")
    assert pair.signs == "----"
    # By hand: t(3) = 3.182446; the standard deviation of 9, 10, 11, 12 thousandths is 1.290994e-3.
    assert pair.half == pytest.approx(3.182446 * 1.290994e-3 / 2, rel=1e-6)


@pytest.mark.parametrize("count", [3, 8])
def test_one_more_of_a_kind_is_too_low_in_1_of_200_cases(count: int) -> None:
    values = np.random.default_rng(count).normal(2.0, 0.1, (20_000, count + 1)).tolist()
    found = sum(too_low(value, sample) for value, *sample in values)
    assert abs(found - 100) < 4 * math.sqrt(100)  # four standard deviations of a count
    assert not too_low(1.0, [2.0])
    assert not too_low(1.0, [2.0, LOST, 2.1])


def test_what_a_difference_says() -> None:
    some = paired([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    edge = 4.302653 / math.sqrt(3)  # t(2) of the printed tables
    assert str(some) == f"undecided: +0.0000 ({-edge:+.4f} to {edge:+.4f}; signs -0+)"
    assert str(paired([1.0], [2.0])) == "undecided: -1.0000 (one seed; signs -)"
    assert some.told("+.1f") == f"+0.0 ({-edge:+.1f} to {edge:+.1f}; signs -0+)"


@pytest.mark.parametrize(
    ("a", "b", "verdict", "signs"),
    [
        ([1.0] * 6, [2.0] * 5 + [LOST], "helps", "------"),  # 2 / 2^6 = 0.03
        ([2.0] * 5 + [LOST], [1.0] * 6, "hurts", "++++++"),
        ([1.0] * 5, [2.0] * 4 + [LOST], "undecided", "-----"),  # 2 / 2^5 = 0.06
        ([1.0] * 5 + [3.0], [2.0] * 5 + [LOST], "helps", "------"),
        ([1.0] * 6 + [3.0], [2.0] * 5 + [LOST, 2.0], "undecided", "------+"),
        ([1.0] * 7 + [LOST], [2.0] * 8, "undecided", "-------+"),  # 2 (1 + 8) / 2^8 = 0.07
        ([LOST] * 6, [LOST] * 6, "undecided", "??????"),
        ([1.0, LOST], [LOST, 1.0], "undecided", "-+"),  # differences of both infinities
    ],
)
def test_where_a_run_diverged_the_signs_decide(a, b, verdict, signs) -> None:
    pair = paired(a, b)
    assert (pair.verdict, pair.signs) == (verdict, signs)
    assert pair.interval() == "diverged in some seed"
    below = signs.count("-")
    assert pair.lower == (stats.binomtest(below, len(signs)).pvalue <= 0.05 and below > len(signs) / 2)


def test_the_crossing_is_linear_in_the_logarithm_of_the_budget() -> None:
    trials = [(1.0, 1.5), (1.25, 1.3), (2.0, 1.1)]
    assert crossing(trials, 1.1) == pytest.approx(2.0)
    assert crossing(trials, 1.2) == pytest.approx(math.sqrt(1.25 * 2.0))
    assert crossing(trials, 1.0) == math.inf
    assert crossing([*trials, (3.0, 1.2)], 1.1) == pytest.approx(2.0)  # the first time counts
    assert crossing([(1.0, 1.5)], 1.6) == 1.0
    assert crossing([(1.0, LOST), (2.0, 1.0)], 1.2) == 2.0


@given(
    st.lists(st.floats(1.01, 2.9), min_size=2, max_size=8),
    st.floats(0.01, 1.0),
    st.lists(st.floats(-1.0, 1.0), min_size=8, max_size=8),
)
def test_where_losses_fall_with_the_logarithm_of_the_budget_the_budget_is_found(factors, fall, seeds) -> None:
    def loss(budget: float, seed: float) -> float:
        return seed - fall * math.log(budget)

    few = seeds[: len(factors)]
    losses = {b: [loss(b, s) for s in few] for b in (3.0, 1.0, 1.5, 2.0)}  # in any order
    budgets = budgets_for(losses, [loss(x, s) for x, s in zip(factors, few, strict=True)])
    assert budgets.factors == pytest.approx(factors, rel=1e-9)
    effect = budgets.above(1.5)
    assert effect.differences == pytest.approx([math.log(1.5 / x) for x in factors], abs=1e-9)


def test_budgets_for_people() -> None:
    # Logarithms +-0.1 about log 1.5; t(1) = 12.7062, and the standard error of two values is half their distance.
    low, high = (100 * (1.5 * math.exp(sign * 0.1 * 12.7062) - 1) for sign in (-1, 1))
    both = Budgets((1.5 * math.exp(0.1), 1.5 * math.exp(-0.1)), 3.0)
    assert both.told(" tokens") == f"50 % more tokens ({low:.0f} to {high:.0f})"
    assert str(both) == f"50 % more ({low:.0f} to {high:.0f})"
    assert str(Budgets((1.5,), 2.0)) == "50 % more"
    assert Budgets((1.0, 1.0), 2.0).told(" tokens") == "no more tokens"
    assert str(Budgets((1.0, 1.0, 1.5), 2.0)).endswith("), no more in 2 of 3 seeds")
    some = Budgets((1.5, math.inf, math.inf), 2.0)
    assert some.told(" tokens") == "at least 50 % more tokens, over 100 % more in 2 of 3 seeds"
    assert Budgets((math.inf, math.inf), 3.0).told(" tokens") == "over 200 % more tokens in 2 of 2 seeds"
    # Seeds that need more than the largest budget count as such, by their signs.
    assert Budgets((1.6,) * 3 + (math.inf,) * 3, 2.0).above(1.5).lower
    assert not Budgets((1.6,) * 2 + (math.inf,) * 3, 2.0).above(1.5).lower


def test_slopes_are_those_of_lines_through_each_seed() -> None:
    x = [1.0, 2.0, 4.0]
    samples = [[2.0 * t + 1.0, -t, 0.5] for t in x]
    assert slopes(x, samples) == pytest.approx([2.0, -1.0, 0.0], abs=1e-12)
    lost, kept = slopes(x, [[1.0, 1.0], [LOST, 2.0], [1.0, 4.0]])
    assert math.isnan(lost)  # which decides nothing, and says nothing of the other seeds
    assert kept == pytest.approx(1.0)


def test_the_mean_and_its_standard_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0 / math.sqrt(3)))
    assert mean_and_error([1.0]) == (1.0, math.inf)
    assert mean_and_error([1.0, LOST]) == (math.inf, 0.0)


def test_samples_for_people() -> None:
    assert shown([1.0, 2.0, 3.0]) == "2.0000 ± 0.5774"
    assert shown([1.0]) == "1.0000"
    assert table_of({"a": [1.0, 3.0]}, ("", "mean", "each")) == [
        ("", "mean", "each"),
        ("a", "2.0000 ± 1.0000", "1.0000, 3.0000"),
    ]


def test_a_seed_that_diverged_is_counted_and_makes_no_mean() -> None:
    lost = [1.0, LOST, 2.0]
    assert shown(lost) == "diverged in 1 of 3 seeds"
    assert shown([LOST]) == "diverged"
    assert table_of({"a": lost}, ()) == [(), ("a", "diverged in 1 of 3 seeds", "1.0000, diverged, 2.0000")]
    said = "AdEMAMix ends below AdamW in 2 of 3 seeds; some runs diverged"
    assert against(paired(lost, [2.0, 2.0, 3.0]), "AdEMAMix", "AdamW") == said


def test_how_far_one_is_from_another() -> None:
    assert against(paired([1.5], [2.0]), "It", "AdamW") == "It ends 0.5000 nats below AdamW (one seed)"
    high, low = [1.00, 1.11, 1.21], [0.9, 0.9, 0.9]
    edge = 4.302653 * stats.sem([0.10, 0.21, 0.31])
    mean = 0.62 / 3
    within = f"(95 % interval {mean - edge:.4f} to {mean + edge:.4f}"
    said = f"It ends {mean:.4f} nats above AdamW {within}; lower in 0 of 3 seeds)"
    assert against(paired(high, low), "It", "AdamW") == said
    said = f"It ends {mean:.4f} nats below AdamW {within}; lower in 3 of 3 seeds)"
    assert against(paired(low, high), "It", "AdamW") == said


def test_intervals_that_hold_together_are_wider() -> None:
    assert [jointly(count) for count in (0, 1, 4)] == pytest.approx([0.95, 0.95, 0.9875])


def test_pairs_by_what_they_do() -> None:
    pairs = {"a": BELOW, "b": OPEN, "c": ABOVE, "d": BELOW}
    assert grouped(pairs) == f"helps: a, d; hurts: c; undecided: b ({OPEN.interval()})"
    assert grouped({"after 1": BELOW}, link=" ") == "helps after 1"


BELOW, ABOVE, OPEN, ONE = Paired((-1.0, -1.01)), Paired((1.0, 1.01)), Paired((-1.0, 1.0)), Paired((-1.0,))


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ((BELOW,), "reproduced"),
        ((BELOW, BELOW), "reproduced"),
        ((BELOW, OPEN), "undecided"),
        ((ABOVE, OPEN), "contradicted"),
        ((BELOW, ABOVE), "contradicted"),
        ((ONE,), "not tested at this size"),
        ((BELOW, ONE), "not tested at this size"),
        ((Paired(()),), "not tested at this size"),
    ],
)
def test_a_claim_holds_if_every_effect_does_and_falls_with_any_that_is_opposite(effects, verdict) -> None:
    finding = decide("tokens", "ours", *effects)
    assert (finding.claim, finding.verdict, finding.ours) == ("tokens", verdict, "ours")
