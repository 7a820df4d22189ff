"""A step ends or has not begun, whatever raises: closures, hooks, scalers, signals."""

import contextlib
import copy
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ademamix import AdamW, AdEMAMix, RuleOptimizer
from ademamix.backends import cpu
from ademamix.engine.interrupts import uninterrupted
from small_models import BACKENDS, model, same, set_grads


class StopNow(Exception):  # noqa: N818 - no error, like KeyboardInterrupt
    pass


def stop(*_: Any) -> None:
    raise StopNow


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A timer's signal raises StopNow."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # some hit a finalizer, which cannot raise
    before = signal.signal(signal.SIGALRM, stop), signal.signal(signal.SIGUSR1, stop)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before[0])
    signal.signal(signal.SIGUSR1, before[1])


# --------------------------------------------------------------------------------- signals


def signaled(done: list[str], *numbers: int, error: Exception | None = None) -> None:
    with uninterrupted():
        for number in numbers:
            with uninterrupted():
                signal.raise_signal(number)
        done.append("the block")
        if error is not None:
            raise error


def test_a_signal_waits_for_the_end_of_a_block(handled: None) -> None:
    done: list[str] = []
    with pytest.raises(StopNow):
        signaled(done, signal.SIGALRM, signal.SIGALRM)
    assert done == ["the block"]
    assert signal.getsignal(signal.SIGALRM) is stop
    with pytest.raises(StopNow):
        signal.raise_signal(signal.SIGALRM)


