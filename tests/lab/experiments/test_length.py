"""What `length` trains and what it concludes, from losses that are known; test_experiments.py runs it for real."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from scipy import stats

from ademamix.lab.experiments import length
from ademamix.lab.reports.report import Report
from ademamix.lab.training.optimizers import arguments_of

CPU = length.PRESETS["cpu"]
SEEDS = CPU.seeds
TILT = {seed: 0.01 * (-1) ** i for i, seed in enumerate(SEEDS)}  # of each seed's own trend
LR = {"adamw": 4e-3, "ademamix": 2e-3}  # the best


def adamw(steps: float) -> float:
    """AdamW's loss by the number of steps: linear in its logarithm, so that interpolation is exact."""
    return 9.0 - 0.5 * math.log(steps)


def losses(factor: Callable[[int, int], float], lost: Callable[..., bool] = lambda *_: False) -> Callable[..., float]:
    """Losses by which AdamW needs the budget `factor(T, seed)`, in T; and some that are `lost`.

    At another learning rate, or another beta3 than 1 - 8 / T, a run ends higher.
    """

    def loss(optimizer: str, recipe: Any, _: object) -> float:
        if lost(optimizer, recipe):
            return math.inf
        own, t = getattr(recipe, optimizer), recipe.steps
        off = 0.1 * math.log(own.lr / LR[optimizer]) ** 2 + 0.1 * (own.beta2 != 0.999)
        if optimizer == "ademamix":
            off += 0.01 * math.log((1 - own.beta3) * t / 8) ** 2
        seed_own = 0.3 * math.sin(recipe.seed)  # far more than the differences
        return adamw(t if optimizer == "adamw" else t * factor(t, recipe.seed)) + off + seed_own

    return loss


def power(q: float, at_first: float) -> Callable[[int, int], float]:
    """A budget that goes with T to a power, about which seeds differ."""
    return lambda t, seed: at_first * (t / CPU.lengths[0]) ** (q + TILT.get(seed, 0.0))


@pytest.fixture
def carried_out(pretended: Any) -> Callable[..., tuple[Report, Any]]:
    def run(settings: length.Length, loss: Callable[..., float]) -> tuple[Report, Any]:
        trials = pretended(loss)
        return length.run(settings, trials), trials

    return run


def half(values: list[float]) -> float:
    """Half the 95 % interval of a mean."""
    return float(stats.sem(values) * stats.t.isf(0.025, len(values) - 1))


@pytest.mark.parametrize(
    ("q", "at_first", "verdict", "said"),
    [
        (0.2, 1.3, "reproduced", "grows"),
        (0.001, 1.6, "undecided", "does not decidedly change"),
        (-0.2, 2.3, "contradicted", "shrinks"),
    ],
)
def test_the_trend_is_the_power_by_which_the_budget_goes_with_the_length(
    q: float, at_first: float, verdict: str, said: str, carried_out: Any
) -> None:
    report, _ = carried_out(CPU, losses(power(q, at_first)))
    (finding,) = report.findings
    assert (finding.claim, finding.verdict) == ("length", verdict)
    edge = half([TILT[seed] for seed in SEEDS[:4]])  # every length has these four
    signs = "".join("+" if q + TILT[seed] > 0 else "-" for seed in SEEDS[:4])
    power_said = f"to the power {q:+.3f} ({q - edge:+.3f} to {q + edge:+.3f}; signs {signs})"
    # The gain is 0.5 nats for each factor of e of the budget.
    nats = f"the gain in nats changes by {q / 2:+.4f} ({(q - edge) / 2:+.4f} to {(q + edge) / 2:+.4f}; signs {signs})"
    assert power_said in finding.ours
    assert nats in finding.ours
    assert finding.ours.startswith("from 2,000 to 32,000 steps")
    assert finding.ours.endswith("over the 4 seeds that every length has")
    assert report.headlines[0].startswith(f"AdEMAMix's gain {said} with the number of steps: ")
    assert report.headlines[1] == finding.ours[0].upper() + finding.ours[1:]


