"""Clipping, gradient scaling, steps that are skipped, and steps whose coefficients are computed on the device."""

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdamW, AdEMAMix, backends
from ademamix.backends import Batch, Rows, eager
from ademamix.formats import FORMATS
from optimizer_table import CASES, FIRST, Case, every_case

BACKENDS = ("eager", "cpu")
SCHEDULED: dict[str, Any] = {"betas": (0.9, 0.99, 0.999), "alpha": 5.0, "alpha_warmup": 7, "beta3_warmup": 5}
SHAPES = ((64, 96), (5,), (3, 700), ())


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SHAPES]


def give_gradients(params: list[torch.Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def snapshot(params: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in params]
    for p in params:
        tensors += [t.clone() for _, t in sorted(optimizer.state.get(p, {}).items())]
    return tensors


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", ["float32", "compact"])
def test_clipping_is_that_of_torch_and_leaves_the_gradients_alone(backend: str, state: str) -> None:
    theirs, ours = parameters(), parameters()
    # Only a factor that is a power of two gives the same bits whether it is applied in float32 before or within.
    a = AdEMAMix(theirs, lr=0.1, backend=backend, state=state, **SCHEDULED)
    b = AdEMAMix(ours, lr=0.1, backend=backend, state=state, **SCHEDULED)
    for step in range(5):
        scale = (0.001, 3.0)[step % 2]
        give_gradients(theirs, step, scale)
        give_gradients(ours, step, scale)
        norm = nn.utils.clip_grad_norm_(theirs, 1.0)
        before = [p.grad.clone() for p in ours]
        ours_norm = b.clip_grad_norm_(1.0)
        assert ours_norm.shape == ()
        assert torch.equal(ours_norm, norm)
        a.step()
        b.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
    for p, q in zip(theirs, ours, strict=True):
        if state == "float32":
            # torch rounds g * factor once and so do we: the factor may differ in its last bit, by float32 or float64.
            torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)
        else:  # a gradient that differs in its last bit may be rounded to the next code
            torch.testing.assert_close(q, p, rtol=0.0, atol=0.1 * 5 / 127)


@every_case
def test_every_optimizer_clips_by_a_power_of_two_to_the_bit(make: Case) -> None:
    """A factor of 1 / 4 on the gradients gives the same bits before a step and within it; its norm is 4 to the bit."""
    ours, theirs = ([torch.zeros(64, 96, requires_grad=True)] for _ in range(2))
    optimizers = [make(params, backend="eager", state="compact") for params in (ours, theirs)]
    for step in range(4):
        grad = torch.zeros(64, 96)
        grad[step, 3 * step] = 4.0
        ours[0].grad, theirs[0].grad = grad.clone(), grad / 4.0
        # clip_grad_norm_ adds 1e-6 to the norm, which this bound takes back.
        assert optimizers[0].clip_grad_norm_(1.0 + 2.5e-7) == 4.0
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(ours[0].grad, grad)
        assert equal(snapshot(ours, optimizers[0]), snapshot(theirs, optimizers[1]))


def test_the_factor_of_clipping_is_for_one_step_and_ends_with_the_gradients() -> None:
    def trained(clip: bool, *, zero: bool) -> list[torch.Tensor]:
        params = parameters()
        optimizer = AdamW(params, lr=0.1)
        give_gradients(params, 0)
        if clip:
            optimizer.clip_grad_norm_(1e-3)
        if zero:
            optimizer.zero_grad()
            give_gradients(params, 0)
            optimizer.step()
        else:
            optimizer.step()
            before = [p.detach().clone() for p in params]
            give_gradients(params, 1)
            optimizer.step()
            return [p.detach() - b for p, b in zip(params, before, strict=True)]
        return [p.detach() for p in params]

    assert equal(trained(True, zero=True), trained(False, zero=True))
    assert not equal(trained(True, zero=False), trained(False, zero=False))


def test_the_norm_of_low_precision_gradients_is_accumulated_in_float32() -> None:
    p = torch.zeros(10_000, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.full_like(p, 0.01)
    exact = p.grad.double().norm()
    # A sum of 10,000 float32 numbers in any order is off by less than 10,000 * 2**-24.
    torch.testing.assert_close(AdEMAMix([p]).clip_grad_norm_(1.0).double(), exact, rtol=6e-4, atol=0.0)
    assert AdEMAMix([nn.Parameter(torch.zeros(2))]).clip_grad_norm_(1.0) == 0.0  # no gradients


@pytest.mark.parametrize("given", [float, torch.tensor, lambda x: torch.tensor([[x]], dtype=torch.float64)])
def test_a_norm_of_more_gradients_takes_the_place_of_one_s_own(given: Any) -> None:
    """As of two stages of a pipeline, of which each process has one; numbers of float32 come through all of these."""
    whole, parts = parameters(), parameters()
    a = AdEMAMix(whole, lr=0.1, **SCHEDULED)
    # Noise is not used, so that parameters may be numbered anew.
    stages = [AdEMAMix(parts[i : i + 2], lr=0.1, **SCHEDULED) for i in (0, 2)]
    for step, scale in enumerate((1.0, 2.0, 4.0)):
        give_gradients(whole, step)
        give_gradients(parts, step, scale)
        whole[0].grad[0, 0] = parts[0].grad[0, 0] = math.nan if step == 1 else 2.0
        parts[0].grad[0, 0] *= scale
        norm = a.clip_grad_norm_(0.5)
        for stage in stages:
            found = stage.clip_grad_norm_(0.5, grad_scale=None if scale == 1.0 else scale, norm=given(norm.item()))
            assert (found.shape, found.dtype) == ((), torch.float32)
            assert torch.equal(found, norm) or norm.isnan()
            stage.step()
        a.step()
        assert all(map(torch.equal, whole, parts))
    assert [o.skipped_steps for o in (a, *stages)] == [1, 1, 1]


@pytest.mark.parametrize("bad", [-1.0, "1", torch.ones(2), [1.0]])
def test_a_bad_norm_is_refused(bad: Any) -> None:
    params = parameters()
    give_gradients(params, 0)
    optimizer = AdEMAMix(params)
    with pytest.raises(ValueError, match=r"norm must be a number >= 0 or a tensor of one element, got"):
        optimizer.clip_grad_norm_(1.0, norm=bad)
    assert optimizer._note is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("others", [(), (torch.float32,)], ids=["alone", "among others"])
@pytest.mark.parametrize("size", [1.0, 1e40, 1e-60])
def test_float64_gradients_are_clipped_in_float64(size: float, others: tuple[torch.dtype, ...], backend: str) -> None:
    """float32 has neither 1e40 nor 1e-60, its factors are off by 6e-8. Also with a scale that is not a power of 2."""
    runs = []
    for how in ("torch", "ours", "scaled"):
        params = [torch.zeros(5, dtype=d, requires_grad=True) for d in (torch.float64, *others)]
        optimizer = AdamW(params, lr=0.1, eps=0.0, weight_decay=0.0, backend=backend)
        for step in range(3):
            give_gradients(params, step)
            params[0].grad *= size * (3.0 if how == "scaled" else 1.0)
            if others:
                params[1].grad = torch.zeros(5)
            if how == "torch":
                norm = nn.utils.clip_grad_norm_(params, 0.3 * size)
            else:
                found = optimizer.clip_grad_norm_(0.3 * size, grad_scale=3.0 if how == "scaled" else None)
                assert found.dtype == norm.dtype == torch.float64
            optimizer.step()
        if how != "torch":
            torch.testing.assert_close(found, norm, rtol=1e-15, atol=0.0)  # some roundings
        assert optimizer.skipped_steps == 0
        runs.append(params[0].detach())
    for run in runs[1:]:  # 20 roundings in three steps
        torch.testing.assert_close(run, runs[0], rtol=20 * 2.0**-53, atol=0.0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, "1", None])
def test_a_bad_max_norm_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"max_norm must be a number >= 0, got"):
        AdEMAMix(parameters()).clip_grad_norm_(bad)


