"""What decides about a step before it is taken: the gradients' norm and scale, and whether a CUDA graph captures it."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.amp import GradScaler

from ademamix import backends
from ademamix.backends import sent_to
from ademamix.engine.arguments import NUMBERS
from ademamix.engine.sharding import global_norm, gradients, is_sharded
from ademamix.engine.state import CPU, scalar


class Norm(NamedTuple):
    """The gradients' norm, as the next step is to use it."""

    value: Tensor
    factor: Tensor | None  # on the gradients
    grad_scale: float | Tensor | None  # the gradients have been multiplied by it, and value divided


class Note:
    """A norm that is kept for the next step, and which gradients it is of; these it does not keep alive."""

    def __init__(self, norm: Norm, grads: Sequence[Tensor]) -> None:
        self.norm = norm
        self.grads, self.versions, self.graphs = list(map(ref, grads)), _versions(grads), _nodes()

    def serves(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are gradients that it is of; some may be gone.

        They may have been changed in place meanwhile, by a factor for instance, as those that torch's clip_grad_norm_
        has clipped may be. Changed twice or more, with a graph built between, they have been zeroed and are another
        batch's.
        """
        noted = [each() for each in self.grads]
        if len(grads) == len(noted) and all(map(is_, grads, noted)) and _nodes() == self.graphs:  # in all but few steps
            return True
        versions = {id(g): version for g, version in zip(noted, self.versions, strict=True) if g is not None}
        if not all(id(g) in versions for g in grads):
            return False
        changes = [now - versions[id(g)] for g, now in zip(grads, _versions(grads), strict=True)]
        return _nodes() == self.graphs or max(changes, default=0) < 2


def _versions(grads: Sequence[Tensor]) -> list[int]:
    """How often each has been changed in place; inference tensors do not count."""
    try:
        return [g._version for g in grads]
    except RuntimeError:
        return [0 if g.is_inference() else g._version for g in grads]


def _nodes() -> int:
    """How many operations autograd has recorded in this thread."""
    return torch._C._autograd._get_sequence_nr()


def clipping(
    params: Sequence[Any],
    max_norm: float,
    grad_scale: float | Tensor | GradScaler | None,
    norm: float | Tensor | None = None,
) -> Norm:
    """The norm of all gradients of ``params``, which have been multiplied by ``grad_scale``, without that, and the
    factor that clips them; or this ``norm`` in its place.

    Raises:
        ValueError: ``max_norm`` or ``norm`` is not a number >= 0.
    """
    if not isinstance(max_norm, NUMBERS) or not max_norm >= 0.0:
        raise ValueError(f"max_norm must be a number >= 0, got {max_norm!r}")
    if isinstance(grad_scale, GradScaler):  # its get_scale() would wait for the device
        grad_scale = grad_scale._get_scale_async() if grad_scale.is_enabled() else None
    members = [p for p in params if p.grad is not None]
    if norm is None:
        value = global_norm(gradients(members, [p.grad for p in members]), params)
    else:
        value = _one_number(norm)
        if not any(p.dtype == torch.float64 for p in members):
            value = value.float()
        value = sent_to(members[0].device, value) if members else value
    if isinstance(grad_scale, Tensor) and grad_scale.device.type != "cpu":
        grad_scale = sent_to(value.device, grad_scale)  # a GradScaler's lies where the loss does
    if grad_scale is not None and norm is None:
        value = value / grad_scale
    return Norm(value, (max_norm / (value + 1e-6)).clamp(max=1.0), grad_scale)


def _one_number(norm: Any) -> Tensor:
    """A norm that somebody else has computed, as :func:`global_norm` gives one. It may be a NaN."""
    if isinstance(norm, Tensor) and norm.numel() == 1:
        whole: Any = norm.full_tensor() if is_sharded(norm) else norm  # type: ignore[attr-defined]
        value: Tensor = whole.detach().reshape(())
        return value
    if not isinstance(norm, NUMBERS) or norm < 0.0:
        raise ValueError(f"norm must be a number >= 0 or a tensor of one element, got {norm!r}")
    return torch.tensor(float(norm), dtype=torch.float64)


def factor_and_skip(
    norm: Norm | None, scale: float | Tensor | None, found_inf: float | Tensor | None, skip_nonfinite: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What to multiply the gradients by, and whether to skip the step, where that is a question.

    Args:
        norm: of the gradients, if anybody has looked at it.
        scale: a GradScaler's, if it leaves the gradients scaled.
        found_inf: what a GradScaler has found, not 0 if a gradient is not finite.
        skip_nonfinite: whether a norm that is not finite skips the step.

    Raises:
        RuntimeError: the gradients were clipped while scaled, by a norm that knows of no scale.
    """
    factor, skip = None, None
    if norm is not None:
        if norm.factor is not None and norm.grad_scale is None and scale is not None:
            raise RuntimeError(
                "clip_grad_norm_ has seen scaled gradients: call scaler.unscale_(optimizer) before it, "
                "or give it grad_scale=scaler"
            )
        factor = norm.factor
        scale = norm.grad_scale if norm.grad_scale is not None else scale
        if skip_nonfinite:
            skip = (norm.value - norm.value) != 0.0  # of an infinity or a NaN that is a NaN; isfinite() takes 6 kernels
    if scale is not None:
        known = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64, device=CPU)
        factor = 1.0 / known if factor is None else factor / scale
    if found_inf is not None:
        found_inf = found_inf if isinstance(found_inf, Tensor) else scalar(found_inf)  # 0, where it saw no gradient
        skip = found_inf.bool() if skip is None else skip | found_inf.bool().to(skip.device)
    return factor, skip


def is_captured(params: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a CUDA graph captures the step; RuntimeError if it would capture what it must not, or not all."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    within = {device: backends.capturing(device) for device in {p.device for p in params}}
    if not any(within.values()):
        return False
    missing = [i for i, group in enumerate(groups) if not group["capturable"]]
    if missing:
        raise RuntimeError(f"a CUDA graph captures only steps with capturable=True; groups {missing} have False")
    outside = sorted(str(device) for device, captured in within.items() if not captured)
    if outside:  # their part of the step would be taken now, and in no replay
        raise RuntimeError(f"a CUDA graph captures only steps on its own devices; there are parameters on {outside}")
    return True
