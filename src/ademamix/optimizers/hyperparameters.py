"""The hyperparameters that optimizers share: taken from a constructor, their ranges, the coefficients they give."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as xp

from ademamix.engine.arguments import check_number


def hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's own arguments, of its ``locals()``: all but those that it hands on as they are."""
    return {name: x for name, x in arguments.items() if name not in ("self", "params", "options", "__class__")}


# --------------------------------------------------------------------------------- ranges


def check_common(group: Mapping[str, Any], *others: str) -> None:
    """The hyperparameters that all rules of the family have, and others that are finite numbers >= 0."""
    for name in ("lr", "eps", "weight_decay", *others):
        check_number(name, group[name], "a finite number >= 0", lambda x: x >= 0.0)


def check_betas(group: Mapping[str, Any], count: int) -> None:
    if not isinstance(group["betas"], Sequence) or len(group["betas"]) != count:
        raise ValueError(f"betas must be {count} numbers in [0, 1), got {group['betas']!r}")
    for i, beta in enumerate(group["betas"]):
        check_beta(f"betas[{i}]", beta)


def check_beta(name: str, value: Any) -> None:
    check_number(name, value, "a number in [0, 1)", lambda x: 0.0 <= x < 1.0)


def check_warmups(group: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if group[name] is not None:
            check_number(name, group[name], "None or a number of steps >= 1", lambda x: x >= 1.0)


def check_log_time(group: Mapping[str, Any]) -> None:
    check_number("delta", group["delta"], "a finite number > 0", lambda x: x > 0.0)
    check_number("kappa", group["kappa"], "a number in (0, 1]", lambda x: 0.0 < x <= 1.0)


# --------------------------------------------------------------------------------- coefficients


def adam_coefficients(step: Any, group: Mapping[str, Any], beta2: Any) -> dict[str, Any]:
    """Those of the geometry :func:`ademamix.geometries.adam`."""
    common = {name: group[name] for name in ("lr", "weight_decay", "eps")}
    return {**common, "w2": 1.0 - beta2, "debias2": xp.sqrt(debias(step, beta2))}


def debias(step: Any, beta: Any) -> Any:
    """The bias correction of an EMA: 1 / (1 - beta^t), the inverse of the weight that all gradients have in it."""
    return 1.0 / (1.0 - beta**step)
