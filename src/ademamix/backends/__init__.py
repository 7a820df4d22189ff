"""Which backend serves which tensors, and what every backend needs to know of a rule.

A backend is a module with one class, ``Launch``. It is made once for a batch of parameters that share formats, and is
called in each step with that step's gradients and coefficients.
"""

import importlib
import inspect
import math
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ademamix.formats import BLOCK, Format

Rule = Callable[..., tuple[Any, ...]]

BACKENDS = ("auto", "eager", "cpu", "triton")
_unavailable: set[tuple[str, Rule | type]] = set()  # rules that have failed to compile, tensors that cannot be read
_making = threading.RLock()  # held while compilers are imported and at work

if hasattr(os, "register_at_fork"):
    # In the middle of that a child would wait forever for locks of a thread that it does not have.
    os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


class Rows(NamedTuple):
    """A tensor's elements in their order as rows of equal length, and which noise is theirs.

    A tensor may be the part of a parameter that one process has; noise belongs to the element of the whole. There,
    elements are counted in the order of their memory; where a slot has scales, along the rows that its blocks lie
    along, each of them filled up to whole blocks.
    """

    number: int
    first: int  # the number of the first element of row 0
    stride: int  # and how much further on that of the next row is


def whole(t: torch.Tensor, blocked: bool) -> Rows:
    """The rows of a parameter that is all here."""
    if not blocked:
        return Rows(1, 0, t.numel())
    return Rows(in_rows(t.shape)[0], 0, row_length(t.shape))


def in_rows(shape: Sequence[int]) -> tuple[int, int]:
    """The shape in which a parameter has blocks along its rows: [dim 0, rest], or [1, n] of one dimension."""
    return (shape[0] if len(shape) > 1 else 1), math.prod(shape[1:] if len(shape) > 1 else shape)


