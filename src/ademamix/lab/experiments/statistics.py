"""Differences within seeds, with intervals by Student's t; how samples are told to people. A diverged run is infinite.

Both sides of a comparison have the same seeds: the same initial weights and the same batches. So losses are compared
seed by seed, and the spread between seeds, which is larger than most effects, drops out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

LEVEL = 0.95  # of intervals


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; that of one value is unknown: infinity. So is the mean, if a run diverged."""
    if any(map(math.isinf, values)):
        return math.inf, 0.0
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.mean(values), spread


@dataclass(frozen=True)
class Paired:
    """Differences of two samples, seed by seed: their mean, its interval by Student's t, and what they decide."""

    differences: tuple[float, ...]  # infinite where one run of the pair diverged, not a number where both did
    level: float = LEVEL

    @cached_property
    def mean(self) -> float:
        """Infinite, or not a number, if a run diverged."""
        return sum(self.differences) / len(self.differences)

    @cached_property
    def half(self) -> float:
        """Half the interval's width; infinite for one pair, and if a run diverged."""
        if not math.isfinite(self.mean) or len(self.differences) < 2:
            return math.inf
        from scipy.stats import t  # takes most of a second

        error = statistics.stdev(self.differences) / math.sqrt(len(self.differences))
        return float(error * t.ppf((1 + self.level) / 2, len(self.differences) - 1))

    @property
    def below(self) -> int:
        """Pairs in which the first value is the lower one."""
        return sum(d < 0 for d in self.differences)

    @property
    def count(self) -> int:
        return len(self.differences)

    @property
    def lower(self) -> bool:
        """Whether the first sample is decidedly below the second: the whole interval is below zero.

        Where a run diverged there is no interval; then the signs decide, by a two-sided test at the same level. With
        95 % that takes six seeds that agree.
        """
        if math.isfinite(self.mean):
            return self.mean + self.half < 0
        return self._signs_agree(self.below)

    @property
    def higher(self) -> bool:
        """Whether it is decidedly above."""
        if math.isfinite(self.mean):
            return self.mean - self.half > 0
        return self._signs_agree(sum(d > 0 for d in self.differences))

    def _signs_agree(self, agreeing: int) -> bool:
        from scipy.stats import binomtest

        return agreeing > self.count / 2 and bool(binomtest(agreeing, self.count).pvalue <= 1 - self.level)

    @property
    def verdict(self) -> str:
        """What the first does to a loss, compared with the second."""
        return "helps" if self.lower else "hurts" if self.higher else "undecided"

    @property
    def signs(self) -> str:
        """The sign of each seed's difference, in the order of the seeds."""
        return "".join("-" if d < 0 else "+" if d > 0 else "0" if d == 0 else "?" for d in self.differences)

    def interval(self, form: str = "+.4f") -> str:
        """The interval for people, or why there is none."""
        if not math.isfinite(self.mean):
            return "diverged in some seed"
        return (
            "one seed" if math.isinf(self.half) else f"{self.mean - self.half:{form}} to {self.mean + self.half:{form}}"
        )

    def told(self, form: str = "+.4f") -> str:
        """Mean, interval and signs."""
        known = f"{self.mean:{form}} " if math.isfinite(self.mean) else ""
        return f"{known}({self.interval(form)}; signs {self.signs})"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.told()}"

    def __neg__(self) -> "Paired":
        return Paired(tuple(-d for d in self.differences), self.level)


