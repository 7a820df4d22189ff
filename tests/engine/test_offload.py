"""State in host memory: it computes what state next to the parameters, or float32 parameters, would give."""

import copy
import io
import itertools
import pickle
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdEMAMix
from ademamix.engine.offload import Trip, _Slabs
from optimizer_table import CASES, Case, every_case

F32, C64 = torch.float32, torch.complex64
SHAPES = ((64, 96), (5,), (3, 700), (), (70, 257))
SETTINGS: dict[str, Any] = {"lr": 0.01, "alpha": 5.0, "alpha_warmup": 7, "beta3_warmup": 5, "weight_decay": 0.1}
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_() for s in SHAPES]


def train(params: Any, optimizer: Any, steps: range, like: torch.dtype | None = None) -> None:
    """Some steps whose gradients have been rounded to the dtype ``like``; one parameter has none now and then."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(like or p.dtype).to(p.dtype)
        if step % 3 == 1:
            params[2].grad = None
        optimizer.step()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ademamix.engine.launches.CHUNK", 4000)  # several chunks, some of them of one parameter


IN_PLACE = [
    *(("AdEMAMix", s, d, "cpu") for s in ("float32", "bfloat16", "compact") for d in (F32, torch.float64, C64)),
    *((name, "compact", F32, "eager") for name in CASES),
]


@pytest.mark.parametrize(("name", "state", "dtype", "backend"), IN_PLACE, ids=str)
def test_steps_on_the_host_have_the_bits_of_steps_in_place(
    name: str, state: str, dtype: torch.dtype, backend: str
) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizers = [
        CASES[name](params, state=state, backend=backend, offload=offload)
        for params, offload in ((ours, True), (theirs, False))
    ]
    for params, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(params, optimizer, range(6), C64 if dtype == C64 else F32)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        one, other = optimizers[0].state[p], optimizers[1].state[q]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    launches = optimizers[0]._launches
    assert launches is not None
    assert len(launches.calls) >= 3


def test_a_step_that_only_the_device_knows_to_skip_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU gradients are on their way by then."""

    class Elsewhere:
        device = torch.device("cuda")

        def __init__(self, value: bool) -> None:
            self.value = value

        def to(self, device: torch.device) -> torch.Tensor:
            return torch.tensor(self.value, device=device)

    params = parameters()
    optimizer = AdEMAMix(params, offload=True, state="compact", **SETTINGS)
    train(params, optimizer, range(2))

    def tensors() -> list[torch.Tensor]:
        return [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]

    before = tensors()
    for skip in (True, False):
        monkeypatch.setattr(optimizer, "_factor_and_skip", lambda params, grads, skip=skip: (None, Elsewhere(skip)))
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True)) is skip


LAYOUTS = {
    "channels last, dimensions of 1": torch.empty(64, 32, 1, 1, dtype=torch.bfloat16, device="meta"),
    "channels last": torch.empty(7, 5, 3, 3, dtype=torch.float16, device="meta"),
    "turned": torch.empty(64, 80, device="meta").t(),
    "complex": torch.empty(64, 80, dtype=torch.complex64, device="meta"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_gradient_is_read_before_it_has_arrived(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from a GPU pretended: what they bring is there once somebody has waited for them."""

    def fetch(trip: Trip, members: Any) -> Any:
        for m in members:
            grad = trip.stand_ins[m].grad
            assert grad is not None
            assert not trip.grads[m].is_conj()  # torch resolves it in the host's memory, before the copy is there
            grad.fill_(torch.nan)
        return [[(trip.stand_ins[m].grad, trip.grads[m]) for m in members]]

    def arrived(trip: Trip, chunk: int) -> None:
        for to_host, grad in chain.from_iterable(trip.events[chunk]):
            to_host.copy_(grad)

    runs = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(Trip, "_fetch", fetch)
            monkeypatch.setattr(Trip, "arrived", arrived)
        generator = torch.Generator().manual_seed(0)
        like = torch.empty_like(LAYOUTS[layout], device="cpu")
        like = like.to(memory_format=torch.channels_last) if like.ndim == 4 else like
        p = torch.empty_like(like).copy_(torch.randn(like.shape, generator=generator)).requires_grad_()
        optimizer = AdEMAMix([p], offload=True, lr=0.1)
        for _ in range(3):
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator))
            p.grad = p.grad.conj() if p.is_complex() else p.grad
            optimizer.step()
        runs.append(p.detach().clone())
    assert torch.equal(*runs)


def test_host_memory_is_cut_from_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes a power of two of each request for pinned memory."""
    sizes: list[int] = []
    empty = torch.empty

    def requested(size: Any, **options: Any) -> torch.Tensor:
        sizes.append(size)
        return empty(size, **options)

    shapes = [(50257, 768), (1024, 768), *[(768, 3 * 768), (768, 768), (768,), (5,)] * 12]
    slabs, like = _Slabs(), [torch.empty(s, device="meta") for s in shapes]
    monkeypatch.setattr(torch, "empty", requested)
    tensors = [slabs.empty(t, torch.float32, torch.device("cpu")) for t in like]
    assert [t.shape for t in tensors] == [t.shape for t in like]
    assert all(t.is_contiguous() and t.data_ptr() % 64 == 0 for t in tensors)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(size & (size - 1) == 0 for size in sizes)
    wanted = sum(t.nbytes for t in tensors)
    assert sum(sizes) < 1.3 * wanted < sum(1 << (t.nbytes - 1).bit_length() for t in tensors)


@LOW
@every_case
def test_low_precision_parameters_are_the_rounded_master_weights(make: Case, dtype: torch.dtype) -> None:
    ours, exact = parameters(dtype), parameters()
    optimizers = make(ours, offload=True, backend="eager"), make(exact, backend="eager")
    for params, optimizer in zip((ours, exact), optimizers, strict=True):
        train(params, optimizer, range(8), dtype)
    for p, q in zip(ours, exact, strict=True):
        assert torch.equal(optimizers[0].state[p]["master"], q)
        assert torch.equal(p, q.detach().to(dtype))
        assert all(t.device.type == "cpu" for t in optimizers[0].state[p].values())


@LOW
@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_resume_is_exact_in_whichever_order_things_are_loaded(
    fresh: bool, weights_first: bool, dtype: torch.dtype
) -> None:
    """Into a new optimizer, and into one that has done other steps."""
    params = parameters(dtype)
    optimizer = AdEMAMix(params, offload=True, state="compact", backend="eager", **SETTINGS)
    train(params, optimizer, range(4))
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], optimizer.state_dict()], file)
    train(params, optimizer, range(4, 9))

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = parameters(dtype)
    resumed = AdEMAMix(again, offload=True, state="compact", backend="eager")
    if not fresh:
        train(again, resumed, range(20, 23))
    if not weights_first:
        resumed.load_state_dict(state)
    with torch.no_grad():
        for p, w in zip(again, weights, strict=True):
            p.copy_(w)
    if weights_first:
        resumed.load_state_dict(state)
    train(again, resumed, range(4, 9))
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][name], resumed.state[q][name]) for name in optimizer.state[p])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_others_write_into_a_parameter_is_taken_over(dtype: torch.dtype) -> None:
    changed, twin = parameters(dtype), parameters(dtype)
    one, two = (AdEMAMix(ps, offload=True, lr=0.0) for ps in (changed, twin))
    train(changed, one, range(2))
    train(twin, two, range(2))
    with torch.no_grad():
        changed[0][3] = 7.0
        changed[1].data = torch.full_like(changed[1], 2.0)
    train(changed, one, range(2, 4))
    train(twin, two, range(2, 4))
    assert (changed[0][3] == 7.0).all()
    assert torch.equal(changed[0][4:], twin[0][4:])
    assert (changed[1] == 2.0).all()
    assert all(map(torch.equal, changed[2:], twin[2:]))