def row_length(shape: Sequence[int]) -> int:
    """Elements of a row of a parameter, filled up to whole blocks."""
    return BLOCK * -(-in_rows(shape)[1] // BLOCK)


@dataclass(frozen=True)
class Batch:
    """Parameters that one launch updates: of one device, dtype and set of formats.

    All tensors are real and dense; where a slot has scales, all are contiguous. For parameter i and slot k of the rule,
    ``slots[i][k]`` holds the codes, with the parameter's shape, and ``scales[i][k]``, float32 of shape
    [dim 0, ceil(rest / BLOCK)], their scales (``in_rows`` has these two). A slot that is not stored reads as zero and
    what the rule returns for it is dropped: its format is None, as are its tensors. ``keys[i]`` is parameter i's key of
    the noise (formats.keys), ``rows[i]`` says which noise is whose; where a slot has scales, its rows are those that
    blocks run along. Parameters that are quantized weights (``is_made_of_others``) only go to the eager backend.
    """

    rule: Rule
    format: Format  # of the parameters
    grad: Format  # of the gradients
    formats: tuple[Format | None, ...]  # of the slots
    parameters: Sequence[torch.Tensor]
    slots: Sequence[Sequence[torch.Tensor | None]]
    scales: Sequence[Sequence[torch.Tensor | None]]
    keys: npt.NDArray[np.uint32]
    rows: Sequence[Rows]

    @property
    def blocked(self) -> bool:
        """Whether any slot has scales."""
        return any(f is not None and f.scale is not None for f in self.formats)

    @property
    def stochastic(self) -> bool:
        """Whether anything is rounded by noise."""
        return any(f is not None and f.stochastic for f in (self.format, *self.formats))

    @property
    def double(self) -> bool:
        """Whether the arithmetic is float64, as for float64 parameters, or float32, as for all others."""
        return self.format.storage == "float64"


class Launch(Protocol):
    """The update of one batch. Compiling happens in the constructor; nothing is written before the call."""

    def __init__(self, batch: Batch) -> None: ...

    def __call__(
        self,
        grads: Sequence[torch.Tensor],
        rows: Sequence[int],
        coefficients: torch.Tensor,
        skip: torch.Tensor | None,
    ) -> None:
        """Update parameters, slots and scales in place, without waiting for the device.

        Args:
            grads: one gradient a parameter, with its shape and strides.
            rows: ``coefficients[rows[i]]`` serves parameter i.
            coefficients: [rows, 2 + coefficients], on the CPU, or on the batch's device where only that knows them:
                a factor on the gradient, the steps done before this one, then the rule's coefficients in their order.
            skip: None, or a boolean tensor of one element on the batch's device: if it is true, nothing is written.
        """


def storage_dtype(format: Format) -> torch.dtype:
    """The dtype of a format's tensors."""
    return torch.bfloat16 if format.storage == "bits16" else getattr(torch, format.storage)


def sent_to(device: torch.device, t: torch.Tensor) -> torch.Tensor:
    """The tensor on the device, copied if it is not there.

    Copies between GPUs are ordered by their streams. Host memory is not: what leaves it unwaited must be pinned and
    nobody else's, who might write it before it is read, and what arrives in it has to be waited for.
    """
    if "cpu" not in (device.type, t.device.type):
        return t.to(device, non_blocking=True)
    own = t.pin_memory() if device.type == "cuda" and t.device.type == "cpu" else t  # itself if it was pinned before
    return own.to(device, non_blocking=own is not t)


def is_fake(t: Any) -> bool:
    """Whether t is a FakeTensor, whose numbers nobody knows."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(t, module.FakeTensor)


def mode_of(tensors: Iterable[Any]) -> AbstractContextManager[Any]:
    """The mode of the fake ones among the tensors, in which all that is made is fake."""
    mode: AbstractContextManager[Any] = next(t.fake_mode for t in tensors if is_fake(t))
    return mode


def has_memory(t: torch.Tensor) -> bool:
    """Whether t has a place in memory, which fused backends need, or nothing to keep there."""
    return not is_fake(t) and (t.numel() == 0 or t.data_ptr() != 0)


def is_made_of_others(t: torch.Tensor) -> bool:
    """Whether other tensors have its numbers, which only its own operations reach (as those of quantized weights)."""
    return _lacks_memory(t) and type(t.detach()) is not torch.Tensor


def is_freed(t: torch.Tensor) -> bool:
    """Whether t's memory was given back, as by ``untyped_storage().resize_(0)``."""
    return _lacks_memory(t) and type(t.detach()) is torch.Tensor


def _lacks_memory(t: torch.Tensor) -> bool:
    return not (has_memory(t) or is_fake(t) or t.is_meta)


def capturing(device: torch.device) -> bool:
    """Whether what is started on the device is not carried out but recorded, in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # each has a current stream of its own
        return torch.cuda.is_current_stream_capturing()


def choose(backend: str, device: torch.device) -> str:
    """Name of the backend module that serves tensors on ``device``; ValueError where the asked one cannot."""
    fused = {"cpu": "cpu", "cuda": "triton"}.get(device.type)  # "cuda" is torch's name for ROCm too
    if backend == "auto":
        return fused or "eager"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # Triton's, for tests: on the CPU
    if backend not in ("eager", fused) and not interpreted:
        allowed = ", ".join(repr(name) for name in ("auto", "eager", fused) if name)
        raise ValueError(f"backend={backend!r} cannot serve a parameter on {str(device)!r}; allowed there: {allowed}")
    return backend


def launch(backend: str, batch: Batch) -> Launch:
    """A launch on the chosen backend; "auto" falls back to eager, with one warning, where the fused one fails."""
    first = batch.parameters[0]
    name = choose(backend, first.device)
    if backend == "auto" and name != "eager" and is_made_of_others(first):
        kind = type(first).__name__
        if (name, type(first)) not in _unavailable:
            _unavailable.add((name, type(first)))
            warn(
                f"the {name!r} backend cannot read parameters of type {kind}, whose numbers only {kind} itself can "
                "reach, so these are updated on 'eager', several times slower. backend='eager' does so without a word."
            )
        name = "eager"
    if backend == "auto" and ((name, batch.rule) in _unavailable or is_fake(first)):
        name = "eager"
    try:
        with _making:
            made: Launch = importlib.import_module(f"{__name__}.{name}").Launch(batch)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says nothing of the backend
    except Exception as error:
        if backend != "auto" or name == "eager":
            raise
        _unavailable.add((name, batch.rule))
        warn(
            f"the {name!r} backend failed, so the rule {batch.rule.__name__!r} runs on 'eager', several times slower "
            f"({reason(error)}; torch {torch.__version__}). backend={name!r} raises the whole error."
        )
        return launch(backend, batch)
    return made


def warn(message: str) -> None:
    """Warn at the user's line: the first outside this library and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("ademamix", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"ademamix: {message}", stacklevel=level)


def reason(error: BaseException) -> str:
    """What went wrong in the first place, in a line: Triton's own message is the kernel's text."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def name_of(launch: Launch) -> str:
    """The backend that a launch is of."""
    return type(launch).__module__.rpartition(".")[2]


@cache
def slot_names(rule: Rule) -> tuple[str, ...]:
    """Names of a rule's state slots: its positional arguments after ``p`` and ``g``."""
    parameters = inspect.signature(rule).parameters.values()
    return tuple(q.name for q in parameters if q.kind is q.POSITIONAL_OR_KEYWORD)[2:]


@cache
def coefficient_names(rule: Rule) -> tuple[str, ...]:
    """Names of a rule's coefficients: its keyword-only arguments."""
    return tuple(q.name for q in inspect.signature(rule).parameters.values() if q.kind is q.KEYWORD_ONLY)


def with_numbers(function: Rule, number: Callable[[float], Any]) -> Rule:
    """The function itself, its literal floating-point numbers made ``number`` of."""
    code = function.__code__
    constants = tuple(number(c) if type(c) is float else c for c in code.co_consts)
    function.__code__ = code.replace(co_consts=constants)
    return function


def called_functions(function: Rule) -> dict[str, types.FunctionType]:
    """The plain functions that a function, or one written inside it, calls by names from around it."""
    cells = {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)}
    scope = {**function.__globals__, **cells}
    names = dict.fromkeys((*function.__code__.co_freevars, *global_names(function.__code__)))
    return {n: scope[n] for n in names if isinstance(scope.get(n), types.FunctionType)}


