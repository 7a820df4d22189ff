"""Steps in Muon's geometry, of every memory: formats, backends, checkpoints, layouts, modes, errors."""

import copy
import io
import itertools
import math
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy as xp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ademamix.engine.muon as engine
from ademamix import KEMA, AdamW, ADana, AdEMAMix, Muon, RuleOptimizer, SimplifiedAdEMAMix, optimizer_from
from ademamix.engine.muon import Iteration, orthogonal
from optimizer_table import CASES as TABLE
from optimizer_table import Case
from small_models import same


def leaning(g: Any, m: Any, *, w: Any = 0.1, lean: Any = 0.5) -> Any:
    m = m + w * (g - m)
    return xp.where(m * g > 0.0, m, lean * m) + g, m


Leaning = optimizer_from(leaning)

MUON = {"momentum_buffer": "int8"}
CASES = {
    "Muon": Case(Muon, {"lr": 0.02}, MUON),
    "Muon without nesterov": Case(Muon, {"lr": 0.02, "nesterov": False, "ns_coefficients": "polar_express"}, MUON),
    "one's own": Case(Leaning, {"lr": 0.02, "geometry": "muon"}, {"m": "int16"}),
    **{
        name: Case(
            case.kind,
            {"lr": 0.02, **case.options, "geometry": "muon"},
            {slot: format for slot, format in case.slots.items() if slot != "exp_avg_sq"},
        )
        for name, case in TABLE.items()
        if "defaults" not in name
    },
}
EVERY_STATE = ("float32", "bfloat16", "compact")
# Numba compiles a kernel for each memory and state: `make test` runs these, `make test-all` all.
FAST = {("Muon", "bfloat16"), ("AdEMAMix", "compact"), ("one's own", "float32")}
every_memory = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
few = pytest.mark.parametrize("make", [CASES["Muon"], CASES["AdEMAMix"]], ids=["Muon", "AdEMAMix"])
STATES = pytest.mark.parametrize("state", EVERY_STATE)
BACKENDS = pytest.mark.parametrize("backend", ["eager", "cpu"])
EACH = pytest.mark.parametrize(
    ("make", "backend"),
    [
        *(pytest.param(make, "eager", id=name) for name, make in CASES.items()),
        pytest.param(CASES["AdEMAMix"], "cpu", id="AdEMAMix, cpu"),
    ],
)

BYTES = {"int8": 1, "int16": 2, "bfloat16": 2, "float32": 4}
SHAPES = ((64, 96), (6, 4), (4, 6), (8, 2, 2), (96, 64), (5, 1), (4, 6))  # two are large enough for codes


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def give_gradients(params: Any, t: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(params: Any, optimizer: RuleOptimizer, steps: Any) -> None:
    for t in steps:
        give_gradients(params, t)
        if t % 3 == 1:  # in some steps
            params[1].grad = None
        optimizer.step()


def everything(params: Any, optimizer: RuleOptimizer) -> list[Any]:
    return [[p.detach(), dict(optimizer.state[p])] for p in params]


# --------------------------------------------------------------------------------- backends, formats, checkpoints


@pytest.mark.parametrize(
    ("make", "state"),
    [
        pytest.param(make, state, id=f"{name}, {state}", marks=[] if (name, state) in FAST else pytest.mark.slow)
        for name, make in CASES.items()
        for state in EVERY_STATE
    ],
)
def test_numba_has_the_bits_of_eager(make: Case, state: str) -> None:
    runs = []
    for backend in ("eager", "cpu"):
        params = parameters()
        optimizer = make(params, state=state, backend=backend)
        train(params, optimizer, range(4))
        runs.append(everything(params, optimizer))
        assert optimizer.backends_in_use == (backend,)
    assert same(*runs)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.float64, "float32"), (torch.bfloat16, "compact"), (torch.float16, "float32")],
    ids=str,
)
def test_numba_has_the_bits_of_eager_for_other_dtypes(dtype: torch.dtype, state: str) -> None:
    """bfloat16 parameters are rounded stochastically."""
    runs = []
    for backend in ("eager", "cpu"):
        params = parameters(dtype)
        optimizer = Muon(params, state=state, backend=backend)
        train(params, optimizer, range(3))
        runs.append(everything(params, optimizer))
    assert same(*runs)


