"""Steps of parameters on a GPU that is not there: torch's fake tensors have devices and no numbers.

So they find what only a GPU would: tensors of two devices in one operation, memory pinned that is not the host's, hosts
that wait for a number (fake tensors have none to give), and copies of host memory that nobody waits for.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ademamix import AdEMAMix, Muon, RuleOptimizer, backends
from ademamix.backends import sent_to
from ademamix.engine.coefficients import on_host
from ademamix.engine.offload import Host, Trip
from optimizer_table import Case, every_case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real one")
CASES: dict[str, dict[str, Any]] = {
    "capturable": {"capturable": True},
    "clipped": {"clip": True},
    "clipped, capturable": {"clip": True, "capturable": True},
    "guarded": {"skip_nonfinite": True},
    "with a learning rate that the GPU has": {"late_lr": True, "skip_nonfinite": True},
    "with a learning rate that the GPU has, capturable": {"late_lr": True, "capturable": True},
    "scaled": {"scale": "cuda:0"},
    "scaled and guarded": {"scale": "cuda:0", "skip_nonfinite": True},
    "clipped on two GPUs": {"clip": True, "devices": 2},
    "scaled on two GPUs": {"scale": "cuda:0", "devices": 2},
    "scaled by the second of two GPUs": {"scale": "cuda:1", "devices": 2},
    "clipped and scaled by the second of two GPUs": {"clip": True, "scale": "cuda:1", "devices": 2},
}


class Pinned:
    """Host memory that is pinned, and copies that need it to be."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []  # so that no other gets its memory

    def __contains__(self, t: Tensor) -> bool:
        return any(t.untyped_storage()._cdata == own.untyped_storage()._cdata for own in self.kept)

    def pin(self, t: Tensor) -> Tensor:
        if t.device.type != "cpu":
            raise RuntimeError("only dense CPU tensors can be pinned")  # torch says so
        if t not in self:
            t = t.clone()
            self.kept.append(t)
        return t

    def check(self, source: Tensor, target: Tensor) -> None:
        """What nobody waits for may come from pinned memory, and must not be read from the host's."""
        if source.device.type == "cpu" and target.device.type != "cpu":
            assert source in self
        assert source.device.type == "cpu" or target.device.type != "cpu"


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
    get, put, to, empty = Tensor.__getitem__, Tensor.__setitem__, Tensor.to, torch.empty
    seen: list[Tensor] = []
    pinned = Pinned()

    def empty_or_pinned(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = empty(*sizes, **options)
        if pin_memory:
            pinned.kept.append(made)
        return made

    def sent(t: Tensor, *where: Any, non_blocking: bool = False, **options: Any) -> Tensor:
        there = to(t, *where, non_blocking=non_blocking, **options)
        if non_blocking:
            pinned.check(t, there)
        return there

    def address(t: Tensor) -> int:
        seen.append(t)  # so that no other gets its number
        return id(t) << 14  # as far from others' as it is long

    def put_part(t: Tensor, index: Any, value: Any) -> None:
        if t.device.type != "cuda":
            put(t, index, value)
        elif isinstance(value, Tensor):
            torch._foreach_copy_([part(t, index)], [value.expand(part(t, index).shape)])
        else:
            part(t, index).fill_(value)

    monkeypatch.setattr(backends, "is_fake", lambda t: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", empty_or_pinned)
    monkeypatch.setattr(Tensor, "to", sent)
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: pinned.pin(t))
    monkeypatch.setattr(Tensor, "data_ptr", address)
    monkeypatch.setattr(Tensor, "__invert__", lambda t: torch.bitwise_not(t))
    monkeypatch.setattr(Tensor, "__setitem__", put_part)
    monkeypatch.setattr(Tensor, "__getitem__", lambda t, i: part(t, i) if t.device.type == "cuda" else get(t, i))
    return monkeypatch


class Kernel:
    """In a compiled kernel's place: looks at its arguments."""

    def __init__(self) -> None:
        self.launched = 0

    def warmup(self, *arguments: Any, grid: Any, **_: Any) -> None:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        assert {t.device for t in tensors} == {tensors[0].device}
        assert tensors[0].is_cuda

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.warmup(*arguments, grid=grid, **options)
            self.launched += 1

        return launch


def step_thrice(
    backend: str,
    *,
    clip: bool = False,
    scale: str | None = None,  # where a GradScaler has what it says
    late_lr: bool = False,
    devices: int = 1,
    and_cpu: bool = False,
    dtype: torch.dtype,
    make: Any = AdEMAMix,
    shapes: Any = ((64, 96), (5,)),
    **options: Any,
) -> RuleOptimizer:
    names = [f"cuda:{device}" for device in range(devices)] + ["cpu"] * and_cpu
    params = [torch.nn.Parameter(torch.empty(s, device=name, dtype=dtype)) for name in names for s in shapes]
    optimizer = make(params, backend=backend, state="compact", **options)
    if late_lr:
        optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda:0")
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        its = None if scale is None else torch.empty((), device=scale)
        if clip:
            optimizer.clip_grad_norm_(1.0, grad_scale=its)
        if scale:  # what a GradScaler does
            optimizer.grad_scale = optimizer.found_inf = its
        optimizer.step()
        if scale:
            del optimizer.grad_scale, optimizer.found_inf
        optimizer.zero_grad()
    return optimizer


FEW = ("capturable", "clipped on two GPUs")  # noise for parameters of bfloat16 is the same under all of them


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        pytest.param(backend, case, dtype, marks=pytest.mark.slow if slow else (), id=f"{backend}-{case}-{dtype}")
        for backend in ("eager", "triton")
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16)
        for slow in [backend == "eager" and dtype == torch.bfloat16 and case not in FEW]
    ],
)
def test_a_step_waits_for_nothing_and_mixes_no_devices(
    pretended: pytest.MonkeyPatch, backend: str, case: str, dtype: torch.dtype
) -> None:
    kernel, table = Kernel(), Kernel()
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is only available on Linux")
        pretended.setattr("ademamix.backends.triton.kernel", lambda *_: kernel)
        pretended.setattr("ademamix.engine.triton_coefficients.kernel", lambda *_: table)
    with FakeTensorMode():
        optimizer = step_thrice(backend, dtype=dtype, **CASES[case])
    assert all(t.is_cuda for state in optimizer.state.values() for t in state.values())
    devices = CASES[case].get("devices", 1) if backend == "triton" else 0
    loaded = 3 * devices  # two kernels for the parameter that is aligned, one for that which is not
    assert kernel.launched == loaded + 3 * 2 * devices
    assert table.launched == 3 * devices


