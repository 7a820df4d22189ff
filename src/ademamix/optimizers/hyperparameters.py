"""The hyperparameters that optimizers share: taken from a constructor, their ranges, the coefficients they give."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as xp

from ademamix.engine.arguments import check_number
from ademamix.engine.kinds import Kind


def hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's own arguments, of its ``locals()``: all but those that it hands on as they are."""
    return {name: x for name, x in arguments.items() if name not in ("self", "params", "options", "__class__")}


UNLIMITED = {**Kind.earlier, "slow_limit": None}  # what optimizers were before they had it

# --------------------------------------------------------------------------------- ranges


def check_common(group: Mapping[str, Any], *others: str) -> None:
    """The hyperparameters that all rules of the family have, and others that are finite numbers >= 0."""
    for name in ("lr", "eps", "weight_decay", *others):
        check_number(name, group[name], "a finite number >= 0", lambda x: x >= 0.0)


def check_betas(group: Mapping[str, Any], count: int) -> None:
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != count:
        third = ""
        if count == 3 and isinstance(betas, Sequence) and len(betas) == 2:
            third = (
                "; the third is beta3, the decay of the slow EMA: "
                f"ademamix.suggest(total_steps, beta1={betas[0]!r}, beta2={betas[1]!r}) gives all of them for a run of "
                "so many steps, ademamix.convert.from_adamw adds it to AdamW's state dicts"
            )
        raise ValueError(f"betas must be {count} numbers in [0, 1), got {betas!r}{third}")
    for i, beta in enumerate(betas):
        check_beta(f"betas[{i}]", beta)


def check_beta(name: str, value: Any) -> None:
    check_number(name, value, "a number in [0, 1)", lambda x: 0.0 <= x < 1.0)


def check_warmups(group: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if group[name] is not None:
            check_number(name, group[name], "None or a number of steps >= 1", lambda x: x >= 1.0)


def check_slow_limit(group: Mapping[str, Any]) -> None:
    if group["slow_limit"] is not None:
        check_number("slow_limit", group["slow_limit"], "None or a finite number > 0", lambda x: x > 0.0)


def check_log_time(group: Mapping[str, Any]) -> None:
    check_number("delta", group["delta"], "a finite number > 0", lambda x: x > 0.0)
    check_number("kappa", group["kappa"], "a number in (0, 1]", lambda x: 0.0 < x <= 1.0)


# --------------------------------------------------------------------------------- coefficients


def adam_coefficients(step: Any, group: Mapping[str, Any], beta2: Any) -> dict[str, Any]:
    """Those of the geometry :func:`ademamix.geometries.adam`."""
    common = {name: group[name] for name in ("lr", "weight_decay", "eps")}
    return {**common, **average("2", 1.0 - beta2), "debias2": xp.sqrt(debias(step, beta2))}


def average(name: str, w: Any) -> dict[str, Any]:
    """Those of an average in which the newest gradient weighs ``w``; ``memories.py`` says why there are three."""
    far = 1.0 * (w > 0.75)
    return {f"w{name}": w, f"stay{name}": 1.0 - far * w, f"pull{name}": 1.0 - far}


def limit(step: Any, group: Mapping[str, Any], beta2: Any, *slow: tuple[Any, Any]) -> dict[str, Any]:
    """``floor`` of the geometry :func:`ademamix.geometries.adam_limited`.

    An average that gives the newest gradient the weight ``w`` is at most w / (1 - beta2) root mean squares where that
    is 1 or more, whatever the gradients are (by Cauchy and Schwarz): no average as short as exp_avg_sq is limited.

    Args:
        step: step t, from 1 on.
        group: its ``slow_limit`` is a factor, or None for no limit.
        beta2: decay of exp_avg_sq.
        slow: of each average in the slow part its factor there, and its w.
    """
    if group["slow_limit"] is None:
        return {"floor": 0.0}
    most = group["slow_limit"] * sum(factor * xp.maximum(1.0, w / (1.0 - beta2)) for factor, w in slow)
    most = xp.maximum(most, 1e-15)  # where a factor is 0, so is the slow part
    return {"floor": 1.0 / (most * most * debias(step, beta2))}


def debias(step: Any, beta: Any) -> Any:
    """The bias correction of an EMA: 1 / (1 - beta^t), the inverse of the weight that all gradients have in it."""
    return 1.0 / (1.0 - beta**step)
