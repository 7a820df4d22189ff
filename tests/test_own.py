"""Optimizers made from a user's rule, and what is said of a rule's mistakes."""

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy as xp
import pytest
import torch

from ademamix import RuleOptimizer, optimizer_from, rules
from ademamix.elementwise import traced

PAGE = (Path(__file__).parent.parent / "docs" / "a-memory-of-your-own.md").read_text(encoding="utf-8")


def test_the_page_s_examples_run_one_after_the_other_and_train_their_model() -> None:
    first, torch_, time, jax_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(first, scope)
    torch.manual_seed(0)
    exec(torch_, scope)
    x = torch.randn(32, 64)
    assert (scope["model"](x) - x).square().mean() < 0.13  # a tenth of the start's: 1 + 1 / 3
    assert {t.dtype for t in scope["optimizer"].state[scope["model"].weight].values()} >= {torch.int16, torch.uint8}
    exec(time, scope)
    assert scope["optimizer"].coefficients(4.0, scope["optimizer"].param_groups[0])["w_long"] == 0.5
    assert "transformation(Agreeing)" in jax_  # run by jax_transformations.py


# --------------------------------------------------------------------------------- classes


def leaky(p: Any, g: Any, memory: Any, mean_sq: Any, *, lr: Any = 0.1, leak: Any = 0.25, w: Any) -> Any:
    """A user's rule."""
    memory = memory + leak * (g - memory)
    mean_sq = mean_sq + w * (g * g - mean_sq)
    return p - lr * memory / (xp.sqrt(mean_sq) + 1e-8), memory, mean_sq


def shrinking(step: Any, *, leak: Any, floor: float = 0.01) -> dict[str, Any]:
    return {"w": xp.maximum(leak / step, floor)}


Leaky = optimizer_from(leaky, shrinking)


def test_the_class_is_shaped_like_the_library_s() -> None:
    names = list(inspect.signature(Leaky).parameters)
    assert names[:6] == ["params", "lr", "leak", "floor", "maximize", "state"]
    assert (Leaky.__name__, Leaky.__module__, Leaky.__doc__) == ("Leaky", __name__, "A user's rule.")
    assert Leaky.compact == {"memory": "int16", "mean_sq": "float8"}
    optimizer = Leaky([torch.zeros(2, requires_grad=True)], 0.5, floor=0.1)
    assert {n: optimizer.param_groups[0][n] for n in ("lr", "leak", "floor")} == {"lr": 0.5, "leak": 0.25, "floor": 0.1}
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.state_dict() == optimizer.state_dict()


@pytest.mark.parametrize("options", [{"backend": "cpu"}, {"backend": "eager"}, {"capturable": True}], ids=str)
def test_a_run_is_that_of_the_rule_in_float64(options: Any) -> None:
    random = np.random.default_rng(0)
    start, grads = random.standard_normal((5, 4)), random.standard_normal((30, 5, 4))
    p = torch.tensor(start, requires_grad=True)
    optimizer = Leaky([p], 0.05, floor=0.02, **options)
    memory, mean_sq = np.zeros((5, 4)), np.zeros((5, 4))
    for t, g in enumerate(grads, start=1):
        w = max(0.25 / t, 0.02)
        memory, mean_sq = 0.75 * memory + 0.25 * g, (1 - w) * mean_sq + w * g**2
        start = start - 0.05 * memory / (np.sqrt(mean_sq) + 1e-8)
        p.grad = torch.tensor(g)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor(start), rtol=1e-13, atol=1e-13)


