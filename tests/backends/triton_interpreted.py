"""The Triton backend in Triton's interpreter, on the CPU: run by test_triton.py, which sets TRITON_INTERPRET=1.

Torch's square root on CPUs is off by one unit in the last place in 0.7 % of all cases and the interpreter's, NumPy's,
is not: parameters are compared up to that, all state bit for bit.
"""

import itertools
import math
import os
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from ademamix import KEMA, AdamW, ADana, AdEMAMix, Muon, RuleOptimizer, SimplifiedAdEMAMix, backends, optimizer_from
from ademamix.backends import Rows, cpu, eager, triton
from ademamix.backends.triton import xp
from ademamix.engine import triton_coefficients
from ademamix.engine.tracing import traced
from ademamix.formats import FORMATS

assert os.environ.get("TRITON_INTERPRET") == "1"
if not hasattr(InterpretedFunction, "warmup"):  # as in Triton 3.2; there is nothing to compile
    InterpretedFunction.warmup = lambda *_, **__: None

# Before Triton 3.7 its numbers are arrays of one element, which NumPy 2.4 no longer takes for numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")

# One element, none, a ragged block, rows of several blocks with a ragged last one, and aligned ones.
SHAPES = ((), (0, 4), (5,), (3, 1, 1500), (8, 512), (9, 517))
SCALE = 0.5


def clipped(p: torch.Tensor, g: Any, momentum: Any, *, lr: Any, bound: Any) -> Any:
    """A user's rule: with a helper, a global number, annotations that Triton does not know and functions of xp."""
    momentum = smaller(momentum + SCALE / 1.0 * (g - momentum), bound)
    slow = momentum
    slow /= 2.0
    return p - lr * xp.where(momentum > 0.0, momentum, slow), momentum


def smaller(x: Any, bound: Any) -> Any:
    return xp.maximum(xp.minimum(x, bound), -bound)


SHARES = (0.1, 0.3)


def divided(x: Any, k: int) -> Any:
    return x if k == 0 else divided(xp.maximum(x, x) / 3.0, k - 1)


def varied(p: Any, g: Any, m: Any, last: Any, kept: Any, chosen: Any, *, lr: Any = 0.1, w: Any = 0.7) -> Any:
    """With all that Python offers, numbers and coefficients on both sides of everything, and slots that take over."""
    before = m
    for share in SHARES:
        m = m + (lambda x: divided(x, 2))(share * SCALE * lr * w * g) - (1.0 - w) / (3.0 / lr) * g
    kept = xp.minimum(xp.maximum(kept, 0.3), 1.0 / (1.0 + xp.abs(g)))
    m = m - xp.minimum(*[share / w * g for share in SHARES])
    return p - lr * w * last, m, before, kept, xp.where(m > w, 0.1, lr)


Varied = optimizer_from(varied)


class Clipped(RuleOptimizer):
    rule = staticmethod(clipped)

    def __init__(self, params: Any, lr: float = 0.1, bound: float = 0.4, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "bound": bound, "maximize": False}, **options)

    @staticmethod
    def check(group: Any) -> None:
        pass

    @staticmethod
    def coefficients(step: Any, group: Any) -> dict[str, Any]:
        return {"lr": group["lr"], "bound": group["bound"]}


def parameters(dtype: torch.dtype, shapes: Any = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def give_gradients(params: Any, step: int, dtype: torch.dtype | None = None) -> None:
    for p in params:
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + 7)).to(dtype or p.dtype)
        if dtype is not None:
            p.grad_dtype = dtype
        p.grad = g


def trained(kind: Any, which: str, dtype: torch.dtype, *, grads: Any = None, steps: int = 2, **options: Any) -> Any:
    params = parameters(dtype)
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.03}]  # two rows of coefficients
    optimizer = kind(groups, lr=0.1, backend=which, **options)
    for step in range(steps):
        give_gradients(params, step, grads)
        optimizer.clip_grad_norm_(5.0)
        optimizer.step()
    return params, [optimizer.state[p] for p in params]