def test_checkpoints_move_to_the_host_and_back() -> None:
    for before, after in ((False, True), (True, False)):
        params, reference = parameters(), parameters()
        old, plain = AdEMAMix(params, offload=before, **SETTINGS), AdEMAMix(reference, **SETTINGS)
        train(params, old, range(3))
        train(reference, plain, range(6))
        new = AdEMAMix(params, offload=after)
        new.load_state_dict(copy.deepcopy(old.state_dict()))
        train(params, new, range(3, 6))
        assert all(map(torch.equal, params, reference))
    low = parameters(torch.bfloat16)
    optimizer = AdEMAMix(low, offload=True)
    train(low, optimizer, range(1))
    beside = AdEMAMix(low)
    beside.load_state_dict(optimizer.state_dict())
    assert "master" not in beside.state[low[0]]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(clone: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = AdEMAMix(params, offload=True, **SETTINGS)
    train(params, optimizer, range(3))
    twin = clone(optimizer)
    others = twin.param_groups[0]["params"]
    train(params, optimizer, range(3, 6))
    train(others, twin, range(3, 6))
    assert all(map(torch.equal, params, others))


def test_clipping_scaling_and_bad_gradients() -> None:
    ours, theirs = parameters(), parameters()
    optimizers = AdEMAMix(ours, offload=True, **SETTINGS), AdEMAMix(theirs, **SETTINGS)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in optimizers]
    for step in range(4):
        for params, optimizer, scaler in zip((ours, theirs), optimizers, scalers, strict=True):
            scaler.scale(torch.zeros((), requires_grad=True))
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) * scaler.get_scale()
            if step == 2:
                params[0].grad[3, 4] = torch.inf
            optimizer.clip_grad_norm_(0.5, grad_scale=scaler)
            scaler.step(optimizer)
            scaler.update()
    assert [o.skipped_steps for o in optimizers] == [1, 1]
    assert all(map(torch.equal, ours, theirs))


def test_broken_gradients_and_master_weights_are_named_before_anything_changes() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = AdEMAMix(embedding.parameters(), offload=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"only takes dense gradients \(torch.strided\)"):
        optimizer.step()
    assert not optimizer.state
    low = parameters(torch.bfloat16)
    optimizer = AdEMAMix(low, offload=True)
    train(low, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["master"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'master' has shape \(3,\); a parameter of shape \(64, 96\) needs"):
        optimizer.load_state_dict(saved)


def test_layouts_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 3, 5, 6, generator=generator)
    plain, last = values.clone().requires_grad_(), values.to(memory_format=torch.channels_last).requires_grad_()
    optimizers = AdEMAMix([plain], offload=True), AdEMAMix([last], offload=True)
    for _ in range(3):
        plain.grad = torch.randn(values.shape, generator=generator)
        last.grad = plain.grad.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


def gpu(test: Any) -> Any:
    """A test that `make gpu` runs."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_s_parameters_have_the_bits_of_the_host_s(dtype: torch.dtype) -> None:
    there = [p.detach().cuda().requires_grad_() for p in parameters(dtype)]
    here = parameters(dtype)
    optimizers = AdEMAMix(there, offload=True, **SETTINGS), AdEMAMix(here, offload=True, **SETTINGS)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(there, here, strict=True):
            q.grad = torch.randn(q.shape, generator=generator).to(dtype)
            p.grad = q.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(there, here, strict=True))
    assert {t.device.type for state in optimizers[0].state.values() for t in state.values()} == {"cpu"}
