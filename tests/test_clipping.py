"""One norm for several optimizers, against one optimizer or torch's clipping of all parameters."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdamW, AdEMAMix, GradientMemory, clip_grad_norm_
from small_models import model, same, set_grads

SETTINGS: dict[str, Any] = {"lr": 0.1, "alpha": 5.0, "alpha_warmup": 6, "beta3_warmup": 5}


def split(net: nn.Module, *kinds: Any) -> list[Any]:
    """An optimizer for each of the two linear layers."""
    return [kind(layer.parameters()) for kind, layer in zip(kinds, (net[0], net[2]), strict=True)]


def ours(params: Any) -> AdEMAMix:
    return AdEMAMix(params, **SETTINGS)


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def everything(net: nn.Module, optimizers: list[Any]) -> list[Any]:
    states = [optimizer.state[p] for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    return [dict(net.state_dict()), *map(dict, states)]


def test_two_optimizers_step_as_one_with_all_parameters() -> None:
    whole, parts = model(), model()
    one, two = ours(whole.parameters()), split(parts, ours, ours)
    for t in range(6):
        for net in (whole, parts):
            set_grads(net, t)
            if t == 2:
                net[2].weight.grad[0, 0] = math.nan
        norm = one.clip_grad_norm_(0.5)
        assert torch.equal(clip_grad_norm_(iter(two), 0.5), norm) or norm.isnan()
        for optimizer in (one, *two):
            optimizer.step()
        assert same(everything(whole, [one]), everything(parts, two))
    assert [o.skipped_steps for o in (one, *two)] == [1, 1, 1]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("scaled", [False, True])
def test_beside_an_optimizer_of_torch(dtypes: tuple[torch.dtype, torch.dtype], scaled: bool) -> None:
    nets = [model() for _ in range(2)]
    for net in nets:
        for layer, dtype in zip((net[0], net[2]), dtypes, strict=True):
            layer.to(dtype)
    optimizers = [split(net, torchs, ours) for net in nets]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled) for _ in nets]
    for t in range(4):
        norms = []
        for net, both, scaler, joint in zip(nets, optimizers, scalers, (False, True), strict=True):
            scaler.scale(torch.zeros((), requires_grad=True))
            set_grads(net, t)
            for p in net.parameters():
                p.grad *= scaler.get_scale()
            if joint:
                norms.append(clip_grad_norm_(both, 0.5, grad_scale=scaler))
            else:
                for optimizer in both:
                    scaler.unscale_(optimizer)
                norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5))
            for optimizer in both:
                scaler.step(optimizer)
            scaler.update()
        # bfloat16 gradients' norm is rounded to bfloat16 by torch before it is used, 2**-9 of it.
        rough = torch.bfloat16 in dtypes
        torch.testing.assert_close(norms[1].double(), norms[0].double(), rtol=2.0**-8 if rough else 1e-6, atol=0.0)
        for p, q in zip(*[net.parameters() for net in nets], strict=True):
            # A factor that is off by 2**-8 moves a step of at most lr (1 + alpha) per element by as much of it, and
            # bfloat16 parameters, of size 1 at most, may be rounded to the next number each time.
            error = (t + 1) * (0.1 * 6 + 1) * 2.0**-8 if rough else (t + 1) * 0.1 * 6 * 1e-5
            torch.testing.assert_close(p, q, rtol=0.0, atol=error)


@pytest.mark.parametrize(("bad", "expected"), [(math.nan, math.nan), (math.inf, 0.0)])
def test_a_bad_gradient_anywhere_skips_the_steps_of_ours_and_does_to_others_what_torch_does(
    bad: float, expected: float
) -> None:
    net = model()
    other, adamw = split(net, torchs, AdamW)
    set_grads(net, 0)
    net[2].bias.grad[1] = bad
    theirs = copy.deepcopy(net)
    for p, q in zip(theirs.parameters(), net.parameters(), strict=True):
        p.grad = q.grad.clone()
    before = copy.deepcopy(everything(net, [adamw]))
    assert torch.allclose(clip_grad_norm_([other, adamw], 1.0), torch.tensor(bad), equal_nan=True)
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    for p, q in zip(net[0].parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.0, atol=0.0, equal_nan=True)
        torch.testing.assert_close(p.grad, torch.full_like(p, expected), rtol=0.0, atol=0.0, equal_nan=True)
    adamw.step()
    assert adamw.skipped_steps == 1
    assert same(before, everything(net, [adamw]))


class Holding(torch.optim.Optimizer):
    """Has an optimizer, as accelerate's, and is of a class of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


def test_optimizers_in_others() -> None:
    nets = [model() for _ in range(2)]
    plain, held = (split(net, torchs, AdamW) for net in nets)
    for net in nets:
        set_grads(net, 0)
        net[2].bias.grad[1] = math.nan
    clip_grad_norm_(plain, 0.5)
    clip_grad_norm_(map(Holding, held), 0.5)
    for _, adamw in (plain, held):
        adamw.step()
        assert adamw.skipped_steps == 1


def test_parameters_in_two_optimizers_count_once() -> None:
    net = model()
    set_grads(net, 0)
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
    assert torch.allclose(clip_grad_norm_([ours(net.parameters()), AdamW(net[0].parameters())], 1.0), norm)
    before = [p.grad.clone() for p in net.parameters()]
    clip_grad_norm_([torchs(net.parameters()), torchs(net[0].parameters())], 0.5)
    for p, g in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.grad, g * (0.5 / (norm + 1e-6)))


def test_what_is_refused_changes_nothing() -> None:
    net = model()
    set_grads(net, 0)
    before = [p.grad.clone() for p in net.parameters()]
    memory, sgd = GradientMemory(net[0].parameters(), memory=AdEMAMix), torchs(net.parameters())
    for bad, max_norm, message in (
        (net.parameters(), 1.0, "optimizers must be instances of torch.optim.Optimizer, got a Parameter"),
        ([sgd], -1.0, "max_norm must be a number >= 0, got -1.0"),
        ([memory, sgd], 1.0, r"takes no parameter that an optimizer of this library shares .*\(8, 6\), \(8,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_grad_norm_(bad, max_norm)
    assert memory._note is None
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))
    assert clip_grad_norm_([], 1.0) == 0.0
