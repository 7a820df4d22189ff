"""What tools for many processes are held against: a loop without any tool, that computes what two processes would.

Each process has its own batches. Its gradients are summed first, and then those of the two processes. All divisors are
powers of two. So a tool that sums in this order, and computes the same otherwise, has the same bits.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ademamix import AdEMAMix, suggest

WORLD = 2
STEPS = 50
# eps far above the noise of rounding: an error in a gradient is one of the same relative size in a step.
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3, **suggest(100)}
# Gradients that were summed in another order, or clipped by norms that were, differ by 1e-6 of their size, and later
# ones by what weights differ. A step moves a weight by at most lr (1 + alpha), 0.09; 50 of them, each off by 1e-5 of
# that:
ROUNDED = {"rtol": 0.0, "atol": STEPS * 0.09 * 1e-5}
MAX_NORM = 0.1  # a third of the gradients' norms here, and less


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.LayerNorm(128), nn.Linear(128, 80))


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x.repeat(1, 5)).square().mean()  # type: ignore[no-any-return]


def batches(step: int, rank: int, accumulate: int = 1, bad: bool = False) -> list[Tensor]:
    """The micro-batches of a process in a step; a bad one has a NaN only in the last process."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn = [torch.randn(4, 16, generator=generator) for _ in range(accumulate)]
    if bad and rank == WORLD - 1:
        drawn[-1][0, 0] = math.nan
    return drawn


class Tool(Protocol):
    """A training run in the tool's own way."""

    def step(self, micro_batches: list[Tensor]) -> None: ...
    def weights(self) -> Iterable[Tensor]:
        """All of them, in the order of the model's parameters."""


def train(tool: Tool, steps: range, accumulate: int = 1, bad: Collection[int] = ()) -> list[Tensor]:
    """Weights after these steps."""
    for step in steps:
        tool.step(batches(step, dist.get_rank(), accumulate, step in bad))
    return [w.detach().clone() for w in tool.weights()]


def plain_loop(
    steps: range, accumulate: int = 1, max_norm: float | None = None, without: Collection[int] = (), **options: Any
) -> list[Tensor]:
    """Weights of a run on one process that computes the mean over all of them."""
    net = model()
    optimizer = AdEMAMix(net.parameters(), **SETTINGS, **options)
    params = list(net.parameters())
    for step in steps:
        if step in without:
            continue
        for rank in range(WORLD):
            sums = [torch.zeros_like(p) for p in params]
            for x in batches(step, rank, accumulate):
                for s, g in zip(sums, torch.autograd.grad(loss(net, x) / accumulate, params), strict=True):
                    s += g
            for p, s in zip(params, sums, strict=True):
                p.grad = s / WORLD if p.grad is None else p.grad + s / WORLD
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in params]


def assert_same(weights: Iterable[Tensor], wanted: Iterable[Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(list(weights), list(wanted), **(tolerance or {"rtol": 0.0, "atol": 0.0}))
