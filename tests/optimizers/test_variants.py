"""The other memories against float64 implementations written from their papers' equations."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ademamix import KEMA, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix
from ademamix.backends import bind, slot_names

STEPS, SHAPE = 60, (7, 5)
Array = np.ndarray[Any, Any]


def rates() -> list[float]:
    """A warmup and a decay: coefficients must follow lr."""
    return [1e-2 * min(1.0, (t + 1) / 10) * (1 - t / STEPS) for t in range(STEPS)]


def half_lives(t: int, start: float, end: float, warmup: float) -> float:
    """beta at the share t / warmup of the way from one to the other, linear in the half-life."""
    share = min(t / warmup, 1.0)
    halves = [0.0 if beta == 0.0 else np.log(0.5) / np.log(beta) for beta in (start, end)]
    return float(0.5 ** (1 / ((1 - share) * halves[0] + share * halves[1])))


def simplified(p: Array, grads: Array) -> Iterator[Array]:
    """arXiv 2502.02431 with b1 = 0.99 from 0.8 on over 40 steps, b2 = 0.95, alpha = 3, weight decay 0.1."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, rates(), strict=True), start=1):
        m = half_lives(t, 0.8, 0.99, 40) * m + g
        v = 0.95 * v + 0.05 * g**2
        p = p - lr * ((m + 3.0 * g) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * p)
        yield p


def adana(p: Array, grads: Array, delta: float, kappa: float, weight_decay: float, omega: float) -> Iterator[Array]:
    """arXiv 2602.05298, peak lr 0.01; its lambda(t) = omega / t is multiplied only by lr's schedule."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, rates(), strict=True), start=1):
        beta = 1 - delta / (delta + t)
        m = beta * m + (1 - beta) * g
        v = beta * v + (1 - beta) * g**2
        schedule = lr / 1e-2
        step = 1e-2 * (g + (1 + t) ** (1 - kappa) * m) / (np.sqrt(v) + 1e-8)
        p = p - schedule * (step + omega / t * p) - lr * weight_decay * p
        yield p


def log_time(p: Array, grads: Array, scale: float) -> Iterator[Array]:
    """AdEMAMix whose slow EMA has ADana's decay, and as its alpha ADana's, delta = 4, kappa = 0.9."""
    fast, slow, v = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, rates(), strict=True), start=1):
        fast = 0.9 * fast + 0.1 * g
        slow = t / (4 + t) * slow + 4 / (4 + t) * g
        v = 0.999 * v + 0.001 * g**2
        numerator = fast / (1 - 0.9**t) + scale * (1 + t) ** 0.1 * slow
        p = p - lr * (numerator / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * p)
        yield p


def kema(p: Array, grads: Array, count: int, shortest: float, warmup: float | None) -> Iterator[Array]:
    """Horizons to 80, power 0.6; weights and horizons as KEMA's docstring has them."""
    horizons = np.geomspace(shortest, 80.0, count)
    weights = (horizons / shortest) ** 0.4
    first = 1 - 1 / shortest
    averages, v = np.zeros((count, *p.shape)), np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, rates(), strict=True), start=1):
        betas = [half_lives(t, first, 1 - 1 / h, warmup) if warmup else 1 - 1 / h for h in horizons]
        averages = np.stack([b * m + (1 - b) * g for b, m in zip(betas, averages, strict=True)])
        share = min(t / warmup, 1.0) if warmup else 1.0
        factors = [1 / (1 - first**t), *(share * weights[1:])]
        v = 0.99 * v + 0.01 * g**2
        numerator = sum(a * m for a, m in zip(factors, averages, strict=True))
        p = p - lr * (numerator / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.1 * p)
        yield p


def _kema(count: int, shortest: float, warmup: float | None) -> tuple[Any, Any]:
    options = {"count": count, "power": 0.6, "shortest": shortest, "longest": 80.0, "beta2": 0.99, "warmup": warmup}
    return lambda p, g: kema(p, g, count, shortest, warmup), lambda p, **k: KEMA(p, weight_decay=0.1, **options, **k)