def test_of_several_signals_none_is_lost() -> None:
    came: list[Any] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        raise StopNow

    numbers = (signal.SIGALRM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        with pytest.raises(StopNow):
            signaled(came, *numbers)
        assert came == ["the block", *numbers]
        assert all(signal.getsignal(number) is note for number in numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_what_a_block_raises_goes_first(handled: None) -> None:
    with pytest.raises(StopNow) as caught:
        signaled([], signal.SIGALRM, error=ValueError("of the block"))
    assert isinstance(caught.value.__context__, ValueError)


def test_other_threads_hold_nothing_back() -> None:
    """Python handles signals in the main thread, and lets no other set handlers."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            p = nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            AdEMAMix([p]).step()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def test_interrupts_at_any_moment_leave_whole_steps(handled: None) -> None:
    """With 1 to 60 steps done between two interrupts; the reference takes as many without any."""
    params, uninterrupted_ones = ([nn.Parameter(torch.ones(64, 80)) for _ in range(12)] for _ in range(2))
    optimizer, reference = (AdEMAMix(each, state="compact") for each in (params, uninterrupted_ones))
    for p in (*params, *uninterrupted_ones):
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    delays = torch.rand(150, generator=torch.Generator().manual_seed(0)) * 3e-3 + 1e-5
    for delay in delays.tolist():
        with contextlib.suppress(StopNow):
            signal.setitimer(signal.ITIMER_REAL, delay)
            while True:
                optimizer.step()
        assert torch.is_grad_enabled()  # no_grad() would now and then be left in force
        done = {optimizer.state[p]["step"].item() for p in params}
        assert len(done) == 1
    for _ in range(int(done.pop())):
        reference.step()
    assert same([p.detach() for p in params], [p.detach() for p in uninterrupted_ones])


def test_a_signal_comes_once_to_whoever_waits_for_it(handled: None) -> None:
    """asyncio does by a file descriptor, which Python has written to when the signal came."""
    reader, writer = socket.socketpair()
    with reader, writer:
        for end in (reader, writer):
            end.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno())
        try:
            with pytest.raises(StopNow):
                signaled([], signal.SIGUSR1)
        finally:
            signal.set_wakeup_fd(before)
        assert len(reader.recv(10)) == 1


def test_a_signal_while_a_kernel_is_made_is_no_failure_of_the_backend(
    handled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler's own error looked like one of the compiler: every later step was eager's."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AdamW([p])
    make = cpu.kernel

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGALRM)
        return make(*args)

    monkeypatch.setattr(cpu, "kernel", interrupted)
    with pytest.raises(StopNow):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.backends_in_use == ("cpu",)


def test_an_interrupted_load_has_been_or_not(handled: None) -> None:
    net = model()
    optimizer = AdamW(net.parameters())
    set_grads(net, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for delay in torch.linspace(1e-5, 2e-3, 60).tolist():
        with contextlib.suppress(StopNow):
            signal.setitimer(signal.ITIMER_REAL, delay)
            while True:
                optimizer.load_state_dict(saved)
        assert same(optimizer.state_dict(), saved)


# --------------------------------------------------------------------------------- what raises


def scaled_by_an_int(optimizer: RuleOptimizer) -> None:
    """What GradScaler.step does where no parameter has a gradient: the sum of no tensors is the int 0."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), 0
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def test_a_scaler_that_saw_no_gradient() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    scaled_by_an_int(optimizer)
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state
    assert optimizer.skipped_steps == 0
    p.grad = torch.full((3,), 2.0)
    scaled_by_an_int(optimizer)
    assert optimizer.state[p]["exp_avg"][0] == pytest.approx(0.1)  # (1 - beta1) times a gradient of 1


def fails_in_a_closure(optimizer: RuleOptimizer) -> None:
    def closure() -> float:
        raise StopNow

    optimizer.step(closure)


def fails_in_a_hook(optimizer: RuleOptimizer) -> None:
    hook = optimizer.register_step_pre_hook(stop)
    try:
        optimizer.step()
    finally:
        hook.remove()


def fails_under_a_scaler(optimizer: RuleOptimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    hook = optimizer.register_step_pre_hook(stop)
    try:
        scaler.step(optimizer)
    finally:
        hook.remove()


def fails_at_a_gradient(optimizer: RuleOptimizer) -> None:
    (*_, last), sparse = optimizer.param_groups[0]["params"], torch.zeros(3).to_sparse()
    dense, last.grad = last.grad, sparse
    try:
        optimizer.clip_grad_norm_(1e-3)
    finally:
        last.grad = dense


def fails_at_coefficients(optimizer: RuleOptimizer) -> None:
    optimizer.coefficients = stop  # type: ignore[method-assign, assignment]
    try:
        optimizer.step()
    finally:
        del optimizer.coefficients


def fails_at_a_hyperparameter(optimizer: RuleOptimizer) -> None:
    group = optimizer.param_groups[0]
    lr, group["lr"] = group["lr"], None
    try:
        optimizer.step()
    finally:
        group["lr"] = lr


FAILURES = [
    fails_in_a_closure,
    fails_in_a_hook,
    fails_under_a_scaler,
    fails_at_a_gradient,
    fails_at_coefficients,
    fails_at_a_hyperparameter,
]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([None, *FAILURES]), max_size=6),
    st.sampled_from(["cpu", "eager"]),
    st.sampled_from(["float32", "compact"]),
    st.booleans(),
)
def test_a_step_that_raises_has_not_been(
    calls: list[Callable[[RuleOptimizer], None] | None], backend: str, state: str, clip: bool
) -> None:
    nets = model(), model()
    optimizers = [AdEMAMix(net.parameters(), lr=0.1, backend=backend, state=state) for net in nets]
    for optimizer in optimizers:
        optimizer._step_supports_amp_scaling = True  # as with fused=True, which backend="eager" refuses
    for t, call in enumerate([*calls, None]):
        for net, optimizer in zip(nets, optimizers, strict=True):
            set_grads(net, t)
            if clip:
                optimizer.clip_grad_norm_(0.5)
        if call is not None:
            with pytest.raises((StopNow, RuntimeError, TypeError)):
                call(optimizers[0])
            assert not hasattr(optimizers[0], "found_inf")
            assert not hasattr(optimizers[0], "grad_scale")
        for optimizer in optimizers:
            optimizer.step()
        assert same([p.detach() for p in nets[0].parameters()], [p.detach() for p in nets[1].parameters()])
        assert same(optimizers[0].state_dict(), optimizers[1].state_dict())


# --------------------------------------------------------------------------------- memory that is not one's own


@BACKENDS
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["expanded", "windows", "two views", "one tensor twice", "another dtype"])
def test_memory_of_several_elements_is_refused(kind: str, offload: bool, backend: str) -> None:
    """Whether one parameter has them or two; the others have not moved then."""
    memory = torch.arange(12.0)
    shared = {
        "expanded": [memory[:1].expand(4)],
        "windows": [memory.as_strided((4, 3), (2, 1))],
        "two views": [memory[:5], memory[4:]],
        "one tensor twice": [memory, memory.view(3, 4)],
        "another dtype": [memory[:4], memory[2:6].view(torch.float64)],
    }[kind]
    good, others = nn.Parameter(torch.ones(3)), [nn.Parameter(t) for t in shared]
    optimizer = AdEMAMix([good, *others], lr=0.1, backend=backend, offload=offload)
    for p in (good, *others):
        p.grad = torch.ones_like(p)
    before = memory.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"share memory|several elements in one place"):
            optimizer.step()
        assert torch.equal(good, torch.ones(3))
        assert torch.equal(memory, before)
        assert not optimizer.state
    for p in others:
        p.grad = None
    optimizer.step()
    assert not torch.equal(good, torch.ones(3))


