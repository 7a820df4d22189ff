"""A rule of a user's own."""

import numpy as xp


def lion(p, g, exp_avg, *, lr=1e-3, beta1=0.9, w2=0.01, weight_decay=0.0):
    """The sign of a mixture of the gradient and its average, smoothed."""
    mixed = beta1 * exp_avg + (1.0 - beta1) * g
    update = mixed / (xp.abs(mixed) + 1e-3)
    return p - lr * (update + weight_decay * p), exp_avg + w2 * (g - exp_avg)
