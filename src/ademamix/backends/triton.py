"""The GPU backend (CUDA and ROCm): the rule compiled by Triton, one launch for all parameters of a batch.

A program of the kernel is one warp, which walks over BLOCKS blocks of one tensor, found in tables on the device: a
block's maximum never leaves the warp. The kernel is text made for the rule and the formats; it calls the rule and the
formats themselves. Tensors whose memory is aligned and those whose memory is not are two launches: one kernel for both
would take the registers of the worse one.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
import ast
import contextlib
import hashlib
import inspect
import linecache
import types
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from ademamix.backends import Batch, Rule, bind, capturing, coefficient_names, sent_to
from ademamix.formats import BLOCK, LANES, OTHER, Format, hashed, noise_share, turned

BLOCKS = 8  # of one program, which computes once what they share: addresses, coefficients, the noise of lanes
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}  # eager has no fused multiply-add either
ALIGNMENT = 16  # bytes of the widest access, and elements: of codes of one byte
STAGED = 32  # host buffers of tables that are made at a time

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
def _start_of(pointer, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    start = tl.load(pointer).to(tl.pointer_type(dtype))
    return tl.multiple_of(start, 16) if ALIGNED else start
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
def _double(x): return tl.full((), x, tl.float64)
@triton.jit
def _bits(x): return x.to(tl.uint32, bitcast=True)
@triton.jit
def _from_bits(x): return x.to(tl.float32, bitcast=True)
@triton.jit
def _uint(x): return tl.cast(x, tl.uint32)
@triton.jit
def _shift_right(x, places): return x >> tl.cast(places, tl.uint32)
# fmt: on


xp = _namespace(
    sqrt=_sqrt,
    abs=_abs,
    exp=_exp,
    log=_log,
    minimum=_minimum,
    maximum=_maximum,
    where=_where,
    divide=_divide,
    double=_double,
)
format_xp = _namespace(
    where=_where,
    divide=_divide,
    maximum=_larger,
    bits=_bits,
    from_bits=_from_bits,
    uint=_uint,
    shift_right=_shift_right,
)


def _jit(function: Rule) -> Any:
    """A function for Triton, which reads globals, also those in annotations, only if they are declared constant."""
    scope = function.__globals__
    for name, value in scope.items():
        if not isinstance(value, types.ModuleType | triton.JITFunction) and not name.startswith("__"):
            scope[name] = tl.constexpr(value)
    scope["_triton_language"] = tl  # the interpreter looks for it among a function's globals
    return triton.jit(function)


def define(name: str, text: str, scope: dict[str, Any]) -> Any:
    """The last function of a text, which Triton reads once more, where Python looks for it."""
    full = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    linecache.cache[f"<{full}>"] = (len(text), None, text.splitlines(keepends=True), f"<{full}>")
    scope["__name__"] = full
    exec(compile(text, f"<{full}>", "exec"), scope)
    return scope[name]


def made_current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes it the current one, for which Triton compiles and launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Plain(ast.NodeTransformer):
    """A traced rule in the Python that every Triton reads alike: before 3.9, keyword-only arguments are dropped and
    numbers given to a function are float32."""

    def __init__(self, double: bool) -> None:
        self.double = double

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        node.args, node.kwonlyargs, node.kw_defaults = [*node.args, *node.kwonlyargs], [], []
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.parse(f"xp.double({node.value!r})", mode="eval").body if self.double else node


def _rule(rule: Rule, double: bool) -> Any:
    """A traced rule compiled by Triton, its coefficients positional."""
    text = ast.unparse(_Plain(double).visit(ast.parse(inspect.getsource(rule))))
    return _jit(define(rule.__name__, text, {"xp": xp}))


def _of(format: Format | None) -> Format:
    assert format is not None
    return format


def source(rule: Rule, formats: Sequence[Format | None], in_rows: bool, shifted: bool) -> str:
    """The kernel's text, from its arguments on.

    A row of ``table`` has the addresses of a parameter's tensors (p, g, the stored slots, then their scales), its row
    of coefficients, and whether all is aligned.

    Args:
        rule: a traced rule.
        formats: of p, g and the slots.
        in_rows: whether a tensor may have more than one row.
        shifted: whether a row may begin between two blocks of lanes of the noise.
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
    noises = sorted({noise_share(max(k - 1, 0))[0] for k in kept if _of(formats[k]).stochastic})

    def loaded(k: int) -> str:
        _, integer = STORAGES[_of(formats[k]).storage]
        raw = f"tl.load(a{k} + start + place, mask=mask, other=0)"
        if integer is None:
            return f"x{k} = {raw}.to(tl.{arithmetic})"
        return f"x{k} = decode{k}({raw}.to(tl.{integer}), {f'tl.load(b{k} + block)' if k in scale else '0.0'})"

    def stored(k: int) -> list[str]:
        memory, _ = STORAGES[_of(formats[k]).storage]
        x, lines = f"r{k}", []
        if k in scale:
            lines = [
                f"s{k} = scale{k}(from_bits(tl.max(tl.where(mask, bits(r{k}) & 0x7FFFFFFF, 0), 0)))",
                f"tl.store(b{k} + block, s{k})",
            ]
        if k in coded:
            which, places = noise_share(max(k - 1, 0))
            random = f"turned(random{which}, {places})" if places else f"random{which}"
            given = f"s{k}" if k in scale else "0.0"
            x = f"encode{k}(r{k}, {given}, {random if _of(formats[k]).stochastic else '0'})"
        return [*lines, f"tl.store(a{k} + start + place, {x}.to(tl.{memory}), mask=mask)"]

    # What lies under one program: the same for all of its blocks.
    key = ["key0 = hashed(uint(tl.load(keys + tensor)), uint(tl.load(row_of + 1)))"]
    key += [f"key{w} = hashed(key0, {w})" for w in noises if w]
    key += ["origin, stride = tl.load(shapes + 4 * tensor + 2), tl.load(shapes + 4 * tensor + 3)"]
    lanes = [] if shifted else [f"of_lane{w} = hashed(key{w}, place)" for w in noises]
    # And the noise of a block.
    noise = [f"first = origin + row * stride + column * {BLOCK}"]
    noise += [f"lane = (first & {LANES - 1}).to(tl.int32) + place"] if shifted else []  # below 2 * LANES
    for w in noises:
        noise += [f"of_block{w} = hashed(key{w} ^ uint({OTHER}), first >> 8)"]
        if shifted:
            noise += [
                f"of_lane{w} = hashed(key{w}, lane & {LANES - 1})",
                f"of_next{w} = hashed(key{w} ^ uint({OTHER}), (first >> 8) + 1)",
                f"of_block{w} = tl.where(lane < {LANES}, of_block{w}, of_next{w})",
            ]
        noise += [f"random{w} = uint(of_lane{w} ^ of_block{w})"]
    slots = [f"x{k}" if k in stream else "0.0" for k in range(2, len(formats))]
    results = ", ".join(["r0", *(f"r{k}" for k in range(2, len(formats)))])
    coefficients = [f"c{i}" for i, _ in enumerate(names)]
    head = [
        f"row_of = coefficients + tl.load(entry + {width - 2}) * {2 + len(names)}",
        "rest = tl.load(shapes + 4 * tensor)",
        "across = tl.load(shapes + 4 * tensor + 1).to(tl.int32)",
        *(f"a{k} = start_of(entry + {stream[k]}, tl.{STORAGES[_of(formats[k]).storage][0]}, ALIGNED)" for k in kept),
        *(f"b{k} = start_of(entry + {scale[k]}, tl.float32, False)" for k in scaled),
        f"factor = tl.load(row_of).to(tl.{arithmetic})",
        *(f"{c} = tl.load(row_of + {i}).to(tl.{arithmetic})" for i, c in enumerate(coefficients, 2)),
        f"place = tl.arange(0, {BLOCK})",
        *([*key, *lanes] if noises else []),
        "begin = tl.load(begins + tl.program_id(0))",
        f"end = tl.minimum(begin + {BLOCKS}, tl.load(lengths + tensor).to(tl.int32))",
    ]
    body = [
        f"row, column = {'block // across, block % across' if in_rows else '0, block'}",
        "row, column = tl.cast(row, tl.int64), tl.cast(column, tl.int64)",
        f"start = row * rest + column * {BLOCK}",
        f"number = tl.minimum(rest - column * {BLOCK}, {BLOCK}).to(tl.int32)",
        "if ALIGNED:",
        f"    start = tl.multiple_of(start, {ALIGNMENT})",
        f"    number = tl.multiple_of(number, {ALIGNMENT})",
        "mask = place < number",
        *map(loaded, kept),
        *(noise if noises else []),
        f"{results}, = rule({', '.join(['x0', 'x1 * factor', *slots, *coefficients])})",
        *(line for k in written for line in stored(k)),
    ]
    return "\n".join(
        [
            "(tensors, begins, skip, table, shapes, lengths, coefficients, keys, ALIGNED: tl.constexpr):",
            "    if tl.load(skip) == 0:",
            "        tensor = tl.load(tensors + tl.program_id(0))",
            f"        entry = table + tensor * {width}",
            f"        if (tl.load(entry + {width - 1}) != 0) == ALIGNED:",
            *(f"            {line}" for line in head),
            "            for block in range(begin, end):",
            *(f"                {line}" for line in body),
            "",
        ]
    )