@STATES
@every_memory
def test_a_state_has_the_memory_s_slots_alone(make: Case, state: str) -> None:
    params = parameters()
    optimizer = make(params, state=state, backend="eager")
    train(params, optimizer, range(2))
    for p in params:
        numbers = {"compact": make.slots, **{s: dict.fromkeys(make.slots, s) for s in ("float32", "bfloat16")}}[state]
        numbers = numbers if p.numel() >= 4096 else dict.fromkeys(make.slots, "float32")
        own = optimizer.state[p]
        scales = [f"{slot}_scale" for slot, format in numbers.items() if format.startswith("int")]
        assert sorted(own) == sorted(["step", *numbers, *scales])
        for slot, format in numbers.items():
            assert own[slot].shape == p.shape
            assert own[slot].nbytes == BYTES[format] * p.numel()


def test_bytes_per_parameter() -> None:
    """With a scale of 4 bytes for 256 elements of each slot."""
    expected = {Muon: (4, 1), ADana: (4, 2), AdamW: (4, 1), AdEMAMix: (8, 3), SimplifiedAdEMAMix: (4, 2), KEMA: (12, 5)}
    for kind, sizes in expected.items():
        for state, size in zip(("float32", "compact"), sizes, strict=True):
            (p,) = params = parameters(shapes=[(64, 512)])
            optimizer = kind(params, geometry="muon", state=state, backend="eager")
            train([p, p], optimizer, range(1))
            found = sum(t.nbytes for name, t in optimizer.state[p].items() if name != "step") / p.numel()
            slots = sum(not name.endswith("_scale") for name in optimizer.state[p]) - 1
            assert found == pytest.approx(size + (slots * 4 / 256 if state == "compact" else 0.0))


@STATES
@every_memory
def test_resume_at_every_step_is_exact(make: Case, state: str) -> None:
    params = parameters()
    optimizer = make(params, state=state, backend="eager")
    kept = []
    for t in range(5):
        file = io.BytesIO()
        torch.save([[p.detach() for p in params], optimizer.state_dict()], file)
        kept.append(file)
        train(params, optimizer, range(t, t + 1))
    for t, file in enumerate(kept):
        file.seek(0)
        weights, saved = torch.load(file, weights_only=True)
        resumed = [w.clone().requires_grad_() for w in weights]
        other = make(resumed, state=state, backend="eager", lr=7.0, geometry="muon")
        other.load_state_dict(saved)
        train(resumed, other, range(t, 5))
        assert same(everything(params, optimizer), everything(resumed, other))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@every_memory