# --------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["clip", "always"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(backend: str, bad: float, how: str) -> None:
    skips_what_is_not_finite(FIRST["AdEMAMix"], backend, bad, how)


@every_case
@pytest.mark.parametrize("how", ["clip", "always"])
def test_no_optimizer_takes_a_step_that_is_not_finite(make: Case, how: str) -> None:
    skips_what_is_not_finite(make, "eager", math.nan, how)


def skips_what_is_not_finite(make: Case, backend: str, bad: float, how: str) -> None:
    runs = []
    for poisoned in (False, True):
        params = parameters(torch.bfloat16)
        options = {"skip_nonfinite": True} if how == "always" else {}
        optimizer = make(params, backend=backend, state="compact", **options)
        for step in range(6):
            if poisoned and step in (0, 3):
                give_gradients(params, 50)
                params[2].grad[1, 699] = bad
                before = snapshot(params, optimizer)
                if how == "clip":
                    assert not optimizer.clip_grad_norm_(1.0).isfinite()
                assert optimizer.step(lambda: 3.0) == 3.0
                assert equal(before, snapshot(params, optimizer))
            give_gradients(params, step)
            if how == "clip":
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        assert optimizer.skipped_steps == (2 if poisoned else 0)
        assert pickle.loads(pickle.dumps(optimizer)).skipped_steps == optimizer.skipped_steps
        runs.append(snapshot(params, optimizer))
    assert equal(*runs)


