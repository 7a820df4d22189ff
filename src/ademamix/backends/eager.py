"""The reference backend: plain torch operations, on every device.

The rule runs on lists of tensors, so that each of its operations is one ``torch._foreach_*`` call for many parameters.
Large parameters are cut and small ones put together into lists of about ``PIECE`` elements, which bounds temporaries.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ademamix.backends import Batch, bind, coefficient_names, is_fake, is_made_of_others, with_numbers
from ademamix.formats import BLOCK, FORMATS, LANES, OTHER, Format, hashed, noise_share, turned

PIECE = 1 << 20


class Tensors:
    """A list of tensors that computes like one tensor."""

    __array_ufunc__ = None  # so that NumPy's numbers leave arithmetic with lists to them

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors


def _each(function: Callable[..., Tensor]) -> Callable[..., Tensors]:
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
        if any(isinstance(a, Tensor) for a in args):
            if name not in ("add", "mul", "div"):
                return each(*args)  # torch has no such foreach kernel with a tensor for a number
            if name == "add":  # without alpha, torch would take the tensor for a number and wait for it
                return Tensors(function(args[0].tensors, args[1], alpha=1.0))
        elif name == "mul" and isinstance(args[0], Tensors) and not isinstance(args[1], Tensors) and args[1] == 1.0:
            return args[0]  # most averages' stay and pull
        return Tensors(function(*(a.tensors if isinstance(a, Tensors) else a for a in args)))

    each = _each(getattr(torch, name))
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

    @staticmethod
    def divide(x: Any, y: Any) -> Any:
        if isinstance(x, Tensors):
            return x / y
        return _each(_quotient)(x, y) if isinstance(y, Tensors) else _quotient(x, y)


def _quotient(x: Any, y: Any) -> Any:
    """A number over a tensor or a number; torch's own multiplies by the reciprocal and so rounds twice."""
    if isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x / y
    return torch.full((), x, dtype=y.dtype, device=y.device) / y


class format_xp:  # noqa: N801 - the namespace that formats are written against; uint32 lives in int32
    where = staticmethod(torch.where)
    divide = staticmethod(_quotient)

    @staticmethod
    def maximum(x: Tensor, least: float) -> Tensor:
        return x.clamp_min(least)

    @staticmethod
    def bits(x: Tensor) -> Tensor:
        return x.view(torch.int32)

    @staticmethod
    def from_bits(x: Tensor) -> Tensor:
        return x.view(torch.float32)

    @staticmethod
    def uint(x: Any) -> Any:
        return x if isinstance(x, Tensor) else x - ((x & 0x80000000) << 1)

    @staticmethod
    def shift_right(x: Tensor, places: int) -> Tensor:
        return (x >> places) & ((1 << (32 - places)) - 1)

    @staticmethod
    def to_float(x: Tensor) -> Tensor:
        return x.float()


_hashed, _turned = bind(hashed, format_xp), bind(turned, format_xp)


