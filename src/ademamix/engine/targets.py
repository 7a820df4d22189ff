"""What backends update: real, dense, local tensors, which are the parameters themselves wherever these are so."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ademamix import backends
from ademamix.engine.sharding import is_sharded, local
from ademamix.engine.state import fits, is_dense
from ademamix.formats import FORMATS, Format


class Targets:
    """The tensors to update in the parameters' place.

    Args:
        params: the parameters.
        formats: of the slots that each of them stores.

    Attributes:
        tensors: views of the parameters, or copies of those that are not dense.
    """

    def __init__(self, params: Sequence[Tensor], formats: Sequence[Mapping[str, Format]]) -> None:
        self.params = params
        fit = [fits(p, f) for p, f in zip(params, formats, strict=True)]
        self.tensors = [
            real(p if good else torch.empty_like(p, memory_format=torch.contiguous_format))
            for p, good in zip((local(p).detach() for p in params), fit, strict=True)
        ]
        self.copied = [i for i, good in enumerate(fit) if not good]
        self.complex = [i for i, p in enumerate(params) if p.is_complex()]
        self.sharded = any(map(is_sharded, params))
        self.layouts = [t.stride() for t in self.tensors]

    def resolved(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients, local and real, and none lazily negated."""
        grads = list(map(local, grads)) if self.sharded else list(grads)
        for i in self.complex:
            grads[i] = real(grads[i].resolve_conj())
        if any(map(Tensor.is_neg, grads)):  # as the backward of a complex conjugate's imaginary part leaves them
            grads = [g.resolve_neg() for g in grads]
        return grads

    def lie_alike(self, grads: Sequence[Tensor]) -> bool:
        """Whether resolved gradients have the strides of the tensors."""
        return list(map(Tensor.stride, grads)) == self.layouts

    def laid_out(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Resolved gradients with the strides of the tensors, copied where they had others."""
        return [
            g if g.stride() == t.stride() else torch.empty_like(t, dtype=g.dtype).copy_(g)
            for g, t in zip(grads, self.tensors, strict=True)
        ]

    def read(self) -> None:
        """Take over what the parameters are, where the tensors are copies."""
        for i in self.copied:
            self.tensors[i].copy_(real(local(self.params[i])))

    def write(self) -> None:
        """Write the copies back into their parameters."""
        for i in self.copied:
            real(local(self.params[i])).copy_(self.tensors[i])


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
            raise RuntimeError(f"{name}: parameters of shapes {shapes} share memory: one alone can update it")
        before = np.count_nonzero(taken)
        own[...] = True
        if np.count_nonzero(taken) - before < own.size:
            found = f"a parameter of shape {tuple(t.shape)} and strides {t.stride()} has several elements in one place"
            raise RuntimeError(f"{name}: {found} in memory; give each its own, as p.data = p.data.clone() does")


def real(t: Tensor) -> Tensor:
    """A complex tensor as one of its parts, in a dimension more; a real one itself."""
    return torch.view_as_real(t) if t.is_complex() else t


def number_format(t: Tensor, *, stochastic: bool) -> Format:
    """How a parameter's or a gradient's numbers are stored."""
    if t.dtype == torch.bfloat16:
        return FORMATS["bfloat16" if stochastic else "bfloat16_nearest"]
    return FORMATS[str(t.dtype).removeprefix("torch.")]
