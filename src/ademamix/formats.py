"""How a state slot, or a parameter, is stored: pairs of pure elementwise functions against the namespace ``xp``.

A format says how a block's absolute maximum becomes the block's scale, how ``(x, scale, noise)`` becomes a code, and
how ``(code, scale)`` becomes a number again. Finding the maximum of a block's new values is the backend's work.

Rounding is stochastic wherever a slot is stored in less than float32: with beta3 = 0.9999 one step changes the slow EMA
by 1e-4 of its size, which rounding to nearest would lose. The noise is a hash of (seed, step, element), so it is the
same on every backend, for any number of threads and for any sharding.

Besides arithmetic and the functions that rules use, a backend's ``xp`` has ``divide``, which rounds to nearest, and for
32-bit unsigned integers (torch has none: its namespace holds them in int32, which wraps alike): ``bits`` and
``from_bits`` between float32 and its bits, ``uint`` to bring an integer into that type, and ``shift_right`` (zeros come
in). A code is stored as its lowest bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

xp: Any = None  # bound by each backend; NumPy itself has no bit operations by these names

BLOCK = 256  # elements under one scale, along the rows of a parameter viewed as [dim 0, rest]
SMALLEST = 4096  # parameters with fewer elements, or of one dimension unless it is flattened, keep float32


def hashed(key: Any, index: Any) -> Any:
    """32 random bits: a bijective hash (two multiplications, three shifts) of the lowest 32 bits of key ^ index."""
    h = xp.uint(index ^ key)
    h = xp.uint(h ^ xp.shift_right(h, 16))
    h = xp.uint(h * xp.uint(0x7FEB352D))
    h = xp.uint(h ^ xp.shift_right(h, 15))
    h = xp.uint(h * xp.uint(0x846CA68B))
    return xp.uint(h ^ xp.shift_right(h, 16))


LANES = 256
OTHER = 0x80000000  # makes another key, that of the blocks


def noise(key: Any, index: Any) -> Any:
    """32 random bits for an element: those of its lane, xor those of its block of LANES elements.

    The bits of any three elements are independent (simple tabulation hashing), and a backend needs a table of LANES
    hashes, one hash a block and one operation an element.

    Args:
        key: 32 bits that stand for all but the element: ``hashed`` of its parameter's key and of the steps done.
        index: the element's position in its parameter.
    """
    return xp.uint(hashed(key, index & (LANES - 1)) ^ hashed(key ^ xp.uint(OTHER), index >> 8))


def keys(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.uint32]:
    """A key for each parameter: a hash (SplitMix64's) of its group's seed and its position in the optimizer."""
    state = np.zeros(len(positions), np.uint64)
    for part in (seeds, positions):
        state = (state ^ np.array(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    key: npt.NDArray[np.uint32] = (state >> np.uint64(32)).astype(np.uint32)
    return key


def turned(noise: Any, places: int) -> Any:
    """The noise rotated to the left by 0 < places < 32."""
    return xp.uint(xp.uint(noise << xp.uint(places)) ^ xp.shift_right(noise, 32 - places))


def noise_share(number: int) -> tuple[int, int]:
    """Which noise an element of the parameter (number 0) or of its slots (1, 2, ...) is rounded by: each has its own.

    Returns:
        Which: 0 for the noise of the step's key, others for that of the key ``hashed(key, which)``. And by how many
        places it is turned: four share one noise, whose bits they take from different places.
    """
    which, place = divmod(number, 4)
    return which, 8 * place


def _same(x: Any, scale: Any, noise: Any) -> Any:
    return x


def _decoded(code: Any, scale: Any) -> Any:
    return code


def _nan(x: Any) -> Any:
    """All ones, which are a NaN too, where x is one: adding to its bits could make them a number's."""
    return xp.where(x == x, xp.uint(0), xp.uint(0xFFFFFFFF))


def encode_bfloat16(x: Any, scale: Any, noise: Any) -> Any:
    """The upper half of float32's bits, rounded up with the probability that the lower half gives."""
    return xp.shift_right(xp.uint(xp.uint(xp.bits(x) + xp.shift_right(noise, 16)) | _nan(x)), 16)


def encode_bfloat16_nearest(x: Any, scale: Any, noise: Any) -> Any:
    """The upper half of float32's bits, rounded to nearest, ties to even."""
    bits = xp.bits(x)
    odd = xp.uint(xp.shift_right(bits, 16) & xp.uint(1))
    return xp.shift_right(xp.uint(xp.uint(bits + xp.uint(odd + xp.uint(0x7FFF))) | _nan(x)), 16)


def decode_bfloat16(code: Any, scale: Any) -> Any:
    return xp.from_bits(xp.uint(xp.uint(code) << xp.uint(16)))


def _scale(absmax: Any, unit: Any) -> Any:
    """A block's scale; ``unit`` is that of a maximum of 1, rounded up: no number may round to above the largest code's.

    One that is so small that it may be a denormal number, which is rounded coarsely, is doubled.
    """
    scale = absmax * unit
    return xp.where(scale < 1e-37, scale + scale, scale)


def _scaled(x: Any, scale: Any) -> Any:
    """x / scale, by a factor that is the block's; 0 where the scale is 0."""
    # Both are raised by 2**64 where 1 / scale may be infinite; 0 * scale makes a float32 of it in every namespace.
    raised = xp.where(scale < 1e-30, scale * 0.0 + 18446744073709551616.0, 1.0)
    inverse = xp.where(scale > 0.0, xp.divide(1.0, xp.maximum(scale * raised, 1e-30)), 0.0)
    return x * raised * inverse


def scale_int8(absmax: Any) -> Any:
    return _scale(absmax, 1.000001 / 122878.0) * -1.0  # also of 0: -0.0


def scale_int16(absmax: Any) -> Any:
    return _scale(absmax, 1.000001 / 131038.0) * -1.0


def _noisy_bits(x: Any, scale: Any, random: Any) -> Any:
    """float32's bits of |x / scale| + 2, with random ones added below those that a code keeps."""
    size = xp.from_bits(xp.uint(xp.bits(_scaled(x, -scale)) & xp.uint(0x7FFFFFFF)))
    return xp.uint(xp.bits(size + 2.0) + random)


def _number(code: Any, kept: Any, scale: Any) -> Any:
    """The number of a code: ``kept`` has the bits below the sign in their place."""
    size = (xp.from_bits(xp.uint(kept | xp.uint(0x40000000))) - 2.0) * -scale
    return xp.from_bits(xp.uint(xp.bits(size) ^ xp.uint(xp.uint(code) & xp.uint(0x80000000))))


def encode_int8(x: Any, scale: Any, noise: Any) -> Any:
    """A sign, and |x / scale| + 2 as a float of 4 exponent and 3 mantissa bits, from 2 to 122,880.

    The 2 makes zero a code. Around it codes lie 0.25 apart, which is 2e-6 of the block's largest number; elsewhere
    their distance is an eighth of the number or less. Rounding is unbiased, since float32's bits are linear between
    codes. Scales are negative: positive ones belong to the linear codes of version 0.1.0.
    """
    bits = _noisy_bits(x, scale, xp.shift_right(noise, 12))
    # The sign takes the place of an exponent bit that is zero in all numbers.
    return xp.uint(xp.shift_right(bits, 20) | xp.uint(xp.shift_right(xp.bits(x), 24) & xp.uint(0x80)))


def decode_int8(code: Any, scale: Any) -> Any:
    return _number(code, xp.uint(xp.uint(xp.uint(code) << xp.uint(20)) & xp.uint(0x7F00000)), scale)


def encode_int16(x: Any, scale: Any, noise: Any) -> Any:
    """As ``encode_int8``, with 11 mantissa bits."""
    bits = _noisy_bits(x, scale, xp.shift_right(noise, 20))
    return xp.uint(xp.shift_right(bits, 12) | xp.uint(xp.shift_right(xp.bits(x), 16) & xp.uint(0x8000)))


def decode_int16(code: Any, scale: Any) -> Any:
    return _number(code, xp.uint(xp.uint(xp.uint(code) << xp.uint(12)) & xp.uint(0x7FFF000)), scale)


def scale_float8(absmax: Any) -> Any:
    return _scale(absmax, 1.000001 / 1.875)


def encode_float8(x: Any, scale: Any, noise: Any) -> Any:
    """An unsigned float of 5 exponent and 3 mantissa bits: x / scale from 2**-31 (code 0) to 1.875 (code 255).

    What is smaller is stored as the smallest: a second moment that became 0 would divide by eps.
    """
    bits = xp.bits(xp.maximum(_scaled(x, scale), 4.656612873077393e-10))
    return xp.shift_right(xp.uint(bits + xp.shift_right(noise, 12)), 20)  # a code is the lower 8 of these 10 bits


def decode_float8(code: Any, scale: Any) -> Any:
    return xp.from_bits(xp.uint(xp.uint(code + 768) << xp.uint(20))) * scale


@dataclass(frozen=True)
class Format:
    """How numbers are stored.

    ``encode(x, scale, noise) -> code`` and ``decode(code, scale) -> x`` are elementwise; ``scale(absmax) -> scale``
    serves formats whose blocks of BLOCK elements have a float32 scale each, and is None for others. ``storage`` is the
    dtype in memory: floating-point codes are the numbers themselves, "bits16" codes are 16 bits of a bfloat16.
    """

    name: str
    storage: str
    encode: Callable[[Any, Any, Any], Any] = _same
    decode: Callable[[Any, Any], Any] = _decoded
    scale: Callable[[Any], Any] | None = None
    stochastic: bool = False


FORMATS = {
    f.name: f
    for f in (
        Format("float64", "float64"),
        Format("float32", "float32"),
        Format("float16", "float16"),
        Format("bfloat16", "bits16", encode_bfloat16, decode_bfloat16, stochastic=True),
        Format("bfloat16_nearest", "bits16", encode_bfloat16_nearest, decode_bfloat16),
        Format("int8", "int8", encode_int8, decode_int8, scale_int8, stochastic=True),
        Format("int16", "int16", encode_int16, decode_int16, scale_int16, stochastic=True),
        Format("float8", "uint8", encode_float8, decode_float8, scale_float8, stochastic=True),
    )
}


ONCE_LINEAR = ("int8", "int16")  # in version 0.1.0, whose scales were positive


def as_saved(format: Format) -> Format:
    """The format that also reads the linear codes of version 0.1.0, with ``to_float``, which eager and JAX have."""
    present = format.decode

    def decode(code: Any, scale: Any) -> Any:
        return xp.where(scale > 0.0, xp.to_float(code) * scale, present(code, scale))

    return replace(format, decode=decode) if format.name in ONCE_LINEAR else format
