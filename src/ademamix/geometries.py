"""The mathematics of stepping: how a direction ``u`` that a memory made of the gradients becomes a step.

An elementwise geometry maps ``(p, u, g, *slots)`` and its keyword-only coefficients to ``(new p, *new slots)``; names
mean what they mean in a memory (``memories.py``). What stands between ``p`` and ``g`` is what the memory returns before
its slots. It computes with the array namespace ``xp``: arithmetic, and what all backends have (``sqrt``, ``abs``,
``exp``, ``log``, ``minimum``, ``maximum``, ``where``).
"""

from typing import Any

import numpy as xp


def adam(
    p: Any,
    u: Any,
    g: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    w2: Any,  # these three of beta2, as every average's (memories.py)
    stay2: Any,
    pull2: Any,
    debias2: Any,  # 1 / sqrt(1 - beta2^t)
) -> tuple[Any, Any]:
    """Each element divided by its root mean square (Adam), with decoupled decay multiplied by lr as in PyTorch."""
    exp_avg_sq = stay2 * exp_avg_sq + w2 * (g * g - pull2 * exp_avg_sq)
    update = u / (debias2 * xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), exp_avg_sq


def adam_limited(
    p: Any,
    u: Any,
    fast: Any,  # what of u fresh gradients have made
    slow: Any,  # and what old ones may have: u is their sum
    g: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    w2: Any,
    stay2: Any,
    pull2: Any,
    debias2: Any,
    floor: Any,  # of exp_avg_sq / slow^2, below which slow is limited; 0 for no limit
) -> tuple[Any, Any]:
    """Adam's step, in which a slow part r times as large as its limit counts as 1 / r of the limit.

    Where gradients stop, their mean square is forgotten before the slow average is, and the quotient of the two grows
    by orders of magnitude. A mean never exceeds the root mean square of the same gradients, so a slow part that does is
    of older ones, and the less it counts the further they lie back. ``u`` itself is kept below the limit, not summed
    anew: a run without a limit keeps its bits.
    """
    exp_avg_sq = stay2 * exp_avg_sq + w2 * (g * g - pull2 * exp_avg_sq)
    share = floor * slow
    over = share * slow > exp_avg_sq
    denominator = debias2 * xp.sqrt(exp_avg_sq) + eps
    # fast + exp_avg_sq / share where over, with one division: kernels of compact state wait for these.
    update = xp.where(over, fast * share + exp_avg_sq, u) / xp.where(over, share * denominator, denominator)
    return p - lr * (update + weight_decay * p), exp_avg_sq
