"""Averages at every weight of the newest gradient: 1 is exact, and no weight near 0 or 1 loses what is averaged."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix
from ademamix.backends import bind, coefficient_names
from ademamix.engine.state import decoded
from ademamix.optimizers.hyperparameters import average
from optimizer_table import ROWS, Case, Row, every_case

EPS = 2.0**-24  # half a unit in the last place of 1 in float32: one rounding


# --------------------------------------------------------------------------------- beta2 = 0

ZERO: dict[type[RuleOptimizer], dict[str, Any]] = {
    AdEMAMix: {"betas": (0.9, 0.0, 0.9999), "alpha": 0.0},
    AdamW: {"betas": (0.9, 0.0), "weight_decay": 0.0},
    SimplifiedAdEMAMix: {"betas": (0.9, 0.0), "slow_limit": None},
    KEMA: {"beta2": 0.0, "power": 50.0, "longest": 1e4},  # all but the first EMA weigh nothing
}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("kind", ZERO, ids=lambda kind: kind.__name__)
def test_with_beta2_0_a_small_gradient_after_a_large_one_takes_torch_s_step(
    kind: type[RuleOptimizer], backend: str
) -> None:
    """1 - beta1 = 0.1 of the first gradient and of the second over the second's size: 3,300 lr and not 3.3e7."""
    p, q = (torch.zeros(3, requires_grad=True) for _ in range(2))
    ours = kind([p], lr=1e-3, backend=backend, **ZERO[kind])
    torchs = torch.optim.AdamW([q], lr=1e-3, betas=(0.9, 0.0), weight_decay=0.0)
    for g in (1.0, 1e-4):
        for optimizer in (ours, torchs):
            optimizer.param_groups[0]["params"][0].grad = torch.full((3,), g)
            optimizer.step()
    # Simplified AdEMAMix has the sum in the place of the average, and no bias correction; eps is 1e-8.
    expected = -1e-3 * (1.0 + (0.9 + 1e-4) / (1e-4 + 1e-8)) if kind is SimplifiedAdEMAMix else q.detach()
    # Some ten roundings of each of two steps.
    torch.testing.assert_close(p.detach(), torch.as_tensor(expected).expand(3), rtol=40 * EPS, atol=0.0)
    assert torch.equal(ours.state[p]["exp_avg_sq"], torch.full((3,), 1e-4) ** 2)


# --------------------------------------------------------------------------------- squares beyond float32


def through(optimizer: torch.optim.Optimizer, sizes: tuple[float, ...]) -> list[torch.Tensor]:
    """A parameter after each step; its first gradient is of these sizes, all others are ones."""
    (p,) = optimizer.param_groups[0]["params"]
    after = []
    for size in sizes:
        p.grad = torch.ones_like(p)
        p.grad[0, 0] = size
        optimizer.step()
        after.append(p.detach().clone())
    return after


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_after_an_infinite_square_no_step_is_taken_as_in_torch(backend: str) -> None:
    """torch averages 0.001 g g, and not g g, so that its average is infinite from 5.8e20 on, ours from 1.8e19."""
    p, q = (torch.zeros(64, 64, requires_grad=True) for _ in range(2))
    ours = AdamW([p], lr=0.1, weight_decay=0.0, backend=backend)
    sizes = (1.0, -1e21, 1.0, 1e21, 1.0)
    found = through(ours, sizes)
    expected = through(torch.optim.AdamW([q], lr=0.1, weight_decay=0.0), sizes)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=40 * EPS, atol=0.0)  # some ten roundings a step
    assert all(x[0, 0] == found[0][0, 0] for x in found)
    assert ours.state[p]["exp_avg_sq"][0, 0] == torch.inf


@every_case
@pytest.mark.parametrize("state", ["float32", "bfloat16", "compact"])
@pytest.mark.parametrize("size", [2e19, 1e37])
def test_finite_gradients_give_no_nan(make: Case, state: str, size: float) -> None:
    """Up to where sums of gradients are finite. A block of compact state has one scale, and stops as a whole."""
    p = torch.zeros(64, 300, requires_grad=True)
    optimizer = make([p], state=state, backend="eager")
    *_, last = through(optimizer, (1.0, size, 1.0, -size, 1.0))
    assert last.isfinite().all()
    squares = decoded(optimizer.state[p]["exp_avg_sq"], optimizer.state[p].get("exp_avg_sq_scale"))
    assert squares.isinf().sum() == (256 if state == "compact" else 1)
    assert not squares.isnan().any()


