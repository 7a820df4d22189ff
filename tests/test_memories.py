"""The library's rules, composed of a memory and a geometry, against the same rules written in one piece."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy as xp
import pytest
import torch

from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix, geometries, memories
from ademamix.backends import Rule, bind, coefficient_names, eager, slot_names, with_numbers
from ademamix.engine.tracing import composed, traced
from ademamix.optimizers.hyperparameters import average

# --------------------------------------------------------------------------------- in one piece


def limited(u: Any, fast: Any, slow: Any, exp_avg_sq: Any, floor: Any, root: Any) -> Any:
    over, share = floor * slow * slow > exp_avg_sq, floor * slow
    return xp.where(over, fast * share + exp_avg_sq, u) / xp.where(over, share * root, root)


def ademamix(
    p: Any,
    g: Any,
    exp_avg_fast: Any,
    exp_avg_slow: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    alpha: Any,
    w1: Any,
    stay1: Any,
    pull1: Any,
    w2: Any,
    stay2: Any,
    pull2: Any,
    w3: Any,
    stay3: Any,
    pull3: Any,
    debias1: Any,
    debias2: Any,
    floor: Any,
) -> Any:
    exp_avg_fast = stay1 * exp_avg_fast + w1 * (g - pull1 * exp_avg_fast)
    exp_avg_slow = stay3 * exp_avg_slow + w3 * (g - pull3 * exp_avg_slow)
    exp_avg_sq = stay2 * exp_avg_sq + w2 * (g * g - pull2 * exp_avg_sq)
    fast, slow = debias1 * exp_avg_fast, alpha * exp_avg_slow
    root = debias2 * xp.sqrt(exp_avg_sq) + eps
    update = limited(fast + slow, fast, slow, exp_avg_sq, floor, root)
    return p - lr * (update + weight_decay * p), exp_avg_fast, exp_avg_slow, exp_avg_sq


def adamw(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    w1: Any,
    stay1: Any,
    pull1: Any,
    w2: Any,
    stay2: Any,
    pull2: Any,
    debias1: Any,
    debias2: Any,
) -> Any:
    exp_avg = stay1 * exp_avg + w1 * (g - pull1 * exp_avg)
    exp_avg_sq = stay2 * exp_avg_sq + w2 * (g * g - pull2 * exp_avg_sq)
    update = debias1 * exp_avg / (debias2 * xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), exp_avg, exp_avg_sq


def simplified_ademamix(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    alpha: Any,
    stay1: Any,
    pull1: Any,
    w2: Any,
    stay2: Any,
    pull2: Any,
    debias2: Any,
    floor: Any,
) -> Any:
    exp_avg = stay1 * exp_avg + (g - pull1 * exp_avg)
    exp_avg_sq = stay2 * exp_avg_sq + w2 * (g * g - pull2 * exp_avg_sq)
    root = debias2 * xp.sqrt(exp_avg_sq) + eps
    update = limited(exp_avg + alpha * g, alpha * g, exp_avg, exp_avg_sq, floor, root)
    return p - lr * (update + weight_decay * p), exp_avg, exp_avg_sq


def adana(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    alpha: Any,
    w2: Any,
    stay2: Any,
    pull2: Any,
) -> Any:
    exp_avg = stay2 * exp_avg + w2 * (g - pull2 * exp_avg)
    exp_avg_sq = stay2 * exp_avg_sq + w2 * (g * g - pull2 * exp_avg_sq)
    update = (g + alpha * exp_avg) / (xp.sqrt(exp_avg_sq) + eps)
    return p - lr * (update + weight_decay * p), exp_avg, exp_avg_sq


def kema_3(
    p: Any,
    g: Any,
    exp_avg_1: Any,
    exp_avg_2: Any,
    exp_avg_3: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    weight_decay: Any,
    eps: Any,
    w2: Any,
    stay2: Any,
    pull2: Any,
    debias2: Any,
    floor: Any,
    w_1: Any,
    stay_1: Any,
    pull_1: Any,
    a_1: Any,
    w_2: Any,
    stay_2: Any,
    pull_2: Any,
    a_2: Any,
    w_3: Any,
    stay_3: Any,
    pull_3: Any,
    a_3: Any,
) -> Any:
    exp_avg_1 = stay_1 * exp_avg_1 + w_1 * (g - pull_1 * exp_avg_1)
    exp_avg_2 = stay_2 * exp_avg_2 + w_2 * (g - pull_2 * exp_avg_2)
    exp_avg_3 = stay_3 * exp_avg_3 + w_3 * (g - pull_3 * exp_avg_3)
    exp_avg_sq = stay2 * exp_avg_sq + w2 * (g * g - pull2 * exp_avg_sq)
    fast, slow = a_1 * exp_avg_1, a_2 * exp_avg_2 + a_3 * exp_avg_3
    u = fast + a_2 * exp_avg_2 + a_3 * exp_avg_3
    root = debias2 * xp.sqrt(exp_avg_sq) + eps
    update = limited(u, fast, slow, exp_avg_sq, floor, root)
    return p - lr * (update + weight_decay * p), exp_avg_1, exp_avg_2, exp_avg_3, exp_avg_sq


def kema(count: int) -> Rule:
    return KEMA.rule_of({"count": count})


def on_eager(rule: Rule, tensors: list[torch.Tensor], coefficients: dict[str, float]) -> list[torch.Tensor]:
    number = np.float64 if tensors[0].dtype == torch.float64 else np.float32
    bound = bind(rule, eager.xp, lambda f: with_numbers(f, number))
    given = {name: number(coefficients[name]) for name in coefficient_names(rule)}
    return [x.tensors[0] for x in bound(*(eager.Tensors([t]) for t in tensors), **given)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rule", "whole"),
    [
        (AdEMAMix.rule, ademamix),
        (AdamW.rule, adamw),
        (SimplifiedAdEMAMix.rule, simplified_ademamix),
        (ADana.rule, adana),
        (kema(3), kema_3),
    ],
    ids=lambda rule: rule.__name__,
)
def test_a_composed_rule_has_the_bits_of_the_one_in_one_piece(rule: Rule, whole: Rule, dtype: torch.dtype) -> None:
    assert rule.__name__ == whole.__name__
    assert slot_names(rule) == slot_names(whole)
    generator = torch.Generator().manual_seed(0)
    p, g, *slots = (torch.randn(10_000, dtype=dtype, generator=generator) for _ in range(2 + len(slot_names(rule))))
    slots[-1].abs_()  # the second moment
    names = sorted({*coefficient_names(rule), *coefficient_names(whole)})
    coefficients = dict(zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True))
    for name in [name for name in names if name[0] == "w" and name != "weight_decay"]:  # else squares may be negative
        coefficients |= average(name[1:], coefficients[name])
    if whole is adana:  # both moments have one decay there, and no bias correction
        coefficients |= {f"{name}1": coefficients[f"{name}2"] for name in ("w", "stay", "pull")} | {"debias2": 1.0}
    found, expected = (on_eager(f, [p, g, *slots], coefficients) for f in (rule, whole))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("rule", "digest"),
    [
        (AdEMAMix.rule, "edf998cc031e020b8d7830e1f0afcafae38888f170ca0b7c222d5fd5f233c0b0"),
        (AdamW.rule, "866f4e688790f4561768d25e48a67ec6717e09a9a4b7b97aa7bd5c8cad793db5"),
        (SimplifiedAdEMAMix.rule, "0eb2a3db893461cb0d076a2307e2c974fd2ad1ae3a2cd3d8f262d66420a17b25"),
        (ADana.rule, "85961d9272e42872763f0f79a1a55c2b4caed2e2a619bead9d79447bb1dfded6"),
        (kema(2), "f0b734caf20f645a29b79dbe9a989c1aecc6e4915141eb143c6815dab3dbed26"),
        (kema(3), "2c99d72dae5dd3933e0b983a3497b46b2f860b908a17cc5ad94a02c557e3486e"),
        (kema(8), "906d0648721f441b5a43d946202905f27d72cf00a58444278c7cec600c360527"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_arithmetic_of_a_rule_is_what_it_was(rule: Rule, digest: str) -> None:
    """Digests of the operations, one a line. A change of one changes results, or the order of temporaries at least."""
    assert traced(rule) is rule
    _, _, body = inspect.getsource(rule).partition("\n")
    assert hashlib.sha256(body.encode()).hexdigest() == digest


# --------------------------------------------------------------------------------- a memory of one's own


def agreeing(g: Any, short: Any, long: Any, *, alpha: Any, w_short: Any, w_long: Any) -> Any:
    short = short + w_short * (g - short)
    long = long + w_long * (g - long)
    return short + xp.where(short * long > 0.0, alpha * long, 0.0), short, long


class Agreeing(RuleOptimizer):
    rule = staticmethod(composed(agreeing, geometries.adam))

    def __init__(self, params: Any, lr: float = 1e-2, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)

    @staticmethod
    def check(group: Any) -> None: ...

    @staticmethod
    def coefficients(step: Any, group: Any) -> dict[str, Any]:
        adam = {"lr": group["lr"], "weight_decay": 0.1, "eps": 1e-8, **average("2", 0.01), "debias2": 1.0}
        return {**adam, "alpha": 2.0, "w_short": 0.1, "w_long": 0.01}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_memory_of_one_s_own_makes_an_optimizer(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(500, dtype=torch.float64, generator=generator).requires_grad_()
    optimizer = Agreeing([p], backend=backend)
    exact, short, long, mean_sq = p.detach().numpy().copy(), np.zeros(500), np.zeros(500), np.zeros(500)
    for _ in range(5):
        p.grad = torch.randn(500, dtype=torch.float64, generator=generator)
        optimizer.step()
        g = p.grad.numpy()
        short, long, mean_sq = 0.9 * short + 0.1 * g, 0.99 * long + 0.01 * g, 0.99 * mean_sq + 0.01 * g**2
        u = short + np.where(short * long > 0, 2.0 * long, 0.0)
        exact -= 1e-2 * (u / (np.sqrt(mean_sq) + 1e-8) + 0.1 * exact)
    np.testing.assert_allclose(p.detach().numpy(), exact, rtol=1e-12)
    assert list(optimizer.state[p]) == ["step", "short", "long", "exp_avg_sq"]


def made(text: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"xp": xp}
    exec(text, scope)
    return scope["mine"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mine(*, w): return w,", r"a memory takes \(g, \*slots, \*, coefficients\), .* got \[\]"),
        ("def mine(g, m=0): return g, m", "a slot starts at 0 and has no default .* got m=0"),
        (
            "def mine(g, exp_avg_sq): return g, exp_avg_sq",
            r"no other argument's name, .* adam too, got \['exp_avg_sq'\]",
        ),
        ("def mine(g, m, *, p): return g, m", r"no other argument's name, .* got \['p'\]"),
        ("def mine(g, m): return m", r"a memory returns a tuple of 2, the new \(u, m\), got no tuple"),
        ("def mine(g, m, *, w): return w, m", "the new u must have p's shape, got a coefficient"),
        ("def mine(g, m): return g ** 2, m", r"in the rule mine: \*\* is not there on all backends"),
    ],
)
def test_what_is_no_memory_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed(made(text), geometries.adam)


def test_a_coefficient_that_both_name_is_one() -> None:
    rule = composed(made("def mine(g, m, *, eps, w): return g + eps * m, w * g"), geometries.adam)
    assert coefficient_names(rule) == ("lr", "weight_decay", "eps", "w2", "stay2", "pull2", "debias2", "w")


def test_the_memories_of_kema_are_made_once() -> None:
    assert memories.kema(3) is memories.kema(3)
    assert kema(3) is kema(3)
    assert list(inspect.signature(memories.kema(2)).parameters)[:3] == ["g", "exp_avg_1", "exp_avg_2"]
