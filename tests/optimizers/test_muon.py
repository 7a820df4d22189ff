"""Every memory in Muon's geometry against the equations in float64, and Muon against torch's."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.optim

from ademamix import KEMA, AdamW, ADana, AdEMAMix, Muon, RuleOptimizer, SimplifiedAdEMAMix, optimizer_from

Array = Any

STEPS, SHAPE = 14, (12, 8)
BACKENDS = pytest.mark.parametrize("backend", ["eager", "cpu"])


def rates() -> Array:
    """A linear warmup, and a cosine down to a tenth."""
    t = np.arange(1, STEPS + 1)
    return 1e-2 * np.minimum(t / 4, 0.55 + 0.45 * np.cos(np.pi * t / STEPS))


# --------------------------------------------------------------------------------- the equations


def iterated(u: Array, a: float, b: float, c: float, steps: int, eps: float) -> Array:
    """Keller Jordan's: X = a X + (b A + c A^2) X with A = X X^T, of the side that has fewer rows."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / max(np.sqrt((x * x).sum()), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def half_lives(t: int, start: float, end: float, warmup: float) -> float:
    """A decay whose half-life goes from that of start to that of end, linearly."""
    share = min(t / warmup, 1.0)
    halves = [0.0 if beta == 0.0 else math.log(0.5) / math.log(beta) for beta in (start, end)]
    return 0.5 ** (1.0 / ((1.0 - share) * halves[0] + share * halves[1]))


def adamw(grads: Array) -> Iterator[Array]:
    m = 0.0
    for t, g in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * g
        yield m / (1 - 0.9**t)


def ademamix(grads: Array, beta1: float = 0.9, warm: bool = True) -> Iterator[Array]:
    """beta3 = 0.999, alpha = 5; both warm up, over 5 and 7 steps."""
    fast = slow = 0.0
    for t, g in enumerate(grads, start=1):
        beta3, alpha = (half_lives(t, 0.9, 0.999, 5), 5.0 * min(t / 7, 1.0)) if warm else (0.999, 5.0)
        fast, slow = beta1 * fast + (1 - beta1) * g, beta3 * slow + (1 - beta3) * g
        yield fast / (1 - beta1**t) + alpha * slow


def log_time(grads: Array) -> Iterator[Array]:
    """delta = 4, kappa = 0.9, alpha = 0.5."""
    fast = slow = 0.0
    for t, g in enumerate(grads, start=1):
        fast, slow = 0.9 * fast + 0.1 * g, t / (4 + t) * slow + 4 / (4 + t) * g
        yield fast / (1 - 0.9**t) + 0.5 * (1 + t) ** 0.1 * slow


def simplified(grads: Array) -> Iterator[Array]:
    """beta1 from 0.8 to 0.99 over 6 steps, alpha = 3."""
    m = 0.0
    for t, g in enumerate(grads, start=1):
        m = half_lives(t, 0.8, 0.99, 6) * m + g
        yield m + 3.0 * g


def adana(grads: Array) -> Iterator[Array]:
    """delta = 6, kappa = 0.75."""
    m = 0.0
    for t, g in enumerate(grads, start=1):
        m = t / (6 + t) * m + 6 / (6 + t) * g
        yield g + (1 + t) ** 0.25 * m


def kema(grads: Array, count: int, shortest: float, warmup: float | None) -> Iterator[Array]:
    """Horizons to 80, power 0.6."""
    horizons = np.geomspace(shortest, 80.0, count)
    first, averages = 1 - 1 / shortest, [0.0] * count
    for t, g in enumerate(grads, start=1):
        share = min(t / warmup, 1.0) if warmup else 1.0
        betas = [half_lives(t, first, 1 - 1 / h, warmup) if warmup else 1 - 1 / h for h in horizons]
        averages = [b * m + (1 - b) * g for b, m in zip(betas, averages, strict=True)]
        weights = share * (horizons / shortest) ** 0.4
        yield averages[0] / (1 - first**t) + sum(w * m for w, m in zip(weights[1:], averages[1:], strict=True))


def muon(grads: Array, nesterov: bool) -> Iterator[Array]:
    m = 0.0
    for g in grads:
        m = 0.95 * m + 0.05 * g
        yield 0.95 * m + 0.05 * g if nesterov else m


def heavy(g: Any, m: Any, *, beta: Any = 0.8, k: Any) -> Any:
    m = beta * m + g
    return m + k * g, m


Heavy = optimizer_from(heavy, lambda step, *, start=2.0: {"k": start / step})


def heavy_ball(grads: Array) -> Iterator[Array]:
    m = 0.0
    for t, g in enumerate(grads, start=1):
        m = 0.8 * m + g
        yield m + 3.0 / t * g