def test_without_the_guard_a_nan_goes_where_torch_lets_it_go() -> None:
    for options, clip in (({}, False), ({"skip_nonfinite": False}, True)):
        ours, theirs = parameters(), parameters()
        for params, optimizer in ((ours, AdamW(ours, **options)), (theirs, torch.optim.AdamW(theirs))):
            give_gradients(params, 0)
            params[0].grad[0, 0] = math.nan
            if clip and isinstance(optimizer, AdamW):
                optimizer.clip_grad_norm_(1.0)
            elif clip:
                nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p.isnan(), q.isnan())
        assert ours[0].isnan().any()


@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8", "int16", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_launch_writes_nothing_where_the_device_says_so(state: str, dtype: torch.dtype) -> None:
    def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        f = FORMATS[state]
        numbers = torch.randn(16, 300, generator=torch.Generator().manual_seed(1)).abs()
        codes, scale = (numbers, None) if state == "float32" else eager.encode(f, numbers, torch.zeros(16, 300).int())
        kept = torch.empty(16, 300, dtype=torch.bfloat16 if state == "bfloat16" else getattr(torch, f.storage))
        if state == "float32":
            kept.copy_(codes)
        else:
            eager.write(f, kept, codes)
        return numbers.to(dtype), kept, scale

    def rule(p: Any, g: Any, m: Any) -> Any:
        return p + g, m + g * g

    results = []
    for skip in (None, torch.tensor(False), torch.tensor(True)):
        p, m, scale = tensors()
        name = "float32" if dtype == torch.float32 else "bfloat16"
        key = torch.tensor([7], dtype=torch.int32).numpy().view("uint32")
        formats = (FORMATS[state],)
        batch = Batch(rule, FORMATS[name], FORMATS["float32"], formats, [p], [[m]], [[scale]], key, [Rows(16, 0, 300)])
        table = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
        eager.Launch(batch)([torch.ones(16, 300)], [0], table, skip)
        results.append([t for t in (p, m, scale) if t is not None])
    assert equal(results[0], results[1])
    assert equal(results[2], [t for t in tensors() if t is not None])
    assert not equal(results[0], results[2])


