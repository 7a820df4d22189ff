"""Coefficients as operations on a step that only the device knows, written down for it to compute."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ademamix.backends import bind

Coefficients = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]  # of the step, from 1 on, and the group


class Tape:
    """What the coefficients of a group are computed by.

    Attributes:
        lines: statements that compute ``t0``, ``t1``, ... of the step ``t``, of numbers ``n0``, ``n1``, ... and of each
            other; functions are ``tl``'s, but for ``minimum`` and ``maximum``.
        numbers: the host's numbers, and tensors of one element whose value only a device knows.
        results: names of the results.

    Raises:
        TypeError: the coefficients are computed by something else than arithmetic and ``xp``'s functions, or branch on
            the step.
    """

    def __init__(self, coefficients: Coefficients, names: Sequence[str], group: Mapping[str, Any]) -> None:
        self._lines: list[str] = []
        self.numbers: list[Any] = []
        values = bind(coefficients, _tape_xp)(_Known(self, "t"), Values(group))
        sign = -1.0 if group["maximize"] else 1.0
        self.results = tuple(self.name(x) for x in (sign, *(values[name] for name in names)))
        self.lines = tuple(self._lines)

    def name(self, x: Any) -> str:
        if isinstance(x, _Known):
            return x.name
        self.numbers.append(x if is_late(x) else float(x))
        return f"n{len(self.numbers) - 1}"

    def computed(self, text: str, *operands: Any) -> "_Known":
        self._lines.append(f"t{len(self._lines)} = {text.format(*map(self.name, operands))}")
        return _Known(self, f"t{len(self._lines) - 1}")


class _Known:
    """A number that only the device knows."""

    __array_ufunc__ = None  # NumPy's numbers leave arithmetic with it to it

    def __init__(self, tape: Tape, name: str) -> None:
        self.tape, self.name = tape, name

    def __pow__(self, power: Any) -> Any:
        return _exp(_product(power, _log(self)))

    def __rpow__(self, base: float) -> Any:
        if isinstance(base, Tensor) or not base >= 0.0:
            raise TypeError(f"the base of a power must be >= 0, got {base!r}")
        return _exp(_product(self, math.log(base) if base else -math.inf))

    def __neg__(self) -> Any:
        return _product(self, -1.0)

    def __bool__(self) -> bool:
        raise TypeError("only the device knows the step")


def _operation(text: str) -> Callable[..., Any]:
    def apply(*operands: Any) -> Any:
        tape = next(x.tape for x in operands if isinstance(x, _Known))
        return tape.computed(text, *operands)

    return apply


for _name, _text in (("add", "+"), ("sub", "-"), ("mul", "*"), ("truediv", "/")):
    _apply = _operation(f"{{0}} {_text} {{1}}")
    setattr(_Known, f"__{_name}__", _apply)
    setattr(_Known, f"__r{_name}__", lambda self, x, apply=_apply: apply(x, self))
for _name, _text in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
    setattr(_Known, f"__{_name}__", _operation(f"{{0}} {_text} {{1}}"))


def _function(of_numbers: Callable[..., float], text: str) -> Callable[..., Any]:
    written = _operation(text)

    def apply(*args: Any) -> Any:
        if any(isinstance(x, _Known) for x in args):
            return written(*args)
        if any(map(is_late, args)):
            raise TypeError("only a device knows one of the hyperparameters")
        return of_numbers(*args)

    return apply


_product = _operation("{0} * {1}")
_exp, _log = _function(math.exp, "tl.exp({0})"), _function(math.log, "tl.log({0})")


class _tape_xp:  # noqa: N801 - the namespace in which coefficients are written down
    sqrt, abs = _function(math.sqrt, "tl.sqrt({0})"), _function(abs, "tl.abs({0})")
    exp, log = _exp, _log
    minimum, maximum = _function(min, "minimum({0}, {1})"), _function(max, "maximum({0}, {1})")
    where = _function(lambda condition, x, y: x if condition else y, "tl.where({0}, {1}, {2})")


def is_late(x: Any) -> bool:
    """Whether only a device knows the number."""
    return isinstance(x, Tensor) and x.device.type != "cpu"


PLAIN = frozenset((float, int, bool, str, type(None)))


class Values(Mapping[str, Any]):
    """A group's hyperparameters as coefficients are computed of them; what else a user keeps there is not looked at.

    Args:
        group: the parameter group.
        late: what is made of a tensor on a device, whose number nobody waits for. Other tensors, and NumPy's numbers,
            are Python's numbers: arithmetic with them could be in float32.
    """

    def __init__(self, group: Mapping[str, Any], late: Callable[[Tensor], Any] = lambda x: x) -> None:
        self._group, self._late = group, late

    def __getitem__(self, name: str) -> Any:
        x = self._group[name]
        return x if type(x) in PLAIN else number_of(x, self._late)

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


def number_of(x: Any, late: Callable[[Tensor], Any]) -> Any:
    if type(x) in PLAIN:
        return x
    if isinstance(x, Tensor):
        return late(x) if is_late(x) else float(x.detach())
    if isinstance(x, np.generic):
        return x.item()
    return tuple([number_of(each, late) for each in x]) if isinstance(x, tuple | list) else x
