"""The GPU backend (CUDA and ROCm): the rule compiled by Triton, one launch for all parameters of a batch.

A program of the kernel takes a tile of ROWS blocks of one tensor, which it finds in tables on the device; a warp holds
a block, so a block's maximum is found without leaving it. The kernel is text made for the rule and the formats; it
calls the rule and the formats themselves.
"""

# mypy: disable-error-code="no-untyped-def"
import contextlib
import hashlib
import linecache
import types
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ademamix.backends import Batch, Rule, bind, capturing, coefficient_names
from ademamix.formats import BLOCK, LANES, OTHER, Format, hashed, turned
from ademamix.table import sent_to

ROWS = 4  # blocks in a tile, each of them in one warp: 8 elements a thread, 16 or 32 bytes of each wide stream
OPTIONS = {"num_warps": ROWS, "enable_fp_fusion": False}  # eager has no fused multiply-add either
ALIGNMENT = 16  # bytes of the widest access, and elements: of codes of one byte
STAGED = 8  # host buffers of tables that are made at a time

STORAGES = {  # in memory, and as which integers codes are decoded
    "float64": ("float64", None),
    "float32": ("float32", None),
    "float16": ("float16", None),
    "bits16": ("uint16", "uint32"),
    "int16": ("int16", "int32"),
    "int8": ("int8", "int32"),
    "uint8": ("uint8", "uint32"),
}


def _namespace(**functions: Any) -> types.ModuleType:
    """A namespace that Triton can look names up in."""
    module = types.ModuleType("xp")
    module.__dict__.update(functions)
    return module


# Functions of one's own, all of them: the interpreter replaces those of triton.language where it sees that name.
# ruff: noqa: E704
# fmt: off
@triton.jit
def _sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)  # float32's plain one is approximate
@triton.jit
def _divide(x, y):
    return x / y if (x + y).dtype == tl.float64 else tl.div_rn(x, y)  # here float32's plain one is approximate too
@triton.jit
def _abs(x): return tl.abs(x)
@triton.jit
def _exp(x): return tl.exp(x)
@triton.jit
def _log(x): return tl.log(x)
@triton.jit
def _minimum(x, y): return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)  # as everywhere else
@triton.jit
def _maximum(x, y): return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
@triton.jit
def _larger(x, y): return tl.maximum(x, y)
@triton.jit
def _where(condition, x, y): return tl.where(condition, x, y)
@triton.jit
def _bits(x): return x.to(tl.uint32, bitcast=True)
@triton.jit
def _from_bits(x): return x.to(tl.float32, bitcast=True)
@triton.jit
def _uint(x): return tl.cast(x, tl.uint32)
@triton.jit
def _shift_right(x, places): return x >> tl.cast(places, tl.uint32)
@triton.jit
def _to_float(x): return x.to(tl.float32)
@triton.jit
def _to_int(x): return x.to(tl.int32).to(tl.uint32, bitcast=True)
# fmt: on

xp = _namespace(
    sqrt=_sqrt, abs=_abs, exp=_exp, log=_log, minimum=_minimum, maximum=_maximum, where=_where, divide=_divide
)
format_xp = _namespace(
    where=_where,
    divide=_divide,
    maximum=_larger,
    bits=_bits,
    from_bits=_from_bits,
    uint=_uint,
    shift_right=_shift_right,
    to_float=_to_float,
    to_int=_to_int,
)


def _jit(function: Rule) -> Any:
    """A function for Triton, which reads globals, also those in annotations, only if they are declared constant."""
    scope = function.__globals__
    for name, value in scope.items():
        if not isinstance(value, types.ModuleType | triton.JITFunction) and not name.startswith("__"):
            scope[name] = tl.constexpr(value)
    scope["_triton_language"] = tl  # the interpreter looks for it among a function's globals
    return triton.jit(function)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _define(name: str, text: str, scope: dict[str, Any]) -> None:
    """Carry out a text of functions; Triton reads it once more, where Python looks for it."""
    linecache.cache[f"<{name}>"] = (len(text), None, text.splitlines(keepends=True), f"<{name}>")
    exec(compile(text, f"<{name}>", "exec"), scope)