@every_case
def test_no_optimizer_s_step_waits_for_anything(pretended: pytest.MonkeyPatch, make: Case) -> None:
    """A GPU computes the coefficients of each."""
    with FakeTensorMode():
        optimizer = step_thrice("eager", dtype=torch.float32, clip=True, capturable=True, make=make)
    assert all(t.is_cuda for state in optimizer.state.values() for t in state.values())


def in_both_geometries(kind: Any) -> Any:
    def make(params: Any, **options: Any) -> RuleOptimizer:
        groups = [
            {"params": [p for p in params if p.ndim > 1], "geometry": "muon"},
            {"params": [p for p in params if p.ndim < 2], "geometry": "adam"},
        ]
        return kind(groups, **options)  # type: ignore[no-any-return]

    return make


@pytest.mark.parametrize(
    ("case", "backend", "kind"),
    [*((case, "eager", Muon) for case in CASES), *((case, "triton", AdEMAMix) for case in FEW)],
)
def test_a_step_in_muon_s_geometry_waits_for_nothing_and_mixes_no_devices(
    pretended: pytest.MonkeyPatch, case: str, backend: str, kind: Any
) -> None:
    """Also where a matrix has more rows than columns, or more dimensions."""
    kernel = Kernel()
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is only available on Linux")
        pretended.setattr("ademamix.backends.triton.kernel", lambda *_: kernel)
        pretended.setattr("ademamix.engine.triton_coefficients.kernel", lambda *_: kernel)
    shapes = ((64, 96), (96, 64), (64, 8, 2, 2), (64, 96), (5,))
    with FakeTensorMode():
        make = in_both_geometries(kind)
        optimizer = step_thrice(backend, dtype=torch.float32, make=make, shapes=shapes, **CASES[case])
    assert all(t.is_cuda for state in optimizer.state.values() for t in state.values())


