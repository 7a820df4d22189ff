"""Parameters of one dimension that are flattened ones: they are stored in few bits when the optimizer is told so."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ademamix import AdamW, AdEMAMix, RuleOptimizer
from ademamix.backends import eager
from ademamix.lab.plan import need
from optimizer_table import FIRST, Case
from small_models import same

RAGGED = 4096 + 300  # elements: whole blocks of 256 and a part of one


def steps(optimizer: RuleOptimizer, first: int = 0, number: int = 4) -> None:
    for t in range(first, first + number):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.numel(), generator=torch.Generator().manual_seed(t)).view_as(p).to(p.dtype)
        optimizer.step()


def trained(make: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    p = torch.randn(RAGGED, generator=torch.Generator().manual_seed(9)).view(shape).to(dtype).requires_grad_()
    optimizer = make([p], **options)
    steps(optimizer)
    return p, optimizer


@pytest.mark.parametrize(
    ("make", "backend", "state", "dtype"),
    [
        *((make, "eager", "compact", torch.float32) for make in FIRST.values()),
        *((FIRST["AdEMAMix"], "eager", state, torch.bfloat16) for state in ("bfloat16", "compact")),
        (FIRST["AdEMAMix"], "cpu", "bfloat16", torch.float32),
        (FIRST["AdEMAMix"], "cpu", "compact", torch.bfloat16),
    ],
)
def test_a_vector_is_stored_and_updated_as_a_row(make: Case, backend: str, state: str, dtype: torch.dtype) -> None:
    (p, flat), (q, row) = (
        trained(make, shape, dtype, backend=backend, state=state, flat_parameters=True)
        for shape in ((RAGGED,), (1, RAGGED))
    )
    assert same(p.detach(), q.detach().view(-1))
    for name, value in flat.state[p].items():
        assert same(value, row.state[q][name].view(value.shape)), name
        assert value.shape == ((1, 18) if name.endswith("_scale") else () if name == "step" else p.shape)
    assert {name for name, value in flat.state[p].items() if value.dtype == torch.float32} == {
        "step",
        *(f"{slot}_scale" for slot in make.slots if state == "compact"),
    }


def test_eager_cuts_long_rows_where_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries are no larger than a piece; the bits are those of the whole row."""
    whole, _ = trained(AdEMAMix, (RAGGED,), torch.bfloat16, state="compact", flat_parameters=True, backend="eager")
    largest = 0
    update = eager.Launch._update

    def watched(self: Any, pieces: Any, *rest: Any) -> None:
        nonlocal largest
        largest = max(largest, *(piece.tensors[0].numel() for piece in pieces))
        update(self, pieces, *rest)

    monkeypatch.setattr(eager, "PIECE", 512)
    monkeypatch.setattr(eager.Launch, "_update", watched)
    cut, _ = trained(AdEMAMix, (RAGGED,), torch.bfloat16, state="compact", flat_parameters=True, backend="eager")
    assert largest == 512
    assert torch.equal(whole, cut)


def bytes_of_state(params: list[Tensor], **options: Any) -> int:
    optimizer = AdEMAMix(params, backend="eager", **options)
    steps(optimizer, number=1)
    return sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")


@pytest.mark.parametrize(("state", "low"), [("compact", 4 + 3 * 4 / 256), ("bfloat16", 6.0)])
def test_bytes_per_parameter(state: str, low: float) -> None:
    """12 without the option. With it 1 + 2 + 1 and three scales of 4 bytes for each 256 elements, or 3 times 2."""

    def vector() -> list[Tensor]:
        return [torch.zeros(1 << 14, requires_grad=True)]

    with pytest.warns(UserWarning, match="flat_parameters=True"):
        assert bytes_of_state(vector(), state=state) == 12 << 14
    assert bytes_of_state(vector(), state=state, flat_parameters=True) == low * (1 << 14)


def test_small_vectors_doubles_and_complex_ones_keep_full_precision() -> None:
    for p in (
        torch.zeros(4095, requires_grad=True),
        torch.zeros(4096, dtype=torch.float64, requires_grad=True),
        torch.zeros(4096, dtype=torch.complex64, requires_grad=True),
    ):
        optimizer = AdEMAMix([p], state="compact", flat_parameters=True, backend="eager")
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert {t.dtype for name, t in optimizer.state[p].items() if name != "step"} == {p.dtype}


def test_a_strided_vector_too() -> None:
    p = torch.zeros(2 * RAGGED)[::2].requires_grad_()
    p.data.copy_(torch.randn(RAGGED, generator=torch.Generator().manual_seed(9)))
    optimizer = AdEMAMix([p], state="compact", flat_parameters=True, backend="eager")
    steps(optimizer)
    plain, _ = trained(AdEMAMix, (RAGGED,), state="compact", flat_parameters=True, backend="eager")
    assert torch.equal(p, plain)


