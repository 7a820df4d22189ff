"""A model of a few numbers, gradients for it, and the comparison of all that training changes."""

from typing import Any

import pytest
import torch
from torch import nn

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "eager"])


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def set_grads(net: nn.Module, t: int) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
