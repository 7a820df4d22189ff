"""Means with their errors over seeds, differences, and how both are told to people; a run that diverged is infinite."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; that of one value is unknown: infinity. So is the mean, if a run diverged."""
    if any(map(math.isinf, values)):
        return math.inf, 0.0
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.mean(values), spread


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """By how much the mean of `b` lies above that of `a`, and the joint standard error."""
    (x, dx), (y, dy) = mean_and_error(a), mean_and_error(b)
    return y - x, math.hypot(dx, dy)


def clearly_below(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the mean of `a` is below that of `b` by more than twice the joint standard error."""
    gap, error = difference(a, b)
    return gap > 2 * error


def students_t(freedom: int, level: float = 0.95) -> float:
    """The t with that share of Student's distribution within [-t, t].

    Args:
        freedom: degrees of freedom, from 1 on.
        level: the share, in (0, 1).
    """
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):  # each halves the range
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < level else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """The share within [-t, t]: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@dataclass(frozen=True)
class Paired:
    """By how much losses lie above others of the same seeds: the mean, and its interval by Student's t."""

    mean: float  # infinite if a run of a pair diverged
    half: float  # of the interval's width; infinite for one pair
    below: int  # pairs in which the first loss is the lower one
    count: int

    @property
    def helps(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.mean + self.half < 0

    @property
    def hurts(self) -> bool:
        """Whether the whole interval is above zero."""
        return math.isfinite(self.mean) and self.mean - self.half > 0

    @property
    def verdict(self) -> str:
        """Helps, hurts or undecided."""
        return "helps" if self.helps else "hurts" if self.hurts else "undecided"

    @property
    def interval(self) -> str:
        """The interval for people, or why there is none."""
        if math.isinf(self.mean):
            return "diverged in some seed"
        return "one seed" if math.isinf(self.half) else f"{self.mean - self.half:+.4f} to {self.mean + self.half:+.4f}"

    def __str__(self) -> str:
        known = "" if math.isinf(self.mean) else f"{self.mean:+.4f} "
        return f"{self.verdict}: {known}({self.interval}), {self.below} of {self.count}"


def paired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Paired:
    """By how much `a` lies above `b`, seed by seed, with the interval that covers the mean at this level."""
    below = sum(x < y for x, y in zip(a, b, strict=True))
    if any(map(math.isinf, (*a, *b))):
        return Paired(math.inf, math.inf, below, len(a))
    mean, error = mean_and_error([x - y for x, y in zip(a, b, strict=True)])
    half = error * students_t(len(a) - 1, level) if len(a) > 1 else math.inf
    return Paired(mean, half, below, len(a))


def plus_minus(mean: float, error: float, form: str = ".4f") -> str:
    """A number with its standard error, for people; without it, where one seed gives none."""
    return f"{mean:{form}}" if math.isinf(error) else f"{mean:{form}} ± {error:{form.lstrip('+')}}"


def shown(values: Sequence[float]) -> str:
    """A mean with its standard error, for people, or in how many seeds the run diverged: then there is no mean."""
    if lost := sum(map(math.isinf, values)):
        return f"diverged in {lost} of {len(values)} seeds" if len(values) > 1 else "diverged"
    return plus_minus(*mean_and_error(values))


def diverged(samples: Mapping[str, Sequence[float]]) -> str:
    """Who diverged, and in how many seeds, in place of a sentence on differences; empty if nobody did."""
    return ", ".join(f"{name} {shown(values)}" for name, values in samples.items() if any(map(math.isinf, values)))


def loss_of(value: float) -> str:
    """The loss of one run, for people; infinity stands for a run that diverged."""
    return "diverged" if math.isinf(value) else f"{value:.4f}"


def by_seed(values: Sequence[float]) -> str:
    """Each loss of a sample, for people."""
    return ", ".join(map(loss_of, values))


def table_of(samples: Mapping[str, Sequence[float]], heads: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A table of named samples: the mean with its error, then each value."""
    return [heads, *((name, shown(values), by_seed(values)) for name, values in samples.items())]


def final_losses(adamw: Sequence[float], ademamix: Sequence[float]) -> tuple[str, str]:
    """How far AdEMAMix ends from AdamW, unless one diverged; and the sentence with both losses."""
    if lost := diverged({"AdamW": adamw, "AdEMAMix": ademamix}):
        return lost, lost
    gap, error = difference(ademamix, adamw)
    gain = f"AdEMAMix ends {plus_minus(abs(gap), error)} nats {'below' if gap > 0 else 'above'} AdamW"
    return gain, f"{gain} ({shown(adamw)} and {shown(ademamix)})"
