"""Rows whose gradients stop: the slow EMA is limited by the root mean square of the gradients."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix
from ademamix.convert import from_adamw, from_authors, to_adamw

LIMITED = (AdEMAMix, SimplifiedAdEMAMix, KEMA)
EACH = pytest.mark.parametrize("kind", LIMITED, ids=lambda kind: kind.__name__)

# Horizons a hundredth as long as the defaults, so that silence is over in hundreds of steps; and the slow part's limit,
# in units of lr: what constant gradients make of it, or a little more where an EMA is shorter than that of the squares.
B3 = {"betas": (0.9, 0.9, 0.99)}
SHORT: dict[str, tuple[type[RuleOptimizer], dict[str, Any], float]] = {
    "AdEMAMix": (AdEMAMix, B3, 2.0),
    "AdEMAMix, alpha 8": (AdEMAMix, {**B3, "alpha": 8.0}, 8.0),
    "AdEMAMix, beta1 0": (AdEMAMix, {"betas": (0.0, 0.9, 0.99)}, 2.0),
    "AdEMAMix, warmups": (AdEMAMix, {**B3, "alpha": 8.0, "alpha_warmup": 100, "beta3_warmup": 100}, 8.0),
    "AdEMAMix, log-time": (AdEMAMix, {**B3, "beta3_schedule": "log-time", "alpha": 1.0}, 500.0**0.15),
    "SimplifiedAdEMAMix": (SimplifiedAdEMAMix, {"betas": (0.99, 0.9)}, 100.0),
    "KEMA": (KEMA, {"count": 2, "longest": 100.0, "beta2": 0.9, "power": 0.5}, 10.0**0.5),
    "KEMA of four": (KEMA, {"count": 4, "shortest": 2.0, "longest": 100.0, "beta2": 0.9, "power": 1.0}, 3.36),
}
ACTIVE, SILENT = 100, 400
GROWTH = np.log(0.99 / 0.9**0.5)  # of a slow EMA over root mean squares, in a silent step: 4 %


def step_of(optimizer: RuleOptimizer, p: Tensor, g: Tensor) -> Tensor:
    """The sizes of a step, from 0 on, so that none is rounded away: in units of lr, which is 1."""
    p.data.zero_()
    p.grad = g
    optimizer.step()
    return p.detach().abs().clone()


def silence(kind: type[RuleOptimizer], options: dict[str, Any], backend: str, **others: Any) -> Tensor:
    """Steps [t, element] after normal gradients of a mean have stopped."""
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(16, requires_grad=True)
    optimizer = kind([p], lr=1.0, weight_decay=0.0, backend=backend, **options, **others)
    for _ in range(ACTIVE):
        step_of(optimizer, p, 0.5 + torch.randn(16, generator=generator))
    return torch.stack([step_of(optimizer, p, torch.zeros(16)) for _ in range(SILENT)])


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", SHORT)
def test_a_row_that_falls_silent_takes_no_step_above_that_of_constant_gradients(name: str, backend: str) -> None:
    kind, options, most = SHORT[name]
    steps = silence(kind, options, backend)
    # Where gradients have a mean of half their deviation, the fast part is below 1 and soon gone: 0.9**50 is 5e-3.
    assert steps.max() <= 1.0 + most
    assert steps[50:].max() <= most * (1 + 1e-2)
    if "log-time" not in name:  # where the slow EMA forgets by a power of the time
        # r limits count as 1 / r of one, and r grows geometrically: on its way to 1 it makes at most most / GROWTH, and
        # as much from there; a sum over steps is at most the integral and the largest of them.
        assert steps[50:].sum(0).max() <= 2 * most * (1 + 1 / GROWTH)


@pytest.mark.parametrize("name", SHORT)
def test_without_a_limit_it_takes_steps_without_a_bound(name: str) -> None:
    """Which is what the tests above test."""
    kind, options, _ = SHORT[name]
    assert silence(kind, options, "eager", slow_limit=None).max() > 500.0


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_with_the_default_arguments_steps_stay_below_alpha(backend: str) -> None:
    """A constant gradient for 5,000 steps, then none for up to 200,000: the state is set to what that leaves."""
    p = torch.zeros(16, requires_grad=True)
    optimizer = AdEMAMix([p], lr=1.0, backend=backend)
    step_of(optimizer, p, torch.ones(16))
    state, largest = optimizer.state[p], 0.0
    for silent in range(1_000, 200_000, 1_000):
        state["step"].fill_(5_000 + silent)
        state["exp_avg_fast"].fill_(0.9**silent)
        state["exp_avg_slow"].fill_((1 - 0.9999**5_000) * 0.9999**silent)
        state["exp_avg_sq"].fill_(0.999**silent)
        largest = max(largest, step_of(optimizer, p, torch.zeros(16)).max().item())
    assert 1.0 < largest <= 2.0


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("slow_limit", [0.5, 1.0, 3.0])
def test_above_the_limit_it_is_the_equation(slow_limit: float, backend: str) -> None:
    """h^2 / m2 in the place of m2, in float64; float32 rounds some ten times on its way."""
    p = torch.zeros(200, requires_grad=True)
    optimizer = AdEMAMix([p], lr=1.0, alpha=8.0, slow_limit=slow_limit, backend=backend)
    step_of(optimizer, p, torch.ones(200))
    state, t = optimizer.state[p], 5_000
    m1, m2, v = torch.linspace(-1, 1, 200), torch.logspace(-6, 3, 200), torch.full((200,), 1e-3)
    m2[::2] *= -1.0
    for name, value in (("step", torch.tensor(t - 1.0)), ("fast", m1), ("slow", m2), ("sq", v)):
        state[name if name == "step" else f"exp_avg_{name}"].copy_(value)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999, 0.9999)
    p.data.zero_()
    p.grad = torch.full((200,), 0.01)
    optimizer.step()
    m1, m2, v = 0.9 * m1.double() + 0.1 * 0.01, 0.9999 * m2.double() + 1e-4 * 0.01, 0.999 * v.double() + 1e-3 * 1e-4
    rms = (v / (1 - 0.999**t)).sqrt()
    h = slow_limit * rms
    limited = torch.where(m2.abs() > h, h**2 / m2, m2)
    assert 20 < int((limited != m2).sum()) < 180
    exact = -(m1 / (1 - 0.9**t) + 8.0 * limited) / (rms + 1e-8)
    torch.testing.assert_close(p.detach().double(), exact, rtol=2e-6, atol=2e-6 * 8)


@pytest.mark.parametrize("state", ["float32", "bfloat16", "compact"])
@EACH
def test_in_every_format(kind: type[RuleOptimizer], state: str) -> None:
    """Silent rows among others: what is rounded makes no step larger than what it rounds."""
    _, options, most = SHORT[kind.__name__]
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(16, 256, requires_grad=True)  # one block a row
    optimizer = kind([p], lr=1.0, weight_decay=0.0, state=state, **options)
    for _ in range(ACTIVE):
        step_of(optimizer, p, 0.5 + torch.randn(p.shape, generator=generator))
    g = torch.randn(p.shape, generator=generator)
    g[1::2] = 0.0
    largest = max(step_of(optimizer, p, g)[1::2].max().item() for _ in range(200))
    assert 1.0 < largest <= (1.0 + most) * 1.1  # 8 bits of v are off by up to a sixteenth of it


@EACH
def test_where_gradients_go_on_nothing_changes(kind: type[RuleOptimizer]) -> None:
    """Bit for bit: noise, a mean with noise, and rows of any sparsity, with the default arguments."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 50, generator=generator)
    density, mean = torch.tensor([[1.0], [0.5], [0.1], [1.0], [0.5], [0.1]]), torch.tensor([[0.0]] * 3 + [[1.0]] * 3)
    params = [start.clone().requires_grad_() for _ in range(2)]
    both = [kind([p], backend="eager", slow_limit=limit) for p, limit in zip(params, (1.0, None), strict=True)]
    for _ in range(200):
        g = torch.randn(start.shape, generator=generator) + mean
        g = torch.where(torch.rand(start.shape, generator=generator) < density, g, 0.0)
        for p, optimizer in zip(params, both, strict=True):
            p.grad = g
            optimizer.step()
    assert torch.equal(*params)


