"""The JAX backend: the update of one leaf of the parameters, as a pure function that XLA fuses.

JAX's arrays are not written to, so there is no ``Launch`` here: :mod:`ademamix.jax` calls :class:`Leaf`, and
:func:`orthogonal` for directions in Muon's geometry.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ademamix import geometries
from ademamix.backends import bind, in_rows, row_length
from ademamix.formats import BLOCK, FORMATS, LANES, OTHER, SMALLEST, Format, as_saved, hashed, noise_share, turned


class Blocks(NamedTuple):
    """A slot's leaf that is stored in blocks of 256 elements along the rows of its parameter seen as [dim 0, rest]."""

    codes: Array  # the parameter's shape; int8, int16 or, for float8, uint8
    scale: Array  # [dim 0, ceil(rest / 256)], float32


Stored = Any  # a slot's leaf: an Array of the parameter's shape, or Blocks


class format_xp:  # noqa: N801 - the namespace that formats are written against
    where, maximum, divide = staticmethod(jnp.where), staticmethod(jnp.maximum), staticmethod(jnp.divide)

    @staticmethod
    def bits(x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.uint32)

    @staticmethod
    def from_bits(x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.float32)

    @staticmethod
    def uint(x: Any) -> Array:
        return x.astype(jnp.uint32) if isinstance(x, Array) else jnp.uint32(x)

    @staticmethod
    def shift_right(x: Array, places: int) -> Array:
        return x >> jnp.uint32(places)

    @staticmethod
    def to_float(x: Array) -> Array:
        return x.astype(jnp.float32)


_hashed, _turned = bind(hashed, format_xp), bind(turned, format_xp)


def noise(key: Array, shape: tuple[int, ...], blocked: bool) -> Array:
    """``formats.noise`` of all elements of a parameter; those 2**32 apart have the same."""
    rows, rest = in_rows(shape)
    row, column = (lax.broadcasted_iota(jnp.uint32, (rows, rest), dim) for dim in (0, 1))
    stride = jnp.uint32(row_length(shape) if blocked else rest)
    index = row * stride + column
    bits = _hashed(key, index & (LANES - 1)) ^ _hashed(key ^ jnp.uint32(OTHER), index >> 8)
    return bits.reshape(shape)