# --------------------------------------------------------------------------------- every weight


@given(
    st.floats(0.0, 1.0, exclude_max=True) | st.sampled_from([0.0, 1e-12, 1e-4, 0.25, 0.2500001, 0.9, 0.999, 0.9999]),
    st.floats(-1e6, 1e6, width=32),
    st.floats(-1e6, 1e6, width=32),
)
@settings(max_examples=300, deadline=None)
def test_no_weight_loses_anything(beta: float, m: float, g: float) -> None:
    """Against float64. Up to w = 3/4 the form rounds w, g - m, their product and the sum, of which only the sum is as
    large as |m|, and |m| is at most 4 |beta m|; above, it rounds beta, w, two products and the sum."""
    c = {name: np.float32(x) for name, x in average("", 1.0 - beta).items()}
    m32, g32 = np.float32(m), np.float32(g)
    with np.errstate(under="ignore"):
        found = c["stay"] * m32 + c["w"] * (g32 - c["pull"] * m32)
    exact = beta * float(m32) + (1.0 - beta) * float(g32)
    size = abs(beta * float(m32)) + abs((1.0 - beta) * float(g32))
    # What comes on top: beta is 1 - w in float64, and a denormal number's rounding.
    assert abs(float(found) - exact) <= 16 * EPS * size + 2.0**-53 * abs(m) + 1e-44


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.1, 0.24, 0.25, 0.5, 0.9, 0.999, 0.9999, 0.999999])
def test_an_average_of_equal_gradients_is_the_gradient(beta: float) -> None:
    """Also after 100,000 steps: below w = 3/4 in every single one; above, what a step adds is forgotten by the next."""
    c = {name: np.float32(x) for name, x in average("", 1.0 - beta).items()}
    g = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    m = g.copy()
    for _ in range(100):
        m = c["stay"] * m + c["w"] * (g - c["pull"] * m)
    if beta >= 0.25:
        np.testing.assert_array_equal(m, g)
    else:
        np.testing.assert_allclose(m, g, rtol=4 * EPS)  # beta and w, each rounded, two products and the sum


WEIGHTS = (1.0, 1.0 - 1e-7, 0.99, 0.76, 0.75, 0.5, 0.1, 1e-4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind.__name__)
@pytest.mark.parametrize("w", WEIGHTS)
def test_every_average_of_a_rule_is_written_so(row: Row, w: float) -> None:
    """The rule itself in float32, all its averages of the weight w, against float64."""
    case = row.cases[""]
    (group,) = case([torch.zeros(1, requires_grad=True)]).param_groups
    rule = bind(case.kind.rule_of(group), np)
    values = case.kind.coefficients(3.0, group)
    for name in [name for name in values if name.startswith("stay")]:
        values |= average(name.removeprefix("stay"), w)
    total = row.kind is SimplifiedAdEMAMix
    if total:
        values["pull1"] *= w
    random = np.random.default_rng(0)
    slots = case.slots
    p, g, *old = (random.standard_normal(1000) * 10.0 ** random.integers(-4, 4, 1000) for _ in range(2 + len(slots)))
    old[-1] = old[-1] ** 2
    p, g, *old = (x.astype(np.float32) for x in (p, g, *old))
    given = {name: np.float32(values[name]) for name in coefficient_names(rule)}
    with np.errstate(all="ignore"):
        _, *new = rule(p, g, *old, **given)
    for name, m, found in zip(slots, old, new, strict=True):
        x = g.astype(np.float64) ** 2 if name.endswith("_sq") else g.astype(np.float64)
        weight = 1.0 if total and not name.endswith("_sq") else w
        size = np.abs((1.0 - w) * m) + np.abs(weight * x)
        assert (np.abs(found - ((1.0 - w) * m.astype(np.float64) + weight * x)) <= 16 * EPS * size).all(), name


def test_adana_s_first_step_forgets_what_was_there_as_its_weight_says() -> None:
    """delta / (delta + 1) = 8 / 9 of the first gradient."""
    p = torch.zeros(1, requires_grad=True)
    optimizer = ADana([p], backend="eager")
    p.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].item() == np.float32(8.0 / 9.0)