def test_an_average_as_short_as_that_of_the_squares_is_never_limited() -> None:
    """A burst after silence: m of horizon 10 is 6 root mean squares of horizon 1,000, in AdamW too."""
    options = {"betas": (0.9, 0.999, 0.9), "alpha": 8.0}
    params = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    both = [AdEMAMix([p], backend="eager", slow_limit=x, **options) for p, x in zip(params, (1.0, None), strict=True)]
    for t in range(500):
        g = torch.full((3,), float(t > 400))
        for p, optimizer in zip(params, both, strict=True):
            p.grad = g
            optimizer.step()
    assert torch.equal(*params)


def test_adana_needs_no_limit() -> None:
    """Both of its moments have one decay: |m| <= sqrt(v) by Cauchy and Schwarz, in silence too."""
    p = torch.zeros(16, requires_grad=True)
    optimizer = ADana([p], lr=1.0, backend="eager")
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 400):
        largest = step_of(optimizer, p, torch.randn(16, generator=generator) if t < 100 else torch.zeros(16)).max()
        assert t < 100 or largest <= (1.0 + t) ** 0.15


@EACH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_nan_still_shows(kind: type[RuleOptimizer], value: float, backend: str) -> None:
    p = torch.zeros(4, requires_grad=True)
    optimizer = kind([p], backend=backend)
    p.grad = torch.tensor([1.0, value, 0.0, -1.0])
    optimizer.step()
    assert p.isnan().tolist() == [False, True, False, False]