@BACKENDS
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_views_that_lie_between_each_other_are_two_parameters(backend: str, data: st.DataObject) -> None:
    """Columns of one matrix, or every other row of it: each is updated as if it were the only one."""
    rows, columns = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6))
    matrix = torch.arange(float(rows * columns)).view(rows, columns)
    cut = data.draw(st.integers(1, columns - 1))
    views = data.draw(
        st.sampled_from(
            [(matrix[:, :cut], matrix[:, cut:]), (matrix[::2], matrix[1::2]), (matrix.t()[:cut], matrix.t()[cut:])]
        )
    )
    pairs = [[nn.Parameter(t) for t in views], [nn.Parameter(t.clone().contiguous()) for t in views]]
    for params in pairs:
        optimizer = AdamW(params, lr=0.1, backend=backend)
        for t in range(2):
            for n, p in enumerate(params):
                p.grad = torch.full(p.shape, n + t - 0.5)
            optimizer.step()
    assert same([p.detach() for p in pairs[0]], [p.detach() for p in pairs[1]])


# --------------------------------------------------------------------------------- inference mode


@BACKENDS
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_a_step_in_inference_mode_is_a_step(dense: bool, offload: bool, backend: str) -> None:
    """State that is made there can be changed outside of it, unlike that of torch.optim."""
    params = [nn.Parameter(torch.ones(4) if dense else torch.ones(8)[::2]) for _ in range(2)]
    optimizers = [AdamW([p], lr=0.1, backend=backend, offload=offload) for p in params]
    for t in range(3):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.full((4,), 1.0 + t)
            with torch.inference_mode(p is params[0] and t != 1):
                optimizer.step()
    assert same(optimizers[0].state_dict(), optimizers[1].state_dict())
    assert torch.equal(*params)


@BACKENDS
def test_a_parameter_of_inference_mode_is_refused_outside(backend: str) -> None:
    good = nn.Parameter(torch.ones(4))
    with torch.inference_mode():
        bound = nn.Parameter(torch.ones(4), requires_grad=False)
        bound.grad = torch.ones(4)
    good.grad = torch.ones(4)
    optimizer = AdamW([good, bound], backend=backend)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="was made in inference mode"):
            optimizer.step()
        assert torch.equal(good, torch.ones(4))
        with torch.inference_mode():
            AdamW([bound], backend=backend).step()