def noise(key: Tensor, start: int, length: int) -> Tensor:
    """``formats.noise`` of the elements from ``start`` on; the key is an int32."""
    index = torch.arange(start // LANES, -(-(start + length) // LANES), device=key.device).to(torch.int32)
    lanes = _hashed(key, torch.arange(LANES, dtype=torch.int32, device=key.device))
    blocks = _hashed(key ^ format_xp.uint(OTHER), index)
    bits: Tensor = (blocks[:, None] ^ lanes).flatten()[start % LANES :][:length]
    return bits


def noise_of(key: Tensor, index: Tensor) -> Tensor:
    """``formats.noise`` of the elements of that index; the key is an int32, the index int64."""
    lanes = _hashed(key, (index % LANES).to(torch.int32))
    bits: Tensor = lanes ^ _hashed(key ^ format_xp.uint(OTHER), (index // LANES).to(torch.int32))
    return bits


def _raw(t: Tensor, format: Format) -> Tensor:
    return t.view(torch.int16) if format.storage == "bits16" else t


def decode(format: Format, codes: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes [rows, rest] with scales [rows, blocks] stand for."""
    raw = _raw(codes, format)
    if format.storage.startswith("float"):
        return raw.to(dtype)
    raw = raw.to(torch.int32)
    x: Tensor = bind(format.decode, format_xp)(raw, None if scale is None else _spread(scale, codes.shape[1]))
    return x


def encode(format: Format, x: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Codes [rows, rest], as int32, and scales [rows, blocks] for float32 numbers x [rows, rest]."""
    scale = spread = None
    if format.scale is not None:
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).abs()
        scale = bind(format.scale, format_xp)(padded.view(len(x), padded.shape[1] // BLOCK, BLOCK).amax(2))
        spread = _spread(scale, x.shape[1])
    return bind(format.encode, format_xp)(x, spread, random), scale


def write(format: Format, codes: Tensor, encoded: Tensor) -> None:
    """Keep what ``encode`` gave for codes in their own dtype."""
    _raw(codes, format).copy_(encoded)


def _spread(scale: Tensor, length: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, dim=1).narrow(1, 0, length)


class Launch:
    """See :class:`ademamix.backends.Launch`."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        number = np.float64 if batch.double else np.float32
        self.rule = bind(batch.rule, xp, lambda rule: with_numbers(rule, number))
        self.names = coefficient_names(batch.rule)
        self.dtype = torch.float64 if batch.double else torch.float32
        self.converted = is_made_of_others(batch.parameters[0])
        own = FORMATS["float64" if batch.double else "float32"] if self.converted else batch.format
        self.formats = (own, batch.grad, *batch.formats)
        self.keys = torch.from_numpy(batch.keys.view(np.int32)).to(batch.parameters[0].device)

    def __call__(self, grads: Sequence[Tensor], rows: Sequence[int], coefficients: Tensor, skip: Tensor | None) -> None:
        params = self.batch.parameters
        if not self.converted:
            self._take(dict(enumerate(params)), grads, rows, coefficients, skip)
            return
        for i, p in enumerate(params):  # one by one, as each is a copy for that time
            numbers = p.to(self.dtype) * 1.0  # of which quantized weights make a plain tensor
            self._take({i: numbers}, grads, rows, coefficients, skip)
            if skip is None or not skip:  # which waits for the device: writing may round stochastically
                p.copy_(numbers)

    def _take(
        self,
        params: Mapping[int, Tensor],  # by their numbers in the batch
        grads: Sequence[Tensor],
        rows: Sequence[int],
        coefficients: Tensor,
        skip: Tensor | None,
    ) -> None:
        lists: dict[int, list[_Piece]] = defaultdict(list)
        for i, p in params.items():
            lists[rows[i]] += _pieces(self.batch, i, p, grads[i])
        rounded = coefficients.to(self.dtype)
        for row, pieces in lists.items():
            if is_fake(rounded):
                numbers: Sequence[Any] = [1.0] * rounded.shape[1]
            else:
                numbers = list(rounded[row].numpy()) if rounded.device.type == "cpu" else rounded[row].unbind()
            while pieces:
                count = elements = 0
                while count < len(pieces) and elements < PIECE:
                    elements += pieces[count].tensors[1].numel()  # type: ignore[union-attr]
                    count += 1
                self._update(pieces[:count], numbers, coefficients[row, 1], skip)
                del pieces[:count]

    def _update(self, pieces: Sequence[_Piece], coefficients: Sequence[Any], done: Tensor, skip: Tensor | None) -> None:
        tensors = list(zip(*(piece.tensors for piece in pieces), strict=True))
        scales = list(zip(*(piece.scales for piece in pieces), strict=True))
        p, g, *slots = (
            0.0 if f is None else Tensors([decode(f, t, s, self.dtype) for t, s in zip(ts, ss, strict=True)])
            for f, ts, ss in zip(self.formats, tensors, scales, strict=True)
        )
        factor, _, *rest = coefficients
        with np.errstate(all="ignore"):  # of coefficients; other backends have no such warnings
            results = self.rule(p, _foreach("mul")(g, factor), *slots, **dict(zip(self.names, rest, strict=True)))
        random: dict[int, list[Tensor]] = {}
        given = {id(t) for each in tensors for t in each}
        old: list[Tensor] = []
        new: list[Tensor] = []
        for k, result in zip((0, *range(2, len(self.formats))), results, strict=True):
            f = self.formats[k]
            if f is None:
                continue
            if f.storage.startswith("float"):
                old += tensors[k]
                # What one slot takes over from another is copied first: that may be written before it is read.
                new += [x.clone() if id(x) in given else x for x in result.tensors]
                continue
            which, places = noise_share(max(k - 1, 0))
            if f.stochastic and which not in random:
                random = {which: [self._noise(piece, done, which) for piece in pieces]}
            for i, (x, t, s) in enumerate(zip(result.tensors, tensors[k], scales[k], strict=True)):
                h = random[which][i] if f.stochastic else None
                codes, scale = encode(f, x, _turned(h, places) if places and h is not None else h)
                old += [_raw(t, f)] if s is None else [_raw(t, f), s]
                new += [codes] if scale is None else [codes, scale]
        if skip is not None:
            new = [torch.where(skip, o, n.to(o.dtype)) for o, n in zip(old, new, strict=True)]
        torch._foreach_copy_(old, new)

    def _noise(self, piece: _Piece, done: Tensor, which: int) -> Tensor:
        like = piece.tensors[0]
        assert like is not None
        if is_fake(like):
            return torch.empty_like(like, dtype=torch.int32)
        steps = done.to(torch.int64).to(torch.int32)  # the lowest bits, of a number that float32 may not have
        key = _hashed(self.keys[piece.parameter], steps if steps.device == like.device else int(steps))
        key = _hashed(key, which) if which else key
        if piece.stride == like.shape[1]:
            return noise(key, piece.start, like.numel()).view(like.shape)
        rows, columns = (torch.arange(length, device=like.device) for length in like.shape)
        return noise_of(key, piece.start + piece.stride * rows[:, None] + columns)


@dataclass
class _Piece:
    """Some rows of a parameter, or a part of one, in two-dimensional views: [p, g, *slots], [None, None, *scales]."""

    parameter: int
    start: int  # the first element's index in the whole parameter
    stride: int  # and how much further on the next row starts
    tensors: list[Tensor | None]
    scales: list[Tensor | None]


def _pieces(batch: Batch, i: int, p: Tensor, g: Tensor) -> Iterator[_Piece]:
    if p.numel() == 0:
        return
    number, start, stride = batch.rows[i]
    if number == 1 and not batch.blocked:  # then it may be cut anywhere
        number, stride = p.numel(), 1
    shape = (number, p.numel() // number)

    def views(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        # Dense tensors of equal strides lie alike in memory: without blocks, any order of the elements will do.
        return [None if t is None else t.as_strided(shape, (shape[1], 1)) for t in tensors]

    tensors, scales = views([p, g, *batch.slots[i]]), [None, None, *batch.scales[i]]
    rows, length = max(1, PIECE // shape[1]), min(PIECE, shape[1])  # PIECE is a number of whole blocks
    for first, column in product(range(0, shape[0], rows), range(0, shape[1], length)):
        down, across = min(rows, shape[0] - first), min(length, shape[1] - column)
        here, blocks = (1, column, across), (1, column // BLOCK, -(-across // BLOCK))
        yield _Piece(
            i,
            start + first * stride + column,
            stride if down > 1 else across,
            [None if t is None else t.narrow(0, first, down).narrow(*here) for t in tensors],
            [None if t is None else t.narrow(0, first, down).narrow(*blocks) for t in scales],
        )