def paired(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Paired:
    """By how much `a` lies above `b`, seed by seed.

    Args:
        a, b: losses by seed, in the same order.
        level: of the interval.
    """
    return Paired(tuple(x - y for x, y in zip(a, b, strict=True)), level)


def too_low(value: float, sample: Sequence[float]) -> bool:
    """Whether a value lies below the 99 % prediction interval of a sample: one more of its kind hardly would."""
    mean, error = mean_and_error(sample)
    if not 0.0 < error < math.inf:
        return False
    from scipy.stats import t

    n = len(sample)
    return bool(value < mean - t.isf(0.005, n - 1) * error * math.sqrt(n + 1))


def crossing(trials: Sequence[tuple[float, float]], loss: float) -> float:
    """The budget at which trials, in growing order, first come down to `loss`; linear in its logarithm.

    Args:
        trials: (budget, loss) of runs that each have a full schedule of their own.
        loss: the loss to reach.

    Returns:
        Infinity if no trial reaches it; the first budget if that does.
    """
    x0, y0 = trials[0]
    if y0 <= loss:
        return x0
    for x1, y1 in trials[1:]:
        if y1 <= loss:
            if math.isinf(y0):  # that run diverged
                return x1
            return math.exp(math.log(x0) + (y0 - loss) / (y0 - y1) * (math.log(x1) - math.log(x0)))
        x0, y0 = x1, y1
    return math.inf


@dataclass(frozen=True)
class Budgets:
    """The budgets that an optimizer needs for the losses of another, seed by seed, in budgets of that other."""

    factors: tuple[float, ...]  # infinite where the largest budget does not reach the loss, 1 where 1 is enough
    largest: float

    def above(self, factor: float) -> Paired:
        """The difference of the logarithms of a factor and of those found: below zero where more is needed."""
        return Paired(tuple(math.log(factor) - math.log(found) for found in self.factors))

    def told(self, unit: str) -> str:
        """How much more it needs, for people: the geometric mean, its interval, and the seeds it leaves out."""
        count, enough, beyond = len(self.factors), self.factors.count(1.0), self.factors.count(math.inf)
        most = f"over {100 * (self.largest - 1):.0f} % more"
        if enough == count:
            return f"no more{unit}"
        if beyond == count:
            return f"{most}{unit} in {count} of {count} seeds"
        if beyond:
            return f"at least {100 * (min(self.factors) - 1):.0f} % more{unit}, {most} in {beyond} of {count} seeds"
        pair = -self.above(1.0)
        low, mean, high = (
            f"{100 * math.expm1(x):.0f}" for x in (pair.mean - pair.half, pair.mean, pair.mean + pair.half)
        )
        spread = "" if math.isinf(pair.half) else f" ({low} to {high})"
        return f"{mean} % more{unit}{spread}" + (f", no more in {enough} of {count} seeds" if enough else "")

    def __str__(self) -> str:
        return self.told("")


def budgets_for(losses: Mapping[float, Sequence[float]], goal: Sequence[float]) -> Budgets:
    """The budgets that an optimizer needs for other losses of the same seeds.

    Args:
        losses: its own losses, seed by seed, by budget; 1 is that of the others.
        goal: the losses to reach, seed by seed.
    """
    trials = sorted(losses.items())
    found = (crossing([(x, of_seed[i]) for x, of_seed in trials], loss) for i, loss in enumerate(goal))
    return Budgets(tuple(found), max(losses))


def slopes(x: Sequence[float], samples: Sequence[Sequence[float]]) -> list[float]:
    """The slope of a line of least squares through each seed's values; not a number where one of them is infinite.

    Args:
        x: what the values depend on.
        samples: for each x, the values by seed.
    """
    import numpy as np

    columns = np.array(samples).T
    return [float(np.polyfit(x, of_seed, 1)[0]) if np.isfinite(of_seed).all() else math.nan for of_seed in columns]


def shown(values: Sequence[float]) -> str:
    """A mean with its standard error, for people, or in how many seeds the run diverged: then there is no mean."""
    if lost := sum(map(math.isinf, values)):
        return f"diverged in {lost} of {len(values)} seeds" if len(values) > 1 else "diverged"
    mean, error = mean_and_error(values)
    return f"{mean:.4f}" if math.isinf(error) else f"{mean:.4f} ± {error:.4f}"


def loss_of(value: float) -> str:
    """The loss of one run, for people; infinity stands for a run that diverged."""
    return "diverged" if math.isinf(value) else f"{value:.4f}"


def by_seed(values: Sequence[float]) -> str:
    """Each loss of a sample, for people."""
    return ", ".join(map(loss_of, values))


def table_of(samples: Mapping[str, Sequence[float]], heads: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A table of named samples: the mean with its standard error over seeds, then each value."""
    return [heads, *((name, shown(values), by_seed(values)) for name, values in samples.items())]


def against(pair: Paired, name: str, other: str) -> str:
    """How far a loss is from another, in a sentence: ``AdEMAMix ends 0.05 nats below AdamW (...)``."""
    if not math.isfinite(pair.mean):
        return f"{name} ends below {other} in {pair.below} of {pair.count} seeds; some runs diverged"
    side, apart = ("below", -pair) if pair.mean < 0 else ("above", pair)
    ends = f"{name} ends {apart.mean:.4f} nats {side} {other}"
    if math.isinf(pair.half):
        return f"{ends} (one seed)"
    within = f"{100 * pair.level:.4g} % interval {apart.interval('.4f')}"
    return f"{ends} ({within}; lower in {pair.below} of {pair.count} seeds)"


def jointly(count: int) -> float:
    """The level of each of several intervals that all hold together at 95 % (Bonferroni)."""
    return 1 - (1 - LEVEL) / max(1, count)


def grouped(pairs: Mapping[str, Paired], link: str = ": ") -> str:
    """What helps, hurts, or is undecided, with the interval where it is: ``helps: A, B; undecided: C (...)``."""
    said = []
    for verdict in ("helps", "hurts", "undecided"):
        names = [
            text + (f" ({pair.interval()})" if verdict == "undecided" else "")
            for text, pair in pairs.items()
            if pair.verdict == verdict
        ]
        said += [f"{verdict}{link}{', '.join(names)}"] if names else []
    return "; ".join(said)