# --------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, "unscaled", "scaled"])
@pytest.mark.parametrize("fused", [None, True])
def test_a_grad_scaler_gives_the_steps_of_the_unscaled_gradients(
    backend: str, clip: str | None, fused: bool | None
) -> None:
    """The scale is a power of two, so scaling changes no bit of a normal number."""
    ours, plain = parameters(), parameters()
    a = AdEMAMix(ours, lr=0.01, backend=backend, **SCHEDULED)
    a._step_supports_amp_scaling = fused  # as the option does, which backend="eager" refuses
    b = AdEMAMix(plain, lr=0.01, backend=backend, **SCHEDULED)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(8):
        scaler.scale(torch.zeros((), requires_grad=True))
        give_gradients(ours, step, scaler.get_scale())
        if step == 4:
            ours[1].grad[2] = math.inf
            before, size = snapshot(ours, a), scaler.get_scale()
        if clip == "unscaled":
            scaler.unscale_(a)
            a.clip_grad_norm_(0.5)
        elif clip == "scaled":
            a.clip_grad_norm_(0.5, grad_scale=scaler if step % 2 else scaler.get_scale())
        grads = [p.grad.clone() for p in ours]
        scaler.step(a)
        scaler.update()
        if fused or clip:  # else the scaler has divided them
            assert all(torch.equal(p.grad, g) for p, g in zip(ours, grads, strict=True))
        if step == 4:
            assert equal(before, snapshot(ours, a))
            assert scaler.get_scale() == size / 2
            continue
        give_gradients(plain, step)
        if clip:
            b.clip_grad_norm_(0.5)
        b.step()
    assert a.skipped_steps == (1 if fused or clip else 0)
    assert equal(snapshot(ours, a), snapshot(plain, b))


@pytest.mark.parametrize("fused", [None, False])
def test_a_grad_scaler_does_for_an_optimizer_what_it_does_for_torch_s(fused: bool | None) -> None:
    """Gradients are unscaled, where callers between look at them and clip, and ``step`` is not called in vain."""
    calls, grads = [], []
    for kind, options in ((AdamW, {"fused": fused}), (torch.optim.AdamW, {})):
        params = parameters()
        optimizer = kind(params, lr=0.01, **options)
        optimizer.register_step_pre_hook(lambda *_, kind=kind: calls.append(kind))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            scaler.scale(torch.zeros((), requires_grad=True))
            give_gradients(params, step, 1024.0)
            params[0].grad[0, 0] = math.inf if step == 1 else 1.0
            assert not getattr(optimizer, "_step_supports_amp_scaling", False)
            scaler.step(optimizer)
            scaler.update(1024.0)
            grads.append([p.grad.clone() for p in params])
    assert calls == [AdamW, AdamW, torch.optim.AdamW, torch.optim.AdamW]
    assert all(map(equal, grads[:3], grads[3:]))


@pytest.mark.parametrize("forgotten", ["step", "zero_grad", "other gradients"])
def test_a_grad_scaler_does_its_own_work_again_once_the_note_is_used_or_gone(forgotten: str) -> None:
    params = parameters()
    optimizer: Any = AdEMAMix(params)
    give_gradients(params, 0)
    assert not optimizer._step_supports_amp_scaling
    optimizer.clip_grad_norm_(1.0, grad_scale=8.0)
    assert optimizer._step_supports_amp_scaling
    if forgotten == "step":
        optimizer.step()
    elif forgotten == "zero_grad":
        optimizer.zero_grad(set_to_none=False)
    else:
        give_gradients(params, 1)
    assert not optimizer._step_supports_amp_scaling


def test_others_may_say_what_a_grad_scaler_does() -> None:
    optimizer: Any = AdEMAMix(parameters(), fused=True)
    assert optimizer._step_supports_amp_scaling
    optimizer._step_supports_amp_scaling = False  # as some do about torch's
    assert not optimizer._step_supports_amp_scaling
    assert not copy.deepcopy(optimizer)._step_supports_amp_scaling
    with pytest.raises(ValueError, match="fused must be None, True or False, got 'yes'"):
        AdEMAMix(parameters(), fused="yes")  # type: ignore[arg-type]


