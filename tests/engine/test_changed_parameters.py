"""What may change between two steps: a parameter's dtype, shape, strides, memory and layout, betas, own entries."""

import collections
import copy
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ademamix import KEMA, AdamW, AdEMAMix
from optimizer_table import Case, every_case
from small_models import BACKENDS, same

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# --------------------------------------------------------------------------------- dtypes


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16", "compact"]),
    st.booleans(),
)
def test_each_dtype_steps_with_its_own_precision(
    phases: list[torch.dtype], offload: bool, state: str, step_in_each: bool
) -> None:
    """A constant gradient moves a parameter by lr a step.

    Counted from the last conversion on, 20 steps of 1e-5 from 1e-3 are 2e-4, to the spacing of the last phase's
    numbers there and the noise of its rounding, or that of a compact state: an eighth of each step.
    """
    net = nn.Linear(64, 64, bias=False)
    nn.init.constant_(net.weight, 1e-3)
    optimizer = AdamW(net.parameters(), lr=1e-5, weight_decay=0.0, offload=offload, state=state)
    for dtype in phases:
        net.to(dtype)
        start = net.weight.detach().double().mean()
        for _ in range(20 if dtype is phases[-1] or step_in_each else 0):
            net.weight.grad = torch.ones_like(net.weight)
            optimizer.step()
        last = net.weight
    moved = (start - last.detach().double().mean()).item()
    spacing = torch.finfo(last.dtype).eps * 1e-3
    assert moved == pytest.approx(2e-4, abs=2e-4 / 8 + 2 * spacing)
    if last.dtype == torch.float64:
        assert optimizer.state[last]["exp_avg"].dtype == torch.float64
        assert not torch.equal(last.float().double(), last)  # float32 cannot have computed it


@pytest.mark.parametrize("offload", [False, True])
def test_another_dtype_in_the_same_place(offload: bool) -> None:
    """Neither the address nor the strides say that a float16 became a bfloat16."""
    p = nn.Parameter(torch.full((4, 4), 0.5, dtype=torch.float16))
    optimizer = AdamW([p], lr=0.125, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, offload=offload)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data = p.data.view(torch.bfloat16)
    p.data.fill_(1.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((4, 4), 0.875, dtype=torch.bfloat16))


# --------------------------------------------------------------------------------- shapes, strides, memory

