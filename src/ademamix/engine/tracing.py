"""What a rule computes, found by running it once on placeholders before anything is compiled or changed.

Several backends compile a rule, each of which would read it in its own way: what they know of Python differs, and so
does the precision that they give to numbers from outside the rule. So it is run here, once, on placeholders that write
down what is computed of them. What all backends get is that text, only arithmetic; whatever else the rule is made
of (numbers by name, helpers, loops) has done its part by then. A mistake is reported in terms of the rule's own lines.
"""

import hashlib
import inspect
import linecache
import math
import operator
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from typing import Any, NoReturn

import numpy as np

from ademamix.backends import Rule, bind, coefficient_names
from ademamix.engine.state import MASTER

FUNCTIONS = ("sqrt", "abs", "exp", "log", "minimum", "maximum", "where")
PARTS = ("fast", "slow")  # of a direction, which a memory with a slow EMA returns after it
SMALLEST, LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # of float32's normal numbers

_order = count()


class RuleError(Exception):
    """Something that a rule may not do."""


def _refuse(message: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuleError(message)

    return refuse


class Number:
    """A coefficient, or what is computed only of coefficients: one number for all elements, which only a step knows.

    Args:
        text: an argument's name, or how the operands make this, with "{0}" for the first.
        operands: placeholders and Python's numbers; none for an argument.
    """

    def __init__(self, text: str, *operands: Any) -> None:
        self._text, self._operands, self._index = text, operands, next(_order)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuleError(f"{_kind(self)} has no .{name}: a rule only computes with arithmetic and xp's functions")

    def __neg__(self) -> Any:
        return _computed("-{0}", self)

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


def _computed(text: str, *operands: Any) -> Any:
    """What arithmetic on these gives."""
    for x in operands:
        if isinstance(x, Condition):
            raise RuleError("a condition is not a number: use xp.where(condition, x, y)")
        if not isinstance(x, Number | int | float) or isinstance(x, bool):
            raise RuleError(
                f"a rule only computes with its arguments and Python's numbers, got {type(x).__name__}: {x!r}"
            )
        if not isinstance(x, Number) and x != 0 and not SMALLEST <= abs(x) <= LARGEST:
            raise RuleError(f"numbers are float32, 0 or from {SMALLEST:.2g} to {LARGEST:.2g} in size, got {x!r}")
    return (Array if any(isinstance(x, Array) for x in operands) else Number)(text, *operands)


def _compared(text: str, *operands: Any) -> Any:
    _computed(text, *operands)
    return Condition(text, *operands)


def _function(text: str, *operands: Any) -> Any:
    result = _computed(text, *operands)
    if not isinstance(result, Array):
        raise RuleError("xp's functions take an array: what needs none is a coefficient, computed outside the rule")
    return result


def _where(condition: Any, x: Any, y: Any) -> Any:
    compared = condition._operands if isinstance(condition, Condition) else ()
    like = next((a for a in compared if isinstance(a, Array)), None)
    if like is None:
        got = "one of coefficients" if compared else _kind(condition)
        raise RuleError(f"xp.where takes a comparison of arrays, such as x > 0.0, first, got {got}")
    if not isinstance(_computed("", x, y), Array):  # of two numbers, backends would have to guess the precision
        y = Array("xp.where({0}, {1}, {2})", condition, like, y)
    return Array("xp.where({0}, {1}, {2})", condition, x, y)


for _name, _text in (
    ("add", "{0} + {1}"),
    ("sub", "{0} - {1}"),
    ("mul", "{0} * {1}"),
    ("truediv", "xp.divide({0}, {1})"),
):
    setattr(Number, f"__{_name}__", lambda self, x, text=_text: _computed(text, self, x))
    setattr(Number, f"__r{_name}__", lambda self, x, text=_text: _computed(text, x, self))
for _name, _text in (("lt", "{0} < {1}"), ("le", "{0} <= {1}"), ("gt", "{0} > {1}"), ("ge", "{0} >= {1}")):
    setattr(Number, f"__{_name}__", lambda self, x, text=_text: _compared(text, self, x))
for _name in ("eq", "ne"):
    setattr(Number, f"__{_name}__", _refuse("== and != are not there on all backends: use <, <=, > or >="))


class _Namespace:
    """``xp``: the functions that all backends have."""

    where = staticmethod(_where)
    divide = staticmethod(operator.truediv)  # what has been traced can be traced again

    def __getattr__(self, name: str) -> Any:
        raise RuleError(f"xp.{name} is not there on all backends; xp has {', '.join(FUNCTIONS)}")


for _name in ("sqrt", "abs", "exp", "log"):
    setattr(_Namespace, _name, staticmethod(lambda x, text=f"xp.{_name}({{0}})": _function(text, x)))
for _name in ("minimum", "maximum"):
    setattr(_Namespace, _name, staticmethod(lambda x, y, text=f"xp.{_name}({{0}}, {{1}})": _function(text, x, y)))


def traced(rule: Rule) -> Rule:
    """A rule as all backends compile it: what it computes of its arguments now, with the numbers that it has now.

    Returns:
        A function of the same name and arguments, without their defaults: one operation a line, written against ``xp``
        with arithmetic, ``xp.divide`` for ``/`` and the functions that rules use. Equal texts give the same function.

    Raises:
        ValueError: the rule does what not all backends can compile, or gives what is not its arguments' shape; the
            message names its file, line and text.
    """
    positional, coefficients = _arguments(rule, "a rule", "p", "g"), coefficient_names(rule)
    stand_ins = {name: Number(name) for name in coefficients}
    results = _results(rule, "a rule", ("p", *positional[2:]), map(Array, positional), stand_ins)
    in_order = sorted(_needed(results), key=lambda x: x._index)
    return _written(rule.__name__, positional, coefficients, in_order, results)


@cache
def composed(memory: Rule, geometry: Rule) -> Rule:
    """The rule of a memory of past gradients and an elementwise geometry, traced as one function: one fused pass.

    Args:
        memory: ``(g, *slots, *, coefficients) -> (u, *slots)``: how gradients become a direction.
            One with a slow part returns ``(u, fast, slow, *slots)``.
        geometry: ``(p, u, g, *slots, *, coefficients) -> (p, *slots)``: how the direction becomes a step. One that
            takes ``fast`` and ``slow`` between u and g is for memories that return them.

    Returns:
        ``(p, g, *memory's slots, *geometry's slots, *, geometry's coefficients, memory's) -> (p, *slots)`` as
        :func:`traced` returns it, named like the memory. A coefficient that both name is one.

    Raises:
        ValueError: as :func:`traced`; or two arguments that are not one have the same name.
    """
    remembered, given = _arguments(memory, "a memory", "g")[1:], _arguments(geometry, "a geometry", "p", "u", "g")
    directions, kept = given[1 : given.index("g")], given[given.index("g") + 1 :]
    positional = ("p", "g", *remembered, *kept)
    coefficients = tuple(dict.fromkeys((*coefficient_names(geometry), *coefficient_names(memory))))
    names = (*positional, *coefficients)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        _blame(memory, f"a slot has no other argument's name, of the geometry {geometry.__name__} too, got {twice}")
    numbers = {name: Number(name) for name in coefficients}
    p, g, *slots = map(Array, positional)
    memories, others = slots[: len(remembered)], slots[len(remembered) :]
    also = PARTS if len(directions) == 1 else ()  # what the geometry does not ask for
    results = _results(memory, "a memory", (*directions, *remembered), (g, *memories), numbers, also)
    found, memories = results[: len(directions)], list(results[len(results) - len(remembered) :])
    p, *others = _results(geometry, "a geometry", ("p", *kept), (p, *found, g, *others), numbers)
    # Slots first, and each operation when it is needed: u does not wait while slots are computed, so that eager holds
    # no more at a time than it would for the rule in one piece.
    in_order, results = _needed((*memories, *others, p)), (p, *memories, *others)
    return _written(memory.__name__, positional, coefficients, in_order, results)


def _arguments(function: Rule, kind: str, *first: str) -> tuple[str, ...]:
    """Names of what the function takes by position: what stands for ``first``, then its slots, all checked."""
    if not isinstance(function, types.FunctionType) or not function.__name__.isidentifier():
        raise ValueError(f"{kind} is a function that a def gives its name, got {function!r}")
    parameters = inspect.signature(function).parameters.values()
    positional = tuple(q.name for q in parameters if q.kind is q.POSITIONAL_OR_KEYWORD)
    slots, known = positional[len(first) :], len(positional) + len(coefficient_names(function))
    if len(positional) < len(first) or "step" in positional or known < len(parameters):
        takes = f"({', '.join(first)}, *slots, *, coefficients)"
        _blame(function, f"{kind} takes {takes}, no slot named 'step', got {list(positional)}")
    for name in slots:
        if name in (MASTER, *(f"{slot}_scale" for slot in slots)):
            has = "the state has these"
            _blame(function, f"no slot is named {MASTER!r}, or like another with _scale: {has}, got {name!r}")
    for q in parameters:
        if q.name in positional and q.default is not q.empty:
            _blame(function, f"a slot starts at 0 and has no default (hyperparameters come after a *), got {q}")
        if q.name == "xp":
            _blame(function, f"xp is what {kind} computes with, and no argument")
    return positional


def _results(
    function: Rule,
    kind: str,
    wanted: Sequence[str],
    given: Iterable[Array],
    coefficients: Mapping[str, Number],
    also: Sequence[str] = (),
) -> tuple[Array, ...]:
    """What the function makes of placeholders: arrays by the names ``wanted``, or with ``also`` after the first."""
    xp = _Namespace()
    try:
        results = bind(function, xp)(*given, **{name: coefficients[name] for name in coefficient_names(function)})
    except Exception as error:
        message = str(error) if isinstance(error, RuleError) else f"{type(error).__name__}: {error}"
        _blame(function, message, error, xp)
    if isinstance(results, tuple) and len(results) == len(wanted) + len(also):
        wanted = (wanted[0], *also, *wanted[1:])
    if not isinstance(results, tuple) or len(results) != len(wanted):
        tuple_of = f"({', '.join(wanted)}{',' if len(wanted) == 1 else ''})"
        got = f"one of {len(results)}" if isinstance(results, tuple) else "no tuple"
        _blame(function, f"{kind} returns a tuple of {len(wanted)}, the new {tuple_of}, got {got}")
    for name, result in zip(wanted, results, strict=True):
        if type(result) is not Array:
            _blame(function, f"the new {name} must have p's shape, got {_kind(result)}")
    return results


def _needed(results: Iterable[Array]) -> list[Number]:
    """The operations that give the results, each as soon as one of these needs it, operands from left to right."""
    done: dict[int, Number] = {}
    for result in results:
        waiting: list[Number] = [result]
        while waiting:
            operands = (x for x in waiting[-1]._operands if isinstance(x, Number))
            first = next((x for x in operands if x._operands and x._index not in done), None)
            if first is not None:
                waiting.append(first)
            elif (x := waiting.pop())._operands:
                done[x._index] = x
    return list(done.values())


def _written(
    name: str, positional: Sequence[str], coefficients: Sequence[str], in_order: Sequence[Number], results: Any
) -> Rule:
    star = ["*"] if coefficients else []
    head = f"def {name}({', '.join([*positional, *star, *coefficients])}):"
    return _made(name, "\n".join([head, *_lines(in_order, results, {*positional, *coefficients}), ""]))


def _lines(in_order: Sequence[Number], results: Sequence[Number], taken: set[str]) -> Iterator[str]:
    """The statements of the operations. A name is free again after the last use of what it stands for, as in nested
    expressions: eager's temporaries live no longer than they must."""
    place = {x._index: i for i, x in enumerate(in_order)}
    last: dict[int, float] = {y._index: place[x._index] for x in in_order for y in x._operands if isinstance(y, Number)}
    last |= {x._index: math.inf for x in results}
    unused = (name for name in map("x{}".format, count()) if name not in taken)
    names: dict[int, str] = {}  # by place
    free: list[str] = []

    def text(x: Any) -> str:
        return repr(float(x)) if not isinstance(x, Number) else names[place[x._index]] if x._operands else x._text

    for i, operation in enumerate(in_order):
        given = list(map(text, operation._operands))
        operands = [x for x in operation._operands if isinstance(x, Number) and x._operands]
        free += [names[k] for k in sorted({place[x._index] for x in operands if last[x._index] == i})]
        names[i] = free.pop() if free else next(unused)
        yield f"    {names[i]} = {operation._text.format(*given)}"
    yield f"    return {', '.join(map(text, results))},"


@cache  # kernels are kept by their rule's identity
def _made(name: str, text: str) -> Rule:
    file = f"<ademamix rule {name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # compilers read the text there
    scope: dict[str, Any] = {"xp": np, "__name__": __name__}
    exec(compile(text, file, "exec"), scope)
    rule: Rule = scope[name]
    return rule


def _blame(rule: Rule, message: str, error: Exception | None = None, xp: Any = None) -> NoReturn:
    """Raise ValueError with the last line of the rule, or of what it is made of, bound to ``xp``, that was reached."""
    code, line = rule.__code__, rule.__code__.co_firstlineno
    for frame, at in traceback.walk_tb(error.__traceback__ if error else None):
        if frame.f_globals.get("xp") is xp:
            code, line = frame.f_code, at
    text = linecache.getline(code.co_filename, line).strip()
    raise ValueError(f"{code.co_filename}:{line}, in the rule {rule.__name__}: {message}\n    {text}") from error