def test_sentences_and_tables_have_the_budgets_and_gains(carried_out: Any) -> None:
    report, _ = carried_out(CPU, losses(power(0.2, 1.3)))
    of_8000 = [1.3 * 4 ** (0.2 + tilt) for tilt in TILT.values()]
    mean, edge = math.log(1.3 * 4**0.2), half([math.log(x) for x in of_8000])
    low, middle, high = (100 * math.expm1(x) for x in (mean - edge, mean, mean + edge))
    spread, gain = f"({low:.0f} to {high:.0f})", -0.5 * mean
    interval = f"{gain - edge / 2:+.4f} to {gain + edge / 2:+.4f}"
    assert report.headlines[3] == (
        f"At 8,000 steps AdEMAMix ends {-gain:.4f} nats below AdamW (95 % interval {-gain - edge / 2:.4f} to "
        f"{-gain + edge / 2:.4f}; lower in 8 of 8 seeds); AdamW needs {middle:.0f} % more tokens {spread}"
    )
    assert report.headlines[2].endswith("; AdamW needs 30 % more tokens (30 to 30)")
    assert (
        report.headlines[0]
        .partition("AdamW needs ")[2]
        .startswith(f"30 % more tokens (30 to 30) at 2,000 steps; {middle:.0f} % more tokens {spread} at 8,000 steps; ")
    )
    rows = {row[0]: row for row in report.tables[0]}
    assert rows["8,000"][3:] == (
        f"helps: {gain:+.4f} ({interval}; signs --------)", f"{middle:.0f} % more {spread}",
        "0.004, 0.002", "0.999, 0.999", "0.999",
    )  # fmt: skip
    assert rows["32,000"][-1] == "0.99975"
    of_seeds = [f"{adamw(3 * 8000) + 0.3 * math.sin(seed):.4f}" for seed in SEEDS]
    assert ("8,000", "AdamW", "24,000", ", ".join(of_seeds)) in report.tables[2]
    (line,) = report.pictures[0].lines
    assert line.y == pytest.approx([100 * (1.3 * x**0.2 - 1) for x in (1, 4, 16)])
    assert [band[1] for band in line.band] == pytest.approx([low, high])  # not symmetric: of logarithms
    assert report.pictures[1].lines[0].y == pytest.approx([-0.5 * math.log(1.3 * x**0.2) for x in (1, 4, 16)])


