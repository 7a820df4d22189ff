"""Keywords of torch.optim's optimizers, and betas as people write them: they work, or an error says what to write."""

import copy
import io
import pickle
from collections import UserList
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ademamix import AdamW, AdEMAMix, GradientMemory, Muon, RuleOptimizer, optimizer_from
from optimizer_table import Case, first_cases
from small_models import model, same, set_grads

THEIRS = [
    {"fused": True},
    {"foreach": True},
    {"fused": False, "foreach": False, "differentiable": False, "amsgrad": False},
    {"fused": None, "foreach": None, "differentiable": None, "amsgrad": None},
]
REFUSED = [
    ({"fused": True, "foreach": True}, "only one of fused and foreach may be True, got fused=True and foreach=True"),
    ({"fused": True, "backend": "eager"}, "fused=True takes backend='auto', 'cpu' or 'triton', got 'eager'"),
    ({"foreach": True, "backend": "cpu"}, "foreach=True takes an optimizer with backend='eager', got 'cpu'"),
    ({"fused": 1}, "fused must be None, True or False, got 1"),
    ({"foreach": "yes"}, "foreach must be None, True or False, got 'yes'"),
    ({"differentiable": True}, "differentiable must be False, got True"),
    ({"amsgrad": True}, "amsgrad must be False, got True: no maximum of second moments is kept"),
]


def own(g: Any, m: Any, *, w: Any = 0.1) -> Any:
    return m + g, m + w * g


Own = optimizer_from(own)


def one() -> list[Tensor]:
    return [torch.ones(3, requires_grad=True)]


def step(optimizer: Any) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("keywords", THEIRS, ids=str)
def test_a_line_of_torch_s_adamw_works_as_it_is(keywords: Any) -> None:
    """And the steps are torch's, to the rounding of some ten operations on numbers below 1."""
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = model(), model()
    optimizer = AdamW(ours.parameters(), **options, **keywords)
    reference = torch.optim.AdamW(theirs.parameters(), **options, **{k: bool(v) for k, v in keywords.items() if v})
    for t in range(5):
        set_grads(ours, t)
        set_grads(theirs, t)
        optimizer.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert optimizer.backends_in_use == ("eager",) if keywords.get("foreach") else ("cpu",)


@first_cases
@pytest.mark.parametrize("keywords", THEIRS, ids=str)
def test_every_optimizer_takes_them(make: Case, keywords: Any) -> None:
    optimizer = make(one(), **keywords)
    assert optimizer.backend == ("eager" if keywords.get("foreach") else "auto")
    assert not {"fused", "foreach", "differentiable", "amsgrad"} & optimizer.param_groups[0].keys()


