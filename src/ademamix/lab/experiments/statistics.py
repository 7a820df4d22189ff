"""Means with their errors over seeds, differences, and how both are told to people; a run that diverged is infinite."""

import math
import statistics
from collections.abc import Mapping, Sequence


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