class Started(TorchDispatchMode):
    """Counts torch's operations that start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if function.namespace == "aten" and not view and not function.__name__.startswith("empty"):
            self.names.append(function.__name__)
        return made


@pytest.mark.parametrize(("options", "clip", "most"), [({"capturable": True}, False, 0), ({}, True, 10)])
def test_what_a_step_starts_on_the_gpu(
    pretended: pytest.MonkeyPatch, options: dict[str, Any], clip: bool, most: int
) -> None:
    """A launch for the coefficients, one for the update, and torch's operations for the norm: no more for more
    parameters. Before there was a kernel of coefficients, they took 47 and 65 operations of torch's."""
    pytest.importorskip("triton", reason="Triton is only available on Linux")
    kernel, table = Kernel(), Kernel()
    pretended.setattr("ademamix.backends.triton.kernel", lambda *_: kernel)
    pretended.setattr("ademamix.engine.triton_coefficients.kernel", lambda *_: table)
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(64, 96, device="cuda:0")) for _ in range(30)]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = AdEMAMix(params, backend="triton", alpha_warmup=9, beta3_warmup=9, **options)
        for _ in range(3):
            kernel.launched = table.launched = 0
            with Started() as started:
                if clip:
                    optimizer.clip_grad_norm_(1.0)
                optimizer.step()
    assert len(started.names) <= most, started.names
    assert (kernel.launched, table.launched) == (1, 1)


def test_a_grad_scaler_and_clipping_wait_for_nothing(pretended: pytest.MonkeyPatch) -> None:
    """README's loop; the scaler's own get_scale() would wait."""
    pretended.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(shape, device="cuda:0")) for shape in ((64, 96), (5,))]
        optimizer = AdEMAMix(params, backend="eager")
        scaler = torch.amp.GradScaler("cuda")
        for _ in range(2):
            scaler.scale(torch.empty((), device="cuda:0"))
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.clip_grad_norm_(1.0, grad_scale=scaler)
            scaler.step(optimizer)
            scaler.update()
        with pytest.raises(DataDependentOutputException):
            scaler.get_scale()


def test_only_what_is_on_the_host_is_pinned(pretended: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        there, here = torch.empty(3, device="cuda:0"), torch.empty(3)
        assert sent_to(there.device, there) is there
        assert sent_to(here.device, here) is here
        assert sent_to(there.device, here).is_cuda


def test_copies_of_host_memory_are_waited_for_unless_it_is_pinned_for_them(pretended: pytest.MonkeyPatch) -> None:
    unwaited: list[bool] = []
    to = Tensor.to

    def sent(t: Tensor, *where: Any, non_blocking: bool = False) -> Tensor:
        unwaited.append(non_blocking)
        return to(t, *where, non_blocking=non_blocking)

    pretended.setattr(Tensor, "to", sent)
    with FakeTensorMode():
        here, there = torch.empty(3), torch.empty(3, device="cuda:0")
        users = here.pin_memory()
        for target, t in (("cuda:0", here), ("cuda:0", users), ("cpu", there), ("xpu:0", here), ("cuda:1", there)):
            assert sent_to(torch.device(target), t).device == torch.device(target)
    assert unwaited == [True, False, False, False, True]


class Elsewhere(Tensor):
    """A number that says it is on a GPU."""

    device = torch.device("cuda:0")


def test_devices_share_no_table() -> None:
    """A step multiplies factors into a table, for each device the same."""
    group = {"maximize": False, "lr": torch.tensor(0.5).as_subclass(Elsewhere)}
    _, table = on_host(lambda _, group: {"lr": group["lr"]}, ["lr"], [group], [0], [3.0])
    first = table(torch.device("cpu"))
    first *= 7.0
    assert table(torch.device("cpu")).tolist() == [[1.0, 3.0, 0.5]]


class Launch:
    """In a backend's place: looks at what it gets."""

    def __init__(self, batch: backends.Batch) -> None:
        self.device = batch.parameters[0].device

    def __call__(self, grads: list[Tensor], rows: list[int], coefficients: Tensor, skip: Tensor | None) -> None:
        assert {g.device for g in grads} == {self.device}
        assert coefficients.device in (self.device, torch.device("cpu"))
        assert skip is None or skip.device == self.device


@pytest.mark.parametrize("case", ["clipped, capturable", "scaled", "guarded", "scaled by the second of two GPUs"])
def test_what_the_host_reads_has_arrived(pretended: pytest.MonkeyPatch, case: str) -> None:
    """With parameters on the GPU and on the CPU."""
    pretended.setattr(backends, "launch", lambda _, batch: Launch(batch))
    with FakeTensorMode():
        step_thrice("eager", dtype=torch.float32, and_cpu=True, **CASES[case])


def test_a_norm_on_the_host_waits_for_those_of_gpus(pretended: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(5, device=device)) for device in ("cpu", "cuda:0", "cuda:1")]
        optimizer = AdEMAMix(params, backend="eager")
        for p in params:
            p.grad = torch.empty_like(p)
        assert optimizer.clip_grad_norm_(1.0).device == torch.device("cpu")


