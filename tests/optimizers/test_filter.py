"""Memories as filters of gradients: GradientMemory, between backward and another optimizer's step."""

import copy
import io
import pickle
from math import exp, log
from typing import Any

import pytest
import torch
from torch import nn

import ademamix
from ademamix import KEMA, AdamW, ADana, AdEMAMix, GradientMemory, Muon, RuleOptimizer, SimplifiedAdEMAMix
from ademamix.engine.launches import Launches

BACKENDS = ("eager", "cpu")
SHAPES = ((64, 96), (5,), (3, 700), ())
EPS = torch.finfo(torch.float32).eps


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def give(params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()


def directions(memory: RuleOptimizer, params: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a step makes of the gradients."""
    give(params, grads)
    memory.step()
    return [p.grad for p in params]  # type: ignore[misc]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def slots(memory: RuleOptimizer, params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t for p in params for _, t in sorted(memory.state[p].items())]


def decay(beta: float, t: int, last: float, warmup: int) -> float:
    """AdEMAMix's beta3 in step t of its warmup: linear in the half-life."""
    if t >= warmup:
        return last
    mu = t / warmup
    return exp(log(beta) * log(last) / ((1 - mu) * log(last) + mu * log(beta)))


# --------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_directions_are_ademamix_s_equations(backend: str, dtype: torch.dtype) -> None:
    params, kept = parameters(dtype), parameters(dtype)
    memory = GradientMemory(
        params, memory=AdEMAMix, betas=(0.9, 0.99, 0.999), alpha=5.0, alpha_warmup=4, beta3_warmup=6, backend=backend
    )
    fast, slow = [[torch.zeros(s, dtype=torch.float64) for s in SHAPES] for _ in range(2)]
    for t in range(1, 9):
        grads = gradients(t, dtype)
        beta3 = decay(0.9, t, 0.999, 6)
        for f, s, g in zip(fast, slow, grads, strict=True):
            f.mul_(0.9).add_(g.double(), alpha=0.1)
            s.mul_(beta3).add_(g.double(), alpha=1 - beta3)
        expected = [f / (1 - 0.9**t) + min(t / 4, 1) * 5.0 * s for f, s in zip(fast, slow, strict=True)]
        for u, e in zip(directions(memory, params, grads), expected, strict=True):
            assert u.dtype == dtype
            # A few roundings of float32 a step, of numbers below 8 as the gradients are; then one to nearest.
            error = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
            rounding = 2.0**-8 * e.abs() * (dtype == torch.bfloat16)
            assert ((u.double() - e).abs() <= error + rounding).all()
    assert same(params, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adana_and_sgd_are_the_sequence_of_both(backend: str) -> None:
    params, plain = parameters(torch.float64), parameters(torch.float64)
    memory = GradientMemory(params, memory=ADana, delta=4.0, kappa=0.75, backend=backend)
    optimizer = torch.optim.SGD(params, lr=0.1, weight_decay=0.01)
    average = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for t in range(1, 7):
        grads = gradients(t, torch.float64)
        directions(memory, params, grads)
        optimizer.step()
        with torch.no_grad():
            for p, m, g in zip(plain, average, grads, strict=True):
                m += 4.0 / (4.0 + t) * (g - m)
                p -= 0.1 * (g + (1 + t) ** 0.25 * m + 0.01 * p)
    for p, e in zip(params, plain, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-13, atol=1e-13)  # tens of roundings of float64


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_s_memory_and_torch_s_muon_without_one_are_torch_s_muon() -> None:
    """In float64, where a direction's rounding does not decide about one of bfloat16 in torch's iteration."""
    ours, theirs = ([torch.randn(6, 10, dtype=torch.float64).requires_grad_()] for _ in range(2))
    theirs[0].data.copy_(ours[0].data)
    memory = GradientMemory(ours, memory=Muon, momentum=0.95)
    optimizer = torch.optim.Muon(ours, lr=0.1, momentum=0.0, nesterov=False)
    reference = torch.optim.Muon(theirs, lr=0.1, momentum=0.95, nesterov=True)
    for _ in range(6):
        ours[0].grad = torch.randn(6, 10, dtype=torch.float64)
        theirs[0].grad = ours[0].grad.clone()
        memory.step()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", ["float32", "bfloat16", "compact"])
@pytest.mark.parametrize("kind", [AdEMAMix, KEMA, Muon])
def test_every_format_keeps_the_bits_that_the_memory_has_in_muon_s_geometry(
    kind: type[RuleOptimizer], state: str, backend: str
) -> None:
    params, others = parameters()[::2][:2], parameters()[::2][:2]  # matrices
    memory = GradientMemory(params, memory=kind, state=state, backend=backend)
    exact = GradientMemory(copies := parameters(torch.float64)[::2][:2], memory=kind)
    optimizer = kind(others, state=state, backend=backend, geometry="muon")  # type: ignore[call-arg]
    for t in range(4):
        grads = gradients(t)[::2][:2]
        give(others, grads)
        optimizer.step()
        u = directions(memory, params, grads)
        wanted = directions(exact, copies, [g.double() for g in grads])
    assert same(slots(memory, params), slots(optimizer, others))
    assert not any("exp_avg_sq" in memory.state[p] for p in params)
    # Of the largest: 4 steps' roundings of the slots, to 1 / 127 of a block's largest or to 2^-7; u is a sum of slots
    # with weights that add up to a few times the largest direction's.
    bound = 64 * EPS if state == "float32" else 4 * 4 * 2.0**-7
    for a, e in zip(u, wanted, strict=True):
        assert (a - e).abs().max() <= bound * e.abs().max()


def second(g: Any, m: Any, *, w: Any = 0.5, gain: Any = 2.0) -> Any:
    m = m + w * (g - m)
    return gain * m, m


def test_memory_functions_bring_their_hyperparameters() -> None:
    params = parameters()
    memory = GradientMemory([{"params": params[:2]}, {"params": params[2:], "w": 1.0}], memory=second, gain=4.0)
    u = directions(memory, params, gradients(0))
    assert same(u, [factor * g for factor, g in zip((2.0, 2.0, 4.0, 4.0), gradients(0), strict=True)])
    with pytest.raises(ValueError, match=r"must not get \['lr'\].*allowed: \['w', 'gain', 'maximize'"):
        GradientMemory(params, memory=second, lr=0.1)


def test_classes_from_memories_serve_too() -> None:
    params = parameters()
    memory = GradientMemory(params, memory=ademamix.optimizer_from(second))
    assert same(directions(memory, params, gradients(0)), gradients(0))


@pytest.mark.parametrize("maximize", [False, True])
def test_maximize_negates_the_gradients(maximize: bool) -> None:
    params = parameters()
    memory = GradientMemory(params, memory=second, maximize=maximize)
    sign = -1.0 if maximize else 1.0
    assert same(directions(memory, params, gradients(0)), [sign * g for g in gradients(0)])


def test_complex_parameters_and_any_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(4, 6, dtype=torch.complex64), torch.zeros(8, 6)[::2], torch.zeros(6, 4).t()]
    grads = [torch.randn(4, 6, dtype=p.dtype, generator=generator) for p in params]
    given = [grads[0].conj(), grads[1].t().contiguous().t(), torch.zeros(4, 12)[:, ::2].copy_(grads[2])]
    for p, g in zip(params, given, strict=True):
        p.requires_grad_().grad = g
    memory = GradientMemory(params, memory=second, gain=1.0)
    versions = [p._version for p in params]
    expected = [0.5 * g.clone() for g in given]
    memory.step()
    for p, g, e in zip(params, given, expected, strict=True):
        assert p.grad is g
        assert torch.equal(g, e)
    assert [p._version for p in params] == versions


# --------------------------------------------------------------------------------- gradients


def test_gradients_stay_where_they_are_and_parameters_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Launches] = []
    init = Launches.__init__
    monkeypatch.setattr(Launches, "__init__", lambda self, *args: [made.append(self), init(self, *args)][1])
    params = parameters()
    memory = GradientMemory(params, memory=ADana)
    versions = [p._version for p in params]
    for t in range(3):  # elsewhere each time, as after zero_grad(set_to_none=True)
        grads = gradients(t)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        before = [(g.data_ptr(), g._version) for g in grads]
        memory.step()
        for p, g, (place, version) in zip(params, grads, before, strict=True):
            assert p.grad is g
            assert g.data_ptr() == place
            assert g._version > version  # autograd may have kept it
    assert len(made) == 1
    assert [p._version for p in params] == versions


def test_gradients_that_overlap_themselves_are_refused_before_anything_changes() -> None:
    p = torch.zeros(4, 3, requires_grad=True)
    p.grad = torch.ones(3).expand(4, 3)
    memory = GradientMemory([p], memory=ADana)
    with pytest.raises(RuntimeError, match=r"a gradient of shape \(4, 3\) and strides \(0, 1\) has several elements"):
        memory.step()
    assert not memory.state
    assert torch.equal(p.grad, torch.ones(4, 3))


def test_clipping_acts_on_what_enters_the_memory() -> None:
    params, others = parameters(), parameters()
    memory = GradientMemory(params, memory=second)
    give(params, gradients(0))
    give(others, gradients(0))
    norm = memory.clip_grad_norm_(1.0)
    memory.step()
    assert torch.equal(norm, nn.utils.clip_grad_norm_(others, 1.0))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=4 * EPS, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_sets_gradients_to_zero(bad: float) -> None:
    params = parameters()
    memory = GradientMemory(params, memory=ADana, skip_nonfinite=True)
    directions(memory, params, gradients(0))
    before = [t.clone() for t in slots(memory, params)]
    grads = gradients(1)
    grads[1][2] = bad
    assert not any(u.any() for u in directions(memory, params, grads))
    assert memory.skipped_steps == 1
    assert same(slots(memory, params), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_a_device_skips_sets_gradients_to_zero(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host does not wait to know."""
    params = parameters()
    memory = GradientMemory(params, memory=ADana, backend=backend, capturable=True)
    directions(memory, params, gradients(0))
    before = [t.clone() for t in slots(memory, params)]
    give(params, gradients(1))
    inputs = []
    monkeypatch.setattr(RuleOptimizer, "_run", lambda self, *args: inputs.append(args[0]))
    memory.step()
    monkeypatch.undo()
    memory._run(inputs[0], None, torch.tensor(True), False)
    assert not any(p.grad.any() for p in params)  # type: ignore[union-attr]
    assert same(slots(memory, params), before)
    give(params, gradients(1))
    memory.grad_scale = torch.tensor(4.0)
    memory._run(inputs[0]._replace(grads=[p.grad for p in params]), None, torch.tensor(True), False)
    assert all(p.grad.isnan().all() for p in params)  # type: ignore[union-attr]
    assert same(slots(memory, params), before)


def trained(order: str, bad: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and memory after steps of which one may have a bad gradient."""
    params = parameters()
    memory = GradientMemory(params, memory=ADana, skip_nonfinite=True if order == "unscaled" else None)
    optimizer = torch.optim.SGD(params, lr=0.125, weight_decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=order != "without")
    for t in range(4):
        grads = gradients(t)
        if t == bad:
            if order == "without":
                continue
            grads[0][3, 5] = float("inf")
        give(params, [scaler.scale(g) for g in grads])
        if order == "unscaled":
            scaler.unscale_(optimizer)
            memory.step()
        elif order == "clipped":
            memory.clip_grad_norm_(1e6, grad_scale=scaler)
            scaler.step(memory)
        else:
            scaler.step(memory)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (1.0 if order == "without" else 128.0 if bad is not None and t >= bad else 256.0)
    return params, slots(memory, params)


@pytest.mark.parametrize("bad", [None, 2])
@pytest.mark.parametrize("order", ["scaled", "unscaled", "clipped"])
def test_a_grad_scaler_changes_nothing_but_skipped_steps(order: str, bad: int | None) -> None:
    """Its scale is a power of two, so that all bits are the same."""
    expected, kept = trained("without", bad)
    params, state = trained(order, bad)
    assert same(params, expected)
    assert same(state, kept)


# --------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("state", ["float32", "compact"])
def test_a_run_resumes_exactly(state: str) -> None:
    params = parameters()
    memory = GradientMemory(params, memory=AdEMAMix, alpha_warmup=5, state=state)
    for t in range(3):
        directions(memory, params, gradients(t))
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    others = parameters()
    resumed = GradientMemory(others, memory=AdEMAMix, state=state)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for t in range(3, 6):
        assert same(directions(memory, params, gradients(t)), directions(resumed, others, gradients(t)))


@pytest.mark.parametrize("given", [KEMA, second])
def test_copies_and_pickles_go_on_alike(given: Any) -> None:
    params = parameters()
    memory = GradientMemory(params, memory=given)
    directions(memory, params, gradients(0))
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert isinstance(other, GradientMemory)
        theirs = other.param_groups[0]["params"]
        assert same(slots(other, theirs), slots(memory, params))
        directions(other, theirs, gradients(1))
    expected = [p.grad for p in theirs]
    assert same(directions(memory, params, gradients(1)), expected)


def test_hooks_and_closures() -> None:
    params, seen = parameters(), []
    memory = GradientMemory(params, memory=ADana)
    memory.register_step_pre_hook(lambda *_: seen.append("before"))
    memory.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> float:
        give(params, gradients(0))
        return 3.0

    assert memory.step(closure) == 3.0
    assert seen == ["before", "after"]
    assert not same([p.grad for p in params], gradients(0))


def test_a_parameter_s_own_checkpoint_of_muon_serves_whatever_its_geometry() -> None:
    params = [torch.zeros(4, 6, requires_grad=True)]
    optimizer, memory = Muon(params), GradientMemory(params, memory=Muon)
    params[0].grad = torch.ones(4, 6)
    optimizer.step()
    memory.load_state_dict(optimizer.state_dict())
    before = params[0].detach().clone()
    memory.step()
    assert torch.equal(params[0], before)


UNUSED = [
    (AdamW, ("lr", "eps", "weight_decay")),
    (AdEMAMix, ("lr", "eps", "weight_decay", "slow_limit")),
    (SimplifiedAdEMAMix, ("lr", "eps", "weight_decay", "slow_limit")),
    (ADana, ("lr", "eps", "weight_decay", "omega", "peak_lr")),
    (KEMA, ("lr", "eps", "weight_decay", "beta2", "slow_limit")),
    (Muon, ("lr", "eps", "weight_decay", "betas")),
]
CHANGED: dict[str, Any] = {"omega": 0.5, "peak_lr": 0.5, "beta2": 0.5, "slow_limit": 0.5, "betas": (0.5, 0.5)}
USED: dict[str, Any] = {
    "alpha": 3.0, "alpha_warmup": 9, "beta3_warmup": 9, "beta1_warmup": 9, "delta": 2.0, "kappa": 0.5, "count": 2,
    "power": 0.5, "shortest": 5.0, "longest": 50.0, "warmup": 9, "momentum": 0.5, "nesterov": False, "min_beta1": 0.5,
    "schedule_start": 1, "beta3_schedule": "log-time",
}  # fmt: skip
BETAS = {AdamW: (0.5, 0.9), AdEMAMix: (0.5, 0.9, 0.9), SimplifiedAdEMAMix: (0.5, 0.9)}
WITH: dict[Any, dict[str, Any]] = {  # without which a hyperparameter has no effect
    (SimplifiedAdEMAMix, "min_beta1"): {"beta1_warmup": 9},
    (AdEMAMix, "schedule_start"): {"alpha_warmup": 9},
    (AdEMAMix, "delta"): {"beta3_schedule": "log-time"},
    (AdEMAMix, "kappa"): {"beta3_schedule": "log-time"},
}


@pytest.mark.parametrize(("kind", "unused"), UNUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_hyperparameters_without_effect_are_refused_and_all_others_have_one(
    kind: type[RuleOptimizer], unused: tuple[str, ...]
) -> None:
    def made(**options: Any) -> list[torch.Tensor]:
        params = parameters()
        memory = GradientMemory(params, memory=kind, **options)
        for t in range(3):
            u = directions(memory, params, gradients(t))
        return u

    for name in (*unused, "geometry", "adjust_lr_fn", "ns_coefficients", "ns_steps", "stochastic_rounding", "offload"):
        with pytest.raises(ValueError, match=rf"{kind.__name__} must not get \['{name}'\], .* allowed: \['") as raised:
            made(**{name: CHANGED.get(name, 0.5)})
        assert f"'{name}'" not in str(raised.value).partition("allowed")[2]
        with pytest.raises(ValueError, match=rf"must not get \['{name}'\]"):
            GradientMemory([{"params": parameters(), name: 0.5}], memory=kind)
    own = GradientMemory(parameters(), memory=kind).defaults.keys() - {*unused, *RuleOptimizer.stepping}
    others = own - {"maximize", "stochastic_rounding", "seed", "capturable"}
    for name in sorted(others - {"geometry", "adjust_lr_fn", "ns_coefficients", "ns_steps"}):
        value = BETAS[kind] if name == "betas" else USED[name]
        common = WITH.get((kind, name), {})
        assert not same(made(**common), made(**common, **{name: value})), name


@pytest.mark.parametrize(
    "memory", [torch.optim.AdamW, RuleOptimizer, GradientMemory, "ADana", None, ADana([torch.zeros(2)]), lambda p, g: p]
)
def test_what_has_no_memory_is_named(memory: Any) -> None:
    with pytest.raises(ValueError, match=r"memory must be an optimizer class of this library .*, got") as raised:
        GradientMemory(parameters(), memory=memory)
    assert str(raised.value).endswith(f"got {memory!r}")


def test_bad_values_are_named_as_everywhere() -> None:
    with pytest.raises(ValueError, match=r"kappa must be a number in \(0, 1\], got 2.0"):
        GradientMemory(parameters(), memory=ADana, kappa=2.0)
    with pytest.raises(ValueError, match=r"state must be one of .*, got 'int4'"):
        GradientMemory(parameters(), memory=ADana, state="int4")
    with pytest.raises(ValueError, match=r"state must map slots .*'exp_avg_sq'"):
        GradientMemory(parameters(), memory=ADana, state={"exp_avg_sq": "int8"})
    with pytest.raises(TypeError, match=r"'alpha'; allowed: params, delta, kappa, ((?!lr|eps|geometry).)*$"):
        GradientMemory(parameters(), memory=ADana, alpha=2.0)
    with pytest.raises(ValueError, match="a memory"):
        GradientMemory(parameters(), memory=lambda g, m: m)


def test_small_directions_keep_the_scale_of_a_scaler_in_float16() -> None:
    """Unscaled, they would be zeros in float16."""
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    memory = GradientMemory([p], memory=AdamW)
    p.grad = torch.full_like(p, 6e-4)
    memory.grad_scale, memory.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    memory.step()
    assert torch.equal(p.grad, torch.full_like(p, 6e-4))  # the first direction is the gradient


def test_one_gradient_of_two_parameters_is_refused() -> None:
    p, q = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3, 3))
    p.grad = q.grad = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="two parameters have one tensor as their gradients"):
        GradientMemory([p, q], memory=AdamW).step()
    assert torch.equal(p.grad, torch.ones(3, 3))
