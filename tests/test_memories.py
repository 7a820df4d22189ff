"""The other memories against float64 implementations written from their papers' equations."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ademamix import ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix

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
    """arXiv 2602.05298, peak lr 0.01; its lambda(t) = omega / t is multiplied by lr's schedule alone."""
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


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ADana, {"delta": 0.0}, "delta must be a finite number > 0, got 0.0"),
        (ADana, {"kappa": 1.5}, r"kappa must be a number in \(0, 1\], got 1.5"),
        (ADana, {"omega": -1.0}, "omega must be a finite number >= 0, got -1.0"),
        (ADana, {"omega": 4.0}, "peak_lr must be a finite number > 0 .*, got None"),
        (ADana, {"peak_lr": 0.0}, "peak_lr must be a finite number > 0 .*, got 0.0"),
        (SimplifiedAdEMAMix, {"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
        (SimplifiedAdEMAMix, {"min_beta1": 1.0}, r"min_beta1 must be a number in \[0, 1\), got 1.0"),
        (SimplifiedAdEMAMix, {"beta1_warmup": -1}, "beta1_warmup must be None or a number of steps >= 1, got -1"),
        (SimplifiedAdEMAMix, {"betas": (0.9,)}, r"betas must be 2 numbers in \[0, 1\), got \(0.9,\)"),
        (AdEMAMix, {"beta3_schedule": "log"}, r"beta3_schedule must be one of \('half-life', 'log-time'\), got 'log'"),
        (AdEMAMix, {"delta": -1.0}, "delta must be a finite number > 0, got -1.0"),
        (
            AdEMAMix,
            {"beta3_schedule": "log-time", "alpha_warmup": 5},
            "warmups must be None with beta3_schedule='log-time', .*'alpha_warmup': 5",
        ),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_hyperparameters_are_named(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([torch.zeros(2, requires_grad=True)], **options)