def test_clipping_scaled_gradients_unawares_is_refused() -> None:
    params = parameters()
    optimizer = AdEMAMix(params)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros((), requires_grad=True))
    give_gradients(params, 0, scaler.get_scale())
    optimizer.clip_grad_norm_(1.0)
    before = snapshot(params, optimizer)
    with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(optimizer\) before it, or give it grad_scale="):
        scaler.step(optimizer)
    assert equal(before, snapshot(params, optimizer))


# --------------------------------------------------------------------------------- on the device


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        pytest.param(make, backend, id=f"{name}-{backend}")
        for name, make in CASES.items()
        for backend in BACKENDS
        if backend == "eager" or name in FIRST
    ],
)
def test_coefficients_computed_by_torch_are_those_of_the_host(make: Case, backend: str) -> None:
    runs = []
    for capturable in (False, True):
        params = parameters()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(0.03), "weight_decay": 0.1}]
        optimizer = make(groups, lr=0.01, backend=backend, capturable=capturable, state="compact", seed=3)
        for step in range(9):
            give_gradients(params, step)
            if step % 3 == 1:
                params[0].grad = None  # its number of steps falls behind
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            if step == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        runs.append(snapshot(params, optimizer))
    assert equal(*runs)  # float64 powers of Python and torch, rounded to float32


def test_a_step_skipped_on_the_device_changes_and_counts_nothing() -> None:
    params = parameters()
    optimizer = AdEMAMix(params, capturable=True, state="compact")
    give_gradients(params, 0)
    optimizer.step()
    before = snapshot(params, optimizer)
    launches = optimizer._launches
    assert launches is not None
    for skip, changed in ((True, False), (False, True)):
        launches.run(optimizer._program(offload=False), [p.grad for p in params], None, torch.tensor(skip))
        assert equal(before, snapshot(params, optimizer)) is not changed
    assert optimizer.state[params[0]]["step"] == 2.0


# --------------------------------------------------------------------------------- as if a CUDA graph were captured


def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(backends, "capturing", lambda device: True)


def test_a_graph_captures_no_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = AdEMAMix(params, capturable=True)
    for before in range(2):
        give_gradients(params, before)
        params[1].grad = None if before == 1 else params[1].grad
        capture(monkeypatch)
        untouched = snapshot(params, optimizer)
        with pytest.raises(RuntimeError, match="a CUDA graph cannot capture the first step, nor the first with these"):
            optimizer.step()
        assert equal(untouched, snapshot(params, optimizer))
        monkeypatch.undo()
        optimizer.step()
    capture(monkeypatch)
    optimizer.step()  # of a kind that there was


def test_what_a_graph_reads_lives_on_when_other_steps_need_other_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = AdEMAMix(params, capturable=True)
    give_gradients(params, 0)
    optimizer.step()
    captured = weakref.ref(optimizer._launches)
    capture(monkeypatch)
    optimizer.step()
    monkeypatch.undo()
    params[1].grad = None
    optimizer.step()
    gc.collect()
    assert captured() is not None
    assert optimizer._launches is not captured()


# --------------------------------------------------------------------------------- how long a norm is remembered


def dropped(net: nn.Module, optimizer: AdEMAMix, how: str) -> None:
    """Give up a batch, not by the optimizer's own zero_grad."""
    if how == "zero_grad to None":
        net.zero_grad()
    elif how == "zero_grad to zeros":
        net.zero_grad(set_to_none=False)
    elif how == "other gradients":
        for p in net.parameters():
            p.grad = None if p.grad is None else torch.zeros_like(p)
    else:  # all but one
        for p in list(net.parameters())[1:]:
            p.grad = None