def test_bad_hyperparameters_are_named() -> None:
    p = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(ValueError, match="leak must be a finite number, got nan"):
        Leaky(p, leak=float("nan"))
    with pytest.raises(ValueError, match="maximize must be True or False, got 1"):
        Leaky(p, maximize=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'leek'"):
        Leaky(p, leek=0.5)
    with pytest.raises(ValueError, match=r"shrinking takes \['floor'\], for which neither it nor leaky has a default"):
        optimizer_from(leaky, exec_("def shrinking(step, *, floor): return {'w': floor}", "shrinking"))
    with pytest.raises(ValueError, match=r"the coefficients of Leaky lack \['w'\], which its rule takes"):
        optimizer_from(leaky)(p)


# --------------------------------------------------------------------------------- mistakes


def exec_(text: str, name: str) -> Any:
    scope: dict[str, Any] = {"np": np, "xp": np, "torch": torch, "TABLE": np.ones(3)}
    exec(text, scope)
    return scope[name]


FORM = """\
import numpy as np, torch, numpy as xp
TABLE = np.ones(3)
def helped(m):
    return xp.tanh(m)
def mine(p, g, m, *, lr=0.1):
    m = m + g
    {line}
    return p - lr * m, m
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("m = m * momentum", "NameError: name 'momentum' is not defined"),
        ("m = xp.tanh(m)", "xp.tanh is not there on all backends; xp has sqrt, abs, exp, log, minimum, maximum, where"),
        ("return p - lr * m", r"a rule returns a tuple of 2, the new \(p, m\), got no tuple"),
        ("return p - lr * m, m, g", r"a rule returns a tuple of 2, the new \(p, m\), got one of 3"),
        ("m = 0.0", "the new m must have p's shape, got float"),
        ("m = 2 * lr", "the new m must have p's shape, got a coefficient"),
        ("m = m > 0", "a condition is no number: use xp.where"),
        ("m = (m, m)", r"a rule computes with its arguments and Python's numbers alone, got tuple"),
        ("m = m[None]", "a rule is elementwise: what it gets has no elements to be picked"),
        ("m = m - m.mean()", "an array has no .mean"),
        ("m = m * TABLE", "a rule computes with its arguments and Python's numbers alone, got ndarray"),
        ("m = TABLE * m", "NumPy cannot be called by a rule"),
        ("m = np.concatenate([m, m])", "NumPy cannot be called by a rule"),
        ("m = np.sqrt(m)", "NumPy cannot be called by a rule"),
        ("m = torch.sqrt(m)", "TypeError: sqrt"),
        ("if g > 0: m = 2 * m", "a branch on numbers that the step computes .* use xp.where"),
        ("m = max(m, 0.0)", "a branch on numbers that the step computes .* use xp.where"),
        ("m = m if lr > 0 else g", "a branch on numbers that the step computes .* use xp.where"),
        ("m = m ** 2", r"\*\* is not there on all backends: use x \* x"),
        ("m = abs(m)", "abs.. is not there on all backends: use xp.abs"),
        ("m = m % 2.0", "TypeError: unsupported operand"),
        ("m = xp.where(m, m, g)", "xp.where takes a comparison of arrays, such as x > 0.0, first, got an array"),
        ("m = xp.where(lr > 0.0, m, g)", "xp.where takes a comparison of arrays, .* got one of coefficients"),
        ("m = (lr > 0.0) * m", "a condition is no number: use xp.where"),
        ("m = xp.sqrt(lr) * m", "xp's functions take an array: what needs none is a coefficient"),
        ("m = xp.where(m == 0.0, m, g)", "== and != are not there on all backends"),
    ],
)
def test_a_mistake_is_reported_by_the_rule_s_own_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FORM.format(line=line))
    scope: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    with pytest.raises(ValueError, match=message) as caught:
        optimizer_from(scope["mine"])
    where, *_, text = str(caught.value).splitlines()
    number = int(where.removeprefix(f"{file}:").split(",")[0])
    assert text.strip() == file.read_text().splitlines()[number - 1].strip()
    assert number in (
        (7, 8) if "condition" in message or "got tuple" in message else (5, 7)
    )  # the line, or the function's


def test_a_mistake_in_a_helper_is_reported_by_the_helper_s_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FORM.format(line="m = helped(m)"))
    scope: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    with pytest.raises(
        ValueError, match=r"mine.py:4, in the rule mine: xp.tanh is not there .*\n    return xp.tanh\(m\)"
    ):
        optimizer_from(scope["mine"])


@pytest.mark.parametrize("head", ["(p)", "(p, g, *slots, lr=0.1)", "(p, g, step)", "(p, g, /, m)", "(p, g, m, **rest)"])
def test_a_rule_of_another_form_is_refused(head: str) -> None:
    with pytest.raises(
        ValueError, match=r"a rule takes \(p, g, \*slots, \*, coefficients\), no slot named 'step', got"
    ):
        traced(exec_(f"def mine{head}: return p", "mine"))


def test_a_class_whose_rule_is_wrong_is_refused_before_anything_is_made() -> None:
    class Wrong(RuleOptimizer):
        rule = staticmethod(exec_("def wrong(p, g, *, lr): return p - lr * g.sum()", "wrong"))
        check = staticmethod(lambda group: None)
        coefficients = staticmethod(lambda step, group: {"lr": 0.1})

    with pytest.raises(ValueError, match=r"<string>:1, in the rule wrong: an array has no .sum"):
        Wrong([torch.zeros(2, requires_grad=True)], {"maximize": False})


def test_the_library_s_own_rules_are_right() -> None:
    for rule in (rules.ademamix, rules.adamw, rules.simplified_ademamix, rules.adana, rules.kema(2), rules.kema(8)):
        traced(rule)