@pytest.mark.parametrize("clip", [False, True])
def test_steps_of_one_gpu_and_of_another_are_counted_together(pretended: pytest.MonkeyPatch, clip: bool) -> None:
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(5, device=f"cuda:{i}")) for i in range(2)]
        optimizer = AdEMAMix(params, backend="eager", skip_nonfinite=None if clip else True)
        for step in range(4):
            params[step % 2].grad = torch.empty_like(params[step % 2])
            if clip:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()


def test_hyperparameters_go_where_parameters_are(pretended: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(5, device=f"cuda:{i}")) for i in range(2)]
        optimizer = AdEMAMix(params, backend="eager", capturable=True, alpha_warmup=7)
        optimizer.param_groups[0].update(alpha=torch.empty((), device="cuda:1"), lr=torch.empty((), device="cuda:0"))
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


@pytest.fixture
def capture_on_the_second(pretended: pytest.MonkeyPatch) -> None:
    """A CUDA graph captures what is started on cuda:1, whichever device is the current one."""
    current = ["cuda:0"]

    @contextlib.contextmanager
    def device(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    pretended.setattr(torch.cuda, "device", device)
    pretended.setattr(torch.cuda, "is_initialized", lambda: True)
    pretended.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == "cuda:1")


@pytest.mark.usefixtures("capture_on_the_second")
def test_each_device_has_a_capture_of_its_own() -> None:
    assert [backends.capturing(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu")] == [False, True, False]


@pytest.mark.usefixtures("capture_on_the_second")
@pytest.mark.parametrize("other", ["cuda:0", "cpu"])
def test_a_graph_of_one_gpu_captures_no_step_of_two_devices(other: str) -> None:
    with FakeTensorMode():
        for devices in ((other, "cuda:1"), ("cuda:1", other)):
            params = [torch.nn.Parameter(torch.empty(5, device=device)) for device in devices]
            optimizer = AdEMAMix(params, backend="eager", capturable=True)
            for p in params:
                p.grad = torch.empty_like(p)
            with pytest.raises(
                RuntimeError, match=rf"only steps on its own devices; there are parameters on \['{other}'\]"
            ):
                optimizer.step()
            assert not optimizer.state


def test_a_graph_finds_the_count_of_skipped_steps_made(pretended: pytest.MonkeyPatch) -> None:
    """One that makes it would set it to zero in each replay."""
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(5, device="cuda:0"))
        optimizer = AdEMAMix([p], backend="eager", capturable=True)
        p.grad = torch.empty_like(p)
        optimizer.step()
        count = optimizer._skipped
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        assert optimizer._skipped is count


class Stream:
    """What a stream of a device, and its events, are to others."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.synchronized = device, False
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        self.synchronized = True


def test_each_gpu_sends_what_is_its_own_by_streams_of_its_own(pretended: pytest.MonkeyPatch) -> None:
    """A chunk of an offloaded step may have parameters of all devices."""
    names = ("cuda:0", "cpu", "cuda:1")
    under: list[Any] = [None]
    copies: list[tuple[torch.device, Any, bool]] = []
    currents = {torch.device(name): Stream(torch.device(name)) for name in names}

    @contextlib.contextmanager
    def stream(way: Any) -> Iterator[None]:
        under.append(way)
        yield
        under.pop()

    def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        copies.append((source.device if source.is_cuda else target.device, under[-1], non_blocking))
        return target

    pretended.setattr("ademamix.engine.offload._stream", Stream)
    pretended.setattr(torch.cuda, "stream", stream)
    pretended.setattr(torch.cuda, "current_stream", currents.__getitem__)
    host = Host()
    with FakeTensorMode():
        params = [torch.empty(5, device=name) for name in names]
        host.stand_ins("AdEMAMix", params, {})
        trip = Trip(host, params, [torch.empty_like(p) for p in params])
        pretended.setattr(Tensor, "copy_", copied)
        trip.begin([[0, 1, 2]])
        trip.arrived(0)
        trip.send(0)
        trip.finish()
    assert len(copies) == 6
    for device, way, unwaited in copies:
        assert unwaited == (way is not None) == (device.type == "cuda")
        assert way is None or way.device == device
    for device, (to_host, back) in host.ways.items():
        assert to_host.synchronized
        assert to_host.waited_for == [back, currents[device]]
        assert back.waited_for == [currents[device]]
        assert currents[device].waited_for == [back]
    assert {device.index for device in host.ways} == {0, 1}