@cache
def kernel(rule: Rule, formats: tuple[Format | None, ...], in_rows: bool, shifted: bool) -> Any:
    """The kernel of :func:`source`, not compiled yet."""
    scope: dict[str, Any] = {"tl": tl, "bits": _bits, "from_bits": _from_bits, "uint": _uint}
    scope |= {
        "start_of": _start_of,
        "rule": _rule(rule, _of(formats[0]).storage == "float64"),
        "hashed": bind(hashed, format_xp, _jit),
        "turned": bind(turned, format_xp, _jit),
    }
    for k, f in enumerate(formats):
        if f is not None and STORAGES[f.storage][1]:
            scope |= {f"encode{k}": bind(f.encode, format_xp, _jit), f"decode{k}": bind(f.decode, format_xp, _jit)}
            if f.scale is not None:
                scope[f"scale{k}"] = bind(f.scale, format_xp, _jit)
    name = f"{rule.__name__}_kernel"
    return triton.jit(define(name, f"def {name}{source(rule, formats, in_rows, shifted)}", scope))


class Launch:
    """See :class:`ademamix.backends.Launch`."""

    def __init__(self, batch: Batch) -> None:
        number, first, stride = np.array(batch.rows, np.int64).T
        shifted = batch.stochastic and bool((first % LANES).any() or (stride % LANES)[number > 1].any())
        formats = (batch.format, batch.grad, *batch.formats)
        self.kernel = kernel(batch.rule, formats, bool((number > 1).any()), shifted)
        self.device = batch.parameters[0].device
        self.tensors = [  # the pointers are theirs; the second is replaced by the gradient's
            [t for t in (p, p, *slots, *scales) if t is not None]
            for p, slots, scales in zip(batch.parameters, batch.slots, batch.scales, strict=True)
        ]
        pointers = np.array([[t.data_ptr() for t in tensors] for tensors in self.tensors], np.int64)
        rest = np.array([p.numel() for p in batch.parameters]) // np.maximum(number, 1)
        across = -(-rest // BLOCK)
        lengths = across * number
        if lengths.max() >= 1 << 31:
            raise ValueError(f"a tensor must have less than 2**31 blocks of {BLOCK} elements, got {lengths.max()}")
        # An aligned tensor is left to the other kernel in a step whose gradient is not aligned.
        self.even = (pointers % ALIGNMENT == 0).all(1) & (rest % ALIGNMENT == 0)
        self.programs = [self._programs(lengths, which) for which in (self.even, ~self.even)]
        shapes = np.stack([rest, np.maximum(across, 1), first, stride], 1)
        self.static = [
            sent_to(self.device, torch.from_numpy(array)) for array in (shapes, lengths, batch.keys.view(np.int32))
        ]
        self.entries = np.concatenate([pointers, np.zeros((len(pointers), 2), np.int64)], 1)
        self.sent: tuple[list[int], list[int]] | None = None  # the pointers and rows that the table has
        self.staged: list[Tensor] = []
        self.captured: dict[bytes, Tensor] = {}  # the host buffers that graphs send again whenever they are replayed
        self.never = torch.zeros((), dtype=torch.uint8, device=self.device)
        self._send([each[1] for each in pointers.tolist()], [0] * len(pointers))
        # Launches that skip, of both kernels: the first one compiles and loads, which no graph must capture.
        always, none = torch.ones_like(self.never), self.never.double()
        with made_current(self.device):
            for aligned, programs in ((True, self.programs[0]), (False, self.programs[1])):
                if len(programs[0]) or not aligned:
                    self.kernel[(1,)](*self._arguments(programs, none, always), aligned, **OPTIONS)

    def _programs(self, lengths: npt.NDArray[np.int64], which: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """The tensor of each program, and its first block there, for these tensors."""
        of_tensor = -(-lengths // BLOCKS) * which
        tensors = np.repeat(np.arange(len(lengths), dtype=np.int32), of_tensor)
        before = np.repeat(np.cumsum(of_tensor) - of_tensor, of_tensor)
        begins = (BLOCKS * (np.arange(len(tensors)) - before)).astype(np.int32)
        return sent_to(self.device, torch.from_numpy(tensors)), sent_to(self.device, torch.from_numpy(begins))

    def _stage(self) -> None:
        pinned = self.device.type == "cuda"
        self.staged += torch.empty((STAGED, *self.entries.shape), dtype=torch.int64, device="cpu", pin_memory=pinned)

    def _send(self, grads: list[int], rows: list[int]) -> None:
        """Send the table. Its host buffer is written only once: the copy may be under way for long, and a captured
        graph repeats it. Graphs must not allocate pinned memory, so some buffers are kept ready."""
        self.entries[:, 1], self.entries[:, -2] = grads, rows
        aligned = self.entries[:, 1] % ALIGNMENT == 0
        self.entries[:, -1] = self.even & aligned
        even, others = self.programs
        wanted = (
            (even, True, self.entries[:, -1].any()),
            (even, False, (self.even & ~aligned).any()),
            (others, False, True),
        )
        self.launches = [(programs, which) for programs, which, needed in wanted if needed and len(programs[0])]
        captured = capturing(self.device)
        if captured:
            host = self._captured()
        else:
            if len(self.staged) <= STAGED // 2:
                self._stage()
            host = self.staged.pop().copy_(torch.from_numpy(self.entries))
        self.table = host.to(self.device, non_blocking=True)
        self.sent = None if captured else (grads, rows)  # a graph's table holds nothing before it is replayed

    def _captured(self) -> Tensor:
        """A host buffer with the table, which no step after this capture writes."""
        content = self.entries.tobytes()
        if content not in self.captured:
            if not self.staged:
                raise RuntimeError(
                    f"a CUDA graph can capture {STAGED // 2} steps with gradients in different places after one that "
                    "is not captured: take such a step, or keep the gradients where they are (zero_grad("
                    "set_to_none=False))"
                )
            self.captured[content] = self.staged.pop().copy_(torch.from_numpy(self.entries))
        return self.captured[content]

    def __call__(self, grads: Sequence[Tensor], rows: Sequence[int], coefficients: Tensor, skip: Tensor | None) -> None:
        pointers = list(map(Tensor.data_ptr, grads))
        if self.sent != (pointers, rows) or capturing(self.device):  # a graph keeps no table of others alive
            self._send(pointers, list(rows))
        if coefficients.device != self.device:
            coefficients = sent_to(self.device, coefficients)
        flag = self.never if skip is None else skip.view(torch.uint8)
        with made_current(self.device):
            for programs, aligned in self.launches:
                self.kernel[(len(programs[0]),)](*self._arguments(programs, coefficients, flag), aligned, **OPTIONS)

    def _arguments(self, programs: tuple[Tensor, Tensor], coefficients: Tensor, flag: Tensor) -> tuple[Tensor, ...]:
        shapes, lengths, keys = self.static
        return (*programs, flag, self.table, shapes, lengths, coefficients, keys)
