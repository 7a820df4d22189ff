"""The CPU backend: the rule compiled by Numba into one fused pass over all parameters, on all cores.

A kernel walks a table of data pointers, so one call serves any number of tensors and compiling happens once for each
rule and combination of dtypes. Its loads and stores are written as LLVM instructions that say what Numba cannot know:
that the tensors do not overlap (any number of state slots vectorises), that no index is negative, and which addresses
to prefetch (the hardware does not keep up with nine streams).
"""

import hashlib
import os
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.core import types as nt
from numba.extending import intrinsic

from ademamix.backends import Rule, bind, called_functions, coefficient_names, compute_dtype
from ademamix.cache import cache_folder

PIECE = 1 << 18  # least elements in a piece of work: about 0.2 ms
PREFETCH = 2048  # bytes ahead; 512 to 4096 measured alike, none was 8 % slower

NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BITS = {"float64": ir.DoubleType(), "float32": ir.FloatType(), "bfloat16": ir.IntType(16), "float16": ir.HalfType()}


def accessors(stream: int, streams: int, storage: str, arithmetic: str) -> tuple[Any, Any, Any]:
    """Load, store and prefetch of one of a kernel's ``streams`` tensors, as functions of (address, index[, value]).

    ``storage`` is the dtype in memory, ``arithmetic`` ("float32" or "float64") that of the values.
    """
    stored, value = BITS[storage], BITS[arithmetic]
    number = getattr(nt, arithmetic)
    size = 8 if storage == "float64" else 4 if storage == "float32" else 2

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
            if storage == "bfloat16":
                x = builder.bitcast(builder.shl(builder.zext(x, ir.IntType(32)), ir.IntType(32)(16)), ir.FloatType())
            return _convert(builder, x, value)

        return number(nt.int64, nt.int64), generate

    @intrinsic
    def store(context: Any, address: Any, index: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, index, x = args
            if storage == "bfloat16":
                x = _round_to_bfloat16(builder, _convert(builder, x, ir.FloatType()))
            else:
                x = _convert(builder, x, stored)
            annotate(builder.store(x, access(builder, address, index)), builder.module)
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64, number), generate

    @intrinsic
    def prefetch(context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
            function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
            ahead = builder.add(builder.mul(args[1], ir.IntType(64)(size)), ir.IntType(64)(PREFETCH))
            pointer = builder.gep(builder.inttoptr(args[0], byte), [ahead])
            builder.call(function, [pointer, i32(0), i32(3), i32(1)])  # for reading, into all caches, data
            return context.get_dummy_value()

        return nt.void(nt.int64, nt.int64), generate

    return load, store, prefetch


def _convert(builder: Any, x: Any, to: Any) -> Any:
    width = {"half": 16, "float": 32, "double": 64}
    have, want = width[str(x.type)], width[str(to)]
    return x if have == want else builder.fpext(x, to) if have < want else builder.fptrunc(x, to)


def _round_to_bfloat16(builder: Any, x: Any) -> Any:
    """Nearest, ties to even, by integer arithmetic: the hardware's instruction would flush denormals."""
    i16, i32 = ir.IntType(16), ir.IntType(32)
    bits = builder.bitcast(x, i32)
    odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
    rounded = builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, i32(0x7FFF))), i32(16)), i16)
    return builder.select(builder.fcmp_unordered("uno", x, x), i16(0x7FC0), rounded)


def _source(rule: Rule, stored: tuple[bool, ...], lines: Sequence[int]) -> str:
    """Text of the kernel: streams are p, g and the stored slots; ``lines[i]`` = cache lines in 64 elements of one."""
    present = iter(range(2, len(lines)))
    slots = [next(present) if s else None for s in stored]
    kept = [(0, 0), *((s, k + 1) for k, s in enumerate(slots) if s is not None)]
    count = len(coefficient_names(rule))
    arguments = ["load0(a0, i)", "load1(a1, i) * factor"]
    arguments += ["zero" if s is None else f"load{s}(a{s}, i)" for s in slots]
    arguments += [f"c{k}" for k in range(count)]
    element = [
        f"{', '.join(f'r{k}' for k in range(len(slots) + 1))}, = rule({', '.join(arguments)})",
        *(f"store{s}(a{s}, i, r{k})" for s, k in kept),
    ]
    return "\n".join(
        [
            "def kernel(pointers, sizes, offsets, rows, coefficients, begin, end):",
            "    tensor = 0",
            "    while offsets[tensor + 1] <= begin:",
            "        tensor += 1",
            "    while begin < end:",
            "        stop = min(end, offsets[tensor + 1])",
            "        start = begin - offsets[tensor]",
            "        n = stop - begin",
            *(f"        a{s} = pointers[tensor, {s}] + start * sizes[{s}]" for s in range(len(lines))),
            "        row = rows[tensor]",
            "        factor = coefficients[row, 0]",
            *(f"        c{k} = coefficients[row, {k + 1}]" for k in range(count)),
            "        for j in range(0, n - 63, 64):",
            *(f"            prefetch{s}(a{s}, j + {64 // k * m})" for s, k in enumerate(lines) for m in range(k)),
            "            for i in range(j, j + 64):",
            *(f"                {line}" for line in element),
            "        for i in range(n - n % 64, n):",
            *(f"            {line}" for line in element),
            "        begin = stop",
            "        tensor += 1",
            "",
        ]
    )


