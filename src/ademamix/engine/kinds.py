"""What makes one optimizer another: its rule, hyperparameters, the coefficients they give, and its slots' formats."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from ademamix import backends
from ademamix.engine.tape import Values
from ademamix.engine.tracing import traced
from ademamix.formats import FORMATS, Format

STATES = ("float32", "bfloat16", "compact")
SLOT_FORMATS = ("float32", "bfloat16", "int8", "int16", "float8")

traced_once = cache(traced)  # a class's rule stays what it was for the first of its instances


class Kind(ABC):
    """A kind of optimizer, whichever library it serves."""

    rule: backends.Rule
    compact: ClassVar[Mapping[str, str]] = {}  # the format of each slot under state="compact"
    earlier: ClassVar[Mapping[str, Any]] = {}  # hyperparameters that older files lack, and what stood for them then

    @staticmethod
    @abstractmethod
    def check(group: Mapping[str, Any]) -> None:
        """Raise ValueError for a hyperparameter out of its range."""

    @staticmethod
    @abstractmethod
    def coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        """The rule's coefficients in a parameter's step ``step`` (from 1 on), in float64, written against ``xp``."""

    @classmethod
    def rule_of(cls, group: Mapping[str, Any]) -> backends.Rule:
        """The rule for these hyperparameters; all groups of an optimizer share one."""
        return cls.rule

    @classmethod
    def checked_rule(cls, group: Mapping[str, Any]) -> backends.Rule:
        """The rule as all backends compile it, once it and its hyperparameters are found to be right."""
        cls.check(group)
        rule = traced_once(cls.rule_of(group))
        missing = set(backends.coefficient_names(rule)) - set(cls.coefficients(1.0, Values(group)))
        if missing:
            raise ValueError(f"the coefficients of {cls.__name__} lack {sorted(missing)}, which its rule takes")
        return rule

    @classmethod
    def formats_of(cls, group: Mapping[str, Any], state: str | Mapping[str, str]) -> dict[str, Format]:
        """The format of each slot of the rule, stored or not."""
        names = backends.slot_names(cls.rule_of(group))
        if not isinstance(state, Mapping):
            if state not in STATES:
                raise ValueError(f"state must be one of {STATES} or a mapping of slots to formats, got {state!r}")
            of_slot = cls.compact if state == "compact" else dict.fromkeys(names, state)
            state = {name: of_slot[name] for name in names if name in of_slot}
        for name, format in state.items():
            if name not in names or format not in SLOT_FORMATS:
                raise ValueError(f"state must map slots {names} to formats {SLOT_FORMATS}, got {name!r}: {format!r}")
        return {name: FORMATS[state.get(name, "float32")] for name in names}

    @classmethod
    def stored(cls, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the rule's slots that parameters of ``group`` store."""
        return backends.slot_names(cls.rule_of(group))
