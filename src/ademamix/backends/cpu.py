"""The CPU backend: the rule compiled by Numba into one fused pass over all parameters, on all cores.

A kernel walks a table of data pointers, so one call serves any number of tensors and compiling happens once for each
rule and combination of dtypes. Its loads and stores are written as LLVM instructions that say what Numba cannot know:
that the tensors do not overlap (any number of state slots vectorizes) and that no index is negative.
"""

import contextlib
import hashlib
import pickle
import sys
import types
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types as nt
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.extending import intrinsic

from ademamix.backends import Batch, Rule, bind, called_functions, coefficient_names, global_names, with_numbers
from ademamix.backends.cache import cache_folder, made_private, read, trusted, write
from ademamix.backends.pool import for_each
from ademamix.formats import BLOCK, LANES, OTHER, Format, hashed, noise_share, turned

PIECE = 1 << 10

I32, I64 = ir.IntType(32), ir.IntType(64)
STORAGES = {  # in memory, and how wide
    "float64": (ir.DoubleType(), 8),
    "float32": (ir.FloatType(), 4),
    "float16": (ir.HalfType(), 2),
    "uint32": (ir.IntType(32), 4),
    "bits16": (ir.IntType(16), 2),
    "int16": (ir.IntType(16), 2),
    "int8": (ir.IntType(8), 1),
    "uint8": (ir.IntType(8), 1),
}


