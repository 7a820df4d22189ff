"""Where torch runs a program in its own way: compiled functions, fake tensors, the meta device."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ademamix import AdamW, AdEMAMix, RuleOptimizer
from optimizer_table import Case, every_case
from small_models import model, same, set_grads

# --------------------------------------------------------------------------------- compiled functions


def train_from_the_start(make: Callable[..., RuleOptimizer], net: nn.Module) -> RuleOptimizer:
    optimizer = make(list(net.parameters())[:2])
    set_grads(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": list(net.parameters())[2:]})
    optimizer.load_state_dict(optimizer.state_dict())
    set_grads(net, 1)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    return optimizer


@every_case
@pytest.mark.filterwarnings("ignore")  # torch.compile has its own to give
def test_all_of_an_optimizer_s_life_in_a_compiled_function(make: Case) -> None:
    nets = model(), model()
    torch._dynamo.reset()
    optimizers = [
        torch.compile(train_from_the_start, backend="eager")(make, nets[0]),
        train_from_the_start(make, nets[1]),
    ]
    assert same([p.detach() for p in nets[0].parameters()], [p.detach() for p in nets[1].parameters()])
    assert same(optimizers[0].state_dict(), optimizers[1].state_dict())


# --------------------------------------------------------------------------------- fake tensors


def faked(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> nn.Parameter:
    p = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
    p.grad = torch.ones_like(p)
    return p


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("state", ["float32", "bfloat16", "compact"])
@pytest.mark.parametrize(
    "options", [{}, {"backend": "eager"}, {"capturable": True}, {"skip_nonfinite": True}, {"offload": True}], ids=str
)
def test_steps_of_fake_tensors(device: str, state: str, options: dict[str, Any]) -> None:
    """Memory is planned with them, also for GPUs that are not there; torch.optim.AdamW takes them."""
    with FakeTensorMode():
        params = [
            faked((64, 80), torch.float32, device),
            faked((5,), torch.bfloat16, device),
            faked((3, 700), torch.bfloat16, device),
            faked((), torch.complex64, device),
        ]
        theirs = torch.optim.AdamW(params)
        theirs.step()
        optimizer = AdEMAMix(params, state=state, **options)
        optimizer.step()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    for p in params:
        slots = {name: t for name, t in optimizer.state[p].items() if name != "step"}
        assert all(isinstance(t, FakeTensor) and t.device == p.device for t in slots.values())
        assert all(t.shape == p.shape for name, t in slots.items() if not name.endswith("_scale"))
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(state)
    assert kind is None or optimizer.state[params[0]]["exp_avg_slow"].dtype == kind


def test_a_fused_backend_takes_no_fake_tensors() -> None:
    with FakeTensorMode():
        p = faked((3,), torch.float32, "cpu")
    with pytest.raises(
        RuntimeError, match=r"a parameter in group 0 is a FakeTensor.*only allowed with backend='eager'"
    ):
        AdamW([p], backend="cpu").step()


def test_fake_and_true_tensors_by_turns() -> None:
    """A step of one optimizer in the mode leaves another, outside of it, as it is."""
    true, reference = (nn.Parameter(torch.ones(64, 80)) for _ in range(2))
    optimizers = AdEMAMix([true]), AdEMAMix([reference])
    for p, optimizer in zip((true, reference), optimizers, strict=True):
        for t in range(3):
            if p is true:
                with FakeTensorMode():
                    AdEMAMix([faked((64, 80), torch.float32, "cpu")]).step()
            p.grad = torch.full((64, 80), 1.0 + t)
            optimizer.step()
    assert same(optimizers[0].state_dict(), optimizers[1].state_dict())


@pytest.mark.parametrize("state", ["float32", "compact"])
@pytest.mark.parametrize("guard", [{}, {"skip_nonfinite": True}, {"capturable": True}, {"offload": True}], ids=str)
def test_steps_on_the_meta_device(state: str, guard: dict[str, Any]) -> None:
    p: Tensor = nn.Parameter(torch.ones(64, 80, device="meta"))
    optimizer = AdEMAMix([p], state=state, **guard)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    assert optimizer.state[p]["exp_avg_slow"].is_meta


@pytest.mark.filterwarnings("ignore")  # torch.compile has its own to give
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_in_a_compiled_function(copied: Callable[[Any], Any]) -> None:
    net = model()
    optimizer = AdEMAMix(net.parameters())
    set_grads(net, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    torch._dynamo.reset()
    other = torch.compile(lambda: copied(optimizer), backend="eager")()
    assert same(other.state_dict(), before)
    assert same(optimizer.state_dict(), before)
