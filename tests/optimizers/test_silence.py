"""Rows whose gradients stop: the slow average is limited by the root mean square of the gradients."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ademamix
from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix
from ademamix.backends import bind
from ademamix.convert import from_adamw, from_authors, to_adamw

LIMITED = (AdEMAMix, SimplifiedAdEMAMix, KEMA)
EACH = pytest.mark.parametrize("kind", LIMITED, ids=lambda kind: kind.__name__)

# Horizons a hundredth as long as the defaults, so that silence is over in hundreds of steps. In units of lr: what
# constant gradients move by in a step, that is, how large the slow part may be.
SHORT: dict[str, tuple[type[RuleOptimizer], dict[str, Any], float]] = {
    "AdEMAMix": (AdEMAMix, {"betas": (0.9, 0.9, 0.99), "alpha": 2.0}, 2.0),
    "AdEMAMix, alpha 8": (AdEMAMix, {"betas": (0.9, 0.9, 0.99), "alpha": 8.0}, 8.0),
    "AdEMAMix, beta1 0": (AdEMAMix, {"betas": (0.0, 0.9, 0.99)}, 2.0),
    "AdEMAMix, warmups": (
        AdEMAMix,
        {"betas": (0.9, 0.9, 0.99), "alpha": 8.0, "alpha_warmup": 100, "beta3_warmup": 100},
        8.0,
    ),
    "AdEMAMix, log-time": (AdEMAMix, {"betas": (0.9, 0.9, 0.99), "beta3_schedule": "log-time", "alpha": 1.0}, 3.0),
    "SimplifiedAdEMAMix": (SimplifiedAdEMAMix, {"betas": (0.99, 0.9)}, 100.0),
    "KEMA": (KEMA, {"count": 2, "longest": 100.0, "beta2": 0.9, "power": 0.5}, 10.0**0.5),
    "KEMA of four": (KEMA, {"count": 4, "shortest": 2.0, "longest": 100.0, "beta2": 0.9, "power": 1.0}, 3.0),
}
ACTIVE, SILENT = 100, 900  # (0.99 / 0.9**0.5)**t: a quotient of 1e-2 would grow to 1e16 and more


def steps_of(optimizer: RuleOptimizer, p: Tensor, g: Tensor, *, lr: float = 1.0) -> np.ndarray[Any, Any]:
    """The sizes of a row's steps in units of lr. lr is a power of two."""
    p.grad, before = g, p.detach().clone()
    optimizer.step()
    moved = (p.detach() - before).double().abs() / lr
    p.data.zero_()  # so that no step is rounded away
    return moved.numpy()