def assert_same(one: Any, other: Any, steps: int = 2) -> None:
    for p, q in zip(one[0], other[0], strict=True):
        unit = torch.finfo(p.dtype).eps
        # A step of Adam's is at most (1 - b1) / sqrt(1 - b2) = 3.2 times lr = 0.1.
        assert ((p - q).abs() <= steps * unit * torch.maximum(p.abs(), torch.full_like(p, 0.32))).all()
    for state, like in zip(one[1], other[1], strict=True):
        assert state.keys() == like.keys()
        assert all(torch.equal(state[key], like[key]) for key in state)


@pytest.mark.parametrize(
    ("kind", "state", "dtype"),
    [
        *itertools.product((AdEMAMix, Clipped), ("float32", "bfloat16", "compact"), (torch.float32, torch.bfloat16)),
        *((AdamW, state, torch.bfloat16) for state in ("float32", "compact")),  # formats know nothing of rules
        *((kind, "compact", torch.float32) for kind in (SimplifiedAdEMAMix, ADana, KEMA)),
    ],
    ids=str,
)
def test_same_bits_as_eager(kind: Any, state: str, dtype: torch.dtype) -> None:
    assert_same(*(trained(kind, which, dtype, state=state) for which in ("triton", "eager")))


@pytest.mark.parametrize(
    ("kind", "state", "dtype"),
    [(Muon, "compact", torch.float32), (Muon, "float32", torch.bfloat16), (ADana, "bfloat16", torch.float64)],
    ids=str,
)
def test_steps_in_muon_s_geometry_as_eager(kind: Any, state: str, dtype: torch.dtype) -> None:
    """With a group of each geometry, clipped; their passes have no square root but in the geometry "adam"."""
    runs = []
    for which in ("triton", "eager"):
        params = parameters(dtype, [(8, 512), (9, 5), (5, 9), (3, 2, 2), (2, 0), (7,)])
        groups = [
            {"params": params[:2], "lr": 0.03},
            {"params": params[2:5]},
            {"params": params[5:], "geometry": "adam"},
        ]
        optimizer = kind(groups, lr=0.1, geometry="muon", state=state, backend=which)
        for step in range(3):
            give_gradients(params, step)
            optimizer.clip_grad_norm_(5.0)
            optimizer.step()
        runs.append((params, [optimizer.state[p] for p in params]))
    assert_same(*([part[:5] for part in run] for run in runs), steps=0)
    assert_same(*([part[5:] for part in run] for run in runs), steps=3)


@pytest.mark.parametrize(
    "options",
    # with beta2 = 0 a weight is 1, and many slow EMAs are above their limit
    [{"betas": (0.0, 0.9, 0.99)}, {"betas": (0.9, 0.0, 0.99)}, {"maximize": True}, {"capturable": True}],
    ids=str,
)
def test_options_as_eager(options: Any) -> None:
    options = {"state": "compact", "alpha_warmup": 3, "beta3_warmup": 3, **options}
    assert_same(*(trained(AdEMAMix, which, torch.float32, **options) for which in ("triton", "eager")))


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_rule_of_the_user_s_as_eager_and_numba(dtype: torch.dtype, options: Any) -> None:
    runs = [trained(Varied, which, dtype, steps=3, **options) for which in ("triton", "eager", "cpu")]
    assert_same(*runs[:2], steps=0)
    assert_same(*runs[1:], steps=0)


def test_no_function_hides_what_is_no_number() -> None:
    p = torch.zeros(4096, requires_grad=True)
    p.grad = torch.full_like(p, torch.nan)
    optimizer = Varied([p], backend="triton")
    optimizer.step()
    assert optimizer.state[p]["kept"].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_as_eager(dtype: torch.dtype) -> None:
    assert_same(*(trained(AdEMAMix, which, dtype) for which in ("triton", "eager")))


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch gives gradients their parameter's dtype"
)
def test_mixed_dtypes_as_eager() -> None:
    runs = [trained(AdEMAMix, which, torch.float32, grads=torch.bfloat16) for which in ("triton", "eager")]
    assert_same(*runs)