WARM = {"alpha": 5.0, "beta3_warmup": 5, "alpha_warmup": 7}
OF_KEMA = {"power": 0.6, "longest": 80.0}
CASES: dict[str, tuple[Callable[[Array], Iterator[Array]], type[RuleOptimizer], dict[str, Any]]] = {
    "AdamW": (adamw, AdamW, {}),
    "AdEMAMix": (lambda g: ademamix(g, warm=False), AdEMAMix, {"betas": (0.9, 0.999, 0.999), "alpha": 5.0}),
    "AdEMAMix, warmups": (ademamix, AdEMAMix, {"betas": (0.9, 0.999, 0.999), **WARM}),
    "AdEMAMix, beta1 = 0": (
        lambda g: ademamix(g, 0.0, warm=False),
        AdEMAMix,
        {"betas": (0.0, 0.999, 0.999), "alpha": 5.0},
    ),
    "AdEMAMix, log-time": (
        log_time,
        AdEMAMix,
        {"alpha": 0.5, "beta3_schedule": "log-time", "delta": 4.0, "kappa": 0.9},
    ),
    "SimplifiedAdEMAMix": (
        simplified,
        SimplifiedAdEMAMix,
        {"betas": (0.99, 0.9), "alpha": 3.0, "beta1_warmup": 6, "min_beta1": 0.8},
    ),
    "ADana": (adana, ADana, {"delta": 6.0, "kappa": 0.75}),
    "KEMA": (lambda g: kema(g, 3, 5.0, None), KEMA, {"shortest": 5.0, **OF_KEMA}),
    "KEMA, warmup": (lambda g: kema(g, 4, 5.0, 6), KEMA, {"count": 4, "shortest": 5.0, "warmup": 6, **OF_KEMA}),
    "KEMA, without a first EMA": (lambda g: kema(g, 2, 1.0, None), KEMA, {"count": 2, "shortest": 1.0, **OF_KEMA}),
    "Muon": (lambda g: muon(g, True), Muon, {}),
    "Muon without nesterov": (lambda g: muon(g, False), Muon, {"nesterov": False}),
    "one's own": (heavy_ball, Heavy, {"start": 3.0}),
}


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float64, "eager"), (torch.float32, "cpu")], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_trajectories_are_those_of_the_equations(case: str, dtype: torch.dtype, backend: str) -> None:
    directions, kind, options = CASES[case]
    random = np.random.default_rng(0)
    start, grads = random.standard_normal(SHAPE, np.float32), random.standard_normal((STEPS, *SHAPE), np.float32)
    p = torch.tensor(start, dtype=dtype, requires_grad=True)
    optimizer = kind([p], geometry="muon", weight_decay=0.1, backend=backend, **options)
    scale = math.sqrt(12 / 8) if kind is Muon else 0.2 * math.sqrt(12)
    expected = start.astype(np.float64)
    # A direction errs by some 20 roundings of numbers of the size of its largest; the iteration multiplies that by at
    # most 3.4445^5 = 485, over a norm that is sqrt(96) of its elements. Each step of lr adds as much, and a parameter
    # is rounded by a unit of its size, at most 4, twice.
    unit = torch.finfo(dtype).eps
    tolerance = 0.0
    for lr, g, u in zip(rates(), grads, directions(grads.astype(np.float64)), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        made = scale * iterated(u, 3.4445, -4.7750, 2.0315, 5, 0.0)
        expected = expected - lr * (made + 0.1 * expected)
        tolerance += unit * (lr * scale * 485 * 20 / math.sqrt(96) + 2 * 4)
        assert np.abs(p.detach().numpy() - expected).max() <= tolerance
    assert "exp_avg_sq" not in optimizer.state[p]


def test_weight_decay_by_the_step_decays_in_muon_s_geometry_too() -> None:
    """ADana's omega / t, multiplied by lr's schedule."""
    p = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = ADana([p], geometry="muon", lr=0.02, weight_decay=0.5, omega=0.25, peak_lr=0.1)
    expected = 1.0
    for t in range(1, 6):
        p.grad = torch.zeros(4, 4, dtype=torch.float64)
        optimizer.step()
        expected *= 1.0 - 0.02 * 0.5 - 0.02 / 0.1 * 0.25 / t
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-14)


# --------------------------------------------------------------------------------- torch's Muon

torch_s = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.8, "nesterov": False, "weight_decay": 0.0},
    {"momentum": 0.0, "eps": 3.0},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "adjust_lr_fn": "match_rms_adamw"},
    {"adjust_lr_fn": "original", "ns_steps": 7, "weight_decay": 0.3},
    {"lr": torch.tensor(3e-3, dtype=torch.float64)},
]


def in_float64(grad: torch.Tensor, coefficients: Any, steps: int, eps: float) -> torch.Tensor:
    """torch's iteration, without its cast to bfloat16."""
    return torch.tensor(iterated(grad.numpy(), *coefficients, steps, eps))


