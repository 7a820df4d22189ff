"""What a tool's own loop is held against: the same training in a plain loop."""

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ademamix import AdEMAMix, suggest

STEPS = 50
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, **suggest(100)}
MAX_NORM = 0.2  # below all norms of gradients here
MAX_VALUE = 0.02  # below many of their elements

Batch = tuple[Tensor, Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.LayerNorm(512), nn.Linear(512, 4))  # 4096: compact state too


def batches(count: int = STEPS, bad: Collection[int] = ()) -> list[Batch]:
    """Inputs and targets; the bad ones have a NaN."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        x = torch.randn(6, 8, generator=generator)
        made.append((x, x[:, :4] + x[:, 4:]))
        if i in bad:
            x[0, 0] = math.nan
    return made


def loss(net: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (net(x) - y).square().mean()


def plain_loop(
    data: Sequence[Batch],
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    max_value: float | None = None,
    autocast: AbstractContextManager[Any] | None = None,
    **options: Any,
) -> nn.Module:
    """The model after training on these batches, one optimizer step for each ``accumulate`` of them."""
    net = model()
    optimizer = AdEMAMix(net.parameters(), **{**SETTINGS, **options})
    for i, batch in enumerate(data, start=1):
        with autocast or nullcontext():
            part = loss(net, batch) / accumulate
        part.backward()
        if i % accumulate == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            if max_value is not None:
                nn.utils.clip_grad_value_(net.parameters(), max_value)
            optimizer.step()
            optimizer.zero_grad()
    return net


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """All weights, bit for bit."""
    torch.testing.assert_close(list(one.parameters()), list(other.parameters()), rtol=0.0, atol=0.0)
