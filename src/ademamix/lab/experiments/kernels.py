"""What an optimizer remembers: the weight that a gradient of each age has in its update."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ademamix import RuleOptimizer


def ages(step: int, count: int = 60) -> list[int]:
    """Ages of gradients in a step, evenly spaced by their logarithm: from 0, its own, to the first gradient's."""
    return sorted({0, *np.geomspace(1, max(1, step - 1), count).round().astype(int).tolist()} & set(range(step)))


def memory(kind: type[RuleOptimizer], arguments: Mapping[str, Any], step: int, ages: Sequence[int]) -> list[float]:
    """The weight of the gradient of each age in the update of a step, for lr = 1 and gradients of size one.

    It is measured, so it is there for any rule: all gradients are +1, but that an element of its own for each age has
    -1 at that age. Half of what this takes from its update is the weight. The second moment does not see the sign.

    Args:
        kind: the optimizer's class.
        arguments: its settings.
        step: the step, from 1 on.
        ages: steps since the gradient, each below `step`.
    """
    p = torch.zeros(len(ages) + 1, dtype=torch.float64, requires_grad=True)
    # A memory is the same in any geometry, and Adam's is elementwise.
    elementwise = {"geometry": "adam"} if "geometry" in arguments else {}
    # A few elements: compiling the rule for float64 would take longer than running it.
    optimizer = kind([p], **{**arguments, **elementwise, "lr": 1.0, "backend": "eager"})
    p.grad = torch.ones_like(p)
    flipped = {step - age: i for i, age in enumerate(ages)}
    for t in range(1, step + 1):
        p.grad.fill_(1.0)
        if t in flipped:
            p.grad[flipped[t]] = -1.0
        p.detach().zero_()  # so that nothing decays, and the update of this step is what is seen
        optimizer.step()
    weights: list[float] = ((p[:-1] - p[-1]) / 2).tolist()
    return weights
