"""The mathematics of stepping: how a direction ``u`` that a memory made of the gradients becomes a step.

An elementwise geometry maps ``(p, u, g, *slots)`` and its keyword-only coefficients to ``(new p, *new slots)``; names
mean what they mean in a memory (``memories.py``). What stands between ``p`` and ``g`` is what the memory returns before
its slots. It computes with the array namespace ``xp``: arithmetic, and what all backends have (``sqrt``, ``abs``,
``exp``, ``log``, ``minimum``, ``maximum``, ``where``).

"muon" is not elementwise. A step in it has three parts: :func:`direction` writes ``u``, :func:`orthogonalized`
makes matrices of it, and :func:`decoupled` takes the step.
"""

import math
from collections.abc import Callable, Sequence
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
    exp_avg_sq = _mean_square(exp_avg_sq, g, w2, stay2, pull2)
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

    Where gradients stop, their mean square is forgotten before the slow EMA is, and the quotient of the two grows
    by orders of magnitude. A mean never exceeds the root mean square of the same gradients, so a slow part that does is
    of older ones, and the less it counts the further they lie back. ``u`` itself is kept below the limit, not summed
    anew: a run without a limit keeps its bits.
    """
    exp_avg_sq = _mean_square(exp_avg_sq, g, w2, stay2, pull2)
    share = floor * slow
    over = share * slow > exp_avg_sq
    denominator = debias2 * xp.sqrt(exp_avg_sq) + eps
    # fast + exp_avg_sq / share where over, with one division: kernels of compact state wait for these.
    update = xp.where(over, fast * share + exp_avg_sq, u) / xp.where(over, share * denominator, denominator)
    return p - lr * (update + weight_decay * p), exp_avg_sq


def _mean_square(exp_avg_sq: Any, g: Any, w2: Any, stay2: Any, pull2: Any) -> Any:
    """The new average of squares. One that has become infinite stays so, as in torch: infinity minus itself is NaN."""
    finite = xp.where(exp_avg_sq - exp_avg_sq < 1.0, exp_avg_sq, 0.0)
    return stay2 * exp_avg_sq + w2 * (g * g - pull2 * finite)


# --------------------------------------------------------------------------------- muon

Polynomial = tuple[float, float, float]  # a s + b s^3 + c s^5, of a singular value s

NEWTON_SCHULZ: Polynomial = (3.4445, -4.7750, 2.0315)  # Keller Jordan's Muon: the steepest at 0, to within 0.7 to 1.2

# Amsel, Persson, Musco and Gower, arXiv 2505.16932: each the best there is for the interval that those before it leave
# of [1e-3, 1], and the last of them for all that follow.
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # what bfloat16's rounding may make larger than 1 must not run away: all but the last see it smaller


def direction(p: Any, u: Any, g: Any) -> tuple[Any]:
    """The direction itself, in the place of a parameter: what the iteration is given."""
    return (u,)


def decoupled(p: Any, u: Any, *, lr: Any, weight_decay: Any) -> tuple[Any]:
    """A step along u, with decoupled weight decay."""
    return (p - lr * (u + weight_decay * p),)


def polynomials(coefficients: Polynomial | str, steps: int) -> tuple[Polynomial, ...]:
    """Those of an iteration of so many steps: always the same, or "polar_express"."""
    if not isinstance(coefficients, str):
        return (coefficients,) * steps
    *others, last = POLAR_EXPRESS
    safe = [_of_smaller(each, SAFETY) for each in others]
    first, *rest = safe[:steps] + [last] * (steps - len(safe))
    return (_of_smaller(first, SAFETY), *rest)


def _of_smaller(polynomial: Polynomial, factor: float) -> Polynomial:
    """The polynomial of s / factor."""
    a, b, c = polynomial
    return a / factor, b / factor**3, c / factor**5


def scale(adjust_lr_fn: str, rows: int, columns: int) -> float:
    """How large an update of orthogonal directions is: "original" (Keller Jordan's Muon) or "match_rms_adamw", whose
    elements have AdamW's typical root mean square of 0.2 (Liu et al., arXiv 2502.16982)."""
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / max(1, columns)))
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalized(
    x: Any, steps: Sequence[Polynomial], scale: float, norm: Callable[[Any], Any], multiply: Callable[..., Any]
) -> Any:
    """``scale`` times U V^T of each matrix x = U S V^T, approximately (Muon).

    x is divided by its Frobenius norm; then an odd polynomial is applied to its singular values, again and again,
    which drives them towards 1 (those of :data:`NEWTON_SCHULZ` come to lie between 0.7 and 1.2).

    Args:
        x: [..., rows, columns].
        steps: the polynomials, in turn.
        scale: a factor on the result.
        norm: of x, [..., 1, 1], and not 0: a matrix of zeros remains one.
        multiply: (c, a, b, beta, alpha) -> beta c + alpha a @ b, of matrices.
    """
    tall = x.shape[-2] > x.shape[-1]  # the polynomial is one of the shorter side's Gram matrix
    x = x / norm(x)
    for i, (a, b, c) in enumerate(steps, start=1):
        factor = scale if i == len(steps) else 1.0
        gram = x.mT @ x if tall else x @ x.mT
        inner = multiply(gram, gram, gram, factor * b, factor * c)
        x = multiply(x, *((x, inner) if tall else (inner, x)), factor * a, 1.0)
    return x
