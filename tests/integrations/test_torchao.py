"""torchao's quantized training: weights that only their own class can read and write. See docs/tools/torchao.md."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ademamix import AdEMAMix, backends
from small_models import same

# Importing it says what of its compiled code this torch cannot load.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr("warnings.warn", lambda *args, **kwargs: None)
    quantized = pytest.importorskip(
        "torchao.prototype.quantized_training", reason="needs torchao: pip install torchao", exc_type=ImportError
    )
    from torchao.quantization import quantize_

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99, 0.999), "alpha": 5.0, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning has been given yet."""
    monkeypatch.setattr(backends, "_unavailable", set())


def model(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96, bias), nn.Tanh(), nn.Linear(96, 8, bias))
    quantize_(net, quantized.int8_weight_only_quantized_training())
    return net


def backward(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(32, 64, generator=generator), torch.randn(32, 8, generator=generator)
    net.zero_grad()
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    return loss.detach()


def plain_step(params: list[nn.Parameter], copies: list[Tensor], optimizer: AdEMAMix) -> None:
    """The same with copies in float32, which are written back."""
    for p, copied in zip(params, copies, strict=True):
        copied.data, copied.grad = p.detach().dequantize(), p.grad
    optimizer.step()
    with torch.no_grad():
        for p, copied in zip(params, copies, strict=True):
            p.copy_(copied.detach())


@pytest.mark.parametrize("state", ["float32", "compact"])
@pytest.mark.filterwarnings("ignore:.*cannot read parameters of type:UserWarning")
def test_int8_weights_train_as_in_a_loop_over_copies(state: str) -> None:
    """To the bit: both round the same numbers with the same random ones of torch's."""
    net, other = (model(bias=False) for _ in range(2))
    ours = AdEMAMix(net.parameters(), state=state, **OPTIONS)
    params = list(other.parameters())
    copies = [torch.empty(p.shape, requires_grad=True) for p in params]
    loop = AdEMAMix(copies, state=state, backend="eager", **OPTIONS)
    for t in range(20):
        assert torch.equal(backward(net, t), backward(other, t))
        torch.manual_seed(t)
        ours.step()
        torch.manual_seed(t)
        plain_step(params, copies, loop)
    for p, q, copied in zip(net.parameters(), params, copies, strict=True):
        assert torch.equal(p.int_data, q.int_data)
        assert torch.equal(p.scale, q.scale)
        assert same(ours.state[p], loop.state[copied])


def test_the_loss_falls_and_a_checkpoint_goes_on() -> None:
    net = model()
    optimizer = AdEMAMix(net.parameters(), backend="eager", **OPTIONS)
    losses = []
    for _ in range(60):
        losses.append(backward(net, 0).item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    again = model()
    again.load_state_dict(net.state_dict())
    resumed = AdEMAMix(again.parameters(), backend="eager", **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((net, optimizer), (again, resumed)):
        torch.manual_seed(0)
        backward(each, 1)
        its.step()
    assert torch.equal(net[0].weight.int_data, again[0].weight.int_data)
    assert same(optimizer.state_dict()["state"], resumed.state_dict()["state"])


def test_a_nan_is_skipped() -> None:
    net = model()
    optimizer = AdEMAMix(net.parameters(), backend="eager", skip_nonfinite=True, **OPTIONS)
    before = net[0].weight.int_data.clone()
    backward(net, 0)
    net[2].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(net[0].weight.int_data, before)


def test_auto_warns_once_and_a_fused_backend_refuses() -> None:
    net = model()
    optimizer = AdEMAMix(net.parameters(), **OPTIONS)

    def train() -> None:
        for t in range(3):
            backward(net, t)
            optimizer.step()

    with pytest.warns(UserWarning, match="cannot read parameters of type Int8QuantizedTraining") as caught:
        train()
    assert optimizer.backends_in_use == ("cpu", "eager")  # biases, and weights
    assert len([w for w in caught if "cannot read" in str(w.message)]) == 1
    fused = AdEMAMix(net.parameters(), backend="cpu", **OPTIONS)
    with pytest.raises(
        RuntimeError, match=r"is a Int8QuantizedTrainingLinearWeight, .*only allowed with backend='eager'"
    ):
        fused.step()
    assert not fused.state


def test_float8_weights_for_fsdp() -> None:
    """What torchao makes of a weight whose all-gather is in float8: its memory is in another tensor."""
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    torch.manual_seed(0)
    start = torch.randn(64, 80)
    wrapped = nn.Parameter(WeightWithDynamicFloat8CastTensor(start.clone(), LinearMMConfig(), torch.float8_e4m3fn))
    plain = nn.Parameter(start.clone())
    both = [AdEMAMix([p], backend="eager", state="compact", **OPTIONS) for p in (wrapped, plain)]
    for t in range(5):
        wrapped.grad = plain.grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(t))
        for optimizer in both:
            optimizer.step()
    assert torch.equal(wrapped._tensor, plain)