def _of(format: Format | None) -> Format:
    assert format is not None
    return format


def source(rule: Rule, formats: Sequence[Format | None], in_rows: bool) -> str:
    """The kernel's text; formats are those of p, g and the slots, and without ``in_rows`` each tensor is one row.

    A row of ``table`` has the addresses of a parameter's tensors (p, g, the stored slots, then their scales), its row
    of coefficients, and whether all is aligned.
    """
    kept = [k for k, f in enumerate(formats) if f is not None]
    stream = {k: s for s, k in enumerate(kept)}
    scaled = [k for k in kept if _of(formats[k]).scale is not None]
    scale = {k: len(kept) + i for i, k in enumerate(scaled)}
    coded = [k for k in kept if STORAGES[_of(formats[k]).storage][1]]
    written = [k for k in kept if k != 1]
    arithmetic = "float64" if _of(formats[0]).storage == "float64" else "float32"
    width = len(kept) + len(scaled) + 2
    names = coefficient_names(rule)
    stochastic = any(f is not None and f.stochastic for f in formats)

    def loaded(k: int) -> list[str]:
        memory, integer = STORAGES[_of(formats[k]).storage]
        lines = [f"a{k} = start_of(entry + {stream[k]}, tl.{memory}, ALIGNED)"]
        raw = f"tl.load(a{k} + index, mask=mask, other=0)"
        if integer is None:
            return [*lines, f"x{k} = {raw}.to(tl.{arithmetic})"]
        given = f"tl.load(b{k} + block, mask=exists, other=0.0)[:, None]" if k in scale else "0.0"
        return [*lines, f"x{k} = decode{k}({raw}.to(tl.{integer}), {given})"]

    def stored(k: int) -> list[str]:
        memory, _ = STORAGES[_of(formats[k]).storage]
        x, lines = f"r{k}", []
        if k in scale:
            lines = [
                f"s{k} = scale{k}(from_bits(tl.max(tl.where(mask, bits(r{k}) & 0x7FFFFFFF, 0), 1)))",
                f"tl.store(b{k} + block, s{k}, mask=exists)",
            ]
        if k in coded:
            places = 8 * max(k - 1, 0) % 32
            random = "random" if not places else f"turned(random, {places})"
            given = f"s{k}[:, None]" if k in scale else "0.0"
            x = f"encode{k}(r{k}, {given}, {random if _of(formats[k]).stochastic else '0'})"
        return [*lines, f"tl.store(a{k} + index, {x}.to(tl.{memory}), mask=mask)"]

    noisy = [
        "key = hashed(uint(tl.load(keys + tensor)), uint(tl.load(row_of + 1)))",
        "first = tl.load(shapes + 4 * tensor + 2) + row * tl.load(shapes + 4 * tensor + 3)",
        f"first += column * {BLOCK}",
        f"lane = (first & {LANES - 1}).to(tl.int32)[:, None] + place",  # below 2 * LANES
        f"of_lane = hashed(key, lane & {LANES - 1})",
        f"of_block = hashed(key ^ uint({OTHER}), first >> 8)[:, None]",
        f"of_next = hashed(key ^ uint({OTHER}), (first >> 8) + 1)[:, None]",
        f"random = uint(of_lane ^ tl.where(lane < {LANES}, of_block, of_next))",
    ]
    slots = [f"x{k}" if k in stream else "0.0" for k in range(2, len(formats))]
    coefficients = [f"{name}=tl.load(row_of + {i}).to(tl.{arithmetic})" for i, name in enumerate(names, 2)]
    results = ", ".join(["r0", *(f"r{k}" for k in range(2, len(formats)))])
    body = [
        f"entry = table + tensor * {width}",
        f"row_of = coefficients + tl.load(entry + {width - 2}) * {2 + len(names)}",
        "rest = tl.load(shapes + 4 * tensor)",
        "across = tl.load(shapes + 4 * tensor + 1)",
        f"block = tl.cast(tile, tl.int64) * {ROWS} + tl.arange(0, {ROWS})",
        "exists = block < tl.load(lengths + tensor)",
        "if ALIGNED:",
        f"    rest = tl.multiple_of(rest, {ALIGNMENT})",
        *(["row, column = block // across, block % across"] if in_rows else ["row, column = 0, block"]),
        f"start = row * rest + column * {BLOCK}",
        f"number = tl.where(exists, rest - column * {BLOCK}, 0)",
        "if ALIGNED:",
        f"    start = tl.multiple_of(start, {ALIGNMENT})",
        f"    number = tl.multiple_of(number, {ALIGNMENT})",
        f"place = tl.arange(0, {BLOCK})[None, :]",
        "index = start[:, None] + place",
        "mask = place < number[:, None]",
        *(f"b{k} = start_of(entry + {scale[k]}, tl.float32, False)" for k in scaled),
        *(line for k in kept for line in loaded(k)),
        *(noisy if stochastic else []),
        f"g = x1 * tl.load(row_of).to(tl.{arithmetic})",
        f"{results}, = rule({', '.join(['x0', 'g', *slots, *coefficients])})",
        *(line for k in written for line in stored(k)),
    ]
    arguments = "table, shapes, lengths, coefficients, keys"
    return "\n".join(
        [
            "def start_of(pointer, dtype: tl.constexpr, ALIGNED: tl.constexpr):",
            "    start = tl.load(pointer).to(tl.pointer_type(dtype))",
            "    if ALIGNED:",
            f"        start = tl.multiple_of(start, {ALIGNMENT})",
            "    return start",
            "",
            f"def update(tensor, tile, {arguments}, ALIGNED: tl.constexpr):",
            *(f"    {line}" for line in body),
            "",
            f"def kernel(tensors, firsts, skip, {arguments}):",
            "    if tl.load(skip) == 0:",
            "        tensor = tl.load(tensors + tl.program_id(0))",
            "        tile = tl.program_id(0) - tl.load(firsts + tensor)",
            f"        if tl.load(table + tensor * {width} + {width - 1}) != 0:",
            f"            update(tensor, tile, {arguments}, True)",
            "        else:",
            f"            update(tensor, tile, {arguments}, False)",
            "",
        ]
    )


