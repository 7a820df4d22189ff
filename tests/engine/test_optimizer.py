"""Each optimizer as a torch.optim.Optimizer: groups, schedulers, closures, hooks, torch.compile."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ademamix import AdamW, AdEMAMix, RuleOptimizer
from optimizer_table import Case, Row, every_case, every_row, first_cases
from small_models import BACKENDS, model, same, set_grads


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
    assert set(ours) - set(theirs) == {
        *("stochastic_rounding", "seed"),
        *("geometry", "adjust_lr_fn", "ns_coefficients", "ns_steps"),
    }
    assert all(theirs[name] == ours[name] for name in set(ours) & set(theirs))
    group = AdEMAMix(p, 0.5, (0.8, 0.9, 0.99), 3.0, 10, 20, 1e-6, 0.1).param_groups[0]
    names = ("lr", "betas", "alpha", "beta3_warmup", "alpha_warmup", "eps", "weight_decay")
    assert [group[n] for n in names] == [0.5, (0.8, 0.9, 0.99), 3.0, 10, 20, 1e-6, 0.1]
    assert [AdEMAMix(p).defaults[n] for n in names] == [1e-3, (0.9, 0.999, 0.9999), 2.0, None, None, 1e-8, 0.0]


@every_row
@BACKENDS
def test_groups_have_their_own_hyperparameters(row: Row, backend: str) -> None:
    """Those of all cases with the rule of the defaults, as groups share one, and each again with more that differs."""
    shared = [case for case in row.cases.values() if rule_of(case) is rule_of(row.cases["defaults"])]
    groups = [{**case.options, **more} for case in shared for more in ({}, {"lr": 0.1, "maximize": True, "eps": 1e-3})]
    together, apart = ([model() for _ in groups] for _ in range(2))
    defaults = {"weight_decay": 0.2, "backend": backend}
    grouped = row.kind([{"params": together[0].parameters(), **groups[0]}], **defaults)
    for net, options in zip(together[1:], groups[1:], strict=True):
        grouped.add_param_group({"params": net.parameters(), **options})
    singles = [
        row.kind(net.parameters(), **{**defaults, **options}) for net, options in zip(apart, groups, strict=True)
    ]
    for t in range(5):
        for net in (*together, *apart):
            set_grads(net, t)
        for optimizer in (grouped, *singles):
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        assert same(list(one.parameters()), list(other.parameters()))


def rule_of(make: Case) -> Any:
    return make([nn.Parameter(torch.zeros(2))]).rule


def test_named_parameters_and_a_single_tensor() -> None:
    net = model()
    optimizer = AdEMAMix(net.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    single = AdEMAMix([nn.Parameter(torch.zeros(2))])
    single.add_param_group({"params": nn.Parameter(torch.zeros(3))})
    assert len(single.param_groups) == 2
    with pytest.raises(TypeError):
        AdEMAMix([{"params": {nn.Parameter(torch.zeros(2))}}])


@first_cases
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
def test_torch_s_schedulers_drive_lr_as_number_and_as_tensor(make: Case, schedule: Any) -> None:
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


@first_cases
@BACKENDS
def test_a_closure_is_called_with_gradients_and_its_loss_returned(make: Case, backend: str) -> None:
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


@first_cases
def test_a_compiled_training_step_does_what_a_plain_one_does(make: Case) -> None:
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


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, int])
def test_numbers_may_be_numpy_s(number: Any) -> None:
    plain, ours = (nn.Parameter(torch.ones(3)) for _ in range(2))
    for p, kind in ((plain, float), (ours, number)):
        optimizer = AdEMAMix([p], lr=kind(1), weight_decay=kind(2), alpha_warmup=kind(5), beta3_warmup=kind(4))
        p.grad = torch.arange(3.0)
        optimizer.step()
        optimizer.clip_grad_norm_(kind(1))
    assert torch.equal(plain, ours)


@every_case
def test_schedulers_that_cycle_momentum_find_what_the_docs_say(make: Case) -> None:
    """Without it they are for every optimizer, and do not change betas."""
    optimizer = make([torch.ones(3, requires_grad=True)])
    (group,) = optimizer.param_groups
    betas = group.get("betas")
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10, cycle_momentum=False)
    assert group.get("betas") == betas
    if betas is None:
        with pytest.raises(ValueError, match="cycle_momentum"):
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    else:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
        assert group["betas"] == (0.95, *betas[1:])
