"""The measured memory of each optimizer against its closed form."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from ademamix import KEMA, AdamW, ADana, AdEMAMix, SimplifiedAdEMAMix, optimizer_from
from ademamix.lab.experiments.kernels import ages, memory

STEP = 150


def ema(beta: float, age: int) -> float:
    return (1 - beta) * beta**age


def log_time(delta: float, age: int) -> float:
    """An average with weights delta / (delta + t): that of a gradient, once later ones have come."""
    kept = math.prod(1 - delta / (delta + t) for t in range(STEP - age + 1, STEP + 1))
    return delta / (delta + STEP - age) * kept


def adamw(age: int) -> float:
    return ema(0.9, age) / (1 - 0.9**STEP)


def adana(age: int) -> float:
    mean_square = 1 - math.prod(1 - 4.0 / (4.0 + t) for t in range(1, STEP + 1))  # of ones, not bias-corrected
    return ((age == 0) + (1 + STEP) ** 0.2 * log_time(4.0, age)) / math.sqrt(mean_square)


def kema(age: int) -> float:
    later = [(h, (h / 5.0) ** 0.4) for h in (5.0 * 8**0.5, 40.0)]
    return ema(0.8, age) / (1 - 0.8**STEP) + sum(a * ema(1 - 1 / h, age) for h, a in later)


def leaky(p: Any, g: Any, m: Any, *, lr: Any = 0.1, leak: Any = 0.25, decay: Any = 0.5) -> Any:
    m = m + leak * (g - m)
    return p - lr * (m + decay * p), m


@pytest.mark.parametrize(
    ("kind", "settings", "weight"),
    [
        (AdamW, {"weight_decay": 0.3}, adamw),
        (AdEMAMix, {"betas": (0.9, 0.999, 0.98), "alpha": 5.0}, lambda age: adamw(age) + 5.0 * ema(0.98, age)),
        (AdamW, {"geometry": "muon"}, adamw),
        (AdEMAMix, {"betas": (0.0, 0.999, 0.98), "alpha": 5.0}, lambda age: (age == 0) + 5.0 * ema(0.98, age)),
        (
            AdEMAMix,
            {"beta3_schedule": "log-time", "alpha": 0.5, "delta": 4.0, "kappa": 0.9},
            lambda age: adamw(age) + 0.5 * (1 + STEP) ** 0.1 * log_time(4.0, age),
        ),
        (SimplifiedAdEMAMix, {"betas": (0.95, 0.99), "alpha": 7.0}, lambda age: 0.95**age + 7.0 * (age == 0)),
        (ADana, {"delta": 4.0, "kappa": 0.8, "weight_decay": 0.1}, adana),
        (KEMA, {"count": 3, "power": 0.6, "shortest": 5.0, "longest": 40.0}, kema),
        (optimizer_from(leaky), {"lr": 3.0}, lambda age: ema(0.75, age)),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_measured_memory_is_the_closed_form(
    kind: Any, settings: dict[str, Any], weight: Callable[[int], float]
) -> None:
    of = ages(STEP)
    found = memory(kind, settings, STEP, of)
    # eps = 1e-8 next to a second moment of 1 takes that part of each weight; what is measured is a difference of two
    # updates of about 10, so its own error is some 1e-15.
    assert found == pytest.approx([weight(age) for age in of], rel=2e-8, abs=1e-14)


def test_ages_are_those_that_there_are():
    assert ages(1) == [0]
    assert ages(4) == [0, 1, 2, 3]
    many = ages(10_000)
    assert many == sorted(set(many))
    assert (many[0], many[1], many[-1]) == (0, 1, 9_999)
    assert len(many) < 70
