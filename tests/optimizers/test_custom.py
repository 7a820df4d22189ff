"""Optimizers made from a user's rule, and what is said of a rule's mistakes."""

import copy
import functools
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy as xp
import pytest
import torch

from ademamix import AdEMAMix, RuleOptimizer, optimizer_from
from ademamix.engine.tracing import traced
from optimizer_table import Case, every_case

PAGE = (Path(__file__).parents[2] / "docs" / "tutorials" / "your-own-memory.md").read_text(encoding="utf-8")


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


def test_what_changes_over_time_may_be_any_callable() -> None:
    optimizer = optimizer_from(leaky, functools.partial(shrinking, floor=0.5))([torch.zeros(2, requires_grad=True)])
    assert optimizer.coefficients(1.0, optimizer.param_groups[0])["w"] == 0.5
    assert optimizer.param_groups[0]["floor"] == 0.5


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


# --------------------------------------------------------------------------------- one meaning on all backends

BACKENDS = ("cpu", "eager")  # JAX and Triton: jax_transformations.py, triton_interpreted.py
ONE = np.float32


def stepped(
    kind: Any, g: Any, backend: str, dtype: torch.dtype = torch.float32, steps: int = 1, **settings: Any
) -> Any:
    """The parameter, from 1 on, and the slots after some steps with the gradient g."""
    q = torch.ones(len(g), dtype=dtype, requires_grad=True)
    q.grad = torch.tensor(g, dtype=dtype)
    optimizer = kind([q], backend="cpu" if backend == "capturable" else backend, **settings)
    for _ in range(steps):
        optimizer.step()
    return {"p": q.detach().numpy(), **{n: t.numpy() for n, t in optimizer.state[q].items() if n != "step"}}


def assert_same_bits(found: dict[str, Any], **expected: Any) -> None:
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, strict=True)


A, B = 0.1, 0.3
BOTH = (A, B)
GRADIENT = np.random.default_rng(0).standard_normal(1000).astype(np.float32)


def made_inside() -> Any:
    import numpy as xp

    a, b = BOTH

    def larger(x: Any, y: Any) -> Any:
        return xp.maximum(x, y)

    def of_a_closure(p: Any, g: Any, m: Any, *, lr: Any = 0.5) -> Any:
        m = larger(m, m) + a * g
        m = m + b * g
        return p - lr * m, m

    return of_a_closure


def of_globals(p: Any, g: Any, m: Any, *, lr: Any = 0.5) -> Any:
    m = m + A * g
    m = m + B * g
    return p - lr * m, m


def plus(m: Any, g: Any, a: float = A, *, share: int = 1) -> Any:
    return m + share * a * g


def of_defaults(p: Any, g: Any, m: Any, *, lr: Any = 0.5) -> Any:
    m = plus(plus(m, g), g, share=3)  # A * 3 is not B, but rounds to it in float32
    return p - lr * m, m


def of_a_tuple(p: Any, g: Any, m: Any, *, lr: Any = 0.5) -> Any:
    a, b = BOTH
    m = m + a * g
    return p - lr * (m + b * g), m + BOTH[1] * g


def of_a_loop(p: Any, g: Any, m: Any, *, lr: Any = 0.5) -> Any:
    for i in range(len(BOTH)):
        m = m + BOTH[i] * g
    return p - lr * m, m


def of_a_comprehension(p: Any, g: Any, m: Any, *, lr: Any = 0.5) -> Any:
    first, second = [weight * g for weight in BOTH]
    m = m + first + second
    return p - lr * m, m


def of_inner_functions(p: Any, g: Any, m: Any, *, lr: Any = 0.5) -> Any:
    larger = lambda x, y: xp.maximum(x, y)  # noqa: E731

    def added(m: Any, weight: float) -> Any:
        return larger(m, m) + weight * g

    m = added(added(m, A), B)
    return p - lr * m, m


def added_from(k: int, m: Any, g: Any) -> Any:
    return m if k == len(BOTH) else added_from(k + 1, m + BOTH[k] * g, g)