def fingerprint(function: Rule) -> str:
    """All that decides what a rule computes: its bytecode, constants, globals and the functions that it calls.

    Numba's own disk cache looks at the file of the function that it compiled, which for a kernel is not the rule's.
    """
    code = function.__code__

    def text(value: Any) -> str:
        return repr((value.co_code, [text(c) for c in value.co_consts])) if hasattr(value, "co_code") else repr(value)

    called = called_functions(function)
    scope = {n: function.__globals__.get(n) for n in code.co_names if n not in called}
    constants = {n: repr(v) for n, v in scope.items() if not isinstance(v, types.ModuleType)}
    cells = [repr(c.cell_contents) for c in function.__closure__ or ()]
    nested = {n: fingerprint(f) for n, f in called.items()}
    names = (code.co_names, code.co_varnames, code.co_argcount, code.co_kwonlyargcount)
    return repr((text(code), names, constants, cells, function.__defaults__, function.__kwdefaults__, nested))


def _stored(name: str, source: str) -> Path | None:
    """A file of ``source`` in the cache folder, beside which Numba keeps the machine code; None where none can be made.

    The name holds a digest of all that goes into the kernel, so a file never changes once it is there.
    """
    path = cache_folder() / "kernels" / f"{name}.py"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "w") as file:
                file.write(source)
            os.utime(aside, (0, 0))  # Numba's index holds the time: processes that start at once must agree on it
            os.replace(aside, path)
    except OSError:
        return None
    return path


def _jit(rule: Rule, arithmetic: str, module: str) -> Any:
    """The rule for Numba: all arguments positional, its literal numbers in the arithmetic's precision."""
    rule.__module__ = rule.__globals__["__name__"] = module  # its own may not be importable when a kernel is loaded
    code = rule.__code__
    number = getattr(np, arithmetic)
    constants = tuple(number(c) if type(c) in (int, float) else c for c in code.co_consts)
    count = code.co_argcount + code.co_kwonlyargcount
    rule.__code__ = code.replace(co_consts=constants, co_argcount=count, co_kwonlyargcount=0)
    rule.__kwdefaults__ = None
    return numba.njit(error_model="numpy")(rule)


@cache
def kernel(rule: Rule, parameter: str, grad: str, stored: tuple[bool, ...]) -> Callable[..., None]:
    """The compiled kernel for parameters and gradients of the named dtypes and the given stored slots."""
    arithmetic = "float64" if parameter == "float64" else "float32"
    storages = [parameter, grad, *[arithmetic] * sum(stored)]
    source = _source(rule, stored, [{"float64": 8, "float32": 4}.get(s, 2) for s in storages])
    made_of = (source, storages, fingerprint(rule), Path(__file__).read_bytes(), numba.__version__, sys.version)
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    name = f"{rule.__name__}_{parameter}_{grad}_{digest}"
    path = _stored(name, source)
    module = sys.modules[name] = types.ModuleType(name)  # Numba looks modules up by name when it loads a kernel
    exec(compile(source, str(path or f"<{name}>"), "exec"), module.__dict__)
    module.__dict__.update(rule=bind(rule, np, lambda f: _jit(f, arithmetic, name)), zero=getattr(np, arithmetic)(0))
    for stream, storage in enumerate(storages):
        functions = accessors(stream, len(storages), storage, arithmetic)
        module.__dict__.update(zip((f"load{stream}", f"store{stream}", f"prefetch{stream}"), functions, strict=True))
    table, vector = nt.int64[:, ::1], nt.int64[::1]
    signature = nt.void(table, vector, vector, vector, getattr(nt, arithmetic)[:, ::1], nt.int64, nt.int64)
    jit = numba.njit(signature, nogil=True, error_model="numpy", cache=path is not None)
    compiled: Callable[..., None] = jit(module.kernel)
    return compiled


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ademamix")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool's object but not its threads


class Launch:
    """See :class:`ademamix.backends.Launch`."""

    def __init__(
        self,
        rule: Rule,
        parameters: Sequence[torch.Tensor],
        slots: Sequence[Sequence[torch.Tensor | None]],
        grad_dtype: torch.dtype,
    ) -> None:
        stored = tuple(s is not None for s in slots[0])
        dtype = parameters[0].dtype
        self.kernel = kernel(rule, NAMES[dtype], NAMES[grad_dtype], stored)
        self.dtype = np.float64 if compute_dtype(dtype) == torch.float64 else np.float32
        tensors = [(p, *(s for s in kept if s is not None)) for p, kept in zip(parameters, slots, strict=True)]
        self.pointers = np.array([[t.data_ptr() for t in (p, p, *kept)] for p, *kept in tensors], np.int64)
        first, *kept = tensors[0]
        self.sizes = np.array([first.itemsize, grad_dtype.itemsize, *(s.itemsize for s in kept)], np.int64)
        self.offsets = np.cumsum([0, *(p.numel() for p in parameters)], dtype=np.int64)
        self.tensors = tensors  # the pointers are theirs

    def __call__(self, grads: Sequence[torch.Tensor], rows: Sequence[int], coefficients: npt.NDArray[Any]) -> None:
        self.pointers[:, 1] = [g.data_ptr() for g in grads]
        table = (self.pointers, self.sizes, self.offsets, np.array(rows, np.int64), coefficients.astype(self.dtype))
        threads = torch.get_num_threads()
        total = int(self.offsets[-1])
        piece = max(PIECE, total // (8 * threads))
        starts = iter(range(0, total, piece))  # shared: next() on it is atomic, so each piece is taken once

        def work() -> None:
            for begin in starts:
                self.kernel(*table, begin, min(begin + piece, total))

        helpers = [_pool(threads).submit(work) for _ in range(min(threads, -(-total // piece)) - 1)]
        work()
        for helper in helpers:
            helper.result()