CASES: dict[str, tuple[Callable[..., Iterator[Array]], Callable[..., RuleOptimizer]]] = {
    "SimplifiedAdEMAMix": (
        simplified,
        lambda p, **k: SimplifiedAdEMAMix(
            p, betas=(0.99, 0.95), alpha=3.0, beta1_warmup=40, min_beta1=0.8, weight_decay=0.1, **k
        ),
    ),
    "ADana, plain decay": (
        lambda p, g: adana(p, g, 8.0, 0.85, 0.1, 0.0),
        lambda p, **k: ADana(p, weight_decay=0.1, **k),
    ),
    "ADana, decay omega / t": (
        lambda p, g: adana(p, g, 6.0, 0.75, 0.0, 2.0),
        lambda p, **k: ADana(p, delta=6.0, kappa=0.75, omega=2.0, peak_lr=1e-2, **k),
    ),
    "AdEMAMix, log-time": (
        lambda p, g: log_time(p, g, 0.5),
        lambda p, **k: AdEMAMix(p, alpha=0.5, weight_decay=0.1, beta3_schedule="log-time", delta=4.0, kappa=0.9, **k),
    ),
    "KEMA, K = 2": _kema(2, 5.0, None),
    "KEMA, K = 3, without a first EMA": _kema(3, 1.0, None),
    "KEMA, K = 4, warmup": _kema(4, 5.0, 40),
}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
# float64: the sum of 60 steps' roundings, each about 1e-16, is far below 1e-12. float32: parameters are rounded by 6e-8
# of their size in each step, a random walk, and a step of 1e-2 by 20 roundings: 60 * 1e-2 * 1e-6 at the very most.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_trajectories_are_those_of_the_equations(case: str, dtype: torch.dtype, tolerance: float, backend: str) -> None:
    reference, make = CASES[case]
    random = np.random.default_rng(0)
    # float32 values, so that both precisions start from the same numbers
    start, grads = random.standard_normal(SHAPE, np.float32), random.standard_normal((STEPS, *SHAPE), np.float32)
    p = torch.tensor(start, dtype=dtype, requires_grad=True)
    optimizer = make([p], backend=backend)
    exact = reference(start.astype(np.float64), grads.astype(np.float64))
    for lr, g, expected in zip(rates(), grads, exact, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        assert np.abs(p.detach().double().numpy() - expected).max() <= tolerance * np.abs(expected).max()


# --------------------------------------------------------------------------------- memory


def kernel(count: int, ages: int, **options: float) -> Array:
    """The weight of a gradient by its age, from the rule itself: one unit gradient, then zeros, late in a run."""
    group = KEMA([torch.zeros(1, requires_grad=True)], lr=1.0, count=count, **options).param_groups[0]
    plain = {"w2": 0.0, "debias2": 1.0, "eps": 0.0}  # exp_avg_sq stays 1
    coefficients = {**KEMA.coefficients(10**9, group), **plain}
    rule = bind(KEMA.rule_of(group), np)
    averages, weights = [0.0] * count, []
    for age in range(ages):
        p, *averages, _ = rule(0.0, float(age == 0), *averages, 1.0, **coefficients)
        weights.append(-p)
    return np.array(weights)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_kema_remembers_by_the_kernel_of_its_docstring(count: int) -> None:
    ages = np.arange(400)
    h = np.geomspace(10.0, 90.0, count)
    expected = sum((x / 10.0) ** 0.3 / x * (1 - 1 / x) ** ages for x in h)
    np.testing.assert_allclose(kernel(count, 400, power=0.7, shortest=10.0, longest=90.0), expected, rtol=1e-12)


@pytest.mark.parametrize("power", [0.5, 0.7, 1.0])
def test_kema_remembers_by_a_power_of_the_age(power: float) -> None:
    """Horizons a factor of 3 apart are the midpoint rule for an integral over the logarithm of the horizon, which errs
    by 2 |Gamma(power + 2 pi i / ln 3)| / Gamma(power) < 1e-3; (1 - 1 / h)^age is exp(-age / h) within 1 %. The integral
    is Gamma(power) age^-power, less what the longest horizon cuts off: at most (age / end)^power / Gamma(1 + power)."""
    shortest, longest, ages = 3.0, 3.0 * 3.0**7, np.arange(100, 1000)
    w = kernel(8, 1000, power=power, shortest=shortest, longest=longest)[100:]
    law = w * ages**power * math.log(3.0) * shortest ** (1 - power) / math.gamma(power)
    cut = (ages / (longest * 3**0.5)) ** power / math.gamma(1 + power)
    assert (law <= 1.02).all()
    assert (law >= 0.98 - cut).all()


def test_kema_of_two_is_ademamix() -> None:
    p, q = (torch.linspace(-1, 1, 50, dtype=torch.float64).requires_grad_() for _ in range(2))
    one = KEMA([p], count=2, power=0.699, shortest=10.0, longest=1000.0, warmup=30, weight_decay=0.1)
    alpha = 100.0 ** (1 - 0.699)
    two = AdEMAMix([q], betas=(0.9, 0.999, 0.999), alpha=alpha, beta3_warmup=30, alpha_warmup=30, weight_decay=0.1)
    for t in range(50):
        p.grad = q.grad = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        one.step()
        two.step()
    torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)  # 0.9 and 1 - 1 / 10 differ by a rounding


# --------------------------------------------------------------------------------- the number of EMAs


def test_the_number_of_emas_is_one_for_all_groups() -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = KEMA([p], count=2)
    with pytest.raises(ValueError, match=r"must have the rule of the first, with slots .*'exp_avg_2', 'exp_avg_sq'\)"):
        optimizer.add_param_group({"params": q, "count": 3})
    optimizer.add_param_group({"params": q, "longest": 50.0})
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="all groups must have the rule of the first"):
        optimizer.load_state_dict(KEMA([{"params": p}, {"params": q}], count=4).state_dict())
    assert optimizer.state_dict() == before


def test_the_rule_serves_any_number_of_emas() -> None:
    rule = KEMA.rule_of({"count": 6})
    assert slot_names(rule) == (*(f"exp_avg_{k}" for k in range(1, 7)), "exp_avg_sq")
    assert KEMA.rule_of({"count": 6}) is rule
