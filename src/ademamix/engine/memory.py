"""Memory that parameters share, with themselves or with each other."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ademamix import backends
from ademamix.engine.sharding import local
from ademamix.engine.state import is_dense


def check_memory(name: str, params: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a place in memory is more than one element, of one parameter or of two."""
    parts = [t for t in map(local, params) if t.numel() and backends.has_memory(t)]
    parts.sort(key=lambda t: (str(t.device), t.data_ptr()))
    end, neighbors = (torch.device("meta"), 0), list[Tensor]()  # whose extents overlap, one with that of the next
    for t in parts:
        if t.device != end[0] or t.data_ptr() >= end[1]:
            _check_neighbors(name, neighbors)
            end, neighbors = (t.device, 0), []
        end = (t.device, max(end[1], t.data_ptr() + _extent(t)))
        neighbors.append(t)
    _check_neighbors(name, neighbors)


def _extent(t: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.itemsize


def _check_neighbors(name: str, parts: Sequence[Tensor]) -> None:
    if not parts or (len(parts) == 1 and is_dense(parts[0])):
        return
    places = [t.data_ptr() - parts[0].data_ptr() for t in parts]
    unit = math.gcd(*places, *(t.itemsize for t in parts))  # of memory, in bytes
    ends = [place + _extent(t) for place, t in zip(places, parts, strict=True)]
    taken = np.zeros(max(ends) // unit, np.bool_)
    for place, t in zip(places, parts, strict=True):
        size = t.itemsize // unit
        strides = (*(s * size for s in t.stride()), 1)
        own = np.lib.stride_tricks.as_strided(taken[place // unit :], (*t.shape, size), strides)
        if own.any():
            shapes = [tuple(part.shape) for part in parts]
            raise RuntimeError(f"{name}: parameters of shapes {shapes} share memory: only one of them can update it")
        before = np.count_nonzero(taken)
        own[...] = True
        if np.count_nonzero(taken) - before < own.size:
            found = f"a parameter of shape {tuple(t.shape)} and strides {t.stride()} has several elements in one place"
            raise RuntimeError(f"{name}: {found} in memory; give each its own, as p.data = p.data.clone() does")