@pytest.mark.parametrize("state", ["float32", "compact"])
def test_unaligned_memory_as_eager(state: str) -> None:
    """Parameters, gradients and, after some steps, other gradients that start between two multiples of 16 bytes."""
    runs = []
    for which in ("triton", "eager"):
        memory = torch.randn(2, 8193, generator=torch.Generator().manual_seed(1))
        params = [memory[0, 1:4097].view(4, 1024).requires_grad_(), memory[1, 3:4099].view(16, 256).requires_grad_()]
        optimizer = AdEMAMix(params, lr=0.1, backend=which, state=state)
        for step in range(3):
            other = torch.randn(2, 4100, generator=torch.Generator().manual_seed(step))
            for p, g, start in zip(params, other, (step, 2 * step), strict=True):
                p.grad = g[start : start + 4096].view(p.shape)
            optimizer.step()
        runs.append((params, [optimizer.state[p] for p in params]))
    assert_same(*runs, steps=3)


PARTS = {  # slices of 8 x 768 elements, and where their rows lie in the whole
    "rows": ((slice(2, 5), slice(None)), Rows(1, 2 * 768, 3 * 768), Rows(3, 2 * 768, 768)),
    "columns of whole blocks": ((slice(None), slice(256, 768)), Rows(8, 256, 768), Rows(8, 256, 768)),
    "columns": ((slice(1, 7), slice(100, 533)), Rows(6, 868, 768), None),
    "nothing": ((slice(0, 0), slice(None)), Rows(1, 0, 0), Rows(0, 0, 768)),
}


