"""An optimizer from nothing but a memory of past gradients, or a whole rule."""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as xp

from ademamix import geometries
from ademamix.backends import Rule, bind, coefficient_names, slot_names
from ademamix.engine.arguments import check_number
from ademamix.engine.optimizer import OPTIONS, RuleOptimizer
from ademamix.engine.tracing import composed, traced
from ademamix.optimizers.hyperparameters import adam_coefficients, check_beta, check_common


def optimizer_from(
    rule: Rule,
    coefficients: Callable[..., Mapping[str, Any]] | None = None,
    *,
    compact: Mapping[str, str] | None = None,
) -> type[RuleOptimizer]:
    """An optimizer class, of the same shape as :class:`AdEMAMix`, made from a memory of past gradients, or a rule.

    Args:
        rule: a memory ``(g, *slots, *, coefficients) -> (u, *slots)``, where u is the direction of the step in any
            geometry; or a whole rule ``(p, g, *slots, *, coefficients) -> (p, *slots)``. Elementwise, written against a
            global ``xp`` (import numpy as xp) with arithmetic, comparisons and ``xp.sqrt``, ``abs``, ``exp``, ``log``,
            ``minimum``, ``maximum`` and ``where``. Coefficients with defaults are hyperparameters. It is run now, on
            placeholders, and never again: what it finds by name (numbers, helpers) is in the class as it is now.
        coefficients: ``(step, *, hyperparameters) -> {name: value}``, those that change over time, of the step from 1
            on, written against ``xp`` too. Further arguments with defaults are hyperparameters too.
            What a plain function finds by name is kept as it is now.
        compact: formats of the slots under ``state="compact"``; None for 8 bits for slots whose names end with "_sq",
            which must not be negative, and 16 bits for all others.

    Returns:
        A class named like the rule, in camel case (assign it to that name, and its instances can be pickled). It takes
        ``(params, hyperparameters, *, maximize, state, backend, ...)``; every hyperparameter is a finite number. One of
        a memory has, before the memory's own, lr=1e-3, beta2=0.999 (of the geometry "adam", as AdamW's), eps=1e-8 and
        weight_decay=0.0; "muon" is there for it too.

    Raises:
        ValueError: the rule cannot be run by all backends; the message names its file, line and text.
    """
    of_memory = is_memory(rule)
    frozen = composed(rule, geometries.adam) if of_memory else traced(rule)
    over_time = coefficients or _constant
    asked = list(inspect.signature(over_time).parameters.values())[1:]  # after the step
    given = (*(ADAM if of_memory else ()), *inspect.signature(rule).parameters.values(), *asked)
    with_defaults = [q for q in given if q.default is not q.empty]
    hyperparameters = {q.name: q.replace(kind=q.POSITIONAL_OR_KEYWORD, annotation=q.empty) for q in with_defaults}
    unknown = [q.name for q in asked if q.name not in hyperparameters]
    if unknown:
        raise ValueError(
            f"{over_time.__name__} takes {unknown}, for which neither it nor {rule.__name__} has a default"
        )
    if taken := [name for name in hyperparameters if name in ("params", *(q.name for q in OPTIONS))]:
        raise ValueError(f"{rule.__name__}: every optimizer takes {taken}, so no hyperparameter has such a name")
    own = [name for name in coefficient_names(rule) if name in hyperparameters]
    of_step = {*coefficient_names(geometries.adam), *(q.name for q in ADAM)}
    if of_memory and (twice := [name for name in coefficient_names(rule) if name in of_step]):
        raise ValueError(
            f"{rule.__name__}: {twice} are the step's; a memory's coefficients have other names than {sorted(of_step)}"
        )
    kept = bind(over_time, xp) if isinstance(over_time, types.FunctionType) else over_time
    given_now = kept(1.0, **{q.name: hyperparameters[q.name].default for q in asked})
    if foreign := sorted(set(given_now) - set(coefficient_names(rule))):
        raise ValueError(
            f"{getattr(over_time, '__name__', over_time)} gives {foreign}, but {rule.__name__} takes "
            f"only {list(coefficient_names(rule))}"
        )
    if unknown_slots := sorted((compact or {}).keys() - set(slot_names(frozen))):
        raise ValueError(f"compact must map slots {slot_names(frozen)} to formats, got {unknown_slots}")
    scope = {"own": own, "asked": [q.name for q in asked], "over_time": kept}
    values = types.FunctionType(_coefficients.__code__, scope)
    params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    default = {slot: "float8" if slot.endswith("_sq") else "int16" for slot in slot_names(frozen)}
    body = {
        "rule": staticmethod(frozen),
        "coefficients": staticmethod(values),
        "compact": default if compact is None else compact,
        "hyperparameters": tuple(hyperparameters),
        "__signature__": inspect.Signature([params, *hyperparameters.values(), *OPTIONS]),
        "__doc__": rule.__doc__,
        "__module__": rule.__module__,
    }
    if of_memory:
        scope = {"adam_coefficients": adam_coefficients, "of_memory": values}
        body["coefficients"] = staticmethod(types.FunctionType(_with_adam.__code__, scope))
        body["memory"] = staticmethod(rule)
        body["stepping"] = tuple(q.name for q in ADAM if q.name not in [a.name for a in asked])
        composed(rule, geometries.direction)  # kept as it is now
    base = _FromMemory if of_memory else _FromRule
    return type("".join(word.capitalize() for word in rule.__name__.split("_")), (base,), body)


def is_memory(rule: Any) -> bool:
    """Whether it is a function that starts with the gradient ``g``."""
    return isinstance(rule, types.FunctionType) and next(iter(inspect.signature(rule).parameters), None) == "g"


class _FromRule(RuleOptimizer):
    hyperparameters: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(type(self))
        unknown = {name: kwargs.pop(name) for name in [*kwargs] if name not in signature.parameters}
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        group = {name: bound.arguments.pop(name) for name in self.hyperparameters}
        super().__init__(defaults=group, **bound.arguments, **unknown)

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        for name in cls.hyperparameters:
            check_number(name, group[name], "a finite number", lambda x: True)


class _FromMemory(_FromRule):
    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        super().check(group)
        check_common(group)
        check_beta("beta2", group["beta2"])


ADAM = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    for name, default in (("lr", 1e-3), ("beta2", 0.999), ("eps", 1e-8), ("weight_decay", 0.0))
]


def _constant(step: Any) -> dict[str, Any]:
    return {}


def _coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """Given its globals anew for each class: among them a backend finds what it calls, and binds its ``xp``."""
    values = {name: group[name] for name in own}  # type: ignore[name-defined]  # noqa: F821
    values.update(over_time(step, **{name: group[name] for name in asked}))  # type: ignore[name-defined]  # noqa: F821
    return values


def _with_adam(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`_coefficients`, with those of the geometry "adam"."""
    return {**adam_coefficients(step, group, group["beta2"]), **of_memory(step, group)}  # type: ignore[name-defined]  # noqa: F821