def of_recursion(p: Any, g: Any, m: Any, *, lr: Any = 0.5) -> Any:
    m = added_from(0, m, g)
    return p - lr * m, m


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule",
    [
        of_globals,
        made_inside(),
        of_defaults,
        of_a_tuple,
        of_a_loop,
        of_a_comprehension,
        of_inner_functions,
        of_recursion,
    ],
    ids=lambda rule: rule.__name__,
)
def test_numbers_are_float32_wherever_they_come_from(rule: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = ONE(A) * GRADIENT + ONE(B) * GRADIENT
    monkeypatch.setattr(rule, "__name__", "rule")  # what has equal names and traces is compiled once
    assert_same_bits(stepped(optimizer_from(rule), GRADIENT, backend), m=m, p=ONE(1) - ONE(0.5) * m)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_among_themselves_are_float32(backend: str) -> None:
    def rule(p: Any, g: Any, m: Any, n: Any, *, lr: Any = 0.3, w: Any = 0.7) -> Any:
        m = m + A * lr * w * B * g
        n = n + (1.0 - lr - w * w) / (3.0 / w) * g
        return p - lr * w * lr * g, m, n

    lr, w, one = ONE(0.3), ONE(0.7), ONE(1.0)
    expected = {
        "m": ONE(A) * lr * w * ONE(B) * GRADIENT,
        "n": (one - lr - w * w) / (ONE(3.0) / w) * GRADIENT,
        "p": one - lr * w * lr * GRADIENT,
    }
    assert_same_bits(stepped(optimizer_from(rule), GRADIENT, backend), **expected)
    if backend == "eager":
        assert_same_bits(stepped(optimizer_from(rule), GRADIENT, backend, capturable=True), **expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_divisions_round_once(backend: str) -> None:
    def rule(p: Any, g: Any, m: Any, n: Any, *, lr: Any = 0.3) -> Any:
        return p, A / 3.0 / g, lr / g / 7.0

    m, n = ONE(A / 3.0) / GRADIENT, ONE(0.3) / GRADIENT / ONE(7.0)
    for options in ({}, {"capturable": True}):
        assert_same_bits(stepped(optimizer_from(rule), GRADIENT, backend, **options), m=m, n=n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_choice_between_numbers_has_the_precision_of_the_parameter(backend: str) -> None:
    def rule(p: Any, g: Any, m: Any, n: Any, *, lr: Any = 0.3) -> Any:
        return p, xp.where(g > 0.0, A, 1), xp.where(lr < g, lr, B)

    for dtype, number in ((torch.float32, np.float32), (torch.float64, np.float64)):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = stepped(optimizer_from(rule), GRADIENT, backend, dtype)
        finally:
            torch.set_default_dtype(before)
        g = GRADIENT.astype(number)
        m, n = np.where(g > 0, number(A), number(1)), np.where(number(0.3) < g, number(0.3), number(B))
        assert_same_bits(found, m=m, n=n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_function_hides_what_is_no_number(backend: str) -> None:
    def rule(p: Any, g: Any, m: Any, n: Any, *, lr: Any = 0.3) -> Any:
        return p, xp.maximum(g, 0.5), xp.minimum(m, g)

    found = stepped(optimizer_from(rule), [np.nan, 1.0], backend, lr=0.3)
    assert_same_bits(found, m=np.array([np.nan, 1.0], np.float32), n=np.array([np.nan, 0.0], np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_may_take_over_what_another_held(backend: str) -> None:
    def rule(p: Any, g: Any, last: Any, before: Any, old: Any, *, lr: Any = 0.5) -> Any:
        return p - lr * old, p, last, before

    found = stepped(optimizer_from(rule), [1.0, 2.0], backend, steps=4, lr=0.5)
    assert_same_bits(
        found,
        **{n: np.full(2, x, np.float32) for n, x in zip(("p", "last", "before", "old"), (0.5, 1, 1, 1), strict=True)},
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "capturable"])
def test_a_class_computes_for_good_what_its_rule_was_when_it_was_made(backend: str) -> None:
    text = """
def make():
    inner = 2.0
    def helped(g): return SCALE * inner * g
    def rule(p, g, m, *, lr=1.0, w): return p - lr * w * g, helped(g)
    def over_time(step): return {"w": WEIGHT * inner}
    def change(x):
        nonlocal inner
        inner = x
    return rule, over_time, change
"""
    scope: dict[str, Any] = {"SCALE": 3.0, "WEIGHT": 0.25}
    exec(text, scope)
    rule, over_time, change = scope["make"]()
    settings = {"lr": 1.0, **({"capturable": True} if backend == "capturable" else {})}
    made = optimizer_from(rule, over_time)
    for values in ({}, {"SCALE": 5.0, "WEIGHT": 1.0}):
        scope.update(values)
        change(2.0 if not values else 1.0)
        found = stepped(made, [1.0, -1.0], backend, **settings)
        assert_same_bits(found, p=np.array([0.5, 1.5], np.float32), m=np.array([6.0, -6.0], np.float32))
    found = stepped(optimizer_from(rule, over_time), [1.0, -1.0], backend, **settings)
    assert_same_bits(found, p=np.array([0.0, 2.0], np.float32), m=np.array([5.0, -5.0], np.float32))


def test_a_class_of_one_s_own_keeps_the_rule_of_its_first_instance() -> None:
    scope: dict[str, Any] = {"SCALE": 3.0}
    exec("def rule(p, g, m, *, lr): return p - lr * g, SCALE * g", scope)

    class Mine(RuleOptimizer):
        rule = staticmethod(scope["rule"])
        check = staticmethod(lambda group: None)
        coefficients = staticmethod(lambda step, group: {"lr": 1.0})

        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {"maximize": False}, **options)

    for backend in ("eager", "cpu"):
        assert_same_bits(stepped(Mine, [1.0], backend), m=np.array([3.0], np.float32))
        scope["SCALE"] = 5.0
    optimizer = Mine([torch.zeros(2, requires_grad=True)])
    optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    assert copy.deepcopy(optimizer).rule is optimizer.rule


def test_what_is_compiled_holds_no_more_at_a_time_than_the_rule_did() -> None:
    body = inspect.getsource(traced(AdEMAMix.rule))
    assert len(set(re.findall(r"x\d+", body))) == 8  # three averages, a condition, the two that it selects from twice
    assert traced(AdEMAMix.rule) is AdEMAMix.rule

    def rule(p: Any, g: Any, x0: Any, x2: Any, *, x1: Any) -> Any:
        return p - x1 * (g * x0 + x2), x0 + g, x2 - g

    assert list(inspect.signature(traced(rule)).parameters) == ["p", "g", "x0", "x2", "x1"]
    p, g, x0, x2, x1 = np.random.default_rng(0).standard_normal((5, 3))
    for x, y in zip(traced(rule)(p, g, x0, x2, x1=x1), rule(p, g, x0, x2, x1=x1), strict=True):
        np.testing.assert_array_equal(x, y)


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
        ("m = m > 0", "a condition is not a number: use xp.where"),
        ("m = (m, m)", r"a rule only computes with its arguments and Python's numbers, got tuple"),
        ("m = m[None]", "a rule is elementwise: what it gets has no elements to be picked"),
        ("m = m - m.mean()", "an array has no .mean"),
        ("m = m * TABLE", "a rule only computes with its arguments and Python's numbers, got ndarray"),
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
        ("m = (lr > 0.0) * m", "a condition is not a number: use xp.where"),
        ("m = True * m", "a rule only computes with its arguments and Python's numbers, got bool: True"),
        ("m = m + 1e-40", "numbers are float32, 0 or from 1.2e-38 to 3.4e.38 in size, got 1e-40"),
        ("m = m - 10**400", "numbers are float32, 0 or from 1.2e-38 to 3.4e.38 in size, got 1000"),
        ("m = xp.minimum(m, float('nan'))", "numbers are float32, .* got nan"),
        ("m = m + 1.0 / 0", "ZeroDivisionError: "),
        ("m = (lambda x: x.clone())(m)", "an array has no .clone"),
        ("m = sum(x.item() for x in (m, g))", "an array has no .item"),
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


def endless(p: Any, g: Any, *, lr: Any = 0.1) -> Any:
    return endless(p, g, lr=lr)


def test_what_is_no_rule_is_refused() -> None:
    message = "a rule is a function that a def gives its name, got "
    for other in (lambda p, g, *, lr=0.1: (p - lr * g,), np.sqrt, 3, Leaky):
        with pytest.raises(ValueError, match=message):
            optimizer_from(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a slot starts at 0 and has no default .* got lr=0.1"):
        optimizer_from(exec_("def mine(p, g, m, lr=0.1): return p - lr * m, m, lr", "mine"))
    for name in ("master", "m_scale"):  # the state has tensors of these names
        with pytest.raises(
            ValueError, match=rf"no slot is named 'master', or like another with _scale: .* got '{name}'"
        ):
            optimizer_from(exec_(f"def mine(p, g, m, {name}, *, lr=0.1): return p - lr * m, m, {name}", "mine"))
    with pytest.raises(ValueError, match=r"xp is what a rule computes with, and no argument"):
        optimizer_from(exec_("def mine(p, g, xp, *, lr=0.1): return p - lr / xp, xp", "mine"))
    with pytest.raises(ValueError, match=r"in the rule endless: RecursionError: maximum recursion"):
        optimizer_from(endless)


@pytest.mark.parametrize(
    "other", [dict, print, np.sqrt, 3, lambda g: (g,)], ids=["type", "built-in", "ufunc", "number", "lambda"]
)
def test_what_is_no_function_has_no_arguments_to_be_asked_for(other: Any) -> None:
    with pytest.raises(ValueError, match=r"a (rule|memory) is a function that a def gives its name, got "):
        optimizer_from(other)


@pytest.mark.parametrize("name", ["geometry", "ns_steps", "seed", "params"])
@pytest.mark.parametrize("first", ["g", "p, g"])
def test_a_hyperparameter_has_no_option_s_name(name: str, first: str) -> None:
    text = f"def mine({first}, m, *, {name}=0.1): return {first[0]} + {name} * m, m"
    with pytest.raises(ValueError, match=rf"mine: every optimizer takes \['{name}'\], so no hyperparameter has such a"):
        optimizer_from(exec_(text, "mine"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("return m", r"a memory returns a tuple of 2, the new \(u, m\), got no tuple"),
        ("return m,", r"a memory returns a tuple of 2, the new \(u, m\), got one of 1"),
        ("return w, m", "the new u must have p's shape, got a coefficient"),
        ("return g.mean(), m", "an array has no .mean"),
        ("return xp.sign(m), m", "xp.sign is not there on all backends"),
    ],
)
def test_a_mistake_in_a_memory_is_reported_by_its_own_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"import numpy as xp\ndef mine(g, m, *, w=0.1):\n    m = m + w * (g - m)\n    {line}\n")
    scope: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    with pytest.raises(ValueError, match=message) as caught:
        optimizer_from(scope["mine"])
    where, *_, text = str(caught.value).splitlines()
    number = int(where.removeprefix(f"{file}:").split(",")[0])
    assert number in (2, 4)  # the line, or the function's where it is what it returns
    assert text.strip() == file.read_text().splitlines()[number - 1].strip()


def test_a_class_whose_rule_is_wrong_is_refused_before_anything_is_made() -> None:
    class Wrong(RuleOptimizer):
        rule = staticmethod(exec_("def wrong(p, g, *, lr): return p - lr * g.sum()", "wrong"))
        check = staticmethod(lambda group: None)
        coefficients = staticmethod(lambda step, group: {"lr": 0.1})

    with pytest.raises(ValueError, match=r"<string>:1, in the rule wrong: an array has no .sum"):
        Wrong([torch.zeros(2, requires_grad=True)], {"maximize": False})


@every_case
def test_the_library_s_own_rules_are_right(make: Case) -> None:
    traced(make.kind.rule_of(make([torch.zeros(2, requires_grad=True)]).param_groups[0]))


def test_names_that_nothing_takes_are_refused_when_the_class_is_made() -> None:
    memory = exec_("def mine(g, m, *, w=0.1): m = m + w * (g - m); return m, m", "mine")
    with pytest.raises(ValueError, match=r"schedule gives \['v'\], but mine takes only \['w'\]"):
        optimizer_from(memory, exec_("def schedule(step): return {'v': 1 / step}", "schedule"))
    with pytest.raises(ValueError, match=r"compact must map slots \('m', 'exp_avg_sq'\) to formats, got \['n'\]"):
        optimizer_from(memory, compact={"n": "int8"})
    for name in ("lr", "eps", "beta2", "w2"):  # it would be the step's
        with pytest.raises(ValueError, match=rf"mine: \['{name}'\] are the step's"):
            optimizer_from(exec_(f"def mine(g, m, *, {name}=0.1): m = m + {name} * g; return m, m", "mine"))
