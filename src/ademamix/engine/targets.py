"""What backends update: real, dense, local tensors, which are the parameters themselves wherever these are so."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ademamix.engine.sharding import is_sharded, local
from ademamix.engine.state import fits
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


def real(t: Tensor) -> Tensor:
    """A complex tensor as one of its parts, in a dimension more; a real one itself."""
    return torch.view_as_real(t) if t.is_complex() else t


def number_format(t: Tensor, *, stochastic: bool) -> Format:
    """How a parameter's or a gradient's numbers are stored."""
    if t.dtype == torch.bfloat16:
        return FORMATS["bfloat16" if stochastic else "bfloat16_nearest"]
    return FORMATS[str(t.dtype).removeprefix("torch.")]
