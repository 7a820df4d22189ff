"""AdEMAMix and AdamW as torch.optim.Optimizers."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix
from ademamix.backends import cpu

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "eager"])
MAKERS: dict[str, Callable[..., RuleOptimizer]] = {
    "AdEMAMix": lambda p, **k: AdEMAMix(
        p, **{"lr": 0.02, "alpha": 5.0, "beta3_warmup": 12, "alpha_warmup": 15, "weight_decay": 0.1, **k}
    ),
    "AdEMAMix beta1=0": lambda p, **k: AdEMAMix(p, **{"lr": 0.02, "betas": (0.0, 0.99, 0.999), "alpha": 5.0, **k}),
    "AdamW": lambda p, **k: AdamW(p, **{"lr": 0.02, "weight_decay": 0.1, **k}),
    "AdEMAMix log-time": lambda p, **k: AdEMAMix(p, **{"lr": 0.01, "alpha": 1.0, "beta3_schedule": "log-time", **k}),
    "SimplifiedAdEMAMix": lambda p, **k: SimplifiedAdEMAMix(p, **{"lr": 0.02, "betas": (0.8, 0.99), "alpha": 1.0, **k}),
    "ADana": lambda p, **k: ADana(p, **{"lr": 0.01, "omega": 0.5, "peak_lr": 0.02, **k}),
    "KEMA": lambda p, **k: KEMA(p, **{"lr": 0.02, "count": 4, "longest": 40.0, "warmup": 12, **k}),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def set_grads(net: nn.Module, t: int) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


# --------------------------------------------------------------------------------- against torch's own AdamW


@BACKENDS
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
def test_adamw_is_torch_s_adamw_step_by_step(dtype: torch.dtype, maximize: bool, backend: str) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((7, 5), (64,), ())]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2, "maximize": maximize}
    optimizer, reference = AdamW(ours, backend=backend, **options), torch.optim.AdamW(theirs, **options)
    # A dozen roundings a step on either side, each of half a unit, over 50 steps; the sign of each is arbitrary.
    tolerance = 50 * torch.finfo(dtype).eps
    for _ in range(50):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    for p, q in zip(ours, theirs, strict=True):
        for slot in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[p][slot], reference.state[q][slot], rtol=tolerance, atol=tolerance
            )


def test_defaults_are_torch_s_and_the_authors() -> None:
    p = [nn.Parameter(torch.zeros(2))]
    theirs = torch.optim.AdamW(p).defaults
    ours = AdamW(p).defaults
    assert set(ours) - set(theirs) == {"stochastic_rounding", "seed"}
    assert all(theirs[name] == ours[name] for name in set(ours) & set(theirs))
    group = AdEMAMix(p, 0.5, (0.8, 0.9, 0.99), 3.0, 10, 20, 1e-6, 0.1).param_groups[0]
    names = ("lr", "betas", "alpha", "beta3_warmup", "alpha_warmup", "eps", "weight_decay")
    assert [group[n] for n in names] == [0.5, (0.8, 0.9, 0.99), 3.0, 10, 20, 1e-6, 0.1]
    assert [AdEMAMix(p).defaults[n] for n in names] == [1e-3, (0.9, 0.999, 0.9999), 2.0, None, None, 1e-8, 0.0]


# --------------------------------------------------------------------------------- hyperparameters, groups, hooks


@BACKENDS
def test_groups_have_their_own_hyperparameters(backend: str) -> None:
    together, apart = model(), model()
    options = [{"lr": 0.1, "alpha": 3.0}, {"lr": 0.01, "betas": (0.0, 0.9, 0.99), "maximize": True}]
    grouped = AdEMAMix([{"params": together[0].parameters(), **options[0]}], weight_decay=0.1, backend=backend)
    grouped.add_param_group({"params": together[2].parameters(), **options[1]})
    singles = [
        AdEMAMix(apart[0].parameters(), weight_decay=0.1, backend=backend, **options[0]),
        AdEMAMix(apart[2].parameters(), weight_decay=0.1, backend=backend, **options[1]),
    ]
    for t in range(5):
        set_grads(together, t)
        set_grads(apart, t)
        for optimizer in (grouped, *singles):
            optimizer.step()
    assert same(list(together.parameters()), list(apart.parameters()))


def test_named_parameters_and_a_single_tensor() -> None:
    net = model()
    optimizer = AdEMAMix(net.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    single = AdEMAMix([nn.Parameter(torch.zeros(2))])
    single.add_param_group({"params": nn.Parameter(torch.zeros(3))})
    assert len(single.param_groups) == 2
    with pytest.raises(TypeError):
        AdEMAMix([{"params": {nn.Parameter(torch.zeros(2))}}])


@EVERY
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            [4],
        ),
    ],
    ids=["cosine", "one-cycle", "lambda", "sequential"],
)
# Old versions' SequentialLR (2.6 has one) gives its own schedulers the epoch that they deprecate.
@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning:torch.optim.lr_scheduler")
def test_torch_s_schedulers_drive_lr_as_number_and_as_tensor(make: Any, schedule: Any) -> None:
    number, tensor, by_hand = model(), model(), model()
    optimizers = [
        make(number.parameters(), lr=0.02),
        make(tensor.parameters(), lr=torch.tensor(0.02, dtype=torch.double)),
    ]
    schedulers = [schedule(o) for o in optimizers]
    manual = make(by_hand.parameters())
    for t in range(10):
        manual.param_groups[0]["lr"] = float(optimizers[0].param_groups[0]["lr"])
        for net, o in zip((number, tensor, by_hand), (*optimizers, manual), strict=True):
            set_grads(net, t)
            o.step()
        for s in schedulers:
            s.step()
    assert same(list(number.parameters()), list(by_hand.parameters()))
    group = optimizers[1].param_groups[0]
    assert isinstance(group["lr"], torch.Tensor)
    if group["lr"] is group["initial_lr"]:
        pytest.skip("this torch's SequentialLR overwrites initial_lr if lr is a tensor, under any optimizer")
    for p, q in zip(number.parameters(), tensor.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)  # the tensor's schedule rounds by itself


@EVERY
@BACKENDS
def test_a_closure_is_called_with_gradients_and_its_loss_returned(make: Any, backend: str) -> None:
    w = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = make([w], lr=0.05, weight_decay=0.0, backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(60)]
    assert losses[0] == 13.0
    assert losses[-1] < 1.0
    optimizer.zero_grad()
    assert w.grad is None
    before = w.detach().clone()
    assert optimizer.step() is None
    assert torch.equal(w, before)


def test_hooks_run() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = AdEMAMix([w])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda _, d: {**d, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, d: {k: v for k, v in d.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    w.grad = torch.ones(2)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["pre", "post", "loaded"]


@EVERY
def test_a_compiled_training_step_does_what_a_plain_one_does(make: Any) -> None:
    """torch.compile of all of it, as users write it: it once died of an internal error of torch's compiler."""
    plain, compiled = model(), model()
    torch._dynamo.reset()

    def train(net: nn.Module, optimizer: RuleOptimizer, x: torch.Tensor) -> torch.Tensor:
        loss = net(x).square().mean()
        loss.backward()
        norm = optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    optimizers = [make(net.parameters()) for net in (plain, compiled)]
    train_compiled = torch.compile(train, backend="eager")  # of the compiler, the part that reads Python
    for t in range(4):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
        norms = train(plain, optimizers[0], x), train_compiled(compiled, optimizers[1], x)
        assert same(*norms)
        assert same(list(plain.parameters()), list(compiled.parameters()))
    assert same(*(o.state_dict() for o in optimizers))