@pytest.mark.parametrize("how", ["zero_grad to None", "zero_grad to zeros", "other gradients"])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e9])
@pytest.mark.parametrize("skip_nonfinite", [None, True])
def test_the_norm_of_gradients_that_were_dropped_is_forgotten(
    how: str, factor: float, skip_nonfinite: bool | None
) -> None:
    net = nn.Linear(3, 3)
    ours, reference = (copy.deepcopy(net) for _ in range(2))
    optimizers = [AdEMAMix(n.parameters(), lr=0.1, skip_nonfinite=skip_nonfinite) for n in (ours, reference)]
    x = torch.arange(6.0).view(2, 3)
    (ours(x).sum() * factor).backward()
    optimizers[0].clip_grad_norm_(1.0)
    dropped(ours, optimizers[0], how)
    for n, optimizer in zip((ours, reference), optimizers, strict=True):
        n(x).square().sum().backward()
        optimizer.step()
    assert equal([p.detach() for p in ours.parameters()], [p.detach() for p in reference.parameters()])
    assert optimizers[0].skipped_steps == 0


def test_gradients_changed_in_place_stay_clipped() -> None:
    """As those do that torch's clip_grad_norm_ has multiplied: for instance a part of the model gets half of them."""
    theirs, ours = parameters(), parameters()
    optimizers = AdEMAMix(theirs, lr=0.1), AdEMAMix(ours, lr=0.1)
    give_gradients(theirs, 0)
    give_gradients(ours, 0)
    nn.utils.clip_grad_norm_(theirs, 2.0**-6)
    optimizers[1].clip_grad_norm_(2.0**-6)
    for p, q in zip(theirs, ours, strict=True):
        p.grad.mul_(0.5)
        q.grad.mul_(0.5)
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)  # as above: factors may differ in their last bit


def test_another_model_s_forward_pass_between_clipping_and_the_step() -> None:
    """As in adversarial training: these gradients have not changed."""
    one, other = parameters(), parameters()
    optimizers = AdEMAMix(one, lr=0.1), AdEMAMix(other, lr=0.1)
    for params, optimizer in zip((one, other), optimizers, strict=True):
        give_gradients(params, 0)
        optimizer.clip_grad_norm_(2.0**-6)
        if params is one:
            nn.Linear(3, 3)(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert equal(snapshot(one, optimizers[0]), snapshot(other, optimizers[1]))


def test_a_remembered_norm_keeps_no_gradient_alive() -> None:
    params = parameters()
    optimizer = AdEMAMix(params)
    give_gradients(params, 0)
    optimizer.clip_grad_norm_(1.0)
    grads = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    gc.collect()
    assert all(ref() is None for ref in grads)


def test_gradients_cancelled_after_clipping_leave_the_others_clipped() -> None:
    """As where the last layer's are dropped; and where the optimizer's order of parameters changes."""
    theirs, ours = parameters(), parameters()
    optimizers = AdEMAMix(theirs, lr=0.1), AdEMAMix(ours, lr=0.1)
    give_gradients(theirs, 0)
    give_gradients(ours, 0)
    nn.utils.clip_grad_norm_(theirs, 2.0**-6)
    optimizers[1].clip_grad_norm_(2.0**-6)
    for params, optimizer in zip((theirs, ours), optimizers, strict=True):
        params[1].grad = None
        optimizer.param_groups[0]["params"].reverse()
        optimizer.step()
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)


def test_clipped_gradients_scaled_in_place_beside_a_forward_pass_stay_clipped() -> None:
    net = nn.Linear(3, 3)
    nets = net, copy.deepcopy(net)
    optimizers = [AdEMAMix(n.parameters(), lr=0.1) for n in nets]
    for n, optimizer in zip(nets, optimizers, strict=True):
        n(torch.ones(2, 3)).sum().backward()
        if n is net:
            nn.utils.clip_grad_norm_(n.parameters(), 2.0**-6)
        else:
            optimizer.clip_grad_norm_(2.0**-6)
        for p in n.parameters():
            p.grad.mul_(0.5)
        n(torch.ones(2, 3)).sum()
        optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)
