"""The mathematics of stepping: how a direction ``u`` that a memory made of the gradients becomes a step.

An elementwise geometry maps ``(p, u, g, *slots)`` and its keyword-only coefficients to ``(new p, *new slots)``; names
mean what they mean in a memory (``memories.py``). It computes with the array namespace ``xp``: arithmetic, and what all
backends have (``sqrt``, ``abs``, ``exp``, ``log``, ``minimum``, ``maximum``, ``where``).
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
    w2: Any,  # 1 - beta2
    debias2: Any,  # 1 / sqrt(1 - beta2^t)
) -> tuple[Any, Any]:
    """Each element divided by its root mean square (Adam), with decoupled decay multiplied by lr as in PyTorch."""
    exp_avg_sq = exp_avg_sq + w2 * (g * g - exp_avg_sq)
    update = u / (debias2 * xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), exp_avg_sq
