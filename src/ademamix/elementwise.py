"""What a rule may do, checked by running it once on stand-ins before anything is compiled or changed.

A rule is run by several backends, whose compilers would each complain in their own way. Here its mistakes are reported
once, in terms of the rule's own lines.
"""

import inspect
import linecache
import traceback
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NoReturn

from ademamix.backends import Rule, bind, called_functions, coefficient_names, slot_names

FUNCTIONS = ("sqrt", "abs", "exp", "log", "minimum", "maximum", "where")


class RuleError(Exception):
    """Something that a rule may not do."""


def _refuse(message: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuleError(message)

    return refuse


class Number:
    """A coefficient: one number for all elements, which only a step knows."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuleError(f"{_kind(self)} has no .{name}: a rule computes with arithmetic and xp's functions alone")

    __bool__ = _refuse(
        "a branch on numbers that the step computes (if, and, or, min, max) cannot be compiled: use xp.where"
    )
    __pow__ = __rpow__ = _refuse("** is not there on all backends: use x * x, or xp.exp(y * xp.log(x))")
    __abs__ = _refuse("abs() is not there on all backends: use xp.abs")
    __getitem__ = __iter__ = __len__ = _refuse("a rule is elementwise: what it gets has no elements to be picked")
    __array__ = __array_ufunc__ = __array_function__ = _refuse("NumPy cannot be called by a rule: use xp's functions")
    __hash__ = None  # type: ignore[assignment]


class Array(Number):
    """A parameter, gradient or slot."""


class Condition(Number):
    """What a comparison gives."""


def _kind(x: Any) -> str:
    return {Array: "an array", Number: "a coefficient", Condition: "a condition"}.get(type(x), type(x).__name__)


def _computed(*operands: Any) -> Any:
    """What arithmetic on these gives."""
    for x in operands:
        if isinstance(x, Condition):
            raise RuleError("a condition is no number: use xp.where(condition, x, y)")
        if not isinstance(x, Number | int | float):
            raise RuleError(
                f"a rule computes with its arguments and Python's numbers alone, got {type(x).__name__}: {x!r}"
            )
    return Array() if any(isinstance(x, Array) for x in operands) else Number()


def _compared(*operands: Any) -> Any:
    result = _computed(*operands)
    return Condition() if isinstance(result, Array) else result


def _function(*operands: Any) -> Any:
    result = _computed(*operands)
    if not isinstance(result, Array):
        raise RuleError("xp's functions take an array: what needs none is a coefficient, computed outside the rule")
    return result


def _where(condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, Condition):
        raise RuleError(f"xp.where takes a comparison of arrays, such as x > 0.0, first, got {_kind(condition)}")
    return _computed(x, y, Array())


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg"):
    setattr(Number, f"__{_name}__", lambda self, *other: _computed(self, *other))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Number, f"__{_name}__", lambda self, *other: _compared(self, *other))
for _name in ("eq", "ne"):
    setattr(Number, f"__{_name}__", _refuse("== and != are not there on all backends: use <, <=, > or >="))


class _Namespace:
    """``xp``: the functions that all backends have."""

    where = staticmethod(_where)

    def __getattr__(self, name: str) -> Any:
        raise RuleError(f"xp.{name} is not there on all backends; xp has {', '.join(FUNCTIONS)}")


for _name in ("sqrt", "abs", "exp", "log"):
    setattr(_Namespace, _name, staticmethod(lambda x: _function(x)))
for _name in ("minimum", "maximum"):
    setattr(_Namespace, _name, staticmethod(lambda x, y: _function(x, y)))


@cache
def check_rule(rule: Rule) -> None:
    """Run a rule once on stand-ins for its arguments.

    Raises:
        ValueError: the rule does what not all backends can compile, or gives what is not its arguments' shape; the
            message names its file, line and text.
    """
    parameters = inspect.signature(rule).parameters.values()
    positional = [q.name for q in parameters if q.kind is q.POSITIONAL_OR_KEYWORD]
    if len(positional) < 2 or "step" in positional or len(positional) + len(coefficient_names(rule)) < len(parameters):
        _blame(rule, f"a rule takes (p, g, *slots, *, coefficients), no slot named 'step', got {positional}")
    given = {name: Number() for name in coefficient_names(rule)}
    try:
        results = bind(rule, _Namespace())(*(Array() for _ in positional), **given)
    except Exception as error:
        message = str(error) if isinstance(error, RuleError) else f"{type(error).__name__}: {error}"
        _blame(rule, message, error)
    wanted = ("p", *slot_names(rule))
    if not isinstance(results, tuple) or len(results) != len(wanted):
        tuple_of = f"({', '.join(wanted)}{',' if len(wanted) == 1 else ''})"
        got = f"one of {len(results)}" if isinstance(results, tuple) else "no tuple"
        _blame(rule, f"a rule returns a tuple of {len(wanted)}, the new {tuple_of}, got {got}")
    for name, result in zip(wanted, results, strict=True):
        if type(result) is not Array:
            _blame(rule, f"the new {name} must have p's shape, got {_kind(result)}")


def _blame(rule: Rule, message: str, error: Exception | None = None) -> NoReturn:
    """Raise ValueError with the last line of the rule, or of a function of its own that it calls, that was reached."""
    codes = set(_codes(rule))
    code, line = rule.__code__, rule.__code__.co_firstlineno
    for frame, at in traceback.walk_tb(error.__traceback__ if error else None):
        if frame.f_code in codes:
            code, line = frame.f_code, at
    text = linecache.getline(code.co_filename, line).strip()
    raise ValueError(f"{code.co_filename}:{line}, in the rule {rule.__name__}: {message}\n    {text}") from error


def _codes(function: Rule) -> Iterator[types.CodeType]:
    yield function.__code__
    for called in called_functions(function).values():
        yield from _codes(called)