def test_copies_go_on_alike(make: Case, clone: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = make(params, state="compact", backend="eager")
    train(params, optimizer, range(2))
    if make.kind is Leaning:  # pickle finds a class by its name
        Leaning.__qualname__ = "Leaning"
    others, twin = clone((params, optimizer))
    train(params, optimizer, range(2, 4))
    train(others, twin, range(2, 4))
    assert same(everything(params, optimizer), everything(others, twin))


# --------------------------------------------------------------------------------- groups


def both(make: Case, backend: str, **options: Any) -> Any:
    """Matrices in one geometry and the rest in the other, in one optimizer."""
    params = parameters(shapes=[*SHAPES, (5,), ()])
    groups = [{"params": params[:4]}, {"params": params[4:7], "lr": 0.01}, {"params": params[7:], "geometry": "adam"}]
    return params, make(groups, backend=backend, **options)


@EACH
def test_groups_of_both_geometries_step_as_if_each_were_alone(make: Case, backend: str) -> None:
    params, optimizer = both(make, backend)
    alone = parameters(shapes=[*SHAPES, (5,), ()])
    parts = [
        make(alone[:4], backend=backend),
        make(alone[4:7], backend=backend, lr=0.01),
        make(alone[7:], backend=backend, geometry="adam"),
    ]
    for t in range(4):
        give_gradients(params, t)
        give_gradients(alone, t)
        optimizer.step()
        for part in parts:
            part.step()
    states = {p: s for part in parts for p, s in part.state.items()}
    assert same([[p.detach(), optimizer.state[p]] for p in params], [[p.detach(), states[p]] for p in alone])


def test_a_group_of_the_other_geometry_joins_later() -> None:
    for first, second in (("muon", "adam"), ("adam", "muon")):
        p, q = parameters(shapes=[(6, 4), (6, 4)])
        optimizer = ADana([p], geometry=first)
        give_gradients([p], 0)
        optimizer.step()
        optimizer.add_param_group({"params": [q], "geometry": second})
        give_gradients([p, q], 1)
        optimizer.step()
        has = {geometry: optimizer.state[x].keys() for geometry, x in ((first, p), (second, q))}
        assert "exp_avg_sq" in has["adam"]
        assert "exp_avg_sq" not in has["muon"]


@few
def test_named_parameters(make: Case) -> None:
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    optimizer = make(net.named_parameters())
    give_gradients(list(net.parameters()), 0)
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight"]


def test_a_geometry_cannot_change_in_the_middle_of_a_run() -> None:
    for kind, before, after in ((ADana, "adam", "muon"), (ADana, "muon", "adam"), (Muon, "muon", "adam")):
        (p,) = parameters(shapes=[(6, 4)])
        optimizer = kind([p], geometry=before)
        give_gradients([p], 0)
        optimizer.step()
        old = copy.deepcopy(everything([p], optimizer))
        optimizer.param_groups[0]["geometry"] = after
        with pytest.raises(ValueError, match=r"a parameter in group 0 has a state of 1 steps with"):
            optimizer.step()
        assert same(old, everything([p], optimizer))


NEWER = ("geometry", "adjust_lr_fn", "ns_coefficients", "ns_steps")


@pytest.mark.parametrize("default", ["adam", "muon"])
def test_files_without_geometries_are_adam_s(default: str) -> None:
    """They are of versions before there were any, whatever new groups are given."""
    ours, theirs = parameters(shapes=[(6, 4), (5,)]), parameters(shapes=[(6, 4), (5,)])
    optimizer = AdEMAMix([{"params": ours[:1]}, {"params": ours[1:]}])
    give_gradients(ours, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group, name in itertools.product(saved["param_groups"], NEWER):
        del group[name]
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    other = AdEMAMix([{"params": theirs[:1]}, {"params": theirs[1:], "geometry": "adam"}], geometry=default)
    other.load_state_dict(saved)
    for params, its in ((ours, optimizer), (theirs, other)):
        give_gradients(params, 1)
        its.step()
    assert same(everything(ours, optimizer), everything(theirs, other))


# --------------------------------------------------------------------------------- clipping, skipping, capturable


@EACH
def test_clipping_within_the_step_is_clipping_before_it(make: Case, backend: str) -> None:
    """By a power of two, which rounds nothing; clip_grad_norm_ adds 1e-6 to the norm, which the bound takes back."""
    ours, theirs = (parameters(shapes=[(4, 6), (8, 2, 2)]) for _ in range(2))
    one, other = (make(params, backend=backend) for params in (ours, theirs))
    for t in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.zeros_like(p)
            q.grad = torch.zeros_like(q)
        ours[0].grad.view(-1)[[t, t + 9]] = torch.tensor([4.0, -4.0])  # type: ignore[union-attr]
        ours[0].grad.view(-1)[[t + 3, t + 15]] = 4.0  # type: ignore[union-attr]
        theirs[0].grad += ours[0].grad / 8.0
        assert one.clip_grad_norm_(1.0 + 1.25e-7) == 8.0
        one.step()
        other.step()
    assert same(everything(ours, one), everything(theirs, other))


def plain(g: Any, m: Any) -> Any:
    m = 0.5 * m + 0.5 * g
    return m, m


@BACKENDS
@pytest.mark.parametrize("capturable", [False, True])
def test_gradients_of_a_memory_without_coefficients_are_clipped_once(backend: str, capturable: bool) -> None:
    ours, theirs = parameters(), parameters()
    kind = optimizer_from(plain)
    one, other = (kind(params, backend=backend, capturable=capturable, geometry="muon") for params in (ours, theirs))
    for t in range(3):
        give_gradients(ours, t, scale=100.0)
        give_gradients(theirs, t, scale=100.0)
        one.clip_grad_norm_(1.0)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        one.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # a gradient's rounding, times 500, times lr


@EACH
def test_a_step_that_is_not_finite_changes_nothing(make: Case, backend: str) -> None:
    params = parameters()
    optimizer = make(params, backend=backend, skip_nonfinite=True)
    train(params, optimizer, range(2))
    before = copy.deepcopy(everything(params, optimizer))
    give_gradients(params, 2)
    params[3].grad[1, 1] = math.nan  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(before, everything(params, optimizer))


@few
def test_a_grad_scaler_s_factor_is_for_the_memory_alone(make: Case) -> None:
    ours, theirs = parameters(), parameters()
    one, other = (make(params, backend="eager") for params in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(3):
        scaler.scale(torch.zeros((), requires_grad=True))
        give_gradients(ours, t, scale=1024.0)
        give_gradients(theirs, t)
        scaler.step(one)
        scaler.update()
        other.step()
    assert same(everything(ours, one), everything(theirs, other))


@EACH
def test_steps_counted_on_the_device(make: Case, backend: str) -> None:
    """Coefficients are computed in float32 there: they differ by roundings, which the iteration multiplies by 500."""
    runs = []
    for capturable in (False, True):
        params, optimizer = both(make, backend, capturable=capturable)
        for t in range(4):
            give_gradients(params, t)
            optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=4 * 0.02 * 500 * 10 * 2.0**-23)


@few
def test_maximize_goes_the_other_way(make: Case) -> None:
    ours, theirs = parameters(), parameters()
    one, other = make(ours, maximize=True, weight_decay=0.0), make(theirs, weight_decay=0.0)
    start = [p.detach().clone() for p in ours]
    for t in range(2):
        for params, sign in ((ours, 1.0), (theirs, -1.0)):
            give_gradients(params, t, scale=sign)
        one.step()
        other.step()
    assert same([p.detach() for p in ours], [p.detach() for p in theirs])
    assert not any(map(torch.equal, start, ours))


@few
def test_closures_and_hooks(make: Case) -> None:
    params, seen = parameters(), []
    optimizer = make(params)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        give_gradients(params, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert seen == ["before", "after"]


# --------------------------------------------------------------------------------- the host's memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_memory
def test_steps_on_the_host(make: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, some of one parameter; low-precision parameters have float32 master weights there."""
    monkeypatch.setattr("ademamix.engine.launches.CHUNK", 4000)
    ours = parameters(dtype)
    exact = [p.detach().float().requires_grad_() for p in ours]
    optimizers = (
        make(ours, offload=True, backend="eager", state="compact"),
        make(exact, backend="eager", state="compact"),
    )
    for t in range(4):
        give_gradients(ours, t)
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.float()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, exact, strict=True):
        assert torch.equal(p, q.detach().to(dtype))
        own = {name: t for name, t in optimizers[0].state[p].items() if name != "master"}
        assert same(own, dict(optimizers[1].state[q]))


# --------------------------------------------------------------------------------- layouts


def laid_out(how: str) -> tuple[Tensor, Tensor]:
    """A parameter that lies in memory in an unusual way, and a contiguous one with its numbers."""
    generator = torch.Generator().manual_seed(0)
    if how == "channels last":
        plain = torch.randn(8, 3, 5, 5, generator=generator)
        other = plain.clone(memory_format=torch.channels_last)
    elif how == "channels last, tall":
        plain = torch.randn(64, 3, 2, 2, generator=generator)
        other = plain.clone(memory_format=torch.channels_last)
    elif how == "channels last 3d":
        plain = torch.randn(4, 3, 2, 2, 2, generator=generator)
        other = plain.clone(memory_format=torch.channels_last_3d)
    elif how == "transposed":
        plain = torch.randn(70, 80, generator=generator)
        other = plain.t().contiguous().t()
    elif how == "view":
        plain = torch.randn(70, 80, generator=generator)
        other = torch.zeros(70, 160)[:, ::2].copy_(plain)
    else:
        plain = torch.randn(6, 1, generator=generator)
        other = torch.zeros(6).as_strided((6, 1), (1, 7)).copy_(plain)
    return plain.requires_grad_(), other.detach().requires_grad_()


LAYOUTS = ("channels last", "channels last, tall", "channels last 3d", "transposed", "view", "strides of one element")


@BACKENDS
@pytest.mark.parametrize("state", ["float32", "compact"])
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how: str, state: str, backend: str) -> None:
    pair = laid_out(how)
    optimizers = [Muon([p], state=state, backend=backend, stochastic_rounding=False) for p in pair]
    strides = pair[1].stride()
    for t in range(3):
        for p, optimizer in zip(pair, optimizers, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            if t == 1:
                p.grad = torch.empty_like(pair[1]).copy_(p.grad)
            optimizer.step()
    assert torch.equal(*pair)
    assert pair[1].stride() == strides


def test_all_behind_the_first_dimension_is_one() -> None:
    p, q = parameters(shapes=[(6, 2, 3, 2), (6, 12)])
    with torch.no_grad():
        q.copy_(p.view(6, 12))
    optimizers = Muon([p]), Muon([q])
    for t in range(3):
        for x, optimizer in zip((p, q), optimizers, strict=True):
            give_gradients([x], t)
            optimizer.step()
    assert torch.equal(p.view(6, 12), q)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 3)], ids=str)
@BACKENDS
def test_empty_parameters(shape: Any, backend: str) -> None:
    for kind in (Muon, ADana):
        params = parameters(shapes=[shape, (4, 6)])
        optimizer = kind(params, geometry="muon", backend=backend)
        for t in range(2):
            give_gradients(params, t)
            optimizer.step()
        assert optimizer.state[params[0]]["step"] == 2.0


# --------------------------------------------------------------------------------- modes


@few
def test_autocast_changes_nothing(make: Case) -> None:
    ours, theirs = parameters(), parameters()
    one, other = (make(params, backend="eager") for params in (ours, theirs))
    for t in range(2):
        give_gradients(ours, t)
        give_gradients(theirs, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one.step()
        other.step()
    assert same(everything(ours, one), everything(theirs, other))


@few
def test_a_step_in_inference_mode_is_a_step(make: Case) -> None:
    ours, theirs = parameters(), parameters()
    one, other = (make(params) for params in (ours, theirs))
    for t in range(3):
        give_gradients(ours, t)
        give_gradients(theirs, t)
        with torch.inference_mode(t == 0):
            one.step()
        other.step()
    assert same(everything(ours, one), everything(theirs, other))


@STATES
@few
def test_fake_and_meta_tensors(make: Case, state: str) -> None:
    for mode, device in ((FakeTensorMode(), "cpu"), (torch.no_grad(), "meta")):
        with mode:
            params = [nn.Parameter(torch.ones(s, device=device)) for s in ((64, 96), (96, 64), (64, 3, 2, 2), (3, 0))]
            optimizer = make(params, state=state)
            for _ in range(2):
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
        for p in params:
            assert all(t.shape == p.shape for name, t in optimizer.state[p].items() if name in make.slots)


def test_steps_of_fake_tensors_of_a_gpu() -> None:
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(s, device="cuda")) for s in ((64, 96), (96, 64), (64, 3, 2, 2))]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = Muon(params)
        optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"].device.type == "cuda" for p in params)


@pytest.mark.filterwarnings("ignore")  # torch.compile has its own to give
def test_a_step_in_a_compiled_function() -> None:
    ours, theirs = parameters(), parameters()
    one, other = Muon(ours), Muon(theirs)
    torch._dynamo.reset()
    compiled = torch.compile(one.step, backend="eager")
    for t in range(2):
        give_gradients(ours, t)
        give_gradients(theirs, t)
        compiled()
        other.step()
    assert same(everything(ours, one), everything(theirs, other))


# --------------------------------------------------------------------------------- threads


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


ITERATION = Iteration.of(Muon, dict(Muon([torch.zeros(2, 2, requires_grad=True)]).defaults))
assert ITERATION is not None


@pytest.mark.parametrize("shape", [(5, 7), (64, 48), (255, 40), (260, 300)], ids=str)
def test_bits_do_not_depend_on_how_many_matrices_there_are(shape: Any, two_threads: None) -> None:
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    together = orthogonal(x.clone(), ITERATION)
    for n in range(5):
        assert torch.equal(orthogonal(x[: n + 1].clone(), ITERATION), together[: n + 1])
        assert torch.equal(orthogonal(x[n : n + 1].clone(), ITERATION), together[n : n + 1])
    if min(shape) < engine.SMALL:
        torch.set_num_threads(1)
        assert torch.equal(orthogonal(x.clone(), ITERATION), together)


@BACKENDS
def test_bits_do_not_depend_on_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for chunk in (1 << 24, 100, 1):
        monkeypatch.setattr("ademamix.engine.launches.CHUNK", chunk)
        params = parameters(torch.bfloat16, shapes=[(8, 6)] * 7 + [(6, 8)] * 3)
        optimizer = AdEMAMix(params, geometry="muon", backend=backend)
        train(params, optimizer, range(3))
        runs.append(everything(params, optimizer))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def numbers_of_threads() -> list[int]:
    """Of this thread and of one that has never asked."""
    seen = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen


def test_torch_s_number_of_threads_is_what_it_was(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(shapes=[(8, 6)] * 6)
    optimizer = Muon(params)
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
        assert numbers_of_threads() == [2, 2]

    def failing(*_: Any) -> Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("ademamix.geometries.orthogonalized", failing)
    give_gradients(params, 3)
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    assert numbers_of_threads() == [2, 2]


def test_a_helper_s_number_of_threads_is_that_of_the_thread_it_helps(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new thread's own is what some thread was last given, which is 1 while another computes."""
    reached, first, here = threading.Barrier(2, timeout=30), threading.Event(), threading.get_ident()

    def act(x: Tensor, *_: Any) -> Tensor:
        reached.wait()  # both are in the middle
        if threading.get_ident() == here:
            first.set()
        else:
            first.wait(30)
        return x

    monkeypatch.setattr("ademamix.backends.pool._helpers", [])  # so that new ones are started
    monkeypatch.setattr("ademamix.geometries.orthogonalized", act)
    for _ in range(3):
        orthogonal(torch.zeros(2, 3, 3), ITERATION)
        assert numbers_of_threads() == [2, 2]


def test_steps_on_other_threads(two_threads: None) -> None:
    runs: dict[int, Any] = {}

    def run(i: int) -> None:
        params = parameters(shapes=[(8, 6)] * 4)
        optimizer = Muon(params)
        train(params, optimizer, range(3))
        runs[i] = everything(params, optimizer)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(3)
    assert all(same(runs[i], runs[3]) for i in range(3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_steps_too(two_threads: None) -> None:
    params = parameters(shapes=[(8, 6)] * 4)
    optimizer = Muon(params)
    train(params, optimizer, range(1))
    child = os.fork()
    if child == 0:
        try:
            train(params, optimizer, range(1, 2))
            os._exit(0 if all(p.isfinite().all() for p in params) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --------------------------------------------------------------------------------- errors

VECTOR = r"{}: geometry='muon' takes real parameters of at least 2 dimensions, got parameter {} of shape \(5,\)"


def test_a_vector_or_a_complex_matrix_is_refused_by_name() -> None:
    p, v = parameters(shapes=[(4, 6), (5,)])
    with pytest.raises(ValueError, match=VECTOR.format("Muon", 1)):
        Muon([p, v])
    with pytest.raises(ValueError, match=VECTOR.format("AdEMAMix", "'bias'")):
        AdEMAMix([("weight", p), ("bias", v)], geometry="muon")
    with pytest.raises(ValueError, match=r"got parameter 0 of shape \(2, 2\) and dtype torch.complex64; give it to a"):
        Muon([torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(ValueError, match=r"got parameter 0 of shape \(\)"):
        Muon([torch.zeros((), requires_grad=True)])
    optimizer = Muon([p])
    for group in (v, [v], (x for x in [v])):
        with pytest.raises(ValueError, match=VECTOR.format("Muon", 0)):
            optimizer.add_param_group({"params": group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_makes_no_matrix_of_a_vector(named: bool) -> None:
    p, v = parameters(shapes=[(4, 6), (5,)])
    own = [("weight", p), ("bias", v)] if named else [p, v]
    optimizer = ADana(own)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["geometry"] = "muon"
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=VECTOR.format("ADana", "bias" if named else 1)):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometry": "spectral"}, r"geometry must be one of \('adam', 'muon'\), got 'spectral'"),
        ({"geometry": None}, r"geometry must be one of \('adam', 'muon'\), got None"),
        ({"adjust_lr_fn": "adam"}, r"adjust_lr_fn must be one of \(None, 'original', 'match_rms_adamw'\), got 'adam'"),
        ({"ns_steps": 0}, "ns_steps must be an integer from 1 to 99, got 0"),
        ({"ns_steps": 100}, "ns_steps must be an integer from 1 to 99, got 100"),
        ({"ns_steps": 2.5}, "ns_steps must be an integer from 1 to 99, got 2.5"),
        ({"ns_coefficients": (1.0, 2.0)}, r"must be 'polar_express' or three numbers such as .*, got \(1.0, 2.0\)"),
        ({"ns_coefficients": "express"}, "must be 'polar_express' or three numbers such as .*, got 'express'"),
        (
            {"ns_coefficients": np.ones((1, 3))},
            r"must be 'polar_express' or three numbers .*, got array\(\[\[1., 1., 1.\]\]\)",
        ),
        ({"ns_coefficients": (1.0, math.nan, 2.0)}, r"ns_coefficients\[1\] must be a finite number, got nan"),
        ({"ns_coefficients": None}, "must be 'polar_express' or three numbers such as .*, got None"),
    ],
    ids=str,
)
def test_settings_out_of_their_range(options: dict[str, Any], message: str) -> None:
    """In a constructor, a group, and set on a group between two steps."""
    for kind in (Muon, AdEMAMix):
        p, q = parameters(shapes=[(4, 6), (4, 6)])
        with pytest.raises(ValueError, match=message):
            kind([p], **{"geometry": "muon", **options})
        optimizer = kind([p], geometry="muon")
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [q], **options})
        give_gradients([p], 0)
        optimizer.step()
        before = copy.deepcopy(everything([p], optimizer))
        optimizer.param_groups[0].update(options)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert same(before, everything([p], optimizer))


def test_a_vector_whose_group_becomes_muon_s() -> None:
    for shape in ((5,), ()):
        (v,) = parameters(shapes=[shape])
        optimizer = ADana([v])
        optimizer.param_groups[0]["geometry"] = "muon"
        give_gradients([v], 0)
        with pytest.raises(ValueError, match=r"of at least 2 dimensions, got parameter in group 0 of shape \("):
            optimizer.step()
        assert not optimizer.state


def whole(p: Any, g: Any, m: Any, *, lr: Any = 0.1) -> Any:
    return p - lr * m, m + g


def test_a_whole_rule_has_no_other_geometry() -> None:
    kind, message = optimizer_from(whole), "for Whole, which is made of a whole rule and not a memory, got 'muon'"
    (p,) = parameters(shapes=[(4, 6)])
    with pytest.raises(ValueError, match=message):
        kind([p], geometry="muon")
    optimizer = kind([p])
    optimizer.param_groups[0]["geometry"] = "muon"
    give_gradients([p], 0)
    with pytest.raises(ValueError, match=message):
        optimizer.step()


# --------------------------------------------------------------------------------- any order of events


def newton_schulz(u: Any, steps: int, eps: float) -> Any:
    """In float64, of one matrix."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / max(np.sqrt((x * x).sum()), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_life_of_muon_is_that_of_its_equations(data: st.DataObject) -> None:
    """Matrices of all layouts in two groups, some without a gradient now and then, over checkpoints and changes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ademamix.engine.launches.CHUNK", data.draw(st.sampled_from([1, 20, 1 << 24])))
        live(data.draw)


def live(draw: Any) -> None:
    number = st.integers(1, 6)
    shapes = draw(st.lists(st.tuples(number, number) | st.tuples(number, number, number), min_size=1, max_size=5))
    params = parameters(torch.float64, shapes=shapes)
    for i, p in enumerate(params):
        if draw(st.booleans()):
            params[i] = p.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_()
    cut, offload = draw(st.integers(0, len(params))), draw(st.booleans())
    groups = [{"params": part} for part in (params[:cut], params[cut:]) if part]

    def made() -> Muon:
        return Muon(list(map(dict, groups)), backend="eager", offload=offload)  # type: ignore[arg-type]

    optimizer = made()
    exact = [p.detach().numpy().copy() for p in params]
    buffers = [np.zeros(p.shape) for p in params]
    random = np.random.default_rng(0)
    for _ in range(draw(st.integers(1, 5))):
        event = draw(st.sampled_from(["nothing", "load", "ns_steps", "lr", "adjust_lr_fn"]))
        if event == "load":
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = made()
            optimizer.load_state_dict(saved)
        elif event != "nothing":
            values = {"ns_steps": [1, 3], "lr": [0.01, 0.1], "adjust_lr_fn": ["original", "match_rms_adamw"]}
            optimizer.param_groups[-1][event] = draw(st.sampled_from(values[event]))
        for p in params:
            p.grad = torch.tensor(random.standard_normal(p.shape)) if draw(st.integers(0, 3)) else None
        optimizer.step()
        for group in optimizer.param_groups:
            for i in (i for i, p in enumerate(params) if any(p is q for q in group["params"]) and p.grad is not None):
                g, (rows, *_) = params[i].grad.numpy(), params[i].shape  # type: ignore[union-attr]
                buffers[i] = 0.95 * buffers[i] + 0.05 * g
                u = (0.95 * buffers[i] + 0.05 * g).reshape(rows, -1)
                larger = {"match_rms_adamw": 0.2 * math.sqrt(max(u.shape))}
                scale = larger.get(group["adjust_lr_fn"], math.sqrt(max(1.0, rows / u.shape[1])))
                step = scale * newton_schulz(u, group["ns_steps"], 1e-7).reshape(g.shape) + 0.1 * exact[i]
                exact[i] = exact[i] - group["lr"] * step
        for p, q in zip(params, exact, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), q, rtol=0, atol=1e-11)


def test_an_iteration_that_fails_in_the_first_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the optimizer's state nor in what launches keep: the next first step is one."""
    (p,) = parameters(shapes=[(6, 4)])
    optimizer = Muon([p])
    p.grad = torch.ones_like(p)
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_multiply", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full_like(p, 1.0 - 0.95))


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_squares_that_no_number_is_are_normalized(size: float) -> None:
    g = torch.randn(5, 7, dtype=torch.float64)
    steps = []
    for factor in (1.0, size):
        p = nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
        p.grad = factor * g
        Muon([p], eps=0.0).step()
        steps.append(p.detach())
    assert torch.allclose(*steps, rtol=1e-10)