def _blocked(x: Array) -> Array:
    """[dim 0, blocks, 256], filled up with zeros."""
    rows, rest = in_rows(x.shape)
    x = x.reshape(rows, rest)  # at first: explicit sharding wants to see what becomes of each dimension
    if rest % BLOCK:
        x = jnp.pad(x, ((0, 0), (0, -rest % BLOCK)))
    return x.reshape(rows, -(-rest // BLOCK), BLOCK)


def _spread(scale: Array, shape: tuple[int, ...]) -> Array:
    """The scale of each element."""
    return jnp.repeat(scale, BLOCK, axis=1)[:, : in_rows(shape)[1]].reshape(shape)


def decode(stored: Stored, dtype: Any) -> Array:
    """The numbers that a leaf stands for, whatever its format; it may come from a file."""
    if not isinstance(stored, Blocks):
        return stored.astype(dtype)
    codes, scale = stored
    name = {"uint8": "float8"}.get(codes.dtype.name, codes.dtype.name)
    return bind(as_saved(FORMATS[name]).decode, format_xp)(codes.astype(jnp.int32), _spread(scale, codes.shape))


def encode(format: Format, x: Array, random: Array | None) -> Stored:
    """Numbers as the format stores them."""
    if format.storage.startswith("float"):
        return x.astype(format.storage)
    scale = spread = None
    if format.scale is not None:
        scale = bind(format.scale, format_xp)(jnp.abs(_blocked(x)).max(2))
        spread = _spread(scale, x.shape)
    codes = bind(format.encode, format_xp)(x, spread, random)
    if scale is None:
        return lax.bitcast_convert_type(codes.astype(jnp.uint16), jnp.bfloat16)
    return Blocks(codes.astype(format.storage), scale)


class Noise:
    """What the elements of a leaf are rounded by in a step: number 0 is for the parameter, 1, 2, ... are for slots."""

    def __init__(self, key: Array, shape: tuple[int, ...], blocked: bool) -> None:
        self.key, self.shape, self.blocked = key, shape, blocked
        self.made: dict[int, Array] = {}

    def __call__(self, number: int) -> Array:
        which, places = noise_share(number)
        if which not in self.made:
            key = _hashed(self.key, jnp.uint32(which)) if which else self.key
            self.made[which] = noise(key, self.shape, self.blocked)
        return _turned(self.made[which], places) if places else self.made[which]


class Leaf:
    """A leaf of the parameters: its dtypes, and the formats of its slots.

    Args:
        p: the parameter.
        formats: what its optimizer stores slots in, by name; as in torch, float64 parameters and those of one dimension
            or less than 4096 elements keep full precision.
        stochastic_rounding: of a bfloat16 parameter.
    """

    def __init__(self, p: Array, formats: Mapping[str, Format], *, stochastic_rounding: bool) -> None:
        if p.dtype not in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(f"a parameter must be float64, float32, bfloat16 or float16, got {p.dtype}")
        self.p, self.dtype = p, jnp.dtype(jnp.float64 if p.dtype == jnp.float64 else jnp.float32)
        small = p.ndim < 2 or p.size < SMALLEST
        full = FORMATS[self.dtype.name]
        self.formats = dict.fromkeys(formats, full) if small or full.name == "float64" else dict(formats)
        rounded = "bfloat16" if stochastic_rounding else "bfloat16_nearest"
        self.own = FORMATS[rounded if p.dtype == jnp.bfloat16 else p.dtype.name]

    def empty(self, name: str) -> Stored:
        """A slot before the first step, sharded like the parameter."""
        format = self.formats[name]
        zeros = jnp.zeros_like(self.p, dtype=jnp.bfloat16 if format.storage == "bits16" else format.storage)
        if format.scale is None:
            return zeros
        return Blocks(zeros, jnp.zeros_like(_blocked(self.p)[:, :, 0], dtype=jnp.float32))

    def noise(self, key: Any, steps: Array) -> Noise:
        """That of a step after so many, with ``key`` of :func:`ademamix.formats.keys`."""
        of_step = _hashed(jnp.uint32(key), jnp.uint32(steps))
        return Noise(of_step, self.p.shape, any(format.scale is not None for format in self.formats.values()))

    def run(
        self,
        rule: Any,  # bound to jax.numpy
        g: Array,
        slots: Mapping[str, Stored],  # those that are stored
        names: Sequence[str],  # of all slots of the rule
        coefficients: Mapping[str, Any],
        random: Noise,
    ) -> tuple[Array, dict[str, Stored]]:
        """What the rule returns in the parameter's place, and the new slots."""
        numbers = [decode(slots[name], self.dtype) if name in slots else 0.0 for name in names]
        first, *results = rule(self.numbers, g.astype(self.dtype), *numbers, **coefficients)
        new = {}
        for k, (name, x) in enumerate(zip(names, results, strict=True), start=1):
            if name in slots:
                format = self.formats[name]
                new[name] = encode(format, x, random(k) if format.stochastic else None)
        return first, new

    @property
    def numbers(self) -> Array:
        return self.p.astype(self.dtype)

    def moved(self, after: Array, random: Noise) -> Array:
        """The difference between a new parameter, as it is stored, and this one, in its dtype."""
        stored = encode(self.own, after, random(0) if self.own.stochastic else None)
        return (decode(stored, self.dtype) - self.numbers).astype(self.p.dtype)


# --------------------------------------------------------------------------------- matrices


class Matrices(NamedTuple):
    """How an array is seen as matrices: its axes are brought into an order, and then it is of a shape."""

    order: tuple[int, ...]
    shape: tuple[int, int, int]  # matrices, inputs, outputs

    @classmethod
    def of(cls, shape: Sequence[int], geometry: Any) -> "Matrices":
        """By the axis or axes of inputs, and of outputs; "muon" for outputs on the last axis, inputs on all others."""
        n = len(shape)
        if n < 2:
            raise ValueError("geometry='muon' takes parameters of at least 2 dimensions")
        given = (range(n - 1), n - 1) if geometry == "muon" else geometry
        try:
            ins, outs = (np.arange(n)[np.atleast_1d(axes)].tolist() for axes in given)
        except IndexError:
            ins = outs = [0]
        if len({*ins, *outs}) < len(ins) + len(outs):
            raise ValueError(f"{geometry} must name axes from {-n} to {n - 1}, each once")
        others = [a for a in range(n) if a not in (*ins, *outs)]
        first, second, third = (math.prod(shape[a] for a in axes) for axes in (others, ins, outs))
        return cls((*others, *ins, *outs), (first, second, third))

    def seen(self, x: Array) -> Array:
        return x.transpose(self.order).reshape(self.shape)

    def put_back(self, x: Array, shape: Sequence[int]) -> Array:
        in_order = x.reshape([shape[a] for a in self.order])
        return in_order.transpose(sorted(range(len(shape)), key=self.order.__getitem__))


def orthogonal(
    directions: Sequence[Array],
    matrices: Sequence[Matrices],
    polynomials: tuple[geometries.Polynomial, ...],
    scaling: str,  # see geometries.scale
    least: Any,  # norm that a direction is divided by
) -> list[Array]:
    """Each direction orthogonalized and scaled; all matrices of a shape at once."""

    def of_all(directions: list[Array]) -> list[Array]:
        alike: dict[Any, list[int]] = {}
        for i, (u, seen) in enumerate(zip(directions, matrices, strict=True)):
            if u.size:
                alike.setdefault((seen.shape[1:], u.dtype), []).append(i)
        made = list(directions)
        for ((inputs, outputs), dtype), members in alike.items():
            x = jnp.concatenate([matrices[i].seen(directions[i]) for i in members])
            factor = geometries.scale(scaling, outputs, inputs)
            y = _orthogonal(x, jnp.asarray(least, dtype), polynomials, factor)
            ends = np.cumsum([matrices[i].shape[0] for i in members])
            for i, part in zip(members, jnp.split(y, ends[:-1]), strict=True):
                made[i] = matrices[i].put_back(part, directions[i].shape)
        return made

    shardings = [jax.typeof(u).sharding for u in directions]
    explicit = tuple({axis: None for each in shardings for axis in each.mesh.explicit_axes})
    if explicit:  # it would have to be told how each product is sharded
        of_all = jax.sharding.auto_axes(of_all, axes=explicit, out_sharding=shardings)
    return of_all(list(directions))


@partial(jax.jit, static_argnums=(2, 3))  # compiled once where the step itself is not
def _orthogonal(x: Array, least: Array, polynomials: tuple[geometries.Polynomial, ...], factor: float) -> Array:
    tiny = jnp.finfo(jnp.float32).tiny

    def iterate(x: Array, least: Array, dtype: Any) -> Array:
        def norm(y: Array) -> Array:
            sizes = jnp.abs(y.astype(x.dtype))
            most = jnp.maximum(sizes.max((1, 2), keepdims=True), tiny)
            root = jnp.sqrt(jnp.square(sizes / most).sum((1, 2), keepdims=True))  # 1e25 squared would be infinite
            return jnp.maximum(most * root, jnp.maximum(least, tiny)).astype(y.dtype)

        made = geometries.orthogonalized(x.astype(dtype), polynomials, factor, norm, _multiply)
        return made.astype(x.dtype)

    with jax.default_matmul_precision("highest"):
        if x.dtype == jnp.float64:
            return iterate(x, least, x.dtype)
        fast, exact = partial(iterate, dtype=jnp.bfloat16), partial(iterate, dtype=x.dtype)
        return lax.platform_dependent(x, least, cpu=exact, default=fast)


def _multiply(c: Array, a: Array, b: Array, beta: float, alpha: float) -> Array:
    product = jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
    return (beta * c.astype(product.dtype) + alpha * product).astype(c.dtype)  # bfloat16 would take 3.4375 for 3.4445
