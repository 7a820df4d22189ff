"""The mathematics: one pure elementwise function for each optimizer.

A rule maps ``(p, g, *state)`` and its keyword-only coefficients to ``(new p, *new state)``. Its positional names after
``p`` and ``g`` are the names of the state slots; its keyword-only names are the coefficients, computed once for each
group and step by the optimizer class. A rule is written against the array namespace ``xp``: each backend binds that
name to a namespace of its own and runs or compiles what one run on stand-ins has written down of this source (see
``elementwise.py``), so a rule may use arithmetic and ``xp`` functions that all of them have (``sqrt``, ``abs``,
``exp``, ``log``, ``minimum``, ``maximum``, ``where``) and nothing else.

Averages are written ``m + w * (g - m)`` with ``w = 1 - beta``: in float32, ``1 - 0.9999`` would be off by 3e-4 of its
value, while ``w`` arrives rounded once from float64.
"""

import linecache
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as xp


def ademamix(
    p: Any,
    g: Any,
    exp_avg_fast: Any,
    exp_avg_slow: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    alpha: Any,  # alpha_t
    w1: Any,  # 1 - beta1
    w2: Any,  # 1 - beta2
    w3: Any,  # 1 - beta3_t
    debias1: Any,  # 1 / (1 - beta1^t)
    debias2: Any,  # 1 / sqrt(1 - beta2^t)
) -> tuple[Any, Any, Any, Any]:
    """AdEMAMix (arXiv 2409.03137, equation AdEMAMix in section 3): a fast and a slow EMA over one second moment."""
    exp_avg_fast = exp_avg_fast + w1 * (g - exp_avg_fast)
    exp_avg_slow = exp_avg_slow + w3 * (g - exp_avg_slow)
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    update = (debias1 * exp_avg_fast + alpha * exp_avg_slow) / (debias2 * xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), exp_avg_fast, exp_avg_slow, exp_avg_sq


def adamw(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    w1: Any,  # 1 - beta1
    w2: Any,  # 1 - beta2
    debias1: Any,  # 1 / (1 - beta1^t)
    debias2: Any,  # 1 / sqrt(1 - beta2^t)
) -> tuple[Any, Any, Any]:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), with the decay multiplied by lr as in PyTorch."""
    exp_avg = exp_avg + w1 * (g - exp_avg)
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    update = debias1 * exp_avg / (debias2 * xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), exp_avg, exp_avg_sq


def simplified_ademamix(
    p: Any,
    g: Any,
    exp_avg: Any,  # a sum of gradients: 1 / (1 - beta1) times as large as their average
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    alpha: Any,
    w1: Any,  # 1 - beta1_t
    w2: Any,  # 1 - beta2
    debias2: Any,  # 1 / sqrt(1 - beta2^t)
) -> tuple[Any, Any, Any]:
    """Simplified AdEMAMix (Morwani et al., arXiv 2502.02431): one sum of the gradients, and the gradient beside it."""
    exp_avg = exp_avg + (g - w1 * exp_avg)
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    update = (exp_avg + alpha * g) / (debias2 * xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), exp_avg, exp_avg_sq


def adana(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    alpha: Any,  # alpha_t
    w: Any,  # 1 - beta_t
) -> tuple[Any, Any, Any]:
    """ADana (Ferbach et al., arXiv 2602.05298): the gradient and an average whose memory grows with the run."""
    exp_avg = exp_avg + w * (g - exp_avg)
    exp_avg_sq = exp_avg_sq + w * (g * g - exp_avg_sq)
    update = (g + alpha * exp_avg) / (xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), exp_avg, exp_avg_sq


@cache
def kema(count: int) -> Callable[..., tuple[Any, ...]]:
    """A weighted sum of ``count`` EMAs ``exp_avg_1``, ``exp_avg_2``, ... over one second moment.

    Coefficients beside AdamW's: ``w_k`` = 1 - beta_k and ``a_k``, the weight of the k-th EMA, with its bias correction
    if it has one. The function is made from text, since a rule's slots are its arguments' names.
    """
    ks = range(1, count + 1)
    slots = ", ".join([*(f"exp_avg_{k}" for k in ks), "exp_avg_sq"])
    coefficients = ", ".join(["lr, weight_decay, eps, w_sq, debias_sq", *(f"w_{k}, a_{k}" for k in ks)])
    text = f"""\
def kema_{count}(p, g, {slots}, *, {coefficients}):
    {"; ".join(f"exp_avg_{k} = exp_avg_{k} + w_{k} * (g - exp_avg_{k})" for k in ks)}
    exp_avg_sq = exp_avg_sq + w_sq * (g * g - exp_avg_sq)
    update = ({" + ".join(f"a_{k} * exp_avg_{k}" for k in ks)}) / (debias_sq * xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), {slots}
"""
    name = f"<ademamix kema {count}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # compilers read the text there
    scope: dict[str, Any] = {"xp": xp, "__name__": __name__}
    exec(compile(text, name, "exec"), scope)
    rule: Callable[..., tuple[Any, ...]] = scope[f"kema_{count}"]
    return rule
