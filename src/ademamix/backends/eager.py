"""The reference backend: plain torch operations, on every device.

The rule runs on lists of tensors, so that each of its operations is one ``torch._foreach_*`` call for many parameters.
Large parameters are cut and small ones put together into lists of about ``PIECE`` elements, which bounds temporaries.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ademamix.backends import Rule, bind, coefficient_names, compute_dtype

PIECE = 1 << 20


class Tensors:
    """A list of tensors that computes like one tensor."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors


def _each(function: Callable[..., torch.Tensor]) -> Callable[..., Tensors]:
    """A function of tensors and numbers, called for each tensor of its lists."""

    def apply(*args: Any) -> Tensors:
        length = next(len(a.tensors) for a in args if isinstance(a, Tensors))
        lists = [a.tensors if isinstance(a, Tensors) else [a] * length for a in args]
        return Tensors([function(*each) for each in zip(*lists, strict=True)])

    return apply


def _foreach(name: str) -> Callable[..., Tensors]:
    """``torch._foreach_<name>``; commutative ones take a number on the left too."""
    function = getattr(torch, f"_foreach_{name}")

    def apply(*args: Any) -> Tensors:
        if not isinstance(args[0], Tensors):
            args = args[::-1]
        return Tensors(function(*(a.tensors if isinstance(a, Tensors) else a for a in args)))

    return apply


def _method(function: Callable[..., Tensors], reflected: bool = False) -> Callable[..., Tensors]:
    return (lambda self, *other: function(*other, self)) if reflected else (lambda self, *other: function(self, *other))


for _operator, _name in (("add", "add"), ("mul", "mul"), ("sub", "sub"), ("truediv", "div")):
    setattr(Tensors, f"__{_operator}__", _method(_foreach(_name)))
    # torch has no foreach kernel for a number minus or over a list.
    _reflected = _foreach(_name) if _name in ("add", "mul") else _each(getattr(operator, _operator))
    setattr(Tensors, f"__r{_operator}__", _method(_reflected, reflected=True))
for _operator in ("neg", "pow", "lt", "le", "gt", "ge"):
    setattr(Tensors, f"__{_operator}__", _method(_each(getattr(operator, _operator))))


class xp:  # noqa: N801 - the namespace that rules are written against
    sqrt, abs, exp, log = (_foreach(name) for name in ("sqrt", "abs", "exp", "log"))
    minimum, maximum = _foreach("minimum"), _foreach("maximum")
    where = _each(torch.where)


class Launch:
    """See :class:`ademamix.backends.Launch`."""

    def __init__(
        self,
        rule: Rule,
        parameters: Sequence[torch.Tensor],
        slots: Sequence[Sequence[torch.Tensor | None]],
        grad_dtype: torch.dtype,
    ) -> None:
        self.rule = bind(rule, xp)
        self.names = coefficient_names(rule)
        self.dtype = compute_dtype(parameters[0].dtype)
        self.pieces = [_pieces(p, *stored) for p, stored in zip(parameters, slots, strict=True)]

    def __call__(self, grads: Sequence[torch.Tensor], rows: Sequence[int], coefficients: npt.NDArray[Any]) -> None:
        lists: dict[tuple[torch.device, int], list[tuple[torch.Tensor | None, ...]]] = defaultdict(list)
        for pieces, g, row in zip(self.pieces, grads, rows, strict=True):
            for (g_piece,), (p, *slots) in zip(_pieces(g), pieces, strict=True):
                lists[g.device, row].append((p, g_piece, *slots))
        rounded = coefficients.astype(np.float64 if self.dtype == torch.float64 else np.float32)
        for (_, row), pieces in lists.items():
            while pieces:
                count = elements = 0
                while count < len(pieces) and elements < PIECE:
                    elements += pieces[count][1].numel()  # type: ignore[union-attr]
                    count += 1
                self._update(pieces[:count], rounded[row].tolist())
                del pieces[:count]

    def _update(self, pieces: Sequence[Sequence[torch.Tensor | None]], coefficients: Sequence[float]) -> None:
        columns = list(zip(*pieces, strict=True))
        p, g, *slots = (Tensors([t.to(self.dtype) for t in c]) if c[0] is not None else 0.0 for c in columns)
        factor, *rest = coefficients
        results = self.rule(p, _foreach("mul")(g, factor), *slots, **dict(zip(self.names, rest, strict=True)))
        for column, result in zip([columns[0], *columns[2:]], results, strict=True):
            if column[0] is not None:
                torch._foreach_copy_(column, result.tensors)


def _pieces(*tensors: torch.Tensor | None) -> list[tuple[torch.Tensor | None, ...]]:
    """Flat views of dense tensors with equal strides, cut alike into at most PIECE elements."""
    flat = [(torch.split(t.as_strided((t.numel(),), (1,)), PIECE) if t is not None else None) for t in tensors]
    count = len(flat[0])  # type: ignore[arg-type]
    return [tuple(f[i] if f is not None else None for f in flat) for i in range(count)]
