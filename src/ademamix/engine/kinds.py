"""What makes one optimizer another: its rule, hyperparameters, the coefficients they give, and its slots' formats."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from itertools import chain
from typing import Any, ClassVar

from ademamix import backends, geometries
from ademamix.engine.arguments import check_number
from ademamix.engine.tape import Values
from ademamix.engine.tracing import composed, traced
from ademamix.formats import FORMATS, Format

STATES = ("float32", "bfloat16", "compact")
SLOT_FORMATS = ("float32", "bfloat16", "int8", "int16", "float8")
SCALINGS = (None, "original", "match_rms_adamw")

traced_once = cache(traced)  # a class's rule stays what it was for the first of its instances
DECOUPLED = traced(geometries.decoupled)
GEOMETRIES: Mapping[str, tuple[backends.Rule, ...]] = {  # the passes of each; a memory is composed with the first
    "adam": (geometries.adam,),
    "muon": (geometries.direction, DECOUPLED),
}


class Kind(ABC):
    """A kind of optimizer, whichever library it serves."""

    rule: backends.Rule  # of the geometry "adam": memory and geometry in one, or a rule of a user's own
    memory: ClassVar[backends.Rule | None] = None  # what other geometries are for; a rule of a user's own has none
    scaling: ClassVar[str] = "match_rms_adamw"  # what adjust_lr_fn=None stands for
    stepping: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "eps")  # hyperparameters that no direction depends on
    compact: ClassVar[Mapping[str, str]] = {}  # the format of each slot under state="compact"
    # Hyperparameters that older files lack, and what stood for them then.
    earlier: ClassVar[Mapping[str, Any]] = {"geometry": "adam"}

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
        """The rule of the first fused pass over parameters of ``group``; all groups of one geometry share it."""
        geometry, memory = group.get("geometry", "adam"), cls.memory_of(group)
        if geometry == "adam" or memory is None:
            return cls.adam_rule_of(group)
        return composed(memory, GEOMETRIES[geometry][0])

    @classmethod
    def adam_rule_of(cls, group: Mapping[str, Any]) -> backends.Rule:
        """That rule in the geometry "adam", where it depends on hyperparameters."""
        return cls.rule

    @classmethod
    def memory_of(cls, group: Mapping[str, Any]) -> backends.Rule | None:
        """The memory, where it depends on hyperparameters."""
        return cls.memory

    @classmethod
    def rules_of(cls, group: Mapping[str, Any]) -> tuple[backends.Rule, ...]:
        """The rules of all fused passes, as backends compile them."""
        return (traced_once(cls.rule_of(group)), *GEOMETRIES[group["geometry"]][1:])

    @classmethod
    def checked_rule(cls, group: Mapping[str, Any]) -> backends.Rule:
        """The first rule, once it and its hyperparameters are found to be right."""
        cls.check(group)
        cls.check_geometry(group)
        rules = cls.rules_of(group)
        needed = set(chain.from_iterable(map(backends.coefficient_names, rules)))
        if missing := needed - set(cls.coefficients(1.0, Values(group))):
            raise ValueError(f"the coefficients of {cls.__name__} lack {sorted(missing)}, which its rule takes")
        return rules[0]

    @classmethod
    def geometries_of(cls, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The geometries that there are for these hyperparameters."""
        return tuple(GEOMETRIES) if cls.memory_of(group) is not None else ("adam",)

    @classmethod
    def check_geometry(cls, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a geometry that is none, or settings of it out of their range."""
        if group["geometry"] not in (known := cls.geometries_of(group)):
            why = "" if len(known) > 1 else f" for {cls.__name__}, which is made of a whole rule and not a memory"
            raise ValueError(f"geometry must be one of {known}{why}, got {group['geometry']!r}")
        if group["adjust_lr_fn"] not in SCALINGS:
            raise ValueError(f"adjust_lr_fn must be one of {SCALINGS}, got {group['adjust_lr_fn']!r}")
        check_number("ns_steps", group["ns_steps"], "an integer from 1 to 99", lambda x: x in range(1, 100))
        given = group["ns_coefficients"]
        if not (isinstance(given, str) and given == "polar_express"):
            allowed = f"'polar_express' or three numbers such as {geometries.NEWTON_SCHULZ}"
            if not isinstance(given, tuple | list) or len(given) != 3:
                raise ValueError(f"ns_coefficients must be {allowed}, got {given!r}")
            for i, x in enumerate(given):
                check_number(f"ns_coefficients[{i}]", x, "a finite number", lambda x: True)

    @classmethod
    def formats_of(cls, group: Mapping[str, Any], state: str | Mapping[str, str]) -> dict[str, Format]:
        """The format of each slot in any geometry, stored or not."""
        rules = [cls.rule_of({**group, "geometry": geometry}) for geometry in cls.geometries_of(group)]
        names = tuple(dict.fromkeys(chain.from_iterable(map(backends.slot_names, rules))))
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
