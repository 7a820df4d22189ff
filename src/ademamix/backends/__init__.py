"""Which backend serves which tensors, and what every backend needs to know of a rule.

A backend is a module with one class, ``Launch``. It is made once for a list of parameters that share their dtypes, and
called in each step with that step's gradients and coefficients.
"""

import importlib
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch

Rule = Callable[..., tuple[Any, ...]]

BACKENDS = ("auto", "eager", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_unavailable: set[tuple[str, Rule]] = set()  # what has failed to compile


class Launch(Protocol):
    """The update of a fixed list of parameters by one rule.

    Args:
        rule: the elementwise function.
        parameters: dense real tensors of one device type and dtype.
        slots: ``slots[i][k]`` is the k-th state tensor of parameter i, with its shape and strides, or None where that
            slot is not stored: it reads as zero and what the rule returns for it is dropped.
        grad_dtype: dtype of all gradients.

    Compiling happens here, in the constructor; nothing is written before the call.
    """

    def __init__(
        self,
        rule: Rule,
        parameters: Sequence[torch.Tensor],
        slots: Sequence[Sequence[torch.Tensor | None]],
        grad_dtype: torch.dtype,
    ) -> None: ...

    def __call__(self, grads: Sequence[torch.Tensor], rows: Sequence[int], coefficients: npt.NDArray[Any]) -> None:
        """Update parameters and slots in place.

        Args:
            grads: one gradient a parameter, with its shape and strides.
            rows: ``coefficients[rows[i]]`` serves parameter i.
            coefficients: float64 rows: a factor on the gradient, then the rule's coefficients in their order.
        """


def choose(backend: str, device: torch.device) -> str:
    """Name of the backend module that serves tensors on ``device``; ValueError where the asked one cannot."""
    if backend == "auto":
        return "cpu" if device.type == "cpu" else "eager"
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu' cannot serve a parameter on {str(device)!r}; allowed there: 'auto', 'eager'")
    return backend


def launch(
    backend: str,
    rule: Rule,
    parameters: Sequence[torch.Tensor],
    slots: Sequence[Sequence[torch.Tensor | None]],
    grad_dtype: torch.dtype,
) -> Launch:
    """A launch on the chosen backend; "auto" falls back to eager, with one warning, where the fused one fails."""
    name = choose(backend, parameters[0].device)
    if (name, rule) in _unavailable and backend == "auto":
        name = "eager"
    try:
        made: Launch = importlib.import_module(f"{__name__}.{name}").Launch(rule, parameters, slots, grad_dtype)
    except Exception as error:
        if backend != "auto" or name == "eager":
            raise
        _unavailable.add((name, rule))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"ademamix: the {name!r} backend is not available, using 'eager' ({reason})", stacklevel=5)
        return launch(backend, rule, parameters, slots, grad_dtype)
    return made


def slot_names(rule: Rule) -> tuple[str, ...]:
    """Names of a rule's state slots: its positional arguments after ``p`` and ``g``."""
    parameters = inspect.signature(rule).parameters.values()
    return tuple(q.name for q in parameters if q.kind is q.POSITIONAL_OR_KEYWORD)[2:]


def coefficient_names(rule: Rule) -> tuple[str, ...]:
    """Names of a rule's coefficients: its keyword-only arguments."""
    return tuple(q.name for q in inspect.signature(rule).parameters.values() if q.kind is q.KEYWORD_ONLY)


def compute_dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    """The arithmetic's precision: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter_dtype == torch.float64 else torch.float32


def called_functions(function: Rule) -> dict[str, types.FunctionType]:
    """The plain functions that a rule calls by their global names."""
    scope = function.__globals__
    return {n: scope[n] for n in function.__code__.co_names if isinstance(scope.get(n), types.FunctionType)}


def bind(function: Rule, xp: Any, wrap: Callable[[Rule], Any] = lambda f: f) -> Any:
    """The same function over the array namespace ``xp``, wrapped; the functions that it calls are bound with it."""
    called = {name: bind(f, xp, wrap) for name, f in called_functions(function).items()}
    scope = {**function.__globals__, **called, "xp": xp}
    bound = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    bound.__kwdefaults__ = function.__kwdefaults__
    return wrap(bound)
