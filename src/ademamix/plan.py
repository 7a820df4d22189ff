"""From parameters, gradients and state to launches of the backends: checks, state creation, layouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ademamix import backends

if TYPE_CHECKING:
    from ademamix.optimizer import RuleOptimizer


class Plan:
    """All of a step that stays the same while parameters, state tensors and the gradients' dtypes do."""

    def __init__(
        self,
        optimizer: RuleOptimizer,
        params: Sequence[Tensor],
        of_group: Sequence[int],
        stored: Sequence[tuple[str, ...]],
    ) -> None:
        self.params, self.of_group, self.stored = params, of_group, stored
        for i, p in zip(of_group, params, strict=True):
            _check_tensors(type(optimizer).__name__, i, p)
        self.states = [_state_of(optimizer.state.get(p), p, stored[i]) for i, p in zip(of_group, params, strict=True)]
        # The optimizer takes new state over once the step has succeeded.
        self.fresh = {p: s for p, s in zip(params, self.states, strict=True) if s is not optimizer.state.get(p)}
        self.steps = [state["step"] for state in self.states]
        self.slots = [(s, name) for i, s in zip(of_group, self.states, strict=True) for name in stored[i]]
        self.written = [*params, *(state[name] for state, name in self.slots)]
        self.pointers = [t.data_ptr() for t in self.written]
        self.grad_kinds = [(g.dtype, g.layout) for g in _grads(params)]

        # Backends update real, dense tensors: views of the parameters, or a copy where a parameter is not dense.
        self.targets = [_real(p.detach() if _is_dense(p) else torch.empty_like(p.detach())) for p in params]
        self.copied = [i for i, p in enumerate(params) if not _is_dense(p)]
        self.complex = [i for i, p in enumerate(params) if p.is_complex()]
        self.layouts = [t.stride() for t in self.targets]

        buckets: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, (i, p, target) in enumerate(zip(of_group, params, self.targets, strict=True)):
            grad_dtype = _real(_grads([p])[0]).dtype
            buckets[p.device.type, target.dtype, grad_dtype, stored[i]].append(index)
        self.launches = []
        names = backends.slot_names(optimizer.rule)
        for (_, _, grad_dtype, kept), members in buckets.items():
            targets = [self.targets[m] for m in members]
            slots = [[_real(self.states[m][n]) if n in kept else None for n in names] for m in members]
            launch = backends.launch(optimizer.backend, optimizer.rule, targets, slots, grad_dtype)
            self.launches.append((launch, members))

    def serves(
        self,
        optimizer: RuleOptimizer,
        params: Sequence[Tensor],
        of_group: Sequence[int],
        stored: Sequence[tuple[str, ...]],
    ) -> bool:
        """Whether all is as it was when this plan was made, also if somebody exchanged tensors or their memory."""
        return (
            of_group == self.of_group
            and stored == self.stored
            and all(map(is_, params, self.params))
            and all(map(is_, map(optimizer.state.get, params), self.states))
            and all(map(is_, [state.get("step") for state in self.states], self.steps))
            and all(map(is_, [state.get(name) for state, name in self.slots], self.written[len(params) :]))
            and [t.data_ptr() for t in self.written] == self.pointers
            and [(g.dtype, g.layout) for g in _grads(params)] == self.grad_kinds
        )

    def run(self, rows: Sequence[int], coefficients: npt.NDArray[np.float64]) -> None:
        """Update all parameters; ``coefficients[rows[i]]`` serves the i-th."""
        grads = _grads(self.params)
        for i in self.complex:
            grads[i] = _real(grads[i].resolve_conj())
        strides = [g.stride() for g in grads]
        if strides != self.layouts:
            for i, (stride, layout) in enumerate(zip(strides, self.layouts, strict=True)):
                if stride != layout:
                    grads[i] = torch.empty_like(self.targets[i], dtype=grads[i].dtype).copy_(grads[i])
        for i in self.copied:
            self.targets[i].copy_(_real(self.params[i]))
        for launch, members in self.launches:
            launch([grads[m] for m in members], [rows[m] for m in members], coefficients)
        for i in self.copied:
            _real(self.params[i]).copy_(self.targets[i])


def _grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params]  # type: ignore[misc]


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _is_dense(p: Tensor) -> bool:
    """Whether p fills its memory without gaps or overlaps: then empty_like keeps its strides."""
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()


def _state_dtype(p: Tensor) -> torch.dtype:
    real = backends.compute_dtype(p.dtype.to_real())
    return real.to_complex() if p.is_complex() else real


def like_state(value: Tensor, p: Tensor) -> Tensor:
    """``value`` with the device, dtype and layout of p's state; the same tensor where it has them."""
    wanted = torch.empty_like(p, dtype=_state_dtype(p), device="meta", requires_grad=False)
    value = value.detach().to(device=p.device, dtype=wanted.dtype)
    if value.stride() == wanted.stride():
        return value
    return torch.empty_like(wanted, device=p.device).copy_(value)


def _state_of(saved: dict[str, Any] | None, p: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The parameter's state with all the named slots: ``saved`` itself where nothing had to be added."""
    state = {"step": torch.tensor(0.0), **(saved or {})}
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(p, dtype=_state_dtype(p), requires_grad=False)
        elif state[name].shape != p.shape:
            shapes = f"{tuple(state[name].shape)}, its parameter {tuple(p.shape)}"
            raise RuntimeError(f"state tensor {name!r} has shape {shapes}: they must be equal")
        else:
            state[name] = like_state(state[name], p)
    unchanged = saved is not None and state.keys() == saved.keys() and all(state[k] is saved[k] for k in state)
    return saved if saved is not None and unchanged else state


def _check_tensors(name: str, group: int, p: Tensor) -> None:
    g = p.grad
    assert g is not None
    where = f"the gradient of a parameter of shape {tuple(p.shape)} in group {group}"
    if g.layout != torch.strided:
        raise RuntimeError(f"{name} takes dense gradients (torch.strided) alone; {where} is {g.layout}")
    for what, t in (("parameter", p), ("gradient", g)):
        if t.dtype.to_real() not in backends.DTYPES or t.is_complex() != p.is_complex():
            allowed = "float64, float32, bfloat16, float16 or, both of them, complex"
            raise RuntimeError(f"{name} cannot update a {what} of dtype {t.dtype} in group {group}; allowed: {allowed}")
    if g.shape != p.shape:
        raise RuntimeError(f"{name}: {where} has shape {tuple(g.shape)}: they must be equal")
