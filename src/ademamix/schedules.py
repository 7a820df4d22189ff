"""Coefficients over time: pure functions of the step, written against the array namespace ``xp``.

A step may be a number or an array of steps; it counts from 1, as in the paper.
"""

from typing import Any

import numpy as xp


def half_life(beta: Any) -> Any:
    """Steps after which an EMA's weight of one gradient has halved: ln 0.5 / ln beta; 0 for ``beta = 0``.

    Args:
        beta: decay of the EMA, in [0, 1).
    """
    return xp.log(0.5) / xp.log(xp.maximum(beta, 1e-300)) * (beta > 0.0)


def alpha_schedule(step: Any, alpha: Any, warmup: Any = None) -> Any:
    """alpha_t of AdEMAMix: linear from 0 to ``alpha`` over ``warmup`` steps, then constant (arXiv 2409.03137, sec. 3).

    Args:
        step: step or steps t, from 1 on.
        alpha: final weight of the slow EMA.
        warmup: number of steps until ``alpha`` is reached; None for ``alpha`` from the first step on.
    """
    if warmup is None:
        return alpha
    return alpha * xp.minimum(step / warmup, 1.0)


def beta3_schedule(step: Any, beta1: Any, beta3: Any, warmup: Any = None) -> Any:
    """beta3_t of AdEMAMix: from ``beta1`` to ``beta3``, linear in the half-life (arXiv 2409.03137, appendix A.1).

    Args:
        step: step or steps t, from 1 on.
        beta1: decay of the fast EMA, where the schedule starts (at t = 0); 0 has the half-life 0.
        beta3: final decay of the slow EMA; never exceeded.
        warmup: number of steps until ``beta3`` is reached; None for ``beta3`` from the first step on.
    """
    if warmup is None:
        return beta3
    reached = xp.minimum(step / warmup, 1.0)
    length = (1.0 - reached) * half_life(beta1) + reached * half_life(beta3)
    return xp.minimum(0.5 ** (1.0 / xp.maximum(length, 1e-30)), beta3)  # 1e-30 stands for a memory of length 0


def log_time_weight(step: Any, delta: Any) -> Any:
    """1 - beta_t of an EMA whose memory grows with time: delta / (delta + t) (arXiv 2602.05298, ADana's beta_t).

    With it the EMA weighs the gradient of step s <= t about as s^(delta - 1) / t^delta: its horizon is t / delta.

    Args:
        step: step or steps t, from 1 on.
        delta: how often the horizon goes into the steps done so far, > 0.
    """
    return delta / (delta + step)


def log_time_alpha(step: Any, kappa: Any) -> Any:
    """The weight of such an EMA beside the gradient: (1 + t)^(1 - kappa) (arXiv 2602.05298, ADana's alpha_t).

    Args:
        step: step or steps t, from 1 on.
        kappa: damping, in (0, 1]; 1 for a constant weight of 1.
    """
    return (1.0 + step) ** (1.0 - kappa)


LARGEST_BETA3 = 0.9999  # the largest that the paper trained with in earnest: up to 1.5 million steps


def suggest(total_steps: int) -> dict[str, Any]:
    """Keyword arguments of AdEMAMix for a run of so many steps: ``AdEMAMix(params, lr=..., **suggest(256_000))``.

    The slow average reaches back an eighth of the run, beta3 = 1 - 8 / total_steps (as in arXiv 2602.05298; our own
    runs, docs/results/horizon.md, agree), but no further than the paper's 10,000 steps; alpha is the paper's 8; both
    warm up over the whole run.

    Args:
        total_steps: optimizer steps of the whole run, at least 100: with fewer there are no old gradients to speak of.

    Returns:
        ``betas``, ``alpha``, ``alpha_warmup`` and ``beta3_warmup``.

    Raises:
        ValueError: total_steps is no whole number >= 100.
    """
    if not isinstance(total_steps, int) or total_steps < 100:
        raise ValueError(f"total_steps must be a whole number >= 100, got {total_steps!r}")
    beta3 = min(1.0 - 8.0 / total_steps, LARGEST_BETA3)
    return {
        "betas": (0.9, 0.999, beta3),
        "alpha": 8.0,
        "alpha_warmup": total_steps,
        "beta3_warmup": total_steps,
    }