def test_ademamix_has_the_settings_of_the_published_rules_at_each_length(carried_out: Any) -> None:
    _, trials = carried_out(CPU, losses(power(0.2, 1.3)))
    for t, count in zip((2000, 8000, 32_000), (8, 8, 4), strict=True):
        of_length = {point: recipe for (grid, point), recipe in trials.recipes.items() if grid == f"final-{t}"}
        assert set(of_length) == {(name, 1.0, seed) for name in ("adamw", "ademamix") for seed in SEEDS[:count]}
        for (name, _, seed), recipe in of_length.items():
            assert (recipe.steps, recipe.warmup, recipe.seed) == (t, t // 20, seed)
            _, given = arguments_of(name, recipe)
            assert given["lr"] == LR[name]
            if name == "ademamix":
                assert given["betas"] == (0.9, 0.999, pytest.approx(1 - 8 / t))
                assert (given["alpha"], given["alpha_warmup"], given["beta3_warmup"]) == (8.0, t, t)


def test_both_are_tuned_over_as_many_points_with_the_learning_rates_of_each_length(carried_out: Any) -> None:
    _, trials = carried_out(CPU, losses(power(0.2, 1.3)))
    for t, factor in zip(CPU.lengths, (1.0, 1.0, 0.5), strict=True):
        for name, lrs in (("adamw", (2e-3, 4e-3, 8e-3)), ("ademamix", (1e-3, 2e-3, 4e-3))):
            tried = [point for grid, point in trials.recipes if grid == f"tune-{t}-{name}"]
            assert set(tried) == {(factor * lr, beta2) for lr in lrs for beta2 in (0.99, 0.999)}


def test_budgets_beyond_the_longest_are_left_out(carried_out: Any) -> None:
    settings = dataclasses.replace(CPU, longest=70_000)
    report, trials = carried_out(settings, losses(power(0.1, 1.3)))
    longer = {(grid, point[1]): r.steps for (grid, point), r in trials.recipes.items() if grid.startswith("longer")}
    assert longer == {
        ("longer-2000", 1.5): 3000, ("longer-2000", 2.0): 4000, ("longer-2000", 3.0): 6000,
        ("longer-2000", 4.0): 8000,
        ("longer-8000", 1.5): 12_000, ("longer-8000", 2.0): 16_000, ("longer-8000", 3.0): 24_000,
        ("longer-8000", 4.0): 32_000,
        ("longer-32000", 1.5): 48_000, ("longer-32000", 2.0): 64_000,
    }  # fmt: skip
    assert report.findings[0].verdict == "reproduced"
    (far,) = [
        line for line in carried_out(settings, losses(lambda *_: 2.5))[0].headlines if "At 32,000 steps Ad" in line
    ]
    assert far.endswith("; AdamW needs over 100 % more tokens in 4 of 4 seeds")


def test_a_seed_of_which_no_budget_is_enough_gives_no_trend(carried_out: Any) -> None:
    settings = dataclasses.replace(CPU, seed_counts=(8, 8, 8))
    factor = power(0.0, 1.6)
    report, _ = carried_out(settings, losses(lambda t, seed: 5.0 if (t, seed) == (8000, 203) else factor(t, seed)))
    (finding,) = report.findings
    assert finding.verdict == "undecided"
    assert "loss has no known trend, as the largest one tried is too small in some seed; the gain" in finding.ours
    least = 100 * (min(factor(8000, seed) for seed in SEEDS if seed != 203) - 1)
    assert report.headlines[0].startswith("AdEMAMix's gain has no known trend: for its loss AdamW needs ")
    assert f"at least {least:.0f} % more tokens, over 300 % more in 1 of 8 seeds at 8,000 steps" in report.headlines[0]
    (line,) = report.pictures[0].lines
    assert line.x == [2000.0, 32_000.0]  # a mean is not known at 8,000 steps


def test_a_seed_that_not_every_length_has_does_not_hide_the_trend(carried_out: Any) -> None:
    factor = power(0.2, 1.3)
    fifth = SEEDS[4]  # the longest has four
    report, _ = carried_out(CPU, losses(lambda t, seed: 5.0 if (t, seed) == (8000, fifth) else factor(t, seed)))
    assert report.findings[0].verdict == "reproduced"
    assert "to the power +0.200 (" in report.findings[0].ours
    assert "over 300 % more in 1 of 8 seeds at 8,000 steps" in report.headlines[0]


def test_the_best_half_life_at_the_longest_length(carried_out: Any) -> None:
    report, trials = carried_out(CPU, losses(power(0.0, 1.6)))
    (said,) = [line for line in report.headlines if "half-life" in line]
    # Half-lives are log 2 / -log beta3; the best is next to 1 - 8 / 32,000 = 0.99975.
    assert said == (
        "At 32,000 steps a half-life of 2,310 steps (beta3 = 0.9997) has the lowest mean loss. Each half-life compared "
        "with the next shorter one, from 69 steps on: helps: 231 steps, 693 steps, 2,310 steps; hurts: 6,931 steps"
    )
    off = {b: 0.01 * math.log((1 - b) * 32_000 / 8) ** 2 for b in (0.99, 0.9999)}
    longest = off[0.9999] - off[0.99]  # below the shortest's, though above the next shorter one's
    _, first, *_, last = report.tables[1]
    assert (first[:2], first[3]) == (("0.99", "69"), "")
    assert (last[:2], last[3]) == (
        ("0.9999", "6,931"), f"helps: {longest:+.4f} ({longest:+.4f} to {longest:+.4f}; signs ----)",
    )  # fmt: skip
    ages = {point for grid, point in trials.recipes if grid == "beta3"}
    assert ages == {(b, seed) for b in CPU.beta3 for seed in SEEDS[:4]}


def test_a_half_life_that_diverged_is_not_the_best(carried_out: Any) -> None:
    def lost(*beta3: float) -> Callable[..., bool]:
        return lambda name, r: name == "ademamix" and r.seed == 202 and r.ademamix.beta3 in beta3

    def oldest(*beta3: float) -> str:
        report, _ = carried_out(CPU, losses(power(0.0, 1.6), lost(*beta3)))
        (said,) = [line for line in report.headlines if "beta3" in line]
        return said

    first, second = oldest(0.99), oldest(0.9997)
    assert first.startswith("At 32,000 steps a half-life of 2,310 steps (beta3 = 0.9997) has the lowest mean loss")
    assert first.endswith("; hurts: 6,931 steps; undecided: 231 steps (diverged in some seed)")
    assert second.startswith("At 32,000 steps a half-life of 6,931 steps (beta3 = 0.9999) has the lowest mean loss")
    open_ones = "2,310 steps (diverged in some seed), 6,931 steps (diverged in some seed)"
    assert second.endswith(f"helps: 231 steps, 693 steps; undecided: {open_ones}")
    assert oldest(*CPU.beta3) == "At 32,000 steps AdEMAMix diverged in some seed with every beta3 that was tried"


def test_of_one_half_life_there_is_no_comparison(carried_out: Any) -> None:
    report, _ = carried_out(dataclasses.replace(CPU, beta3=(0.999,)), losses(power(0.2, 1.3)))
    assert "At 32,000 steps a half-life of 693 steps (beta3 = 0.999) has the lowest mean loss" in report.headlines


def test_without_values_of_beta3_their_ages_are_not_tried(carried_out: Any) -> None:
    report, _ = carried_out(dataclasses.replace(CPU, beta3=()), losses(power(0.2, 1.3)))
    assert "How old a gradient still helps was not tried" in report.headlines


def test_the_best_learning_rate_at_an_end_is_said(carried_out: Any) -> None:
    report, _ = carried_out(CPU, losses(power(0.2, 1.3)))
    # At 32,000 steps half of each is tried: AdamW's best is the largest, AdEMAMix's too.
    assert report.headlines[-1] == (
        "The best learning rate is the largest that was tried: AdamW, T = 32,000, AdEMAMix, T = 32,000"
    )
