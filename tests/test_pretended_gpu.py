"""Steps of parameters on a GPU that is not there: torch's fake tensors have devices and no numbers.

So they find what only a GPU would: tensors of two devices in one operation, memory pinned that is not the host's, and
hosts that wait for a number (fake tensors have none to give).
"""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ademamix import AdEMAMix
from ademamix.table import sent_to

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real one")
CASES: dict[str, dict[str, Any]] = {
    "capturable": {"capturable": True},
    "clipped": {"clip": True},
    "clipped, capturable": {"clip": True, "capturable": True},
    "guarded": {"skip_nonfinite": True},
    "scaled": {"scale": True},
    "scaled and guarded": {"scale": True, "skip_nonfinite": True},
    "clipped on two GPUs": {"clip": True, "devices": 2},
    "scaled on two GPUs": {"scale": True, "devices": 2},
}


def pin(t: Tensor) -> Tensor:
    if t.device.type != "cpu":
        raise RuntimeError("only dense CPU tensors can be pinned")  # torch says so
    return t


def part(t: Tensor, index: Any) -> Tensor:
    """What t[index] gives, by operations that need no GPU to be there."""
    dimension = 0
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, int):
            t = t.select(dimension, i)
        else:
            t = t.unsqueeze(dimension) if i is None else t.narrow(dimension, 0, len(range(t.shape[dimension])[i]))
            dimension += 1
    return t


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Functions of torch that ask the GPU itself."""
    get, put, empty = Tensor.__getitem__, Tensor.__setitem__, torch.empty
    seen: list[Tensor] = []

    def address(t: Tensor) -> int:
        seen.append(t)  # so that no other gets its number
        return id(t)

    def put_part(t: Tensor, index: Any, value: Any) -> None:
        if t.device.type != "cuda":
            put(t, index, value)
        elif isinstance(value, Tensor):
            torch._foreach_copy_([part(t, index)], [value.expand(part(t, index).shape)])
        else:
            part(t, index).fill_(value)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "data_ptr", address)
    monkeypatch.setattr(Tensor, "__invert__", lambda t: torch.bitwise_not(t))
    monkeypatch.setattr(Tensor, "__setitem__", put_part)
    monkeypatch.setattr(Tensor, "__getitem__", lambda t, i: part(t, i) if t.device.type == "cuda" else get(t, i))
    return monkeypatch


class Kernel:
    """In a compiled kernel's place: looks at its arguments."""

    def __init__(self) -> None:
        self.launched = 0

    def warmup(self, *tensors: Tensor, grid: Any, **_: Any) -> None:
        assert {t.device for t in tensors} == {tensors[0].device}
        assert tensors[0].is_cuda

    def __getitem__(self, grid: Any) -> Any:
        def launch(*tensors: Tensor, **options: Any) -> None:
            self.warmup(*tensors, grid=grid, **options)
            self.launched += 1

        return launch


def step_thrice(
    backend: str, *, clip: bool = False, scale: bool = False, devices: int = 1, dtype: torch.dtype, **options: Any
) -> AdEMAMix:
    shapes = [(f"cuda:{device}", shape) for device in range(devices) for shape in ((64, 96), (5,))]
    params = [torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for device, shape in shapes]
    optimizer = AdEMAMix(params, backend=backend, state="compact", **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        if clip:
            optimizer.clip_grad_norm_(1.0)
        if scale:  # what a GradScaler does
            optimizer.grad_scale = optimizer.found_inf = torch.empty((), device="cuda:0")
        optimizer.step()
        if scale:
            del optimizer.grad_scale, optimizer.found_inf
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_step_waits_for_nothing_and_mixes_no_devices(
    pretended: pytest.MonkeyPatch, backend: str, case: str, dtype: torch.dtype
) -> None:
    kernel = Kernel()
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is there on Linux alone")
        pretended.setattr("ademamix.backends.triton.kernel", lambda *_: kernel)
    with FakeTensorMode():
        optimizer = step_thrice(backend, dtype=dtype, **CASES[case])
    assert all(t.is_cuda for state in optimizer.state.values() for t in state.values())
    assert kernel.launched == (0 if backend == "eager" else 3 * 2 * CASES[case].get("devices", 1))


def test_only_what_is_on_the_host_is_pinned(pretended: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        there = torch.empty(3, device="cuda:0")
        assert sent_to(there.device, there) is there
        assert sent_to(there.device, torch.empty(3)).is_cuda