def accessors(stream: int, streams: int, storage: str, arithmetic: str) -> tuple[Any, Any]:
    """Load and store of one of a kernel's ``streams`` tensors, as functions of (address, index[, value]).

    Floating-point values have the type ``arithmetic``; integers are loaded as int32 and stored from uint32.
    """
    stored, size = STORAGES[storage]
    floating = storage.startswith("float")
    number = getattr(nt, arithmetic) if floating else nt.int32
    value = STORAGES[arithmetic][0]

    def access(builder: Any, address: Any, index: Any) -> Any:
        pointer = builder.inttoptr(address, stored.as_pointer())
        return builder.gep(pointer, [index], inbounds=True)

    def annotate(instruction: Any, module: Any) -> Any:
        instruction.align = size
        domain = module.add_metadata(["ademamix"])
        scopes = [module.add_metadata([f"ademamix {i}", domain]) for i in range(streams)]
        instruction.set_metadata("alias.scope", module.add_metadata([scopes[stream]]))
        instruction.set_metadata("noalias", module.add_metadata(scopes[:stream] + scopes[stream + 1 :]))
        return instruction

    @intrinsic
    def load(context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x = annotate(builder.load(access(builder, *args)), builder.module)
            if floating:
                return _convert(builder, x, value)
            return builder.sext(x, I32) if storage.startswith("int") else builder.zext(x, I32)

        return number(nt.int64, nt.int64), generate

    @intrinsic
    def store(context: Any, address: Any, index: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, index, x = args
            x = _convert(builder, x, stored) if floating else builder.trunc(x, stored)
            annotate(builder.store(x, access(builder, address, index)), builder.module)
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, number if floating else nt.uint32), generate

    return load, store


def _convert(builder: Any, x: Any, to: Any) -> Any:
    width = {"half": 16, "float": 32, "double": 64}
    have, want = width[str(x.type)], width[str(to)]
    return x if have == want else builder.fpext(x, to) if have < want else builder.fptrunc(x, to)


@intrinsic
def _widen(context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return nt.void(), generate


@intrinsic
def _bits(context: Any, x: Any) -> Any:
    return nt.uint32(nt.float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32)


@intrinsic
def _narrow(context: Any, i: Any) -> Any:
    return nt.uint32(nt.int64), lambda context, builder, signature, args: builder.trunc(args[0], I32)


@intrinsic
def _from_bits(context: Any, x: Any) -> Any:
    return nt.float32(nt.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


def _namespace(**functions: Any) -> types.ModuleType:
    """A namespace that Numba can look names up in."""
    module = types.ModuleType("xp")
    module.__dict__.update(functions)
    return module


def _shift_right(x: Any, places: Any) -> Any:
    return np.uint32(x >> np.uint32(places))


# Selections become one instruction of a vector; NumPy's functions would branch.
_select = numba.njit(lambda condition, x, y: x if condition else y)
_divide = numba.njit(lambda x, y: x / y, error_model="numpy")
xp = _namespace(
    **{name: getattr(np, name) for name in ("sqrt", "abs", "exp", "log", "minimum", "maximum")},
    where=_select,
    divide=_divide,
)
format_xp = _namespace(
    where=_select,
    divide=_divide,
    maximum=numba.njit(lambda x, y: x if x > y else y),
    bits=_bits,
    from_bits=_from_bits,
    uint=np.uint32,
    shift_right=numba.njit(_shift_right),
)


class _Kernel:
    """What the text and the functions of one kernel are made from.

    Streams are the tensors behind the pointer table's columns: p, g, the stored slots, then their scales.
    """

    def __init__(self, rule: Rule, format: Format, grad: Format, formats: tuple[Format | None, ...]) -> None:
        self.rule, self.formats = rule, (format, grad, *formats)
        self.arithmetic = "float64" if format.storage == "float64" else "float32"
        self.streams = [k for k, f in enumerate(self.formats) if f is not None]  # stream -> format
        self.scaled = [k for k in self.streams if self._of(k).scale is not None]  # of these the scales are streams
        # Encoded in a pass of their own: it needs the block's new scales, or would make the first pass's chain of
        # operations so long that a core keeps fewer elements in flight (bfloat16 took a quarter longer with AVX2).
        self.late = [k for k in self.streams if k != 1 and (k in self.scaled or self._of(k).stochastic)]
        self.storages = [self._of(k).storage for k in self.streams] + ["float32"] * len(self.scaled)
        self.coded = [k for k in self.streams if not self._of(k).storage.startswith("float")]

    def _of(self, k: int) -> Format:
        format = self.formats[k]
        assert format is not None
        return format

    def source(self) -> str:
        """The kernel: for each block of each tensor, one pass that updates, and one that encodes."""
        stream = {k: s for s, k in enumerate(self.streams)}
        scale = {k: len(self.streams) + i for i, k in enumerate(self.scaled)}
        scratch = {k: len(self.storages) + i for i, k in enumerate(self.late)}
        sizes = [STORAGES[storage][1] for storage in self.storages]
        count = len(coefficient_names(self.rule))

        def value(k: int) -> str:
            if k not in stream:
                return "zero"
            raw = f"load{stream[k]}(a{stream[k]}, i)"
            return f"decode{k}({raw}, {f's{k}' if k in scale else 'zero'})" if k in self.coded else raw

        def encoded(k: int, x: str) -> str:
            if k not in self.coded:
                return x
            which, places = noise_share(max(k - 1, 0))
            random = f"turned(h{which}, {places})" if places else f"h{which}"
            return f"encode{k}({x}, {f's{k}' if k in scale else 'zero'}, {random if self._of(k).stochastic else 'nil'})"

        noises = {which: n for n, which in enumerate(sorted({noise_share(max(k - 1, 0))[0] for k in self.late}))}
        keys = [
            "key0 = hashed(keys[tensor], done[coefficient])",
            *(f"key{w} = hashed(key0, uint({w}))" for w in noises if w),
        ]
        lanes = [
            f"for i in range({2 * LANES}):",
            *(f"    store_lane(lanes{w}, i, hashed(key{w}, narrow(i & {LANES - 1})))" for w in noises),
        ]
        prepare = [
            f"index = first + row * stride + column * {BLOCK}",
            f"wrap = min(n, {LANES} - (index & {LANES - 1}))",
            *(f"lane{w} = lanes{w} + 4 * (index & {LANES - 1})" for w in noises),
            *(f"block{w} = hashed(key{w} ^ uint({OTHER}), narrow(index >> 8))" for w in noises),
            *(f"next{w} = hashed(key{w} ^ uint({OTHER}), narrow((index >> 8) + 1))" for w in noises),
        ]
        direct = [k for k in self.streams if k != 1 and k not in self.late]
        results = ["r0", *(f"r{k}" for k in range(2, len(self.formats)))]
        arguments = [value(0), f"{value(1)} * factor", *(value(k) for k in range(2, len(self.formats)))]
        update = [
            f"{', '.join(results)}, = rule({', '.join([*arguments, *(f'c{k}' for k in range(count))])})",
            *(f"store{stream[k]}(a{stream[k]}, i, {encoded(k, f'r{k}')})" for k in direct),
            *(f"store{scratch[k]}(z{k}, i, r{k})" for k in self.late),
            *(f"m{k} = maximum(m{k}, uint(bits(r{k}) & uint(0x7FFFFFFF)))" for k in self.scaled),
        ]
        # Lane 0 may lie within the block: from there on, the hash is that of the next block of lanes.
        finish = [
            "for part in range(2):",
            "    low, high = (wrap, n) if part else (0, wrap)",
            *(f"    of_block{w} = next{w} if part else block{w}" for w in noises),
            "    for i in range(low, high):",
            *(f"        h{w} = uint(load_lane(lane{w}, i) ^ of_block{w})" for w in noises),
            *(
                f"        store{stream[k]}(a{stream[k]}, i, {encoded(k, f'load{scratch[k]}(z{k}, i)')})"
                for k in self.late
            ),
        ]
        if not self.late:
            keys, lanes, prepare, finish = [], [], [], []
        rescale = [
            line
            for k in self.scaled
            for line in (f"s{k} = scale{k}(from_bits(m{k}))", f"store{scale[k]}(b{k}, row * across + column, s{k})")
        ]
        return "\n".join(
            [
                "def kernel(pointers, shapes, offsets, rows, coefficients, done, keys, begin, end):",
                f"    scratch = np.empty({BLOCK * len(self.late) + 2 * LANES * len(noises)}, np.float32)",
                *(f"    z{k} = scratch.ctypes.data + {4 * BLOCK * i}" for i, k in enumerate(self.late)),
                *(
                    f"    lanes{w} = scratch.ctypes.data + {4 * (BLOCK * len(self.late) + 2 * LANES * n)}"
                    for w, n in noises.items()
                ),
                "    tensor = 0",
                "    while offsets[tensor + 1] <= begin:",
                "        tensor += 1",
                "    while begin < end:",
                "        rest, across = shapes[tensor, 0], shapes[tensor, 1]",
                "        first, stride = shapes[tensor, 2], shapes[tensor, 3]",
                *(f"        b{k} = pointers[tensor, {scale[k]}]" for k in self.scaled),
                "        coefficient = rows[tensor]",
                "        factor = coefficients[coefficient, 0]",
                *(f"        {line}" for line in (*keys, *lanes)),
                *(f"        c{k} = coefficients[coefficient, {k + 2}]" for k in range(count)),
                "        row = (begin - offsets[tensor]) // across",
                "        column = (begin - offsets[tensor]) % across",
                "        stop = min(end, offsets[tensor + 1])",
                "        for block in range(begin, stop):",
                f"            start = row * rest + column * {BLOCK}",
                f"            n = min({BLOCK}, rest - column * {BLOCK})",
                *(f"            {line}" for line in prepare),
                *(f"            a{s} = pointers[tensor, {s}] + start * {sizes[s]}" for s in range(len(stream))),
                "            widen()",
                *(f"            s{k} = load{scale[k]}(b{k}, row * across + column)" for k in self.scaled),
                *(f"            m{k} = uint(0)" for k in self.scaled),
                "            for i in range(n):",
                *(f"                {line}" for line in update),
                *(f"            {line}" for line in rescale),
                *(f"            {line}" for line in finish),
                "            column += 1",
                "            if column == across:",
                "                column = 0",
                "                row += 1",
                "        begin = stop",
                "        tensor += 1",
                "",
            ]
        )

    def functions(self, module: str) -> dict[str, Any]:
        """What the names in the text stand for."""

        def jit(number: Callable[[float], Any]) -> Callable[[Rule], Any]:
            return lambda function: _jit(function, number, module)

        number = getattr(np, self.arithmetic)
        rule = bind(self.rule, xp, jit(number))
        single = jit(np.float32)
        functions = {"rule": rule, "zero": number(0), "nil": np.uint32(0), "np": np, "uint": np.uint32}
        functions |= {
            "widen": _widen,
            "narrow": _narrow,
            "bits": _bits,
            "from_bits": _from_bits,
            "maximum": format_xp.maximum,
        }
        functions |= {"hashed": bind(hashed, format_xp, single), "turned": bind(turned, format_xp, single)}
        for k in self.coded:
            format = self._of(k)
            functions[f"encode{k}"] = bind(format.encode, format_xp, single)
            functions[f"decode{k}"] = bind(format.decode, format_xp, single)
            if format.scale is not None:
                functions[f"scale{k}"] = bind(format.scale, format_xp, single)
        every = [*self.storages, *["float32"] * len(self.late), "uint32"]  # the scratch blocks and lanes last
        for s, storage in enumerate(every):
            made = accessors(s, len(every), storage, self.arithmetic)
            functions.update(zip((f"load{s}", f"store{s}"), made, strict=True))
        functions |= {
            "load_lane": functions[f"load{len(every) - 1}"],
            "store_lane": functions[f"store{len(every) - 1}"],
        }
        return functions

    def digest(self, source: str) -> str:
        """A name for all that goes into the machine code."""
        rules: list[Rule] = [self.rule, hashed, turned]
        for k in self.coded:
            format = self._of(k)
            rules += [f for f in (format.encode, format.decode, format.scale) if f is not None]
        made_of = (source, self.storages, [fingerprint(f) for f in rules], Path(__file__).read_bytes())
        made_by = (numba.__version__, llvmlite.__version__, sys.version)
        made_for = cpu_target.target_context.codegen().magic_tuple()  # the processor and what it can do
        return hashlib.sha256(repr((made_of, made_by, made_for)).encode()).hexdigest()[:16]


def fingerprint(function: Rule, outer: tuple[Rule, ...] = ()) -> str:
    """All that decides what a function computes: its bytecode, constants, globals and the functions that it calls.

    Numba's own disk cache looks at the file of the function that it compiled, which for a kernel is not the rule's.
    """
    code = function.__code__

    def text(value: Any) -> str:
        if not isinstance(value, types.CodeType):
            return repr(value)
        return repr((value.co_code, value.co_names, [text(c) for c in value.co_consts]))

    called = called_functions(function)
    scope = {n: function.__globals__.get(n) for n in global_names(code) if n not in called}
    constants = {n: repr(v) for n, v in scope.items() if not isinstance(v, types.ModuleType)}
    around = zip(code.co_freevars, function.__closure__ or (), strict=True)
    cells = [repr(c.cell_contents) for n, c in around if n not in called]
    outer = (*outer, function)  # functions may call each other
    nested = {n: outer.index(f) if f in outer else fingerprint(f, outer) for n, f in called.items()}
    names = (code.co_varnames, code.co_argcount, code.co_kwonlyargcount)
    return repr((text(code), names, constants, cells, function.__defaults__, function.__kwdefaults__, nested))


class _Kept(NullCache):
    """Machine code in a file: where Numba looks for what it would compile, and leaves what it has compiled.

    Numba's own cache is files that refer to each other and runs whatever machine code they hold, damaged or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        data = read(self.path)
        if data is not None:
            target_context.refresh()
            with contextlib.suppress(Exception):  # written by who knows what
                return CompileResult._rebuild(target_context, *pickle.loads(data))  # type: ignore[no-untyped-call]
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # the disk may be full
            write(self.path, dumps(data._reduce()))  # type: ignore[no-untyped-call]


def _place(name: str) -> Path | None:
    """The file of a kernel; None where nothing can be kept, or nobody can trust it: it is run as code."""
    try:
        folder = made_private(cache_folder() / "kernels")
        return folder / f"{name}.kernel" if trusted(folder) else None
    except OSError:
        return None


def _jit(function: Rule, number: Callable[[float], Any], module: str) -> Any:
    """A function for Numba: all arguments positional, its literal numbers converted."""
    function.__module__ = function.__globals__["__name__"] = module  # its own may not be importable on loading
    code = with_numbers(function, number).__code__
    count = code.co_argcount + code.co_kwonlyargcount
    function.__code__ = code.replace(co_argcount=count, co_kwonlyargcount=0)
    function.__kwdefaults__ = None
    return numba.njit(error_model="numpy")(function)


@cache
def kernel(rule: Rule, format: Format, grad: Format, formats: tuple[Format | None, ...]) -> Callable[..., None]:
    """The compiled kernel for a rule with these formats of parameter, gradient and slots."""
    made = _Kernel(rule, format, grad, formats)
    source = made.source()
    name = f"{rule.__name__}_{format.name}_{made.digest(source)}"
    module = sys.modules[name] = types.ModuleType(name)  # Numba looks modules up by name when it loads a kernel
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    module.__dict__.update(made.functions(name))
    table, vector, words = nt.int64[:, ::1], nt.int64[::1], nt.uint32[::1]
    number = getattr(nt, made.arithmetic)
    signature = nt.void(table, table, vector, vector, number[:, ::1], words, words, nt.int64, nt.int64)
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        raise RuntimeError("NUMBA_DISABLE_JIT is set, so nothing can be compiled")
    result: Any = numba.njit(nogil=True, error_model="numpy")(module.kernel)
    if (path := _place(name)) is not None:
        result._cache = _Kept(path)
    result.compile(signature)
    result.disable_compile()  # for other arguments
    return result  # type: ignore[no-any-return]


class Launch:
    """See :class:`ademamix.backends.Launch`."""

    def __init__(self, batch: Batch) -> None:
        self.kernel = kernel(batch.rule, batch.format, batch.grad, batch.formats)
        self.dtype = torch.float64 if batch.double else torch.float32
        self.keys = batch.keys
        self.tensors = [  # the pointers are theirs; the second is replaced by the gradient's
            [t for t in (p, p, *slots, *scales) if t is not None]
            for p, slots, scales in zip(batch.parameters, batch.slots, batch.scales, strict=True)
        ]
        self.pointers = np.array([[t.data_ptr() for t in tensors] for tensors in self.tensors], np.int64)
        number, first, stride = np.array(batch.rows, np.int64).T
        rest = np.array([p.numel() for p in batch.parameters]) // np.maximum(number, 1)
        across = -(-rest // BLOCK)
        self.shapes = np.stack([rest, across, first, stride], 1)
        self.offsets = np.cumsum([0, *(across * number)], dtype=np.int64)

    def __call__(
        self,
        grads: Sequence[torch.Tensor],
        rows: Sequence[int],
        coefficients: torch.Tensor,
        skip: torch.Tensor | None,
    ) -> None:
        if skip is not None and skip:
            return
        self.pointers[:, 1] = list(map(torch.Tensor.data_ptr, grads))
        tables = (self.pointers, self.shapes, self.offsets)
        numbers = coefficients.to(self.dtype).numpy()
        done = coefficients[:, 1].numpy().astype(np.int64).astype(np.uint32)  # exact, unlike float32
        arguments = (*tables, np.array(rows, np.int64), numbers, done, self.keys)
        threads = torch.get_num_threads()
        total = int(self.offsets[-1])
        piece = max(PIECE, total // (64 * threads))

        def update(begin: int) -> None:
            self.kernel(*arguments, begin, min(begin + piece, total))

        pieces = range(0, total, piece)
        for_each(pieces, update, min(threads, len(pieces)))