@pytest.mark.parametrize(("keywords", "message"), REFUSED)
@pytest.mark.parametrize("kind", [AdEMAMix, AdamW, Muon, Own])
def test_what_they_cannot_be(kind: Any, keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([torch.ones(3, 3, requires_grad=True)], **keywords)


def test_a_memory_takes_them_too() -> None:
    assert GradientMemory(one(), memory=AdEMAMix, fused=True).backend == "auto"
    with pytest.raises(ValueError, match="amsgrad must be False"):
        GradientMemory(one(), memory=AdEMAMix, amsgrad=True)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_know_whether_they_are_fused(clone: Any) -> None:
    assert [clone(AdamW(one(), fused=fused))._fused for fused in (None, True, False)] == [None, True, False]


def test_in_groups_they_must_be_the_optimizer_s() -> None:
    """torch.optim has them in groups, where None and False ask for nothing; a backend is the whole optimizer's."""
    p, q = one() + one()
    nothing = {"fused": None, "foreach": False, "differentiable": False, "amsgrad": False}
    for keywords in (nothing, {"fused": True}):
        step(AdamW([{"params": [p], **keywords}], fused=True))
    step(AdamW([{"params": [p], "foreach": True}], foreach=True))
    optimizer = AdamW([p])
    for group, message in (
        ({"foreach": True}, "foreach=True takes an optimizer with backend='eager', got 'auto'"),
        ({"amsgrad": True}, "amsgrad must be False, got True"),
        ({"fused": 1}, "fused must be None, True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [q], **group})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="fused=True takes backend='auto', 'cpu' or 'triton', got 'eager'"):
        AdamW([{"params": [p], "fused": True}], backend="eager")


@pytest.mark.parametrize("keywords", [{"fused": True}, {"foreach": True}, {}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_run_of_torch_s_adamw_goes_on(keywords: Any, backend: str) -> None:
    """Its groups say how it ran; ours need not do so."""
    theirs, ours = model(), model()
    reference, optimizer = torch.optim.AdamW(theirs.parameters(), **keywords), AdamW(ours.parameters(), backend=backend)
    for t in range(6):
        if t == 3:
            ours.load_state_dict(theirs.state_dict())
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        for net, each in ((theirs, reference), (ours, optimizer)):
            set_grads(net, t)
            each.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert optimizer.backends_in_use == (backend,)
    back = torch.optim.AdamW(theirs.parameters(), **keywords)
    back.load_state_dict(optimizer.state_dict())  # and back, where a step finds what it asks groups for
    back.step()


def test_a_run_that_cannot_go_on() -> None:
    reference = torch.optim.AdamW(one(), differentiable=True)
    optimizer = AdamW(one())
    with pytest.raises(ValueError, match="differentiable must be False, got True"):
        optimizer.load_state_dict(reference.state_dict())


# --------------------------------------------------------------------------------- betas

THIRD = (
    r"betas must be 3 numbers in \[0, 1\), got \(0.9, 0.95\); the third is beta3, the decay of the slow EMA: "
    r"ademamix\.suggest\(total_steps, beta1=0\.9, beta2=0\.95\)"
)


def test_two_betas_for_three() -> None:
    with pytest.raises(ValueError, match=THIRD):
        AdEMAMix(one(), lr=1e-3, betas=(0.9, 0.95), fused=True)  # type: ignore[arg-type]
    optimizer = AdEMAMix(one())
    with pytest.raises(ValueError, match=THIRD):
        optimizer.load_state_dict(torch.optim.AdamW(one(), betas=(0.9, 0.95)).state_dict())
    with pytest.raises(ValueError, match=THIRD):
        optimizer.add_param_group({"params": one(), "betas": [0.9, 0.95]})


@pytest.mark.parametrize("options", [{"backend": "cpu"}, {"backend": "eager"}, {"capturable": True}, {"offload": True}])
def test_two_betas_in_the_middle_of_a_run(options: Any) -> None:
    """As schedulers write them that know of Adam's two."""
    net = model()
    optimizer = AdEMAMix(net.parameters(), **options)
    for t in range(3):
        if t:
            optimizer.param_groups[0]["betas"] = (0.9, 0.95)
            before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            set_grads(net, t)
            with pytest.raises(ValueError, match=THIRD):
                optimizer.step()
            assert same([*before], [net.state_dict(), optimizer.state_dict()])
            optimizer.param_groups[0]["betas"] = (0.9, 0.95, 0.999)
        set_grads(net, t)
        optimizer.step()


class OfTwo(torch.optim.lr_scheduler.OneCycleLR):
    """As one of those that write Adam's two."""

    def step(self, epoch: Any = None) -> None:
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["betas"] = (group["betas"][0], group["betas"][1])


def test_schedulers_of_momentum() -> None:
    """torch's own writes the first and keeps the others."""
    p = one()
    optimizer = AdEMAMix(p, betas=(0.9, 0.95, 0.999))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    for _ in range(5):
        step(optimizer)
        scheduler.step()
    assert optimizer.param_groups[0]["betas"][1:] == (0.95, 0.999)
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    optimizer = AdEMAMix(p, betas=(0.9, 0.95, 0.999))
    OfTwo(optimizer, 0.1, total_steps=10)
    with pytest.raises(ValueError, match=r"betas must be 3 numbers.*got .*, 0.95\); the third is beta3"):
        step(optimizer)


def test_entries_of_a_user_s_own_are_left_alone() -> None:
    """Also under the name of what another optimizer has."""
    optimizer = Own(one())
    optimizer.param_groups[0]["betas"] = 0.9
    step(optimizer)


SEQUENCES = {
    "list": list,
    "another sequence, as OmegaConf's": UserList,
    "NumPy's array": np.array,
    "NumPy's numbers": lambda given: tuple(map(np.float64, given)),
    "tensors": lambda given: tuple(torch.tensor(x, dtype=torch.float64) for x in given),
    "integers": lambda given: (0, *given[1:]),
}


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
def test_betas_of_any_kind_are_a_tuple_of_floats(sequence: Any) -> None:
    """So that torch.load takes a checkpoint with weights_only=True."""
    given = (0.0, 0.95, 0.999)
    net = [model() for _ in range(2)]
    plain = AdEMAMix(net[0].parameters(), betas=given)
    in_group = AdEMAMix([{"params": net[1].parameters(), "betas": sequence(given)}], betas=sequence(given))
    for optimizer, each in ((plain, net[0]), (in_group, net[1])):
        set_grads(each, 0)
        optimizer.step()
    file = io.BytesIO()
    torch.save(in_group.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert same(saved, plain.state_dict())
    for found in (in_group.defaults, in_group.param_groups[0], saved["param_groups"][0]):
        assert type(found["betas"]) is tuple
        assert [type(beta) for beta in found["betas"]] == [float] * 3
    saved["param_groups"][0]["betas"] = sequence(given)
    in_group.load_state_dict(saved)
    assert same(in_group.state_dict(), plain.state_dict())


def test_other_numbers_of_numpy_are_python_s() -> None:
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))], lr=np.float64(0.1), ns_coefficients=np.array([3.0, -4.0, 2.0]))
    (group,) = optimizer.param_groups
    assert (type(group["lr"]), group["ns_coefficients"]) == (float, (3.0, -4.0, 2.0))


@pytest.mark.parametrize("betas", [0.9, None, np.array(0.9), torch.tensor([0.9, 0.95, 0.999])], ids=str)
@pytest.mark.parametrize("kind", [AdEMAMix, AdamW])
def test_betas_that_are_no_sequence(kind: type[RuleOptimizer], betas: Any) -> None:
    with pytest.raises(ValueError, match=r"betas must be [23] numbers in \[0, 1\), got "):
        kind(one(), betas=betas)  # type: ignore[call-arg]


@pytest.mark.parametrize("betas", [(True, 0.9, 0.9), np.array([True, False, True])], ids=str)
def test_booleans_are_no_betas(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"betas\[0\] must be a number in \[0, 1\), got (np.)?True"):
        AdEMAMix(one(), betas=betas)
