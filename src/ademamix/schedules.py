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
    """The weight of such an EMA relative to the gradient: (1 + t)^(1 - kappa) (arXiv 2602.05298, ADana's alpha_t).

    Args:
        step: step or steps t, from 1 on.
        kappa: damping, in (0, 1]; 1 for a constant weight of 1.
    """
    return (1.0 + step) ** (1.0 - kappa)