# --------------------------------------------------------------------------------- saving and resuming


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_at_every_step_is_exact(make: Any, backend: str, dtype: torch.dtype) -> None:
    """In the middle of both warmups too; bfloat16 parameters keep their float32 state."""
    net = model(dtype)
    optimizer = make(net.parameters(), backend=backend)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    saved = []
    for t in range(20):
        set_grads(net, t)
        optimizer.step()
        scheduler.step()
        file = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
        saved.append(file)
    for done, file in enumerate(saved, start=1):
        file.seek(0)
        weights, state, schedule = torch.load(file, weights_only=True)
        again = model(dtype)
        again.load_state_dict(weights)
        resumed = make(again.parameters(), lr=7.0, backend=backend)
        new_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 20)
        resumed.load_state_dict(state)
        new_schedule.load_state_dict(schedule)
        for t in range(done, 20):
            set_grads(again, t)
            resumed.step()
            new_schedule.step()
        assert same(list(again.parameters()), list(net.parameters())), done
        assert same(resumed.state_dict(), optimizer.state_dict()), done


@EVERY
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(make: Any, clone: Any) -> None:
    net = model()
    optimizer = make(net.parameters(), backend="eager")
    for t in range(3):
        set_grads(net, t)
        optimizer.step()
    twin = clone(optimizer)
    assert (twin.backend, twin.state_format) == ("eager", "float32")
    twins = twin.param_groups[0]["params"]
    assert twins[0].data_ptr() != next(net.parameters()).data_ptr()
    for t in range(3, 6):
        set_grads(net, t)
        for p, q in zip(net.parameters(), twins, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        before = [q.detach().clone() for q in twins]
        assert not same(before, list(net.parameters()))
        twin.step()
        assert same(list(twins), list(net.parameters()))
    assert same(twin.state_dict(), optimizer.state_dict())


def test_two_optimizers_loaded_from_one_dict_count_their_own_steps() -> None:
    net, other = model(), model()
    one, two = AdEMAMix(net.parameters()), AdEMAMix(other.parameters())
    set_grads(net, 0)
    one.step()
    two.load_state_dict(one.state_dict())
    set_grads(net, 1)
    one.step()
    assert [two.state[p]["step"].item() for p in other.parameters()] == [1.0] * 4


def test_a_checkpoint_of_amsgrad_is_refused() -> None:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    theirs = torch.optim.AdamW([p], amsgrad=True)
    theirs.step()
    ours = AdamW([p])
    with pytest.raises(ValueError, match="amsgrad must be False, got True"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state
    assert "amsgrad" not in ours.param_groups[0]


def test_a_checkpoint_of_the_authors_program_loads() -> None:
    """It counts steps in Python, stores None for the fast EMA of beta1 = 0 and knows no ``maximize``."""
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([p], betas=(0.0, 0.9, 0.99))
    state = optimizer.state_dict()
    del state["param_groups"][0]["maximize"]
    slots = {"exp_avg_fast": None, "exp_avg_slow": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    state["state"] = {0: {"step": 4, **slots}}
    optimizer.load_state_dict(state)
    p.grad = torch.ones(3)
    optimizer.step()
    assert sorted(optimizer.state[p]) == ["exp_avg_slow", "exp_avg_sq", "step"]
    assert optimizer.state[p]["step"].item() == 5.0


def test_a_foreign_or_misshapen_checkpoint_is_refused_before_anything_changes() -> None:
    net = model()
    optimizer = AdEMAMix(net.parameters(), lr=0.5)
    set_grads(net, 0)
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    bad_shape, no_step, bad_lr, no_tensor = (copy.deepcopy(good) for _ in range(4))
    bad_shape["state"][2]["exp_avg_slow"] = torch.zeros(3, 9)
    del no_step["state"][1]["step"]
    bad_lr["param_groups"][0]["lr"] = float("nan")
    no_tensor["state"][0]["exp_avg_sq"] = no_tensor["state"][0]["exp_avg_sq"].numpy()
    for bad, message in (
        (bad_shape, r"'exp_avg_slow' has shape \(3, 9\); a parameter of shape \(3, 8\) needs \(3, 8\)"),
        (no_step, "state of parameter 1 has no 'step'"),
        (bad_lr, "lr must be a finite number >= 0, got nan"),
        (no_tensor, "state tensor 'exp_avg_sq' must be a tensor, got a ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert same(optimizer.state_dict(), good)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(AdEMAMix([nn.Parameter(torch.zeros(2))]).state_dict())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (AdEMAMix, r"KEMA: state of parameter 0 has \['exp_avg_fast', 'exp_avg_slow'\], but no \['exp_avg_1', 'exp_"),
        (torch.optim.AdamW, r"KEMA: state of parameter 0 has \['exp_avg'\], but no \['exp_avg_1', 'exp_avg_2', 'exp_"),
        (torch.optim.Adagrad, r"KEMA: state of parameter 0 has \['sum'\], but no \['exp_avg_1', .*, 'exp_avg_sq'\]"),
    ],
)
def test_another_optimizer_s_state_is_refused(other: Any, message: str) -> None:
    """It was taken over without its averages, and with its steps, so that nothing corrected the bias of new ones."""
    net = model()
    theirs, ours = other(net.parameters()), KEMA(net.parameters())
    set_grads(net, 0)
    theirs.step()
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


def test_what_a_user_adds_to_a_state_is_kept() -> None:
    net = model()
    optimizer = AdEMAMix(net.parameters(), betas=(0.0, 0.99, 0.999))
    set_grads(net, 0)
    optimizer.step()
    for p in net.parameters():
        optimizer.state[p]["own"] = torch.ones(1)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert all(same(state["own"], torch.ones(1)) for state in optimizer.state.values())


def test_hooks_after_loading_see_the_state_and_may_change_it() -> None:
    net = model(torch.bfloat16)
    optimizer = AdEMAMix(net.parameters())
    set_grads(net, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())

    def hook(loaded: torch.optim.Optimizer) -> None:
        assert same(loaded.state_dict(), saved)
        for state in loaded.state.values():
            state["exp_avg_slow"].zero_()

    optimizer.register_load_state_dict_post_hook(hook)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert all(not state["exp_avg_slow"].any() and state["exp_avg_sq"].any() for state in optimizer.state.values())


class Allocated(TorchDispatchMode):
    """Counts the elements of all new tensors outside of the device "meta"."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta" and not result._is_view():
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("state", ["float32", "bfloat16", "compact"])
def test_loading_what_fits_copies_nothing(state: str) -> None:
    """Low-bit state was turned into the parameters' dtype on the way, three times the memory of compact state."""
    p = nn.Parameter(torch.ones(64, 64))
    p.grad = torch.ones(64, 64)
    optimizer = AdEMAMix([p], state=state, backend="eager")
    optimizer.step()
    saved = optimizer.state_dict()
    again = AdEMAMix([p], state=state)
    with Allocated() as allocated:
        again.load_state_dict(saved)
    assert 1 <= allocated.elements <= 2  # the step, which is the optimizer's own
    assert again.state[p]["exp_avg_slow"] is saved["state"][0]["exp_avg_slow"]


# --------------------------------------------------------------------------------- kinds of tensors


@EVERY
@BACKENDS
def test_layouts_do_not_matter(make: Any, backend: str) -> None:
    """Channels-last, transposed, strided, zero-element, scalar and expanded tensors: the values of contiguous ones."""
    torch.manual_seed(0)
    values = [
        torch.randn(2, 3, 4, 5),
        torch.randn(6, 4),
        torch.randn(5, 3),
        torch.randn(0, 3),
        torch.randn(()),
        torch.randn(7),
    ]

    def odd() -> list[torch.Tensor]:
        storage = torch.zeros(10, 6)
        strided = storage[::2, ::2]
        strided.copy_(values[2])
        layouts = [values[0].clone().to(memory_format=torch.channels_last), values[1].T.clone().T, strided]
        return [t.requires_grad_() for t in (*layouts, *(v.clone() for v in values[3:]))]

    plain, strange = [v.clone().requires_grad_() for v in values], odd()
    optimizers = [make(ps, backend=backend) for ps in (plain, strange)]
    for t in range(4):
        for p, q in zip(plain, strange, strict=True):
            g = torch.randn(p.shape)
            p.grad, q.grad = g, g.clone()
        strange[0].grad = strange[0].grad.to(memory_format=torch.channels_last if t % 2 else torch.contiguous_format)
        constant = torch.randn(())
        plain[5].grad, strange[5].grad = constant.repeat(7), constant.expand(7)
        for o in optimizers:
            o.step()
        for p, q in zip(plain, strange, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
    for p, q in zip(plain, strange, strict=True):
        assert same(optimizers[0].state[p], optimizers[1].state[q])
    assert strange[0].is_contiguous(memory_format=torch.channels_last)

    again = odd()  # state saved from contiguous parameters serves parameters of another layout
    resumed = make(again, backend=backend)
    for p, q in zip(plain, again, strict=True):
        q.data.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for p, q in zip(plain, again, strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    optimizers[0].step()
    resumed.step()
    for p, q in zip(plain, again, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@EVERY
@BACKENDS
def test_complex_parameters_are_pairs_of_real_ones(make: Any, backend: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(5, 3, dtype=torch.complex64, requires_grad=True)
    pair = torch.view_as_real(z.detach()).clone().requires_grad_()
    optimizers = make([z], backend=backend), make([pair], backend=backend)
    for t in range(4):
        g = torch.randn(5, 3, dtype=torch.complex64)
        z.grad = g.conj() if t % 2 else g  # a lazily conjugated one too
        pair.grad = torch.view_as_real(z.grad.resolve_conj()).clone()
        for o in optimizers:
            o.step()
    assert torch.equal(torch.view_as_real(z), pair)
    assert optimizers[0].state[z]["exp_avg_sq"].dtype == torch.complex64


@EVERY
@BACKENDS
def test_lazily_negated_tensors_count_as_what_they_are(make: Any, backend: str) -> None:
    """The imaginary part of a conjugate is a view that says "minus" of its memory; a backward leaves such gradients."""
    torch.manual_seed(0)
    z = torch.randn(5, dtype=torch.complex64)
    lazy = [z.clone().conj().imag.requires_grad_(), torch._neg_view(torch.randn(3, 4)).requires_grad_()]
    plain = [p.detach().clone().resolve_neg().requires_grad_() for p in lazy]
    small = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizers = [make([*ps, s], backend=backend) for ps, s in zip((lazy, plain), small, strict=True)]
    for t in range(3):
        for p, q in zip(lazy, plain, strict=True):
            p.grad = torch._neg_view(torch.randn(p.shape, generator=torch.Generator().manual_seed(t)))
            q.grad = p.grad.resolve_neg()
        small[0].grad = None
        (torch.complex(torch.ones(1), small[0]).conj() * (1.0 + 2.0j)).real.sum().backward()
        small[1].grad = torch.full((1,), 2.0)
        norms = [o.clip_grad_norm_(1.0) for o in optimizers]
        assert norms[0] == norms[1]
        for o in optimizers:
            o.step()
        assert all(p.is_neg() for p in lazy)
        assert small[0].grad.is_neg()
        for p, q in zip([*lazy, small[0]], [*plain, small[1]], strict=True):
            torch.testing.assert_close(p.resolve_neg(), q, rtol=0, atol=0)


@EVERY
def test_state_is_float32_for_low_precision_and_float64_for_double(make: Any) -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        p = torch.ones(3, dtype=dtype, requires_grad=True)
        p.grad = torch.ones_like(p)
        optimizer = make([p])
        optimizer.step()
        assert {v.dtype for k, v in optimizer.state[p].items() if k != "step"} == {expected}
        assert optimizer.state[p]["step"].dtype == torch.float32
        assert p.dtype == dtype
        assert (p < 1).all()


@BACKENDS
def test_parameters_whose_gradient_was_missing_get_their_own_coefficients(backend: str) -> None:
    late, always, alone = (nn.Parameter(torch.ones(4)) for _ in range(3))
    both = MAKERS["AdEMAMix"]([late, always], backend=backend)
    single = MAKERS["AdEMAMix"]([alone], backend=backend)
    for t in range(8):
        always.grad = torch.full((4,), 1.0 + t)
        late.grad = torch.full((4,), 2.0 - t) if t % 3 == 1 else None
        both.step()
        if late.grad is not None:
            alone.grad = late.grad.clone()
            single.step()
    assert (both.state[late]["step"].item(), both.state[always]["step"].item()) == (3.0, 8.0)
    assert torch.equal(late, alone)


@BACKENDS
def test_state_exchanged_by_the_user_is_used(backend: str) -> None:
    p, q = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    one, two = (MAKERS["AdEMAMix"]([x], backend=backend) for x in (p, q))
    for _ in range(2):
        p.grad, q.grad = torch.ones(4, 3), torch.ones(4, 3)
        one.step()
        two.step()
    one.state[p]["exp_avg_slow"].zero_()
    two.state[q]["exp_avg_slow"] = torch.zeros(3, 4).T  # another tensor, of another layout
    p.data = p.data.clone()
    one.step()
    two.step()
    assert torch.equal(p, q)
    one.param_groups[0]["betas"] = two.param_groups[0]["betas"] = (0.0, 0.999, 0.9999)
    one.step()
    two.step()
    assert torch.equal(p, q)
    two.state[q]["exp_avg_sq"] = torch.zeros(5)
    before = copy.deepcopy((q.detach(), two.state[q]))
    with pytest.raises(
        ValueError, match=r"'exp_avg_sq' has shape \(5,\); a parameter of shape \(4, 3\) needs \(4, 3\)"
    ):
        two.step()
    assert same((q.detach(), two.state[q]), before)


@BACKENDS
def test_a_parameter_given_another_view_of_its_memory_is_that_view(backend: str) -> None:
    """Where it begins stays the same: a transposed one was taken for the old one, a pruned one for all of it."""
    p, q = (nn.Parameter(torch.arange(9.0).view(3, 3)) for _ in range(2))
    ours, reference = AdamW([p], lr=0.1, backend=backend), torch.optim.AdamW([q], lr=0.1)
    for t in range(4):
        for w, optimizer in ((p, ours), (q, reference)):
            if t == 2:
                w.data = w.data.t()
            w.grad = torch.arange(9.0).view(3, 3)
            optimizer.step()
        torch.testing.assert_close(p, q, rtol=0, atol=4e-6)  # a few units in the last place of numbers up to 8
    p.data = p.data[:2]
    p.grad = torch.ones(2, 3)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(3, 3\); a parameter of shape \(2, 3\) needs"):
        ours.step()
    assert torch.equal(p, before)


@BACKENDS
def test_a_stale_backward_is_caught(backend: str) -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([w], backend=backend)
    loss = (w**3).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_is_written() -> None:
    w = nn.Parameter(torch.ones(1000))
    w.grad = torch.randn(1000)
    before, version = w.grad.clone(), w.grad._version
    AdEMAMix([w], maximize=True).step()
    assert torch.equal(w.grad, before)
    assert w.grad._version == version


# --------------------------------------------------------------------------------- errors


P = nn.Parameter(torch.zeros(2))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": NAN}, "lr must be a finite number >= 0, got nan"),
        ({"lr": INF}, "lr must be a finite number >= 0, got inf"),
        ({"lr": "0.1"}, "lr must be a finite number >= 0, got '0.1'"),
        ({"lr": torch.zeros(2)}, r"lr must be a finite number >= 0, got tensor\(\[0., 0.\]\)"),
        ({"eps": -1e-9}, "eps must be a finite number >= 0, got -1e-09"),
        ({"weight_decay": NAN}, "weight_decay must be a finite number >= 0, got nan"),
        ({"alpha": -2}, "alpha must be a finite number >= 0, got -2"),
        ({"betas": (0.9, 0.999)}, r"betas must be 3 numbers in \[0, 1\), got \(0.9, 0.999\)"),
        ({"betas": 0.9}, r"betas must be 3 numbers in \[0, 1\), got 0.9"),
        ({"betas": (1.0, 0.9, 0.9)}, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1, 0.9)}, r"betas\[1\] must be a number in \[0, 1\), got -0.1"),
        ({"betas": (0.9, 0.9, NAN)}, r"betas\[2\] must be a number in \[0, 1\), got nan"),
        ({"beta3_warmup": 0}, "beta3_warmup must be None or a number of steps >= 1, got 0"),
        ({"alpha_warmup": -5}, "alpha_warmup must be None or a number of steps >= 1, got -5"),
        ({"alpha_warmup": "all"}, "alpha_warmup must be None or a number of steps >= 1, got 'all'"),
        ({"maximize": 1}, "maximize must be True or False, got 1"),
        ({"state": "int4"}, r"state must be one of \('float32', 'bfloat16', 'compact'\) or a mapping .*, got 'int4'"),
        ({"state": {"exp_avg": "int8"}}, r"state must map slots .*exp_avg_slow.* to formats .*, got 'exp_avg': 'int8'"),
        ({"state": {"exp_avg_sq": "int4"}}, r"state must map slots .* to formats .*float8.*, got 'exp_avg_sq': 'int4'"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
        ({"stochastic_rounding": 1}, "stochastic_rounding must be True or False, got 1"),
        ({"backend": "gpu"}, r"backend must be one of \('auto', 'eager', 'cpu', 'triton'\), got 'gpu'"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_hyperparameters_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdEMAMix([P], **options)
    group = {k: v for k, v in options.items() if k not in ("state", "backend")}
    if group:
        optimizer = AdEMAMix([P])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], **group})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, int])
def test_numbers_may_be_numpy_s(number: Any) -> None:
    plain, ours = (nn.Parameter(torch.ones(3)) for _ in range(2))
    for p, kind in ((plain, float), (ours, number)):
        optimizer = AdEMAMix([p], lr=kind(1), weight_decay=kind(2), alpha_warmup=kind(5), beta3_warmup=kind(4))
        p.grad = torch.arange(3.0)
        optimizer.step()
        optimizer.clip_grad_norm_(kind(1))
    assert torch.equal(plain, ours)


def test_adamw_names_bad_hyperparameters_too() -> None:
    with pytest.raises(ValueError, match=r"betas must be 2 numbers in \[0, 1\), got \(0.9, 0.99, 0.9\)"):
        AdamW([P], betas=(0.9, 0.99, 0.9))


@pytest.mark.parametrize("option", [{"state": "compact"}, {"backend": "eager"}, {"skip_nonfinite": True}], ids=str)
def test_an_option_of_the_whole_optimizer_is_refused_in_a_group(option: dict[str, Any]) -> None:
    """It would do nothing."""
    with pytest.raises(ValueError, match=f"{next(iter(option))} is given to the optimizer, for all groups"):
        AdEMAMix([{"params": [P], **option}])


@pytest.mark.parametrize("named", [False, True])
def test_a_parameter_given_twice_is_refused(named: bool) -> None:
    """Two threads would write it, and one of its two states would be lost."""
    net = model()
    params = list(net.named_parameters() if named else net.parameters())
    with pytest.raises(ValueError, match="must have each parameter once, got number 4 a second time"):
        AdEMAMix([*params, params[1]])
    optimizer = AdEMAMix(params[:2])
    with pytest.raises(ValueError, match="must have each parameter once, got number 1 a second time"):
        optimizer.add_param_group({"params": [params[2], params[2]]})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


def test_a_device_that_the_backend_cannot_serve() -> None:
    with pytest.raises(ValueError, match="backend='cpu' cannot serve a parameter on 'meta'"):
        AdEMAMix([nn.Parameter(torch.zeros(2, device="meta"))], backend="cpu")
    optimizer = AdEMAMix([P], backend="cpu")
    with pytest.raises(ValueError, match="allowed there: 'auto', 'eager'"):
        optimizer.add_param_group({"params": nn.Parameter(torch.zeros(2, device="meta"))})
    assert len(optimizer.param_groups) == 1


@BACKENDS
def test_a_refused_gradient_leaves_everything_as_it_was(backend: str) -> None:
    good = nn.Parameter(torch.ones(3))
    embedding = nn.Embedding(4, 2, sparse=True)
    counts = nn.Parameter(torch.zeros(2, dtype=torch.float8_e5m2), requires_grad=False)
    optimizer = AdEMAMix([good, embedding.weight, counts], backend=backend)
    embedding(torch.tensor([1])).sum().backward()
    good.grad = torch.ones(3)
    for _ in range(2):  # at first without state, then with
        before = copy.deepcopy((good.detach(), embedding.weight.detach(), optimizer.state_dict()["state"]))
        with pytest.raises(RuntimeError, match=r"dense gradients .* is torch\.sparse_coo"):
            optimizer.step()
        after = (good.detach(), embedding.weight.detach(), optimizer.state_dict()["state"])
        assert same(before, after)
        sparse, embedding.weight.grad = embedding.weight.grad, torch.ones(4, 2)
        optimizer.step()
        embedding.weight.grad = sparse
    embedding.weight.grad = None
    counts.grad = torch.zeros(2, dtype=torch.float8_e5m2)
    with pytest.raises(RuntimeError, match=r"cannot update a parameter of dtype torch\.float8_e5m2"):
        optimizer.step()


def test_a_step_that_fails_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AdEMAMix([p], backend="cpu")

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(cpu.Launch, "__call__", fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(p, torch.ones(3))
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 1.0


@BACKENDS
@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)], ids=str
)
def test_torch_s_default_device_and_dtype_change_nothing(backend: str, device: str, dtype: torch.dtype) -> None:
    """Scales were made in the default dtype: kernels, which write float32, wrote behind those of bfloat16."""

    def run() -> Any:
        optimizer = AdEMAMix(nets.pop().parameters(), state="compact", backend=backend)
        for g in grads:
            for p, value in zip(optimizer.param_groups[0]["params"], g, strict=True):
                p.grad = value
            optimizer.clip_grad_norm_(1.0, grad_scale=3.0)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        return optimizer.param_groups[0]["params"], optimizer.state_dict()["state"]

    torch.manual_seed(0)
    net = nn.Linear(600, 10)
    nets = [net, copy.deepcopy(net)]
    grads = [[torch.randn_like(p) for p in net.parameters()] for _ in range(2)]
    expected = run()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            found = run()
    finally:
        torch.set_default_dtype(before)
    assert same(found, expected)


def test_loaded_state_goes_to_the_device_of_each_parameter() -> None:
    def optimizer_on(*devices: str) -> AdEMAMix:
        return AdEMAMix([nn.Parameter(torch.ones(64, 96, device=d)) for d in devices], state="compact", backend="eager")

    saved, loaded = optimizer_on("cpu", "cpu"), optimizer_on("cpu", "meta")
    for p in saved.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    for p in loaded.param_groups[0]["params"]:
        state = loaded.state[p]
        assert len(state) == 7
        assert {t.device for name, t in state.items() if name != "step"} == {p.device}
        assert state["step"].device.type == "cpu"


def test_tensors_made_of_other_tensors() -> None:
    """There is nothing where such a tensor's pointer leads to: fused backends once wrote there."""

    def pair(value: float) -> TwoTensor:
        return TwoTensor(torch.full((3,), value), torch.full((3,), 2.0 * value))

    p, wrapped = nn.Parameter(torch.ones(3)), nn.Parameter(pair(1.0))
    optimizer = AdEMAMix([p, wrapped], lr=0.0)
    p.grad = torch.ones(3)
    optimizer.step()
    for q in (p, wrapped):
        q.grad = pair(1.0)
        with pytest.raises(RuntimeError, match=r"in group 0 is a TwoTensor.*; allowed with backend='eager' alone"):
            optimizer.step()
        assert torch.equal(p, torch.ones(3))
        assert optimizer.state[p]["step"] == 1.0
        q.grad = None
    p.grad = AsyncCollectiveTensor(torch.ones(3))  # a sum under way: waited for
    optimizer.step()
    assert optimizer.state[p]["step"] == 2.0

    eager = AdEMAMix([wrapped], lr=0.1, backend="eager")
    plain = [nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0)]
    reference = AdEMAMix(plain, lr=0.1, backend="eager")
    for t in range(3):
        wrapped.grad = pair(t + 1.0)
        for k, q in enumerate(plain):
            q.grad = torch.full((3,), (k + 1) * (t + 1.0))
        eager.step()
        reference.step()
    assert same([wrapped.data.a, wrapped.data.b], [q.data for q in plain])


# --------------------------------------------------------------------------------- memory


def test_no_temporary_of_parameter_size() -> None:
    """The high-water mark of the process rises by less than 1 MB + 1 % of the state in a step of 16M parameters."""
    resource = pytest.importorskip("resource")
    p = nn.Parameter(torch.ones(1 << 24))
    p.grad = torch.ones(1 << 24)
    optimizer = AdEMAMix([p], backend="cpu")
    optimizer.step()
    state_bytes = 3 * 4 * p.numel()
    spike = torch.ones(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    current = _resident()
    spike = torch.ones(max(0, before * 1024 - current) // 4)  # fill up to the mark, so that a temporary raises it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer.step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del spike
    assert (after - before) * 1024 <= (1 << 20) + state_bytes // 100


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        pytest.skip("needs /proc")
