"""What is true of every optimizer that the library exports: its row in the table, arguments, slots and schedules."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import ademamix
from ademamix import GradientMemory, Muon, RuleOptimizer
from optimizer_table import CASES, ROWS, Case, Options, Row, every_case, every_row
from small_models import model, same, set_grads

OF_ALL_GROUPS = ("state", "backend", "skip_nonfinite", "offload")
BYTES = {"int8": 1, "float8": 1, "int16": 2}


def test_every_optimizer_has_a_row_in_the_table() -> None:
    """But for Muon, whose parameters are all matrices (tests/engine/test_muon.py), and GradientMemory."""
    exported = [getattr(ademamix, name) for name in ademamix.__all__]
    kinds = {x for x in exported if isinstance(x, type) and issubclass(x, RuleOptimizer)}
    kinds -= {RuleOptimizer, Muon, GradientMemory}
    missing = sorted(kind.__name__ for kind in kinds - {row.kind for row in ROWS})
    assert not missing, (
        f"add a row for {missing} to ROWS in tests/optimizer_table.py: all generic tests then run for it"
    )


@every_row
def test_a_row_s_first_case_has_all_warmups(row: Row) -> None:
    warmups = {name for name in inspect.signature(row.kind).parameters if "warmup" in name}
    assert set(row.warmups) == warmups <= row.cases[""].options.keys()


# --------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [(row.kind, options, message) for row in ROWS for options, message in row.refused],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x) if isinstance(x, dict) else "",
)
def test_what_is_refused_is_named_before_anything_changes(kind: Any, options: Options, message: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=message):
        kind(net.parameters(), **options)
    if options.keys() & set(OF_ALL_GROUPS):
        return
    optimizer = kind(net.parameters(), backend="eager")
    set_grads(net, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], **options})
    assert same(optimizer.state_dict(), before)


@every_row
@pytest.mark.parametrize(
    "option", [{"state": "compact"}, {"backend": "eager"}, {"skip_nonfinite": True}, {"offload": True}], ids=str
)
def test_an_option_of_the_whole_optimizer_is_refused_in_a_group(row: Row, option: dict[str, Any]) -> None:
    """It would do nothing."""
    with pytest.raises(ValueError, match=f"{next(iter(option))} is given to the optimizer, for all groups"):
        row.kind([{"params": model().parameters(), **option}])


@every_case
def test_maximizing_is_minimizing_along_the_negated_gradient(make: Case) -> None:
    up, down = model(), model()
    optimizers = make(up.parameters(), maximize=True, backend="eager"), make(down.parameters(), backend="eager")
    for t in range(4):
        set_grads(up, t)
        for p, q in zip(up.parameters(), down.parameters(), strict=True):
            q.grad = -p.grad
        for optimizer in optimizers:
            optimizer.step()
        assert same(list(up.parameters()), list(down.parameters()))


# --------------------------------------------------------------------------------- slots


@every_case
def test_the_state_has_the_slots_of_the_table(make: Case) -> None:
    net = model()
    optimizer = make(net.parameters(), backend="eager")
    set_grads(net, 0)
    optimizer.step()
    for p in net.parameters():
        state = optimizer.state[p]
        assert state.keys() == {"step", *make.slots}
        assert all(state[name].shape == p.shape for name in make.slots)


@every_case
def test_compact_state_has_16_bits_where_memory_is_long_and_8_elsewhere(make: Case) -> None:
    """A scale for each 256 elements is 1 / 64 of a byte."""
    params = [torch.ones(s, requires_grad=True) for s in ((64, 64), (64, 1024))]
    optimizer = make(params, state="compact", backend="eager")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kinds = {"int8": torch.int8, "int16": torch.int16, "float8": torch.uint8}
    for p in params:
        assert {name: optimizer.state[p][name].dtype for name in make.slots} == {
            name: kinds[format] for name, format in make.slots.items()
        }
    stored = sum(t.nbytes for t in optimizer.state[params[1]].values()) - 4  # the step
    each = sum(map(BYTES.__getitem__, make.slots.values()))
    assert stored / params[1].numel() == each + len(make.slots) / 64


# --------------------------------------------------------------------------------- schedules

WARMED = {
    name: (case, {warmup: case.options[warmup] for warmup in row.warmups if warmup in case.options})
    for row in ROWS
    for name, case in CASES.items()
    if case.kind is row.kind and case.options.keys() & set(row.warmups)
}


@pytest.mark.parametrize(("make", "warmups"), WARMED.values(), ids=WARMED)
def test_after_its_warmups_an_optimizer_is_the_one_without_them(make: Case, warmups: dict[str, int]) -> None:
    p = [torch.zeros(3, requires_grad=True)]
    (warm,), (plain,) = (make(p, **options).param_groups for options in ({}, dict.fromkeys(warmups)))
    end = max(warmups.values()) + make.options.get("schedule_start", 0)
    for step in (1.0, end - 1.0, float(end), end + 1.0, 1000.0):
        # beta through its half-life and back: a rounding of 1e-16 is 1e-12 of 1 - beta.
        expected = pytest.approx(make.kind.coefficients(step, plain), rel=1e-11)
        assert (make.kind.coefficients(step, warm) == expected) is (step >= end)
