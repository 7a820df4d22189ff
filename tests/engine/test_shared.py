"""Optimizers inside of wrappers that pass for them, as Lightning's do: what one is told the other one knows."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdEMAMix, RuleOptimizer
from small_models import model, same, set_grads


class Delegating:
    """Has the step of the optimizer that it wraps, and whatever it has not itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["wrapped"], name)

    def step(self, closure: Any = None) -> Any:
        return self.wrapped.step(closure)


def looking_up(optimizer: RuleOptimizer) -> Any:
    """As Lightning's wrappers."""
    kind = type(f"Delegating{type(optimizer).__name__}", (Delegating, type(optimizer)), {})
    wrapper = kind.__new__(kind)
    vars(wrapper)["wrapped"] = optimizer
    return wrapper


def copying(optimizer: RuleOptimizer) -> Any:
    """As others, which have copies of the attributes."""
    wrapper = looking_up(optimizer)
    vars(wrapper).update(vars(optimizer))
    return wrapper


WRAPPERS = pytest.mark.parametrize("wrap", [looking_up, copying])


def pair(wrap: Callable[[RuleOptimizer], Any], **options: Any) -> tuple[list[nn.Module], list[AdEMAMix], Any]:
    """Two models, an optimizer for each, and a wrapper of the first."""
    nets = [model(), model()]
    optimizers = [AdEMAMix(net.parameters(), lr=0.1, backend="eager", **options) for net in nets]
    return nets, optimizers, wrap(optimizers[0])


def alike(nets: list[nn.Module], optimizers: list[AdEMAMix]) -> bool:
    return same(*[[dict(n.state_dict()), o.state_dict()] for n, o in zip(nets, optimizers, strict=True)])


@WRAPPERS
@pytest.mark.parametrize("offload", [False, True])
def test_clipping_and_skipping_through_a_wrapper(wrap: Any, offload: bool) -> None:
    nets, optimizers, wrapper = pair(wrap, offload=offload)
    for t in range(5):
        for net in nets:
            set_grads(net, t)
            if t in (0, 2):
                net[0].weight.grad[1, 1] = math.nan
        norm = optimizers[1].clip_grad_norm_(0.5)
        assert torch.equal(wrapper.clip_grad_norm_(0.5), norm) or norm.isnan()
        wrapper.step()
        optimizers[1].step()
        assert alike(nets, optimizers)
    assert [o.skipped_steps for o in (wrapper, *optimizers)] == [2, 2, 2]
    assert wrapper.backends_in_use == ("eager",)


@WRAPPERS
@pytest.mark.parametrize("through", ["clip", "zero"])
def test_zero_grad_forgets_the_norm_on_either_side(wrap: Any, through: str) -> None:
    nets, optimizers, wrapper = pair(wrap)
    for net in nets:
        set_grads(net, 0)
    (wrapper if through == "clip" else optimizers[0]).clip_grad_norm_(1e-3)
    (wrapper if through == "zero" else optimizers[0]).zero_grad(set_to_none=False)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        p.grad += q.grad
    wrapper.step()
    optimizers[1].step()
    assert alike(nets, optimizers)


@WRAPPERS
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [False, True])
def test_a_grad_scaler_steps_the_wrapper(wrap: Any, fused: bool | None, clip: bool) -> None:
    """Its scale is a power of two, so that all bits are those of steps without it."""
    nets, optimizers, wrapper = pair(wrap)
    for optimizer in (*optimizers, wrapper):
        optimizer._step_supports_amp_scaling = fused  # as the option does, which backend="eager" refuses
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        scaler.scale(torch.zeros((), requires_grad=True))
        for net in nets:
            set_grads(net, t)
        for p in nets[0].parameters():
            p.grad *= scaler.get_scale()
        if t == 1:
            nets[0][0].weight.grad[1, 1] = math.inf
        if clip:
            wrapper.clip_grad_norm_(0.5, grad_scale=scaler)
        scaler.step(wrapper)
        scaler.update()
        if t != 1:
            if clip:
                optimizers[1].clip_grad_norm_(0.5)
            optimizers[1].step()
        assert alike(nets, optimizers)
        assert not hasattr(wrapper, "grad_scale")
        assert not hasattr(optimizers[0], "found_inf")
    # The optimizer does not learn of a step that the scaler itself skips.
    assert wrapper.skipped_steps == optimizers[0].skipped_steps == (1 if fused or clip else 0)


@WRAPPERS
def test_what_a_scaler_leaves_is_seen_on_either_side(wrap: Any) -> None:
    _, (optimizer, _), wrapper = pair(wrap)
    one, other = torch.tensor(4.0), torch.tensor(0.0)
    wrapper.grad_scale, optimizer.found_inf = one, other
    assert (optimizer.grad_scale, wrapper.found_inf) == (one, other)
    del optimizer.grad_scale, wrapper.found_inf
    for name in ("grad_scale", "found_inf"):
        assert not hasattr(wrapper, name)
        assert not hasattr(optimizer, name)


@WRAPPERS
def test_state_loaded_on_either_side(wrap: Any) -> None:
    nets, optimizers, wrapper = pair(wrap)
    for t in range(6):
        for net in nets:
            set_grads(net, t)
        if t in (2, 4):
            fresh = pair(wrap)
            for net, trained in zip(fresh[0], nets, strict=True):
                net.load_state_dict(trained.state_dict())
                set_grads(net, t)
            (fresh[2] if t == 2 else fresh[1][0]).load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            fresh[1][1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
            nets, optimizers, wrapper = fresh
            assert wrapper.state is optimizers[0].state
            assert wrapper.param_groups is optimizers[0].param_groups
        wrapper.clip_grad_norm_(0.5)
        optimizers[1].clip_grad_norm_(0.5)
        wrapper.step()
        optimizers[1].step()
        assert alike(nets, optimizers)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), copy.copy], ids=["deepcopy", "pickle", "copy"]
)
def test_copies_share_nothing_that_calls_leave(clone: Any) -> None:
    net = model()
    optimizer = AdEMAMix(net.parameters(), fused=True)
    for bad in (1.0, math.nan, 1.0):
        set_grads(net, 0)
        net[0].weight.grad *= bad
        optimizer.clip_grad_norm_(1e-3)
        if bad != bad:
            optimizer.step()
    twin = clone(optimizer)
    assert (twin.skipped_steps, twin._fused, twin._note) == (1, True, None)
    twin.grad_scale = torch.tensor(2.0)
    assert not hasattr(optimizer, "grad_scale")
    twin._count(torch.tensor(True))
    assert (twin.skipped_steps, optimizer.skipped_steps) == (2, 1)
    assert optimizer._note is not None
