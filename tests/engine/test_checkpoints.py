"""Saving, resuming and copying: training continues bit for bit, and state that does not fit is refused."""

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ademamix import AdamW, AdEMAMix, RuleOptimizer
from optimizer_table import CASES, FIRST, Case, every_case, first_cases
from small_models import model, same, set_grads

NAMES = {make: name for name, make in CASES.items()}
RESUMED = [
    (make, backend, dtype)
    for make in CASES.values()
    for backend in ("cpu", "eager")
    for dtype in (torch.float32, torch.bfloat16)
    if make in FIRST.values() or (backend, dtype) != ("cpu", torch.bfloat16)  # seconds to compile
]


@pytest.mark.parametrize(
    ("make", "backend", "dtype"), RESUMED, ids=[f"{NAMES[make]}-{b}-{dtype}" for make, b, dtype in RESUMED]
)
def test_resume_at_every_step_is_exact(make: Case, backend: str, dtype: torch.dtype) -> None:
    """In the middle of all warmups too; bfloat16 parameters keep their float32 state.

    One continues to the end, the others for three steps: then they have all that the unbroken training has.
    """

    def everything(*objects: Any) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([x.state_dict() for x in objects], file)
        file.seek(0)
        return file

    def take(t: int, net: nn.Module, optimizer: RuleOptimizer, scheduler: Any) -> None:
        set_grads(net, t)
        optimizer.step()
        scheduler.step()

    net = model(dtype)
    optimizer = make(net.parameters(), backend=backend)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    saved = []
    for t in range(20):
        take(t, net, optimizer, scheduler)
        saved.append(torch.load(everything(net, optimizer, scheduler), weights_only=True))
    for done, (weights, state, schedule) in enumerate(saved, start=1):
        again = model(dtype)
        again.load_state_dict(weights)
        resumed = make(again.parameters(), lr=7.0, backend=backend)
        new_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 20)
        resumed.load_state_dict(copy.deepcopy(state))
        new_schedule.load_state_dict(schedule)
        for t in range(done, 20 if done == 1 else min(done + 3, 20)):
            take(t, again, resumed, new_schedule)
            assert same([dict(again.state_dict()), resumed.state_dict()], [dict(saved[t][0]), saved[t][1]]), (done, t)


@every_case
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(make: Case, clone: Any) -> None:
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


@first_cases
def test_two_optimizers_loaded_from_one_dict_count_their_own_steps(make: Case) -> None:
    net, other = model(), model()
    one, two = make(net.parameters()), make(other.parameters())
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