@cache
def kernel(rule: Rule, formats: tuple[Format | None, ...], in_rows: bool) -> Any:
    """The kernel for a rule and the formats of parameter, gradient and slots, not compiled yet."""
    text = source(rule, formats, in_rows)
    name = f"{rule.__name__}_{_digest(text)}"
    scope: dict[str, Any] = {"__name__": name, "tl": tl, "bits": _bits, "from_bits": _from_bits, "uint": _uint}
    scope |= {
        "rule": bind(rule, xp, _jit),
        "hashed": bind(hashed, format_xp, _jit),
        "turned": bind(turned, format_xp, _jit),
    }
    for k, f in enumerate(formats):
        if f is not None and STORAGES[f.storage][1]:
            scope |= {f"encode{k}": bind(f.encode, format_xp, _jit), f"decode{k}": bind(f.decode, format_xp, _jit)}
            if f.scale is not None:
                scope[f"scale{k}"] = bind(f.scale, format_xp, _jit)
    _define(name, text, scope)
    for function in ("start_of", "update", "kernel"):
        scope[function] = triton.jit(scope[function])
    return scope["kernel"]


class Launch:
    """See :class:`ademamix.backends.Launch`."""

    def __init__(self, batch: Batch) -> None:
        in_rows = batch.blocked or any(rows.number > 1 for rows in batch.rows)
        self.kernel = kernel(batch.rule, (batch.format, batch.grad, *batch.formats), in_rows)
        self.device = batch.parameters[0].device
        self.tensors = [  # the pointers are theirs; the second is replaced by the gradient's
            [t for t in (p, p, *slots, *scales) if t is not None]
            for p, slots, scales in zip(batch.parameters, batch.slots, batch.scales, strict=True)
        ]
        number, first, stride = np.array(batch.rows, np.int64).T
        rest = np.array([p.numel() for p in batch.parameters]) // np.maximum(number, 1)
        across = -(-rest // BLOCK)
        lengths = across * number
        tiles = -(-lengths // ROWS)
        self.tiles = int(tiles.sum())
        self.static = tuple(
            sent_to(self.device, torch.from_numpy(array))
            for array in (
                np.repeat(np.arange(len(tiles), dtype=np.int32), tiles),
                np.cumsum([0, *tiles[:-1]], dtype=np.int64),
                np.stack([rest, np.maximum(across, 1), first, stride], 1),
                lengths,
                batch.keys.view(np.int32),
            )
        )
        pointers = [[t.data_ptr() for t in tensors] for tensors in self.tensors]
        self.entries = np.array([[*each, 0, 0] for each in pointers], np.int64)
        own = [all(address % ALIGNMENT == 0 for address in each) for each in pointers]
        self.even = np.array(own) & (rest % ALIGNMENT == 0)
        self.sent: tuple[list[int], list[int]] | None = None  # the pointers and rows that the table has
        self.staged: list[Tensor] = []
        self.captured: list[Tensor] = []  # the host buffers that graphs send again whenever they are replayed
        self.never = torch.zeros((), dtype=torch.uint8, device=self.device)
        self._send([each[1] for each in pointers], [0] * len(pointers))
        with self._on_device():
            self.kernel.warmup(*self._arguments(self.never.double(), self.never), grid=(1,), **OPTIONS)

    def _stage(self) -> list[Tensor]:
        pinned = self.device.type == "cuda"
        return [*torch.empty((STAGED, *self.entries.shape), dtype=torch.int64, device="cpu", pin_memory=pinned)]

    def _send(self, grads: list[int], rows: list[int]) -> None:
        """Send the table. Its host buffer is written only once: the copy may be under way for long, and a captured
        graph repeats it. Graphs must not allocate pinned memory, so some buffers are kept ready."""
        self.entries[:, 1], self.entries[:, -2] = grads, rows
        self.entries[:, -1] = self.even & (np.array(grads) % ALIGNMENT == 0)
        captured = capturing(self.device)
        if len(self.staged) < (1 if captured else STAGED // 2):
            self.staged += self._stage()
        host = self.staged.pop()
        self.table = host.copy_(torch.from_numpy(self.entries)).to(self.device, non_blocking=True)
        self.sent = None if captured else (grads, rows)  # a graph's table holds nothing before it is replayed
        if captured:
            self.captured.append(host)

    def __call__(self, grads: Sequence[Tensor], rows: Sequence[int], coefficients: Tensor, skip: Tensor | None) -> None:
        if not self.tiles:
            return
        pointers = [g.data_ptr() for g in grads]
        if self.sent != (pointers, list(rows)) or capturing(self.device):  # a graph keeps no table of others alive
            self._send(pointers, list(rows))
        if coefficients.device != self.device:
            coefficients = sent_to(self.device, coefficients)
        flag = self.never if skip is None else skip.view(torch.uint8)
        with self._on_device():
            self.kernel[(self.tiles,)](*self._arguments(coefficients, flag), **OPTIONS)

    def _arguments(self, coefficients: Tensor, flag: Tensor) -> tuple[Tensor, ...]:
        of_tile, firsts, shapes, lengths, keys = self.static
        return (of_tile, firsts, flag, self.table, shapes, lengths, coefficients, keys)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
