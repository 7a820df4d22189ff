"""Memories for geometries of other libraries: a direction in place of each gradient."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ademamix.backends import Rule
from ademamix.engine.arguments import OF_GEOMETRY
from ademamix.engine.directions import Filter
from ademamix.engine.interrupts import uninterrupted
from ademamix.engine.kinds import traced_once
from ademamix.engine.launches import GroupSettings, Inputs, Program
from ademamix.engine.optimizer import RuleOptimizer
from ademamix.engine.sharding import local
from ademamix.engine.tracing import composed
from ademamix.geometries import direction
from ademamix.optimizers.custom import is_memory, optimizer_from

OF_STEPS = (*OF_GEOMETRY, "stochastic_rounding", "offload")


class GradientMemory(RuleOptimizer):
    """A memory as a filter of gradients: :meth:`step` writes its direction u in place of ``p.grad``.

    Another optimizer, from any library, then steps along u: ``torch.optim.SGD``, ``torch.optim.Muon(momentum=0,
    nesterov=False)``, Shampoo, SOAP. Its own momentum should be off; schedulers are for it. Parameters stay as they
    are, and ``p.grad`` the same tensor in the same place, as DDP's views need it.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups. Of any shape.
        memory: an optimizer class that has a memory (:class:`AdEMAMix`, :class:`ADana`, :class:`KEMA`,
            :class:`SimplifiedAdEMAMix`, :class:`AdamW`, :class:`Muon`, or one that :func:`optimizer_from` makes of a
            memory), or a memory function ``(g, *slots, *, coefficients) -> (u, *slots)``, as for
            :func:`optimizer_from`. u is the numerator of the class's update (for Muon, what is orthogonalized).
        hyperparameters: those of the class that u depends on, such as ``alpha``, ``betas`` (of which the one for
            squared gradients has no effect), ``delta``; entries of parameter groups too.
        maximize, state, backend, seed, capturable, skip_nonfinite: as in :class:`AdEMAMix`. ``maximize`` negates the
            gradients: give it to one of the two optimizers, not to both.

    State of a parameter: ``step`` and the memory's slots. Directions are computed in float32 (in float64 for float64
    parameters) and rounded to nearest in the gradient's dtype: they are used once, so no error adds up. A workspace of
    at most 64 MiB, or the largest parameter, holds them until they are written.

    Norms and skipped steps: :meth:`clip_grad_norm_` clips the gradients that enter the memory, within the step;
    ``torch.nn.utils.clip_grad_norm_`` after the step clips u. A step that is skipped, since a gradient is not finite,
    leaves the memory as it is and sets all gradients to zero, so that the other optimizer decays at most. With a
    GradScaler, call ``scaler.step`` for both, the memory first, and ``scaler.unscale_`` for neither, or only for the
    other optimizer::

        scaler.scale(loss).backward()
        scaler.step(memory)         # leaves u scaled, or NaN if a gradient is not finite
        scaler.step(optimizer)      # unscales u and steps, or skips the step
        scaler.update()

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # where gradients are to be seen without their scale
        memory.step()               # with skip_nonfinite=True, or after memory.clip_grad_norm_
        scaler.step(optimizer)
        scaler.update()

    Raises:
        ValueError: ``memory`` has no memory; an argument is out of its range, or is for steps and has no effect on u
            (``lr``, ``weight_decay``, ``eps``, ...). The message names it and what is allowed.

    Example:
        >>> memory = GradientMemory(model.parameters(), memory=ADana, kappa=0.85)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> loss.backward()
        >>> memory.step()  # between backward and the other optimizer's step
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    _step_supports_amp_scaling = True  # gradients keep a GradScaler's scale, for the other optimizer
    given: ClassVar[Any]  # the memory
    kind: ClassVar[type[RuleOptimizer]]  # and its class

    def __new__(cls, params: ParamsT = (), memory: Any = None, **_: Any) -> "GradientMemory":
        if cls is GradientMemory:
            cls = _of(memory)
        made: GradientMemory = super().__new__(cls)
        return made

    def __init__(self, params: ParamsT, memory: type[RuleOptimizer] | Rule, **options: Any) -> None:
        self._check_used(options)
        super().__init__(params, geometry="adam", **options)  # the memory's class's __init__

    def __reduce__(self) -> Any:
        return _unpickled, (type(self).given,), self.__getstate__()

    @classmethod
    def rule_of(cls, group: Mapping[str, Any]) -> Rule:
        memory = cls.memory_of(group)
        assert memory is not None
        return composed(memory, direction)

    @classmethod
    def rules_of(cls, group: Mapping[str, Any]) -> tuple[Rule, ...]:
        return (traced_once(cls.rule_of(group)),)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch.optim, after its hyperparameters, parameters and devices have been checked."""
        self._check_used(param_group)
        super().add_param_group(param_group)

    def _check_used(self, given: Mapping[str, Any]) -> None:
        if found := [name for name in given if name in self.refused]:
            every = inspect.signature(self.kind).parameters
            allowed = [name for name in every if name not in ("params", *self.refused)]
            raise ValueError(
                f"GradientMemory of {self.kind.__name__} must not get {found}, which are for steps and have no effect "
                f"on a direction; allowed: {allowed}, and for params all of a model's"
            )

    def _settings(self, group: Mapping[str, Any]) -> GroupSettings:
        return replace(super()._settings({**group, "geometry": "adam"}), then=Filter)

    def _left_out(self, own: Sequence[Tensor]) -> None:
        for g in map(local, own):
            g.fill_(0.0 if self._scale is None else torch.nan)

    def _run(self, inputs: Inputs, factor: Tensor | None, skip: Tensor | None, captured: bool) -> None:
        if several := [g for g in inputs.grads if torch._debug_has_internal_overlap(local(g)) == 1]:
            found = f"a gradient of shape {tuple(several[0].shape)} and strides {several[0].stride()}"
            raise RuntimeError(f"GradientMemory: {found} has several elements in one place in memory")
        if len(set(map(id, inputs.grads))) < len(inputs.grads):
            raise RuntimeError("GradientMemory: two parameters have one tensor as their gradients; give each its own")
        with uninterrupted():
            super()._run(inputs, factor, skip, captured)
            for p, g in zip(inputs.params, inputs.grads, strict=True):
                if p.grad is not g:  # a sum that was still to be made
                    p.grad = g

    def _program(self, offload: bool) -> Program:
        return super()._program(offload)._replace(scale=self._scale)

    @property
    def _scale(self) -> Any:
        """The scale of a GradScaler that the gradients have, and keep."""
        return getattr(self, "grad_scale", None)


def _of(memory: Any) -> type[GradientMemory]:
    """The class for a memory: the memory's own, with directions in place of steps."""
    kind = memory
    if is_memory(memory):
        kind = optimizer_from(memory)
    if not (inspect.isclass(kind) and issubclass(kind, RuleOptimizer)) or kind.memory is None:
        raise ValueError(
            "memory must be an optimizer class of this library that has a memory, such as ADana, or a memory function "
            f"(g, *slots, *, coefficients) -> (u, *slots), got {memory!r}"
        )
    refused = (*kind.stepping, *OF_STEPS)
    body = {"given": staticmethod(memory), "kind": kind, "refused": refused, "__module__": __name__}
    return type("GradientMemory", (GradientMemory, kind), body)


def _unpickled(memory: Any) -> GradientMemory:
    kind = _of(memory)
    return kind.__new__(kind)
