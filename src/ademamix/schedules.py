"""Coefficients over time: pure functions of the step, written against the array namespace ``xp``.

A step may be a number or an array of steps; it counts from 1, as in the paper.
"""

import math
from typing import Any

import numpy as xp


def half_life(beta: float) -> float:
    """Steps after which an EMA's weight of one gradient has halved: ln 0.5 / ln beta; 0 for ``beta = 0``.

    Args:
        beta: decay of the EMA, in [0, 1).
    """
    return math.log(0.5) / math.log(beta) if beta > 0.0 else 0.0


def alpha_schedule(step: Any, alpha: float, warmup: float | None = None) -> Any:
    """alpha_t of AdEMAMix: linear from 0 to ``alpha`` over ``warmup`` steps, then constant (arXiv 2409.03137, sec. 3).

    Args:
        step: step or steps t, from 1 on.
        alpha: final weight of the slow EMA.
        warmup: number of steps until ``alpha`` is reached; None for ``alpha`` from the first step on.
    """
    if warmup is None:
        return alpha
    return alpha * xp.minimum(step / warmup, 1.0)


def beta3_schedule(step: Any, beta1: float, beta3: float, warmup: float | None = None) -> Any:
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