CHANGES = {
    "its memory": lambda t: t.clone(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "turned": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "a part of a larger tensor": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    "float64 and back": lambda t: t.double().float(),
    "requires_grad": lambda t: t,
}


@every_case
@pytest.mark.parametrize("state", ["float32", "compact"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_laid_out_anew_goes_on(make: Case, state: str, change: str) -> None:
    """The same numbers, by whatever way they lie in memory. Compact blocks do not depend on it, and noise is off."""
    whole, other = (nn.Parameter(torch.linspace(-1, 1, 4096).view(8, 8, 8, 8)) for _ in range(2))
    optimizers = [make([p], backend="eager", state=state) for p in (whole, other)]
    for t in range(4):
        if t == 2:
            other.data = CHANGES[change](other.data)
            other.requires_grad_(change != "requires_grad")
        for p, optimizer in zip((whole, other), optimizers, strict=True):
            p.grad = torch.linspace(0, 1 + t, 4096).view(8, 8, 8, 8)
            optimizer.step()
    if state == "float32" or change not in ("channels last", "turned"):
        assert torch.equal(whole, other)


@BACKENDS
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_shape_is_refused(backend: str, offload: bool, dtype: torch.dtype) -> None:
    p, q = (nn.Parameter(torch.ones(6, 4, dtype=dtype)) for _ in range(2))
    optimizer = AdEMAMix([p, q], lr=0.1, backend=backend, offload=offload)
    for each in (p, q):
        each.grad = torch.ones_like(each)
    optimizer.step()
    before = p.detach().clone()
    q.grad, q.data = None, torch.ones(3, 4, dtype=dtype)  # of the same strides
    q.grad = torch.ones_like(q)
    with pytest.raises(ValueError, match=r"has shape \(6, 4\); a parameter of shape \(3, 4\)"):
        optimizer.step()
    assert torch.equal(p, before)


OTHER_SHAPES = {
    "shorter": lambda: torch.ones(3, 4),
    "turned": lambda: torch.ones(4, 6),
    "flat": lambda: torch.ones(24),
    "one that copy_ would spread": lambda: torch.ones(1, 4),
    "of the same length and strides": lambda: torch.ones(6, 4).as_strided((6, 4, 1), (4, 1, 1)),
}


@BACKENDS
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("other", OTHER_SHAPES)
def test_a_gradient_of_another_shape_is_refused(other: str, laid_out: bool, offload: bool, backend: str) -> None:
    """As by torch, which compares shapes in each step: what lies behind its end is not read.

    ``laid_out``: in steps whose gradients are copied into the parameters' strides.
    """
    params = [nn.Parameter(torch.ones(6, 4)) for _ in range(2)]
    optimizer = AdEMAMix(params, backend=backend, offload=offload)
    for p in params:
        p.grad = torch.ones(4, 6).t() if laid_out else torch.ones(6, 4)
    optimizer.step()
    before = copy.deepcopy([p.detach() for p in params])
    params[1].grad.data = OTHER_SHAPES[other]()
    shape = tuple(params[1].grad.shape)
    with pytest.raises(RuntimeError, match=re.escape(f"in group 0 has shape {shape}: they must be equal")):
        optimizer.step()
    assert same([p.detach() for p in params], before)


@BACKENDS
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("what", ["parameter", "gradient", "state tensor 'exp_avg_slow'"])
def test_memory_that_was_given_back_is_named(what: str, offload: bool, backend: str) -> None:
    """As tools that keep models elsewhere for some time leave it; an empty tensor has none to give."""
    params = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(0, 4))]
    optimizer = AdEMAMix(params, backend=backend, offload=offload)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    launches = optimizer._launches
    optimizer.step()
    assert optimizer._launches is launches
    before, p = params[0].detach().clone(), params[1]
    freed = {"parameter": p, "gradient": p.grad}.get(what, optimizer.state[p]["exp_avg_slow"])
    assert isinstance(freed, torch.Tensor)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{what} .*has no memory"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_a_gradient_of_the_same_elements_and_strides_but_another_shape_is_refused() -> None:
    """Dimensions of one element may have any strides."""
    p = nn.Parameter(torch.ones(6, 1))
    optimizer = AdamW([p])
    p.grad = torch.ones(6, 1)
    optimizer.step()
    p.grad.data = torch.ones(6).as_strided((1, 6), (1, 1))
    with pytest.raises(RuntimeError, match=r"has shape \(1, 6\): they must be equal"):
        optimizer.step()


# --------------------------------------------------------------------------------- hyperparameters


def betas(first: float) -> tuple[float, float, float]:
    return first, 0.99, 0.999


@pytest.mark.parametrize("state", ["float32", "compact"])
@BACKENDS
def test_beta1_that_becomes_0_and_again_another(backend: str, state: str) -> None:
    """As the equation says: m1_t = b1_t m1_{t-1} + (1 - b1_t) g_t, in float64, in each step with its own b1."""
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdEMAMix([p], lr=0.0, betas=betas(0.9), backend=backend, state=state)
    m1 = 0.0
    for t, beta1 in enumerate((0.9, 0.9, 0.0, 0.0, 0.5, 0.9)):
        optimizer.param_groups[0]["betas"] = betas(beta1)
        p.grad = torch.full((64, 64), 1.0 + t)
        optimizer.step()
        m1 = beta1 * m1 + (1.0 - beta1) * (1.0 + t)
        if state == "float32":
            torch.testing.assert_close(optimizer.state[p]["exp_avg_fast"], torch.full((64, 64), m1))


@pytest.mark.parametrize(
    ("kind", "without", "with_it"),
    [
        (AdEMAMix, {"betas": betas(0.0)}, {"betas": betas(0.9)}),
        (KEMA, {"shortest": 1.0}, {"shortest": 10.0}),
    ],
)
def test_an_average_that_nobody_has_kept(kind: Any, without: dict[str, Any], with_it: dict[str, Any]) -> None:
    """It cannot start in mid-run: m1 of the step before is not known."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = kind([p], lr=0.1, **without)
    optimizer.param_groups[0].update(with_it)
    optimizer.param_groups[0].update(without)  # no step has been taken: nothing is lost
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0].update(with_it)
    with pytest.raises(ValueError, match=r"a state of 1 steps without \['exp_avg_(fast|1)'\]"):
        optimizer.step()
    assert torch.equal(p, before)
    optimizer.param_groups[0].update(without)
    optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        lambda x: torch.tensor(x, dtype=torch.float64),
        lambda x: nn.Parameter(torch.tensor([x], dtype=torch.float64)),
        np.float64,
        np.float32,
    ],
)
def test_betas_of_another_kind_are_numbers(kind: Any, capturable: bool) -> None:
    """Computed with as tensors, 1 - 0.9999 would be rounded to float32: off by 1e-4 of its value."""
    given = tuple(map(kind, (0.9, 0.999, 0.9999)))
    numbers = tuple(x.item() for x in given)
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at_once = AdEMAMix([{"params": params[:1], "betas": given}], capturable=capturable)
        later = AdEMAMix(params[1:2], capturable=capturable)
        later.param_groups[0]["betas"] = given
        plain = AdEMAMix(params[2:], betas=numbers, capturable=capturable)
        loaded = at_once.state_dict()
        loaded["param_groups"][0]["betas"] = list(given)
        at_once.load_state_dict(loaded)
        for optimizer, p in zip((at_once, later, plain), params, strict=True):
            for t in range(3):
                p.grad = torch.full((3,), 1.0 + t)
                optimizer.step()
    assert all(type(beta) is float for beta in at_once.param_groups[0]["betas"])
    states = [optimizer.state[p] for optimizer, p in zip((at_once, later, plain), params, strict=True)]
    assert same(states[0], states[2])
    assert same(states[1], states[2])


@pytest.mark.parametrize("capturable", [False, True])
@BACKENDS
def test_what_a_user_keeps_in_a_group_is_not_looked_at(backend: str, capturable: bool) -> None:
    mask, thing = torch.ones(3, 3), object()
    own = {"mask": mask, "thing": thing, "name": "decoder", "masks": [mask], "none": None, "sparse": mask.to_sparse()}
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([{"params": [p], **own}], backend=backend, capturable=capturable)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    group = optimizer.param_groups[0]
    assert all(group[name] is value for name, value in own.items())
    assert copy.deepcopy(optimizer).param_groups[0].keys() == group.keys()


def test_lists_of_a_user_s_own_stay_what_they_are() -> None:
    """Even where they hold tensors of one element, as betas may."""
    pair = collections.namedtuple("pair", "a b")
    own = {
        "shadow": [nn.Parameter(torch.ones(1))],
        "pair": pair(torch.ones(1), 2),
        "meta": [torch.ones(1, device="meta")],
        "numbers": (np.float32(1.0),),
    }
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AdEMAMix([{"params": [p], **own}])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    group = optimizer.param_groups[0]
    assert type(group["shadow"][0]) is nn.Parameter
    assert type(group["pair"]) is pair
    assert group["meta"][0].is_meta
    assert type(group["numbers"][0]) is np.float32
    with pytest.raises(ValueError, match=r"betas\[1\] must be a number in \[0, 1\), got tensor\(.*meta"):
        AdamW([p], betas=(0.9, torch.tensor(0.99, device="meta")))
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*63\), got tensor\(2\)"):
        AdamW([p], seed=torch.tensor(2))


# --------------------------------------------------------------------------------- behind an offloaded optimizer's back

BEHIND = {
    "fill_": lambda p: p.data.fill_(5.0),
    "copy_": lambda p: p.data.copy_(torch.full_like(p, 5.0)),
    "NumPy": lambda p: p.detach().numpy().fill(5.0),
    "another storage": lambda p: setattr(p, "data", torch.full_like(p, 5.0)),
}


@pytest.mark.parametrize("change", BEHIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_changed_through_data_is_stepped_from(change: str, dtype: torch.dtype) -> None:
    """Neither the version nor the address of a parameter tells of it."""
    if change == "NumPy" and dtype == torch.bfloat16:
        pytest.skip("NumPy has no bfloat16")
    params = [nn.Parameter(torch.ones(4, dtype=dtype)) for _ in range(2)]
    optimizers = [AdamW([p], lr=0.125, offload=offload) for p, offload in zip(params, (True, False), strict=True)]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
        BEHIND[change](p)
        optimizer.step()
    assert params[0][0] < 5.0
    torch.testing.assert_close(params[0], params[1], rtol=torch.finfo(dtype).eps, atol=0.0)
