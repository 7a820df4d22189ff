"""The coefficients of a step, written down for a device to compute: the same numbers as the host's."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ademamix.backends import coefficient_names
from ademamix.engine.tape import Tape
from optimizer_table import Case, every_case

LANGUAGE = {
    "tl": SimpleNamespace(
        exp=math.exp, log=math.log, sqrt=math.sqrt, abs=abs, where=lambda condition, x, y: x if condition else y
    ),
    "minimum": min,
    "maximum": max,
}


def computed(tape: Tape, step: float) -> list[float]:
    """What a device makes of the tape in a step."""
    scope: dict[str, Any] = {**LANGUAGE, "t": step, **{f"n{k}": float(x) for k, x in enumerate(tape.numbers)}}
    exec("\n".join(tape.lines), scope)
    return [scope[name] for name in tape.results]


@every_case
@pytest.mark.parametrize("maximize", [False, True])
def test_a_tape_gives_the_host_s_numbers(make: Case, maximize: bool) -> None:
    """To 1e-11: where 1 - beta^t is 1e-4, the rounding of beta^t, 1e-16, is 1e-12 of it, and there is a little more."""
    optimizer = make([torch.zeros(3, requires_grad=True)], lr=0.1, weight_decay=0.01, maximize=maximize)
    (group,), names = optimizer.param_groups, coefficient_names(optimizer.rule)
    tape = Tape(optimizer.coefficients, names, group)
    for step in (*map(float, range(1, 10)), 99.0, 100.0, 12345.0):
        values = optimizer.coefficients(step, group)
        expected = [-1.0 if maximize else 1.0, *(values[name] for name in names)]
        assert computed(tape, step) == pytest.approx(expected, rel=1e-11, abs=0.0)


def test_comparisons_negation_and_numbers_on_both_sides() -> None:
    def coefficients(step: Any, group: Any) -> Any:
        from ademamix.engine.tape import _tape_xp as xp

        chosen = xp.where(step <= 3.0, -step, xp.abs(2.0 - step))
        return {"a": chosen, "b": (1.0 + step) ** 0.5 - 6.0 / step, "c": xp.where(step > 3.0, 1.0, group["lr"]) * step}

    tape = Tape(coefficients, ("a", "b", "c"), {"lr": torch.tensor(0.25), "maximize": False})
    assert computed(tape, 3.0) == pytest.approx([1.0, -3.0, 0.0, 0.75])
    assert computed(tape, 8.0) == pytest.approx([1.0, 6.0, 2.25, 8.0])


@pytest.mark.parametrize(
    "of_step",
    [
        lambda step: 1.0 if step > 3.0 else 2.0,
        lambda step: math.cos(step),
        lambda step: step.clamp(max=3.0),
        lambda step: (-2.0) ** step,
        lambda step: torch.cos(step),
    ],
)
def test_what_cannot_be_written_down_says_so(of_step: Any) -> None:
    """The optimizer then lets torch compute it."""
    with pytest.raises((TypeError, AttributeError)):
        Tape(lambda step, _: {"a": of_step(step)}, ("a",), {"maximize": False})
