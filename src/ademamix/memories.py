"""The mathematics of remembering: what is kept of past gradients, and the direction that is made of it.

A memory maps ``(g, *slots)`` and its keyword-only coefficients to ``(u, *new slots)``: of the gradient to a direction
``u``, elementwise. One with a slow EMA returns ``(u, fast, slow, *new slots)``, where ``u`` is the sum of the two.
Its positional names after ``g`` are the names of the state slots; its keyword-only names are the coefficients, computed
once for each group and step by the optimizer class. A memory computes with arithmetic, and with what ``xp`` has
(``geometries.py``, which is also where ``u`` becomes a step).

An average ``beta m + w g`` with ``w = 1 - beta`` is written ``stay m + w (g - pull m)``:

- Up to w = 3/4, stay and pull are 1. An average of equal gradients stays exactly what it is, and ``w`` arrives rounded
  once from float64, while a ``1 - 0.9999`` of float32 would be off by 3e-4 of its value.
- Above, stay is beta and pull is 0. There ``m + w (g - m)`` would lose g: after m = 1, a g of 1e-8 with w = 1 would
  give 0. Beta and w, each rounded, add up to 1 within 6e-8: so far off is an average of equal gradients, at any step.

Either way an average errs by a few roundings of |beta m| + |w g| (tests/optimizers/test_averages.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any


def adamw(
    g: Any,
    exp_avg: Any,
    *,
    w1: Any,  # 1 - beta1
    stay1: Any,
    pull1: Any,
    debias1: Any,  # 1 / (1 - beta1^t)
) -> tuple[Any, Any]:
    """One EMA (AdamW: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
    exp_avg = stay1 * exp_avg + w1 * (g - pull1 * exp_avg)
    return debias1 * exp_avg, exp_avg


def ademamix(
    g: Any,
    exp_avg_fast: Any,
    exp_avg_slow: Any,
    *,
    alpha: Any,  # alpha_t
    w1: Any,  # 1 - beta1
    stay1: Any,
    pull1: Any,
    w3: Any,  # 1 - beta3_t
    stay3: Any,
    pull3: Any,
    debias1: Any,  # 1 / (1 - beta1^t)
) -> tuple[Any, Any, Any, Any, Any]:
    """A fast and a slow EMA (AdEMAMix: arXiv 2409.03137, equation AdEMAMix in section 3)."""
    exp_avg_fast = stay1 * exp_avg_fast + w1 * (g - pull1 * exp_avg_fast)
    exp_avg_slow = stay3 * exp_avg_slow + w3 * (g - pull3 * exp_avg_slow)
    fast, slow = debias1 * exp_avg_fast, alpha * exp_avg_slow
    return fast + slow, fast, slow, exp_avg_fast, exp_avg_slow


def simplified_ademamix(
    g: Any,
    exp_avg: Any,  # a sum of gradients: 1 / (1 - beta1) times as large as their average
    *,
    alpha: Any,
    stay1: Any,  # with pull1: beta1_t of the sum stays
    pull1: Any,
) -> tuple[Any, Any, Any, Any]:
    """A sum of the gradients, and the gradient itself (Simplified AdEMAMix: Morwani et al., arXiv 2502.02431)."""
    exp_avg = stay1 * exp_avg + (g - pull1 * exp_avg)
    fresh = alpha * g
    return exp_avg + fresh, fresh, exp_avg, exp_avg


def adana(
    g: Any,
    exp_avg: Any,
    *,
    alpha: Any,  # alpha_t
    w1: Any,  # 1 - beta_t
    stay1: Any,
    pull1: Any,
) -> tuple[Any, Any]:
    """The gradient, and an average whose memory grows with the run (ADana: Ferbach et al., arXiv 2602.05298)."""
    exp_avg = stay1 * exp_avg + w1 * (g - pull1 * exp_avg)
    return g + alpha * exp_avg, exp_avg


def momentum(
    g: Any,
    momentum_buffer: Any,
    *,
    w_m: Any,  # 1 - momentum
    stay_m: Any,
    pull_m: Any,
    fresh: Any,  # what the gradient itself weighs: 1 - momentum (Nesterov) or 0
) -> tuple[Any, Any]:
    """One EMA without bias correction (Muon: Jordan et al., https://kellerjordan.github.io/posts/muon/)."""
    momentum_buffer = stay_m * momentum_buffer + w_m * (g - pull_m * momentum_buffer)
    return momentum_buffer + fresh * (g - momentum_buffer), momentum_buffer


@cache
def kema(count: int) -> Callable[..., tuple[Any, ...]]:
    """A weighted sum of ``count`` EMAs ``exp_avg_1``, ``exp_avg_2``, ...

    Coefficients: ``w_k`` = 1 - beta_k, ``stay_k``, ``pull_k``, and ``a_k``, the weight of the k-th EMA, with its bias
    correction if it has one. All EMAs but the first are slow. The function is made from text, since a memory's slots
    are its arguments' names.
    """
    ks = range(1, count + 1)
    slots = ", ".join(f"exp_avg_{k}" for k in ks)
    products = [f"a_{k} * exp_avg_{k}" for k in ks]
    text = f"""\
def kema_{count}(g, {slots}, *, {", ".join(f"w_{k}, stay_{k}, pull_{k}, a_{k}" for k in ks)}):
    {"; ".join(f"exp_avg_{k} = stay_{k} * exp_avg_{k} + w_{k} * (g - pull_{k} * exp_avg_{k})" for k in ks)}
    return {" + ".join(products)}, {products[0]}, {" + ".join(products[1:])}, {slots}
"""
    scope: dict[str, Any] = {"__name__": __name__}
    exec(text, scope)
    memory: Callable[..., tuple[Any, ...]] = scope[f"kema_{count}"]
    return memory