def silence(kind: type[RuleOptimizer], options: dict[str, Any], **others: Any) -> np.ndarray[Any, Any]:
    """Steps [t, row, column] after the gradients have stopped."""
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(8, 16, requires_grad=True)
    optimizer = kind([p], lr=1.0, weight_decay=0.0, **options, **others)
    for _ in range(ACTIVE):
        steps_of(optimizer, p, 0.5 + torch.randn(p.shape, generator=generator))
    return np.stack([steps_of(optimizer, p, torch.zeros(p.shape)) for _ in range(SILENT)])


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", SHORT)
def test_a_row_that_falls_silent_takes_no_step_above_that_of_constant_gradients(name: str, backend: str) -> None:
    kind, options, most = SHORT[name]
    steps = silence(kind, options, backend=backend)
    # The first one has the momentum's step of AdamW with it, below 1 here where gradients have a mean of 0.5.
    assert steps.max() <= (1.0 + most) * (1 + 1e-5)
    fast = 50  # 0.9**50 of it: 5e-3
    assert steps[fast:].max() <= most * (1 + 1e-2)
    # r times the limit counts as 1 / r of it, and r grows by a = 0.99 / 0.9**0.5 a step: most (1 + 1 / ln a) before
    # r is 1 and as much after.
    growth = np.log(0.99 / 0.9**0.5)
    assert steps[fast:].sum(0).max() <= 2 * most * (1 + 1 / growth)
    without = silence(kind, options, backend="eager", slow_limit=None)
    assert without.max() > 1e4  # the paper's


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_with_the_default_arguments_steps_stay_below_1_plus_alpha(backend: str) -> None:
    """The worst in a silence: when v has been forgotten to where it is as small as eps. The states are those of 5,000
    normal gradients and so many steps without one, set by hand."""
    p = torch.zeros(8, 16, requires_grad=True)
    optimizer = AdEMAMix([p], lr=1.0, backend=backend)
    steps_of(optimizer, p, torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    worst = 0.0
    for silent in range(0, 200_000, 2_000):
        state = optimizer.state[p]
        state["step"].fill_(5_000 + silent)
        state["exp_avg_fast"].zero_()
        state["exp_avg_slow"].fill_(0.4 * 0.9999**silent)
        state["exp_avg_sq"].fill_(0.999**silent)
        worst = max(worst, steps_of(optimizer, p, torch.zeros(p.shape)).max())
    assert 1.0 <= worst <= 2.0 * (1 + 1e-5)


@pytest.mark.parametrize("state", ["float32", "bfloat16", "compact"])
@EACH
def test_in_every_format(kind: type[RuleOptimizer], state: str) -> None:
    """Those of low-bit state lose silent rows' numbers as these become small; no step gets larger by that."""
    _, options, most = SHORT[kind.__name__]
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(64, 256, requires_grad=True)
    optimizer = kind([p], lr=1.0, weight_decay=0.0, state=state, **options)
    for _ in range(ACTIVE):
        steps_of(optimizer, p, 0.5 + torch.randn(p.shape, generator=generator))
    live = torch.zeros(64, 1)
    live[::2] = 1.0
    largest = max(
        steps_of(optimizer, p, live * torch.randn(p.shape, generator=generator))[1::2].max() for _ in range(300)
    )
    # 8 bits of the fast average are off by 1 / 254 of the block's largest, and those of v by a sixteenth of itself.
    assert largest <= (1.0 + most) * 1.1


@EACH
def test_where_gradients_go_on_nothing_changes(kind: type[RuleOptimizer]) -> None:
    """Bit for bit: noise, a mean with noise, and rows of any sparsity, with the default arguments."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 50, generator=generator)
    density, mean = torch.tensor([[1.0], [0.5], [0.1], [1.0], [0.5], [0.1]]), torch.tensor([[0.0]] * 3 + [[1.0]] * 3)
    params = [start.clone().requires_grad_() for _ in range(2)]
    both = [kind([p], backend="eager", slow_limit=limit) for p, limit in zip(params, (1.0, None), strict=True)]
    for _ in range(500):
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
    for t in range(2_000):
        for p, optimizer in zip(params, both, strict=True):
            p.grad = torch.full((3,), float(t > 1_900))
            optimizer.step()
    assert torch.equal(*params)


def test_adana_needs_no_limit() -> None:
    """Both of its moments have one decay: |m| <= sqrt(v) by Cauchy and Schwarz, in silence too."""
    p = torch.zeros(8, 16, requires_grad=True)
    optimizer = ADana([p], lr=1.0, eps=0.0)
    generator = torch.Generator().manual_seed(0)
    for t in range(400):
        g = torch.randn(p.shape, generator=generator) if t < 100 else torch.zeros(p.shape)
        largest = steps_of(optimizer, p, g).max()
        if t > 100:
            assert largest <= (2.0 + t) ** 0.15


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


def trained(limit: float | None) -> tuple[float, float]:
    """The loss on the tokens that stay, and the longest way of a row whose token no longer occurs."""
    torch.manual_seed(0)
    model, generator = Words(), torch.Generator().manual_seed(0)
    options = {"betas": (0.9, 0.9, 0.99), "alpha": 8.0, "slow_limit": limit}
    optimizer = AdEMAMix(model.parameters(), lr=1e-3, backend="cpu", **options)
    losses = []
    for t in range(700):
        if t == 200:
            before = model.table.weight.detach().clone()
        text = torch.randint(32 if t < 200 else 16, (64,), generator=generator)
        text[1::2] = (text[::2] * 5 + 3) % 16  # something to learn
        optimizer.zero_grad()
        loss = model.loss(text)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses[-50:])), (model.table.weight - before)[16:].abs().max().item()


def test_tokens_that_no_longer_occur_stay_where_they_were() -> None:
    (loss, way), (loss_without, way_without) = trained(1.0), trained(None)
    assert way < 1.0 < 1e3 < way_without  # weights are of size 1
    assert loss < loss_without + 0.01


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


def test_pickles_of_before_the_limit_have_none() -> None:
    p = torch.ones(5, requires_grad=True)
    optimizer = AdEMAMix([p], backend="eager")
    for group in (optimizer.defaults, *optimizer.param_groups):
        del group["slow_limit"]
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    assert [group["slow_limit"] for group in loaded.param_groups] == [None, None]


def test_what_other_programs_have_saved() -> None:
    """The authors' AdEMAMix has no limit, so its runs go on without one; a run of AdamW's begins as the optimizer says."""
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


@EACH
def test_the_state_that_silence_leaves_is_the_rule_s(kind: type[RuleOptimizer]) -> None:
    """The limit is on what is made of the averages, not on these: it holds nothing back that gradients bring back."""
    rule = kind.rule_of(kind([torch.zeros(1, requires_grad=True)]).param_groups[0])
    assert "limit" in bind(rule, np).__code__.co_varnames
    assert set(ademamix.__all__) >= {kind.__name__}