@first_cases
def test_a_foreign_or_misshapen_checkpoint_is_refused_before_anything_changes(make: Case) -> None:
    net, (slot, *_, last) = model(), make.slots
    optimizer = make(net.parameters(), lr=0.5)
    set_grads(net, 0)
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    bad_shape, no_step, no_tensor = (copy.deepcopy(good) for _ in range(3))
    bad_shape["state"][2][slot] = torch.zeros(3, 9)
    del no_step["state"][1]["step"]
    no_tensor["state"][0][last] = no_tensor["state"][0][last].numpy()
    for bad, message in (
        (bad_shape, rf"'{slot}' has shape \(3, 9\); a parameter of shape \(3, 8\) needs \(3, 8\)"),
        (no_step, "state of parameter 1 has no 'step'"),
        (no_tensor, f"state tensor '{last}' must be a tensor, got a ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert same(optimizer.state_dict(), good)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(make([nn.Parameter(torch.zeros(2))]).state_dict())


OTHERS: dict[str, tuple[Any, set[str]]] = {
    **{name: (make, set(make.slots)) for name, make in FIRST.items()},
    "torch's AdamW": (torch.optim.AdamW, {"exp_avg", "exp_avg_sq"}),
    "torch's Adagrad": (torch.optim.Adagrad, {"sum"}),
}


@first_cases
@pytest.mark.parametrize(("other", "slots"), OTHERS.values(), ids=OTHERS)
def test_another_optimizer_s_state_is_refused(make: Case, other: Any, slots: set[str]) -> None:
    """It was taken over without its averages, and with its steps, so that nothing corrected the bias of new ones."""
    net, own = model(), set(make.slots)
    theirs, ours = other(net.parameters()), make(net.parameters())
    set_grads(net, 0)
    theirs.step()
    if slots == own:
        ours.load_state_dict(theirs.state_dict())
        return
    message = f"{make.kind.__name__}: state of parameter 0 has {sorted(slots - own)}, but no {sorted(own - slots)}"
    with pytest.raises(ValueError, match=f"{re.escape(message)}|betas must be [23] numbers"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


@every_case
def test_what_a_user_adds_to_a_state_is_kept(make: Case) -> None:
    net = model()
    optimizer = make(net.parameters())
    set_grads(net, 0)
    optimizer.step()
    for p in net.parameters():
        optimizer.state[p]["own"] = torch.ones(1)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert all(same(state["own"], torch.ones(1)) for state in optimizer.state.values())


@first_cases
def test_hooks_after_loading_see_the_state_and_may_change_it(make: Case) -> None:
    net, (slot, *_, last) = model(torch.bfloat16), make.slots
    optimizer = make(net.parameters(), backend="eager")
    set_grads(net, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())

    def hook(loaded: torch.optim.Optimizer) -> None:
        assert same(loaded.state_dict(), saved)
        for state in loaded.state.values():
            state[slot].zero_()

    optimizer.register_load_state_dict_post_hook(hook)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert all(not state[slot].any() and state[last].any() for state in optimizer.state.values())


class Allocated(TorchDispatchMode):
    """Counts the elements of all new tensors outside of the device "meta"."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta" and not result._is_view():
            self.elements += result.numel()
        return result


@first_cases
@pytest.mark.parametrize("state", ["float32", "bfloat16", "compact"])
def test_loading_what_fits_copies_nothing(make: Case, state: str) -> None:
    """Low-bit state was turned into the parameters' dtype on the way, three times the memory of compact state."""
    p = nn.Parameter(torch.ones(64, 64))
    p.grad = torch.ones(64, 64)
    optimizer = make([p], state=state, backend="eager")
    optimizer.step()
    saved = optimizer.state_dict()
    again = make([p], state=state)
    with Allocated() as allocated:
        again.load_state_dict(saved)
    assert 1 <= allocated.elements <= 2  # the step, which is the optimizer's own
    assert all(again.state[p][slot] is saved["state"][0][slot] for slot in make.slots)


@first_cases
def test_loaded_state_goes_to_the_device_of_each_parameter(make: Case) -> None:
    def optimizer_on(*devices: str) -> RuleOptimizer:
        return make([nn.Parameter(torch.ones(64, 96, device=d)) for d in devices], state="compact", backend="eager")

    saved, loaded = optimizer_on("cpu", "cpu"), optimizer_on("cpu", "meta")
    for p in saved.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    for p in loaded.param_groups[0]["params"]:
        state = loaded.state[p]
        assert state.keys() == {"step", *make.slots, *(f"{slot}_scale" for slot in make.slots)}
        assert {t.device for name, t in state.items() if name != "step"} == {p.device}
        assert state["step"].device.type == "cpu"


@every_case
@pytest.mark.parametrize("own", [{}, {"mask": torch.ones(2), "name": "decoder"}])
@pytest.mark.parametrize("offload", [False, True])
def test_loads_and_copies_change_no_state_dict(make: Case, own: dict[str, Any], offload: bool) -> None:
    """Entries, their order and values, after any number of them; torch.optim adds "differentiable" to its defaults."""
    net = model(torch.bfloat16 if offload else torch.float32)
    optimizer = make([{"params": list(net.parameters()), **own}], offload=offload)
    for t in range(2):
        set_grads(net, t)
        optimizer.step()
    first = copy.deepcopy(optimizer.state_dict())

    def check(other: torch.optim.Optimizer) -> None:
        found = other.state_dict()
        assert same(found, first)
        for group, before in zip(found["param_groups"], first["param_groups"], strict=True):
            assert list(group) == list(before)
        for index, state in found["state"].items():
            assert list(state) == list(first["state"][index])

    copied = pickled = optimizer
    for _ in range(3):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        check(optimizer)
        check(copy.copy(optimizer))
        copied, pickled = copy.deepcopy(copied), pickle.loads(pickle.dumps(pickled))
        check(copied)
        check(pickled)
        copied.load_state_dict(copied.state_dict())
        check(copied)
    assert optimizer.defaults.keys() == make([nn.Parameter(torch.ones(2))]).defaults.keys()


def test_a_load_that_fails_late_changes_nothing() -> None:
    """A user's own hook raises after ours have looked; or memory is short while states are converted."""
    net = model()
    optimizer = AdEMAMix(net.parameters())
    set_grads(net, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(before)
    for state in other["state"].values():
        state["step"] += 5

    class NoMemory(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError), NoMemory():
        optimizer.load_state_dict(other)
    assert same(optimizer.state_dict(), before)