@pytest.mark.parametrize("which", [eager, cpu, triton], ids=lambda m: m.__name__)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("state", ["bfloat16", "int8"])
def test_a_part_is_rounded_by_the_noise_of_the_whole(state: str, part: str, which: Any) -> None:
    place, rows, rows_of_blocks = PARTS[part]
    if state == "int8" and rows_of_blocks is None:
        pytest.skip("blocks would be cut")
    format, key = FORMATS[state], np.array([77], np.uint32)
    table = torch.tensor([[1.0, 3.0, 0.1, 0.4]], dtype=torch.float64)

    def launched(module: Any, own: Any, p: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
        slot = torch.zeros(p.shape, dtype=backends.storage_dtype(format))
        scale = None if format.scale is None else torch.zeros(p.shape[0], -(-p.shape[1] // 256))
        formats = (FORMATS["bfloat16"], FORMATS["float32"], (format,))
        batch = backends.Batch(traced(clipped), *formats, [p], [[slot]], [[scale]], key, [own])
        module.Launch(batch)([g], [0], table, None)
        return [t for t in (p, slot, scale) if t is not None]

    generator = torch.Generator().manual_seed(0)
    p, g = torch.randn(8, 768, generator=generator).bfloat16(), torch.randn(8, 768, generator=generator)
    piece = p[place].clone(), g[place].clone()
    whole = launched(eager, backends.whole(p, format.scale is not None), p, g)
    of_scales = (place[0], slice((place[1].start or 0) // 256, None))
    expected = [t[at] for t, at in zip(whole, (place, place, of_scales), strict=False)]
    own = rows if format.scale is None else rows_of_blocks
    assert all(map(torch.equal, launched(which, own, *piece), expected))


class Counted:
    """In place of a kernel: writes down which of its two versions would be started."""

    def __init__(self, started: list[bool]) -> None:
        self.started = started

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.started.append(args[-1])


def test_one_launch_for_aligned_tensors_and_one_for_the_others() -> None:
    """Aligned are those whose memory and rows are; a gradient that is not brings its tensor to the others."""
    p, q = torch.zeros(8, 512, requires_grad=True), torch.zeros(9, 517, requires_grad=True)
    memory = torch.ones(8 * 512 + 1)
    params: list[list[torch.Tensor]] = [[p], [q], [p, q]]
    for members, aligned, unaligned in zip(params, ([True], [False], [True, False]), (1, 1, 2), strict=True):
        optimizer = AdEMAMix(members, backend="triton", state="compact")
        for t in members:
            t.grad = torch.ones_like(t)
        optimizer.step()
        assert optimizer.state[members[0]]["exp_avg_fast_scale"].all()
        launch = optimizer._launches.calls[0].launch  # type: ignore[union-attr]
        started: list[bool] = []
        launch.kernel = Counted(started)
        optimizer.step()
        assert started == aligned
        started.clear()
        p.grad = memory[1:].view(8, 512)
        optimizer.step()
        assert started == [False] * unaligned


def test_an_empty_tensor_starts_nothing() -> None:
    p = torch.zeros(0, 4, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = AdEMAMix([p], backend="triton")
    optimizer.step()
    launch = optimizer._launches.calls[0].launch  # type: ignore[union-attr]
    assert launch.launches == []
    assert optimizer.state[p]["step"] == 1.0


def test_nothing_changes_where_the_device_says_skip() -> None:
    params = parameters(torch.float32, ((5,), (8, 512)))
    optimizer = AdEMAMix(params, backend="triton", state="compact", capturable=True)
    give_gradients(params, 0)
    optimizer.step()
    launches = optimizer._launches
    assert launches is not None
    assert len(launches.calls) == 2  # compact state, and float32 for the small one

    def tensors() -> list[torch.Tensor]:
        return [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]

    before = tensors()
    for skip in (True, False):
        launches.run(optimizer._program(offload=False), [p.grad for p in params], None, torch.tensor(skip))
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True)) is skip


def test_graphs_and_other_steps_have_tables_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured copy is carried out only by replays; here, what it would write shows which tables it writes."""
    p = torch.zeros(256, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = AdEMAMix([p], backend="triton", capturable=True)
    optimizer.step()
    launch = optimizer._launches.calls[0].launch  # type: ignore[union-attr]
    tables = [launch.table]

    def step(captured: bool) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(backends, "capturing", lambda device: captured)
            patched.setattr(triton, "capturing", lambda device: captured)
            optimizer.step()
        tables.append(launch.table)

    for captured in (False, True, True, False, False):
        step(captured)
    assert tables[1] is tables[0]  # the gradients are where they were
    assert (
        len({t.data_ptr() for t in tables}) == 3
    )  # one for both captures (on a CPU nothing is copied), one after them
    assert tables[5] is tables[4]
    (host,) = launch.captured.values()  # both captures have the same content
    content = host.clone()
    for _ in range(2 * triton.STAGED):
        p.grad = torch.ones_like(p)
        step(False)
    assert list(launch.captured.values()) == [host]
    assert torch.equal(host, content)
    assert host.data_ptr() not in {t.data_ptr() for t in launch.staged}


def test_captures_allocate_no_host_memory_and_say_how_many_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.zeros(256, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = AdEMAMix([p], backend="triton", capturable=True)
    optimizer.step()
    launch = optimizer._launches.calls[0].launch  # type: ignore[union-attr]
    monkeypatch.setattr(triton, "capturing", lambda device: True)
    monkeypatch.setattr(launch, "_stage", None)
    for _ in range(2 * triton.STAGED):
        optimizer.step()
    grads = [torch.ones_like(p) for _ in range(triton.STAGED)]

    def steps() -> None:
        for grad in grads:
            p.grad = grad
            optimizer.step()

    with pytest.raises(RuntimeError, match=f"a CUDA graph can capture {triton.STAGED // 2} steps with gradients"):
        steps()
    assert len(launch.captured) >= triton.STAGED // 2


of_ademamix = AdEMAMix.coefficients


class Swinging(AdEMAMix):
    """Coefficients that are made of torch's own functions, which no kernel is made of."""

    @staticmethod
    def coefficients(step: Any, group: Any) -> dict[str, Any]:
        swing = step.cos() if isinstance(step, torch.Tensor) else math.cos(step)
        return {**of_ademamix(step, group), "lr": group["lr"] * swing}


GROUPS = {
    "alike": (AdEMAMix, {"lr": 0.2}, True),
    "with other schedules": (AdEMAMix, {"alpha_warmup": 3, "maximize": True}, True),
    "with a learning rate that is a tensor": (AdEMAMix, {"lr": torch.tensor(0.2)}, True),
    "of torch's own functions": (Swinging, {}, False),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("case", GROUPS)
def test_one_launch_computes_coefficients_and_counts(case: str, skip: bool) -> None:
    """What only the device knows, against torch's operations: to 1e-6, a few roundings of float32, of a step of 0.1."""
    kind, other, in_one = GROUPS[case]
    runs = []
    for which in ("triton", "eager"):
        params = parameters(torch.float32, ((3, 5), (4,), (300,), ()))
        groups = [{"params": params[:2]}, {"params": params[2:], **other}]
        optimizer = kind(groups, lr=0.1, beta3_warmup=5, backend=which, capturable=True)
        for step in range(4):
            give_gradients(params, step)
            if step == 1:
                params[1].grad = None  # so the counts differ
            if skip and step == 2:
                params[0].grad[0, 0] = torch.nan
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        assert bool(optimizer._launches.steps.tables) == (which == "triton" and in_one)  # type: ignore[union-attr]
        runs.append((params, [optimizer.state[p]["step"].item() for p in params], optimizer.skipped_steps))
    assert runs[0][1:] == runs[1][1:] == ([4.0 - skip, 3.0 - skip, 4.0 - skip, 4.0 - skip], int(skip))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_where_the_kernel_of_coefficients_fails_torch_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any) -> None:
        raise ValueError("an operation that this Triton has not") from NotImplementedError("exp of float64")

    p = torch.zeros(256, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = AdEMAMix([p], backend="triton", capturable=True)
    monkeypatch.setattr(triton_coefficients, "kernel", kernel)
    with pytest.warns(UserWarning, match=r"in some 40 launches \(NotImplementedError: exp of float64\)"):
        optimizer.step()
    optimizer.step()  # without another warning, which would be an error here
    assert optimizer.state[p]["step"] == 2.0
    assert optimizer.backends_in_use == ("triton",)


def test_a_capture_sends_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes with those that are there, or lets torch put new ones into its operations."""
    p = torch.zeros(256, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = AdEMAMix([p], backend="triton", capturable=True)
    optimizer.step()
    (table,) = optimizer._launches.steps.tables.values()  # type: ignore[union-attr]
    (numbers,) = table.sent[1]
    for module in (triton, triton_coefficients):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    optimizer.step()
    assert table.captured[0][1] is numbers
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert len(table.captured) == 1
    assert optimizer.state[p]["step"] == 3.0
    monkeypatch.undo()
    optimizer.step()
    assert table.sent[1][0] is not numbers
    assert optimizer.state[p]["step"] == 4.0


class Elsewhere(torch.Tensor):
    """A number that says it is on a GPU."""

    device = torch.device("cuda:0")


def test_a_graph_keeps_what_its_replays_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the host's numbers that a learning rate of the device's is put among."""
    p = torch.zeros(256, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = AdEMAMix([p], backend="triton", capturable=True)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1).as_subclass(Elsewhere)
    monkeypatch.setattr(triton_coefficients, "sent_to", lambda device, t: t.as_subclass(torch.Tensor))
    optimizer.step()
    (table,) = optimizer._launches.steps.tables.values()  # type: ignore[union-attr]
    numbers = weakref.ref(table.sent[1][0])
    with monkeypatch.context() as patched:
        for module in (triton, triton_coefficients):
            patched.setattr(module, "capturing", lambda device: True)
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.step()
    assert numbers() is not None
    assert table.sent[1][0] is not numbers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", ["bfloat16", "compact"])
def test_flattened_parameters_as_eager_and_as_rows(state: str, dtype: torch.dtype) -> None:
    runs = []
    for which, shape in (("triton", (4396,)), ("eager", (4396,)), ("triton", (1, 4396))):
        params = parameters(dtype, [shape])
        optimizer = AdEMAMix(params, state=state, flat_parameters=True, backend=which)
        for step in range(2):
            give_gradients(params, step)
            optimizer.step()
        runs.append((params, [optimizer.state[p] for p in params]))
    assert_same(*runs[:2])
    (flat, (of_flat,)), (row, (of_row,)) = runs[0], runs[2]
    assert torch.equal(flat[0], row[0].view(-1))
    assert all(torch.equal(value.view(-1), of_row[name].view(-1)) for name, value in of_flat.items())