def pair(dtype: torch.dtype, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(s, dtype=dtype, generator=generator) for s in ((10, 6), (6, 10), (7, 7), (1, 5), (30, 1))]
    ours = [p.clone().requires_grad_() for p in theirs]
    theirs = [p.requires_grad_() for p in theirs]
    options = {"lr": 1e-2, **options}
    return theirs, torch.optim.Muon(theirs, **options), ours, Muon(ours, **options)


def step_both(theirs: Any, reference: Any, ours: Any, optimizer: Any, t: int) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for p, q in zip(theirs, ours, strict=True):
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        q.grad = p.grad.clone()
    reference.step()
    optimizer.step()


@torch_s
@pytest.mark.parametrize("options", ARGUMENTS, ids=str)
def test_muon_is_torch_s_step_by_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", in_float64)
    theirs, reference, ours, optimizer = pair(torch.float64, **options)
    for t in range(8):
        step_both(theirs, reference, ours, optimizer, t)
        for p, q in zip(theirs, ours, strict=True):
            # A direction of few roundings, which the iteration multiplies by some hundred (at most 3.4445^5 or ^7).
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
            buffers = reference.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"]
            torch.testing.assert_close(*buffers, rtol=1e-14, atol=1e-15)


@torch_s
def test_torch_s_bfloat16_is_the_only_other_difference() -> None:
    """Three products in a step, each rounded by 2^-9; b A and c A^2 are three times as large as their sum, and the last
    two steps make no error much smaller."""
    for options in ({}, {"adjust_lr_fn": "match_rms_adamw"}):
        theirs, reference, ours, optimizer = pair(torch.float32, weight_decay=0.0, **options)
        for t in range(5):
            before = [p.detach().clone() for p in theirs]
            with torch.no_grad():
                for p, q in zip(theirs, ours, strict=True):
                    q.copy_(p)
            step_both(theirs, reference, ours, optimizer, t)
            for p, q, old in zip(theirs, ours, before, strict=True):
                assert (p - q).norm() <= 2 * 3 * 3 * 2.0**-9 * (p - old).norm() + 1e-6 * old.norm()


def test_muon_s_arguments_are_torch_s() -> None:
    group = Muon([torch.zeros(2, 2, requires_grad=True)]).param_groups[0]
    expected = {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": True,
        "ns_coefficients": (3.4445, -4.7750, 2.0315),
        "eps": 1e-7,
        "ns_steps": 5,
        "adjust_lr_fn": None,
    }
    assert {name: group[name] for name in expected} == expected
    if hasattr(torch.optim, "Muon"):
        theirs = torch.optim.Muon([torch.zeros(2, 2, requires_grad=True)]).defaults
        assert {name: group[name] for name in theirs} == theirs
    p = torch.zeros(2, 2, requires_grad=True)
    given = Muon([p], 0.1, 0.2, 0.3, False, (1, 2, 3), 0.4, 6, "original").param_groups[0]
    assert [given[name] for name in expected] == [0.1, 0.2, 0.3, False, (1.0, 2.0, 3.0), 0.4, 6, "original"]


@torch_s
@pytest.mark.parametrize("state", ["float32", "compact"])
def test_a_run_of_torch_s_muon_goes_on(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", in_float64)
    theirs, reference, ours, _ = pair(torch.float64, momentum=0.9)
    for t in range(3):
        step_both(theirs, reference, ours, Muon(ours), t)
    with torch.no_grad():
        for p, q in zip(theirs, ours, strict=True):
            q.copy_(p)
    optimizer = Muon(ours, state=state)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert [float(optimizer.state[q]["step"]) for q in ours] == [0.0] * len(ours)
    for t in range(3, 6):
        step_both(theirs, reference, ours, optimizer, t)
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    back = torch.optim.Muon(theirs)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_both(theirs, back, ours, optimizer, 6)
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_of_vectors_are_adamw_s(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs, matrix = (torch.randn(s, generator=generator).to(dtype) for s in ((40,), (40,), (4, 6)))
    theirs.copy_(ours)
    for p in (ours, theirs, matrix):
        p.requires_grad_()
    options = {"weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-6}
    groups = [{"params": [matrix]}, {"params": [ours], "geometry": "adam", "lr": 0.01, **options}]
    optimizer, reference = Muon(groups, backend=backend), AdamW([theirs], lr=0.01, backend=backend, **options)
    for _ in range(5):
        for p in (ours, matrix):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    # Noise is a parameter's by its place among all, so bfloat16 ones are rounded differently.
    unit = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(ours, theirs, rtol=5 * unit, atol=5 * unit)
    assert sorted(optimizer.state[ours]) == ["exp_avg", "exp_avg_sq", "step"]
    assert sorted(optimizer.state[matrix]) == ["momentum_buffer", "step"]
