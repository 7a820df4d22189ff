"""Parameters of which each process has a part, checkpoints that change their number, and torch's other machinery.

What needs several processes is checked by sharding_processes.py, all in one start of four of them.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ademamix import AdamW, AdEMAMix
from processes import assert_passed, started_together

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

outcomes, CHECKS = started_together(Path(__file__).with_name("sharding_processes.py"))


@pytest.mark.first
@pytest.mark.parametrize("name", CHECKS)
def test_on_four_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    assert_passed(name, outcomes)


# --------------------------------------------------------------------------------- on one process


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 64), nn.Tanh(), nn.Linear(64, 70))


def loss(net: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(8, 70, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
    return (net(x) - x).square().mean()


SETTINGS: dict[str, Any] = {"lr": 0.01, "alpha": 5.0, "alpha_warmup": 6, "beta3_warmup": 5, "weight_decay": 0.1}


def test_an_optimizer_for_each_parameter_steps_within_backward() -> None:
    together, apart = model(), model()
    whole = AdEMAMix(together.parameters(), **SETTINGS)
    optimizers = {p: AdEMAMix([p], seed=i, **SETTINGS) for i, p in enumerate(apart.parameters())}

    def step_and_free(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in apart.parameters():
        p.register_post_accumulate_grad_hook(step_and_free)
    for step in range(5):
        loss(together, step).backward()
        whole.step()
        whole.zero_grad()
        loss(apart, step).backward()
        assert all(p.grad is None for p in apart.parameters())
    assert all(map(torch.equal, together.parameters(), apart.parameters()))


def test_a_compiled_model_trains_and_resumes_as_the_plain_one() -> None:
    plain, inner = model(), model()
    compiled = torch.compile(inner, backend="aot_eager")  # the graphs and hooks of any backend, without a compiler
    a, b = AdEMAMix(plain.parameters(), **SETTINGS), AdEMAMix(compiled.parameters(), **SETTINGS)
    for step in range(6):
        for net, optimizer in ((plain, a), (compiled, b)):
            loss(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 2:
            saved = copy.deepcopy(b.state_dict())
            b = AdEMAMix(compiled.parameters())
            b.load_state_dict(saved)
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        # A gradient may be off by a few units in its last place; six steps of lr.
        torch.testing.assert_close(p, q, rtol=0.0, atol=6 * 0.01 * 1e-4)


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_train_as_with_torch_s_adamw(parametrize: Any) -> None:
    ours, theirs = model().double(), model().double()
    for net in (ours, theirs):
        torch.manual_seed(1)  # of spectral_norm's first vectors
        parametrize(net[0])
    optimizers = AdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    start = loss(copy.deepcopy(ours), 0).item()  # spectral_norm counts forward passes
    for step in range(20):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        # float64's roundings; where the exact gradient is 0, their 1e-17 over eps = 1e-8 is 1e-9 of a step of lr.
        torch.testing.assert_close(p, q, rtol=0.0, atol=20 * 0.01 * 1e-8)
    assert loss(ours, 0).item() < 0.8 * start