def test_in_host_memory_too() -> None:
    p, optimizer = trained(AdEMAMix, (RAGGED,), state="compact", flat_parameters=True, offload=True)
    q, here = trained(AdEMAMix, (RAGGED,), state="compact", flat_parameters=True, backend="cpu")
    assert torch.equal(p, q)
    assert same(optimizer.state_dict()["state"], here.state_dict()["state"])


# --------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("backend", "state"), [("eager", "bfloat16"), ("eager", "compact"), ("cpu", "compact")])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_and_checkpoints_go_on_to_the_bit(backend: str, state: str, clone: Any) -> None:
    options: dict[str, Any] = {"state": state, "flat_parameters": True, "backend": backend}
    p, optimizer = trained(AdEMAMix, (RAGGED,), **options)
    twin = clone(optimizer)
    q = p.detach().clone().requires_grad_()
    loaded = AdEMAMix([q], **options)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, twin, loaded):
        steps(each, first=4)
    (r,) = twin.param_groups[0]["params"]
    assert twin.flat_parameters is True
    assert torch.equal(p, q)
    assert torch.equal(p, r)


def test_checkpoints_change_with_the_option() -> None:
    """Float32 state is rounded when it is loaded with the option, and codes are decoded without it."""
    options: dict[str, Any] = {"state": "compact", "backend": "eager"}
    p, flat = trained(AdEMAMix, (RAGGED,), flat_parameters=True, **options)
    full = AdEMAMix([p.detach().clone().requires_grad_()])
    full.load_state_dict(flat.state_dict())
    again = AdEMAMix([p.detach().clone().requires_grad_()], flat_parameters=True, **options)
    again.load_state_dict(full.state_dict())
    (numbers,), (codes,) = full.state.values(), again.state.values()
    for slot, bits in (("exp_avg_fast", 3), ("exp_avg_slow", 11), ("exp_avg_sq", 3)):
        assert numbers[slot].dtype == torch.float32
        assert numbers[slot].abs().max() > 0.0
        assert codes[slot].dtype == flat.state[p][slot].dtype
        # What is a code's number already is at most one code off: scales, made anew, differ by their rounding.
        decoded = AdEMAMix([p.detach().clone().requires_grad_()])
        decoded.load_state_dict(again.state_dict())
        (back,) = decoded.state.values()
        close = 2.0**-bits * numbers[slot].abs() + 2.0**-18 * numbers[slot].abs().max()
        assert ((back[slot] - numbers[slot]).abs() <= close).all()


def test_a_file_with_scales_of_another_shape_is_refused() -> None:
    _, optimizer = trained(AdEMAMix, (RAGGED,), state="compact", flat_parameters=True, backend="eager")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_slow_scale"] = torch.zeros(RAGGED, 1)
    with pytest.raises(ValueError, match=rf"'exp_avg_slow_scale' has shape \({RAGGED}, 1\); .* needs \(1, 18\)"):
        optimizer.load_state_dict(saved)


# --------------------------------------------------------------------------------- the option


def test_it_is_given_to_the_optimizer_for_all_groups() -> None:
    p, q = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="flat_parameters must be True or False, got 1"):
        AdEMAMix([p], flat_parameters=1)  # type: ignore[arg-type]
    optimizer = AdEMAMix([p], flat_parameters=True)
    with pytest.raises(ValueError, match="flat_parameters is given to the optimizer, for all groups"):
        optimizer.add_param_group({"params": [q], "flat_parameters": False})
    optimizer.add_param_group({"params": [q], "flat_parameters": True})
    assert "flat_parameters" not in optimizer.state_dict()["param_groups"][0]


def test_one_warning_where_state_has_no_effect() -> None:
    def model(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.zeros(shape, requires_grad=True) for shape in shapes]

    def train() -> None:
        optimizer = AdamW(model((5000,), (10,)), state="compact", backend="eager")
        steps(optimizer, number=3)
        optimizer.load_state_dict(optimizer.state_dict())
        steps(optimizer, number=3)

    with pytest.warns(UserWarning, match="state='compact' has no effect.*flat_parameters=True") as caught:
        train()
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():  # what is stored compactly, or would not be with the option either
        warnings.simplefilter("error")
        for shapes, options in (
            ([(5000,)], {}),
            ([(5000,)], {"state": "compact", "flat_parameters": True}),
            ([(5000,), (64, 64)], {"state": "compact"}),
            ([(4000,), (8, 8)], {"state": "compact"}),
            ([(5000,)], {"state": {"exp_avg": "float32"}}),
        ):
            steps(AdamW(model(*shapes), backend="eager", **options), number=1)  # type: ignore[arg-type]


def test_a_memory_plan_counts_vectors_as_norms_and_biases() -> None:
    planned = need(torch.nn.LayerNorm(5000), AdEMAMix, "compact")["optimizer state"]
    assert planned == 2 * 5000 * 12