# --------------------------------------------------------------------------------- embeddings


class Words(nn.Module):
    """The next token by the last one, with tables of their own for both."""

    def __init__(self, tokens: int = 32, width: int = 8) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(tokens, width), nn.Linear(width, tokens)

    def loss(self, text: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.table(text[:-1])), text[1:])


def trained(limit: float | None, steps: int, stay: int, **options: Any) -> tuple[Words, Tensor]:
    """The model in the end, and its table when the tokens from ``stay`` on occurred for the last time, in step 200."""
    torch.manual_seed(0)
    model, generator = Words(), torch.Generator().manual_seed(0)
    optimizer = AdEMAMix(model.parameters(), lr=1e-3, backend="cpu", alpha=8.0, slow_limit=limit, **options)
    for t in range(steps):
        if t == 200:
            before = model.table.weight.detach().clone()
        text = torch.randint(32 if t < 200 else stay, (64,), generator=generator)
        text[1::2] = (text[::2] * 5 + 3) % stay  # something to learn
        optimizer.zero_grad()
        model.loss(text).backward()
        optimizer.step()
    return model, before


def test_tokens_that_no_longer_occur_stay_where_they_were() -> None:
    ways = []
    for limit in (1.0, None):
        model, before = trained(limit, 500, 16, **B3)
        ways.append((model.table.weight - before)[16:].abs().max().item())
    # 2 most (1 + 1 / GROWTH) = 400 lr at the very most, where weights are of size 1
    assert ways[0] < 0.4 < 1e2 < ways[1]


def test_a_language_model_whose_tokens_all_occur_is_unchanged() -> None:
    """Bit for bit, though half of the rows have no gradient in a step."""
    (one, _), (other, _) = (trained(limit, 400, 32, betas=(0.9, 0.99, 0.999)) for limit in (1.0, None))
    assert all(map(torch.equal, one.parameters(), other.parameters()))


# --------------------------------------------------------------------------------- files and arguments


@EACH
def test_what_was_saved_without_a_limit_goes_on_without(kind: type[RuleOptimizer]) -> None:
    p = torch.ones(5, requires_grad=True)
    optimizer = kind([p], backend="eager")
    p.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.param_groups[0]["slow_limit"] == 1.0
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["slow_limit"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["slow_limit"] is None
    optimizer.load_state_dict(kind([p], slow_limit=2.0).state_dict())
    assert optimizer.param_groups[0]["slow_limit"] == 2.0


def test_what_other_programs_have_saved() -> None:
    """The authors' AdEMAMix has no limit, so its runs continue without one. A run of AdamW's takes the class's."""
    p = torch.ones(5, requires_grad=True)
    ours, adamw = AdEMAMix([p], backend="eager"), AdamW([p], backend="eager")
    for optimizer in (ours, adamw):
        p.grad = torch.ones(5)
        optimizer.step()
    authors = ours.state_dict()
    authors["param_groups"] = [{k: x for k, x in authors["param_groups"][0].items() if k != "slow_limit"}]
    ours.load_state_dict(from_authors(authors))
    assert ours.param_groups[0]["slow_limit"] is None
    ours.param_groups[0]["slow_limit"] = 3.0
    assert "slow_limit" not in to_adamw(ours.state_dict())["param_groups"][0]
    ours.load_state_dict(from_adamw(adamw.state_dict(), ours))
    assert ours.param_groups[0]["slow_limit"] == 3.0


@EACH
def test_each_group_has_its_own(kind: type[RuleOptimizer]) -> None:
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = kind([{"params": [p], "slow_limit": None}, {"params": [q]}], backend="cpu")
    p.grad = q.grad = torch.ones(2)
    optimizer.step()
    assert [group["slow_limit"] for group in optimizer.param_groups] == [None, 1.0]
