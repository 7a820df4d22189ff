"""One norm for several optimizers."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp import GradScaler
from torch.optim import Optimizer

from ademamix.backends import sent_to
from ademamix.engine.clipping import clipping
from ademamix.engine.interrupts import without_gradients
from ademamix.engine.optimizer import RuleOptimizer
from ademamix.engine.sharding import local


@_disable_dynamo
@without_gradients
def clip_grad_norm_(
    optimizers: Iterable[Optimizer], max_norm: float, grad_scale: float | Tensor | GradScaler | None = None
) -> Tensor:
    """Clip the 2-norm of the gradients of several optimizers together, as if one had all of their parameters.

    Optimizers of this library do it within their next steps, as with their own ``clip_grad_norm_``: if the norm is not
    finite, each of them skips its step. The gradients of others, such as ``torch.optim.Muon``, are multiplied in place,
    as ``torch.nn.utils.clip_grad_norm_`` does it: a norm that is a NaN makes all of them NaN, an infinite one makes
    those that are finite zero.

    Args:
        optimizers: from this library or others, wrapped by Lightning or accelerate or not. With DTensors, all
            processes must have them in the same order.
        max_norm: the largest norm, >= 0.
        grad_scale: the GradScaler whose ``unscale_`` was called for none of the optimizers, or whatever else all
            gradients have been multiplied by; None if they are as they should be.

    Returns:
        The norm before clipping (and without the scale), a tensor of no dimensions on the first gradient's device.

    Raises:
        ValueError: ``optimizers`` are none, ``max_norm`` is not >= 0, or a parameter is in an optimizer of this library
            and in another; no gradient has been changed then.

    Example:
        >>> clip_grad_norm_([muon, adamw], 1.0)
        >>> muon.step()
        >>> adamw.step()
    """
    found = list(map(_unwrapped, optimizers))
    ours = dict.fromkeys(_parameters(o for o in found if isinstance(o, RuleOptimizer)))
    theirs = dict.fromkeys(_parameters(o for o in found if not isinstance(o, RuleOptimizer)))
    if both := [tuple(p.shape) for p in ours if p in theirs]:
        raise ValueError(
            "clip_grad_norm_ takes no parameter that an optimizer of this library shares with another, which would "
            f"clip its gradient twice, got parameters of shape {both}"
        )
    norm = clipping([*ours, *theirs], max_norm, grad_scale)
    assert norm.factor is not None
    for optimizer in found:
        if isinstance(optimizer, RuleOptimizer):
            optimizer.clip_grad_norm_(max_norm, grad_scale, norm.value)
    on: dict[torch.device, list[Tensor]] = defaultdict(list)
    for grad in [p.grad for p in theirs if p.grad is not None]:
        on[grad.device].append(local(grad))
    for device, grads in on.items():
        torch._foreach_mul_(grads, sent_to(device, norm.factor))
    return norm.value


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer of this library that accelerate's has as an attribute, or the optimizer itself."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizers must be instances of torch.optim.Optimizer, got a {type(optimizer).__name__}")
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, RuleOptimizer) else optimizer


def _parameters(optimizers: Iterable[Optimizer]) -> Iterable[Tensor]:
    return chain.from_iterable(group["params"] for o in optimizers for group in o.param_groups)