def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals and attributes in a function and in those that are written inside it."""
    inner = (global_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return (*code.co_names, *chain.from_iterable(inner))


def bind(function: Callable[..., Any], xp: Any, wrap: Callable[[Rule], Any] = lambda f: f) -> Any:
    """The same function over the array namespace ``xp``, wrapped; the functions that it calls are bound with it.

    What it finds by name from now on, as a global or in a function around it, is what was there by that name now.
    """
    done: dict[Any, Any] = {}  # functions may call each other

    def bound(function: Callable[..., Any]) -> Any:
        if function in done:
            return done[function]
        code = function.__code__
        scope = {**function.__globals__, "xp": xp}
        cells = tuple(types.CellType(c.cell_contents) for c in function.__closure__ or ())
        copy = done[function] = types.FunctionType(code, scope, function.__name__, function.__defaults__, cells)
        copy.__kwdefaults__ = function.__kwdefaults__
        called = {name: bound(f) for name, f in called_functions(function).items()}
        scope |= {name: f for name, f in called.items() if name not in code.co_freevars}
        for name, cell in zip(code.co_freevars, cells, strict=True):
            cell.cell_contents = xp if name == "xp" else called.get(name, cell.cell_contents)
        done[function] = wrap(copy)
        return done[function]

    return bound(function)
