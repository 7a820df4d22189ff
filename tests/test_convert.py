"""State dicts of other optimizers: what goes on from them is held against the equations in float64."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import ademamix
from ademamix import AdEMAMix
from ademamix.convert import from_adamw

SHAPES = ((6, 4), (5,))
SCHEDULED: dict[str, Any] = {"alpha": 5.0, "alpha_warmup": 6, "beta3_warmup": 8}
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "eager"])


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]


def gradient(i: int, t: int) -> torch.Tensor:
    return torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(97 * i + t), dtype=torch.float64)


def train(params: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        for i, p in enumerate(params):
            p.grad = gradient(i, t).to(p.dtype)
        optimizer.step()


class Equations:
    """AdamW's and AdEMAMix's steps of one parameter, in float64, as the papers have them."""

    def __init__(self, p: torch.Tensor) -> None:
        self.p, self.m1, self.m2, self.v = p.detach().clone(), *(torch.zeros_like(p.detach()) for _ in range(3))

    def step(self, g: torch.Tensor, t: int, *, betas: Any, alpha: float, lr: float, weight_decay: float) -> None:
        b1, b2, b3 = betas
        self.m1 = b1 * self.m1 + (1 - b1) * g
        self.m2 = b3 * self.m2 + (1 - b3) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        update = (self.m1 / (1 - b1**t) + alpha * self.m2) / ((self.v / (1 - b2**t)).sqrt() + 1e-8)
        self.p = self.p - lr * (update + weight_decay * self.p)


def scheduled_beta3(reached: float, beta1: float, beta3: float) -> float:
    half_lives = [math.log(0.5) / math.log(b) for b in (beta1, beta3)]
    reached = min(reached, 1.0)
    return 0.5 ** (1.0 / ((1.0 - reached) * half_lives[0] + reached * half_lives[1]))


# --------------------------------------------------------------------------------- from AdamW


@BACKENDS
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("source", [torch.optim.AdamW, ademamix.AdamW])
def test_a_training_switched_from_adamw_follows_the_equations(source: Any, capturable: bool, backend: str) -> None:
    switch, end = 7, 20
    params = parameters()
    adamw = source(params, lr=0.01, betas=(0.8, 0.95), weight_decay=0.2)
    train(params, adamw, range(1, switch + 1))
    optimizer = AdEMAMix(params, lr=0.5, betas=(0.1, 0.2, 0.99), backend=backend, capturable=capturable, **SCHEDULED)
    saved = adamw.state_dict()
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(from_adamw(saved, optimizer))
    assert str(saved) == str(before)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.95, 0.99), 0.2)
    assert (group["alpha"], group["schedule_start"], group["capturable"]) == (5.0, switch, capturable)
    train(params, optimizer, range(switch + 1, end))

    for i, (p, start) in enumerate(zip(params, parameters(), strict=True)):
        exact = Equations(start)
        for t in range(1, end):
            since = t - switch
            if since == 1:
                exact.m2.zero_()
            b3 = scheduled_beta3(max(since, 0) / 8, 0.8, 0.99)
            alpha = 5.0 * min(max(since, 0) / 6, 1.0)
            exact.step(gradient(i, t), t, betas=(0.8, 0.95, b3), alpha=alpha, lr=0.01, weight_decay=0.2)
        # 20 steps of a dozen float64 roundings on either side.
        torch.testing.assert_close(p.detach(), exact.p, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_slow"], exact.m2, rtol=1e-12, atol=1e-12)


def test_a_schedule_that_has_not_begun_stands_at_its_start() -> None:
    """A parameter that fell behind the others of its group has not reached the switch: its step is AdamW's."""
    (p, q), (r, s) = parameters(), parameters()
    late = AdEMAMix([p, q], schedule_start=3, betas=(0.9, 0.999, 0.99), **SCHEDULED)
    adamw = ademamix.AdamW([r, s], weight_decay=0.0)
    train([p, q], late, range(3))
    train([r, s], adamw, range(3))
    assert torch.equal(p, r)
    assert torch.equal(q, s)
    train([p, q], late, range(3, 4))
    train([r, s], adamw, range(3, 4))
    assert not torch.equal(p, r)


@pytest.mark.parametrize("state", ["compact", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "compact"])
def test_low_bit_adamw_states_are_taken_over(state: str, target: str) -> None:
    p = nn.Parameter(torch.randn(64, 70))
    adamw = ademamix.AdamW([p], state=state)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        adamw.step()
    optimizer = AdEMAMix([p], state=target)
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    fresh = AdEMAMix([q := nn.Parameter(p.detach().clone())], state=target)
    q.grad = torch.zeros_like(q)
    fresh.step()
    layout = {k: (v.dtype, v.shape) for k, v in fresh.state[q].items()}
    assert {k: (v.dtype, v.shape) for k, v in optimizer.state[p].items()} == layout
    if state == target:
        assert torch.equal(optimizer.state[p]["exp_avg_fast"], adamw.state[p]["exp_avg"])
        assert torch.equal(optimizer.state[p]["exp_avg_fast_scale"], adamw.state[p]["exp_avg_scale"])
    assert not optimizer.state[p]["exp_avg_slow"].any()


def test_schedulers_and_group_entries_go_on() -> None:
    params = parameters()
    adamw = torch.optim.AdamW([("a", params[0]), ("b", params[1])], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 10)
    train(params, adamw, range(3))
    scheduler.step()
    optimizer = AdEMAMix(params)
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    group = optimizer.param_groups[0]
    assert group["initial_lr"] == 0.1
    assert group["lr"] == adamw.param_groups[0]["lr"] != 0.1
    assert group["param_names"] == ["a", "b"]
    assert "foreach" not in group


def adamw_state(**options: Any) -> dict[str, Any]:
    params = parameters()
    adamw = torch.optim.AdamW(params, **options)
    train(params, adamw, range(2))
    return adamw.state_dict()


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    del state["state"][1][key]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": 1}, r"from_adamw: an optimizer's state dict has 'state', this one has \['model'\]"),
        (without(adamw_state(), "exp_avg_sq"), r"the state of parameter 1 has no 'exp_avg_sq'; it has \['exp_avg', "),
        (adamw_state(amsgrad=True), "amsgrad=True is nothing that AdEMAMix can go on from; allowed: False"),
        (
            torch.optim.SGD(parameters(), lr=1.0, momentum=0.9).state_dict(),
            r"parameter group 0 has no 'betas'; it has \['dampening', ",
        ),
        (AdEMAMix(parameters()).state_dict(), r"'betas' of parameter group 0 must be 2, got \(0.9, 0.999, 0.9999\)"),
        (
            torch.optim.Adam(parameters(), weight_decay=0.1).state_dict(),
            "decoupled_weight_decay=False is nothing that AdEMAMix can go on from; allowed: True",
        ),
        (
            torch.optim.AdamW([{"params": [p]} for p in parameters()]).state_dict(),
            "the state dict has 2 parameter groups, the optimizer 1",
        ),
    ],
    ids=range(7),
)
def test_a_foreign_state_dict_is_refused_by_the_name_of_its_key(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_adamw(state, AdEMAMix(parameters()))


@pytest.mark.parametrize("bad", [-1, 2.5, "3"])
def test_a_bad_schedule_start_is_named(bad: Any) -> None:
    with pytest.raises(ValueError, match="schedule_start must be an integer >= 0, got"):
        AdEMAMix(parameters(), schedule_start=bad)
