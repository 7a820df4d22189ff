"""Checks on four processes (gloo), run by test_sharding.py: `python sharding_processes.py RANK FOLDER`.

All checks share one start of the processes. Each process writes what became of each check into FOLDER.
"""

import contextlib
import copy
import datetime
import inspect
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from ademamix import AdEMAMix, GradientMemory, clip_grad_norm_
from ademamix.convert import to_adamw

WORLD = 4
RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    return init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def rows_in_two_turns() -> int:
    """Rows that need not be a multiple of 4 for a part of a part, unless this torch cuts only evenly, as 2.6 does."""
    try:
        _StridedShard(0, split_factor=2)._split_tensor(torch.zeros(10), 2)
    except AssertionError:
        return 12
    return 10


ROWS_UNEVEN, ROWS_EMPTY = (7, 700), (3, 2048)  # of the one, processes have 2, 2, 2, 1 rows, of the other 1, 1, 1, 0
# Shapes, the mesh's dimensions and placements of parameters whose parts keep blocks of 256 elements whole,
WHOLE_BLOCKS: list[tuple[tuple[int, ...], int, Sequence[Any]]] = [
    (ROWS_UNEVEN, 1, [Shard(0)]),
    (ROWS_EMPTY, 1, [Shard(0)]),
    ((64, 65), 1, [Replicate()]),
    ((5, 1021), 1, [Shard(1)]),  # 256, 256, 256, 253 columns
    ((3, 8, 512), 1, [Shard(1)]),
    ((4099,), 1, [Shard(0)]),
    ((), 1, [Replicate()]),
    ((6, 1024), 2, [Shard(0), Shard(1)]),
    ((6, 1024), 2, [Shard(1), Shard(0)]),
    ((7, 700), 2, [Replicate(), Shard(0)]),
    ((10, 600), 2, [Shard(0), Shard(0)]),
    ((rows_in_two_turns(), 600), 2, [_StridedShard(0, split_factor=2), Shard(0)]),  # tensor parallelism, then FSDP
    ((2, 2048), 2, [_StridedShard(1, split_factor=2), Shard(1)]),
]
# and of others.
CUT_BLOCKS: list[tuple[tuple[int, ...], int, Sequence[Any]]] = [
    ((5, 900), 1, [Shard(1)]),
    ((4, 6, 200), 1, [Shard(2)]),
    ((3, 10, 201), 2, [Shard(1), Shard(2)]),  # rows at more than one distance
    ((6, 1000), 2, [Shard(0), Shard(1)]),
    ((2, 3), 2, [Shard(0), Shard(1)]),
]


def gradient(i: int, step: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + i))
    return (g * 10.0 ** (step % 3 - 1)).to(dtype)


def values(cases: Sequence[Any], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape, _, _ in cases]


def part(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    """A tensor that every process has, cut without communication."""
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)
    mine, place = whole, mesh.get_coordinate()  # as in torch 2.6, which would send it around
    for d, placement in enumerate(placements):
        if placement.is_shard():
            mine = placement._split_tensor(mine, mesh.size(d), with_padding=False, contiguous=True)[0][place[d]]
    return DTensor.from_local(mine.clone(), mesh, placements, shape=whole.shape, stride=whole.stride())


def assert_equal(one: torch.Tensor, other: torch.Tensor, *where: Any) -> None:
    """One, which may be a DTensor, is the other, a plain tensor, in its bits."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape), where
    if isinstance(one, DTensor):
        one, other = one.to_local(), part(other, one.device_mesh, one.placements).to_local()
    assert torch.equal(one, other), (where, (one.double() - other.double()).abs().max())


def trained(cases: Sequence[Any], dtype: torch.dtype, parts: Sequence[DeviceMesh] | None, make: Any, **o: Any) -> Any:
    """Parameters, whole or in parts, and their optimizer after three steps."""
    params = values(cases, dtype)
    if parts is not None:
        params = [part(p, parts[dims - 1], placed) for p, (_, dims, placed) in zip(params, cases, strict=True)]
    params = [nn.Parameter(p) for p in params]
    optimizer = make(params, lr=0.01, **o)
    for step in range(3):
        for i, (p, (shape, dims, placements)) in enumerate(zip(params, cases, strict=True)):
            g = gradient(i, step, shape, dtype)
            p.grad = g if parts is None else part(g, parts[dims - 1], placements)
        optimizer.step()
    return params, optimizer


@check
def any_sharding_gives_the_bits_of_one_process_without_communication() -> None:
    both = meshes()
    kinds = [(torch.float32, "float32"), (torch.float32, "compact"), (torch.bfloat16, "bfloat16")]
    kinds += [(torch.bfloat16, "compact")]
    for dtype, state in kinds:
        cases = WHOLE_BLOCKS if state == "compact" else WHOLE_BLOCKS + CUT_BLOCKS
        for backend in ("cpu", "eager"):
            options = {"state": state, "backend": backend, "seed": 5}
            if RANK > 0:
                dist.barrier()
            whole, reference = trained(cases, dtype, None, AdEMAMix, **options)
            if RANK == 0:
                dist.barrier()  # the others find its compiled kernel in the cache
            with CommDebugMode() as communication:
                params, optimizer = trained(cases, dtype, both, AdEMAMix, **options)
            assert communication.get_total_counts() == 0, communication.get_comm_counts()
            for p, q, case in zip(params, whole, cases, strict=True):
                where = (case, state, dtype, backend)
                assert_equal(p.detach(), q.detach(), where)
                mine, theirs = optimizer.state[p], reference.state[q]
                assert mine.keys() == theirs.keys(), where
                for name in mine.keys() - {"step"}:
                    assert (mine[name].placements, mine[name].device_mesh) == (p.placements, p.device_mesh)
                    assert_equal(mine[name], theirs[name], where, name)


def snapshot(params: Any, optimizer: Any) -> list[torch.Tensor]:
    tensors = [t for p in params for t in (p.detach(), *optimizer.state.get(p, {}).values())]
    return [(t.to_local() if isinstance(t, DTensor) else t).clone() for t in tensors]


def unchanged(before: list[torch.Tensor], params: Any, optimizer: Any) -> bool:
    now = snapshot(params, optimizer)
    return len(before) == len(now) and all(map(torch.equal, before, now))


@check
def clipping_costs_one_all_reduce_and_is_that_of_all_gradients() -> None:
    both = meshes()
    one_mesh = [case for case in WHOLE_BLOCKS + CUT_BLOCKS if case[1] == 2]
    for cases, all_reduces in ((one_mesh, 1), (WHOLE_BLOCKS, 2)):
        whole, reference = trained(cases, torch.float32, None, AdEMAMix)
        params, optimizer = trained(cases, torch.float32, both, AdEMAMix)
        exact = torch.cat([p.grad.flatten().double() for p in whole]).norm()
        with CommDebugMode() as communication:
            norm = optimizer.clip_grad_norm_(0.5)
            optimizer.step()
        assert communication.get_total_counts() == all_reduces, communication.get_comm_counts()
        assert not isinstance(norm, DTensor)
        # A sum of n float32 squares, in any order, is off by less than n * 2**-24 of it.
        torch.testing.assert_close(norm.double(), exact, rtol=5000 * 2**-24, atol=0.0)
        from_all = [torch.empty(()) for _ in range(WORLD)]
        dist.all_gather(from_all, norm)
        assert all(torch.equal(norm, n) for n in from_all)
        reference.clip_grad_norm_(0.5)
        reference.step()
        for p, q in zip(params, whole, strict=True):
            like = part(q.detach(), p.device_mesh, p.placements).to_local()
            torch.testing.assert_close(p.detach().to_local(), like, rtol=1e-5, atol=1e-6)  # steps of lr = 0.01


@check
def a_process_may_lack_gradients_that_others_have() -> None:
    """As of an expert that got no tokens here: norms, skipped steps and the order of all-reduces are those of all."""
    both = meshes()
    for skip_nonfinite in (None, True):
        experts = [nn.Parameter(part(torch.ones(8, 6), m, [Shard(0)] * m.ndim)) for m in both]
        common = nn.Parameter(torch.ones(3))
        optimizer = AdEMAMix([*experts, common], skip_nonfinite=skip_nonfinite)
        for bad in (False, True):
            for i, p in enumerate(experts):
                number = torch.nan if bad and RANK == 1 else 2.0
                p.grad = torch.full_like(p, number) if i + 1 == RANK else None  # process 0 and 3 have none at all
            common.grad = torch.full((3,), 3.0) if RANK < 3 else None
            if skip_nonfinite is None:
                norm = optimizer.clip_grad_norm_(1.0)
                assert norm.isnan() if bad else RANK == 3 or norm == (2 * 12 * 4.0 + 3 * 9.0) ** 0.5, norm
            before = snapshot([*experts, common], optimizer)
            optimizer.step()
            assert optimizer.skipped_steps == bad
            assert unchanged(before, [*experts, common], optimizer) == (bad or RANK == 3)


@check
def one_norm_for_several_optimizers_is_that_of_all_gradients_on_all_meshes() -> None:
    whole, _ = trained(WHOLE_BLOCKS, torch.float32, None, AdEMAMix)
    params, _ = trained(WHOLE_BLOCKS, torch.float32, meshes(), AdEMAMix)
    sums = DTensor.from_local(torch.full((64, 65), 0.1 * RANK), params[2].device_mesh, [Partial()])
    params[2].grad, whole[2].grad = sums, torch.full((64, 65), 0.6)
    optimizers = []
    for each in (whole, params):
        optimizers.append([torch.optim.SGD(each[::2], lr=0.1), AdEMAMix(each[1::2], lr=0.01)])
    sgd, ours = optimizers[1]
    norm = nn.utils.clip_grad_norm_(whole, 0.5)
    with CommDebugMode() as communication:
        found = clip_grad_norm_([sgd, ours], 0.5)
    # One for each of two meshes, and that of the gradient which is a sum still to be made.
    assert communication.get_total_counts() == 3, communication.get_comm_counts()
    assert not isinstance(found, DTensor)
    # As above, a sum of squares of fewer than 100,000 elements; torch sums those of a tensor in vectors of 8 and more.
    torch.testing.assert_close(found, norm, rtol=12_500 * 2**-24, atol=0.0)
    again = ours.clip_grad_norm_(0.5, norm=DTensor.from_local(found, params[0].device_mesh, [Replicate()]))
    assert torch.equal(again, found)
    for both in optimizers:
        for optimizer in both:
            optimizer.step()
    for p, q in zip(params, whole, strict=True):
        # Steps of 0.1 times gradients of norm 0.5 at most, by a factor that may be off by that.
        torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=1e-6, atol=0.1 * 0.5 * 12_500 * 2**-24)

    params[2].grad = torch.ones_like(params[2])  # no sum, for which all processes would need it
    for p in params[RANK % 2 :: 2]:  # a process has the gradients of one optimizer
        p.grad = None
    if RANK == 1:
        params[0].grad.to_local()[0, 0] = torch.nan
    before = snapshot(params[1::2], ours)
    assert clip_grad_norm_([sgd, ours], 0.5).isnan()
    ours.step()
    assert ours.skipped_steps == 1
    assert unchanged(before, params[1::2], ours)


@check
def gradients_of_another_mesh_and_partial_parameters_are_named() -> None:
    mesh, _ = meshes()
    other = DeviceMesh("cpu", list(reversed(range(WORLD))))
    p = nn.Parameter(part(torch.ones(64, 80), mesh, [Shard(0)]))
    p.grad = part(torch.ones(64, 80), other, [Shard(0)])
    q = nn.Parameter(DTensor.from_local(torch.ones(64, 80), mesh, [Partial()]))
    q.grad = DTensor.from_local(torch.ones(64, 80), mesh, [Partial()])
    for bad in (p, q):
        for state in ("float32", "compact"):
            with pytest.raises(RuntimeError, match="allowed: Shard and Replicate, the gradient on the same mesh"):
                AdEMAMix([bad], state=state).step()


@check
def a_bad_number_in_one_part_skips_the_step_of_all() -> None:
    for options in ({}, {"skip_nonfinite": True}):
        params, optimizer = trained(WHOLE_BLOCKS, torch.float32, meshes(), AdEMAMix, state="compact", **options)
        if RANK == 3:
            params[0].grad.to_local()[0, 5] = torch.inf
        before = snapshot(params, optimizer)
        if not options:
            assert not optimizer.clip_grad_norm_(1.0).isfinite()
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert unchanged(before, params, optimizer)


@check
def formats_whose_blocks_would_be_cut_are_refused_before_anything_changes() -> None:
    both = meshes()
    for shape, dims, placements in CUT_BLOCKS[:-1]:
        good = nn.Parameter(part(torch.ones(64, 65), both[0], [Shard(0)]))
        bad = nn.Parameter(part(torch.ones(shape), both[dims - 1], placements))
        optimizer = AdEMAMix([good, bad], state="compact")
        good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
        message = f"of shape {shape} with placements {tuple(placements)} on .*: it would cut blocks of 256 elements"
        message = re.sub(r"([()])", r"\\\1", message)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert unchanged([torch.ones_like(t) for t in snapshot([good, bad], optimizer)], [good, bad], optimizer)
        assert not optimizer.state
        full = AdEMAMix([good, bad])
        full.step()
        saved, before = full.state_dict(), snapshot([good, bad], optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert unchanged(before, [good, bad], optimizer)


@check
def mixtures_of_plain_tensors_and_dtensors_are_named() -> None:
    mesh, _ = meshes()
    p, q = nn.Parameter(part(torch.ones(8, 2), mesh, [Shard(0)])), nn.Parameter(torch.ones(8, 2))
    p.grad = torch.ones_like(p)
    q.grad = torch.ones_like(q)
    of_parts, of_whole = AdEMAMix([p]), AdEMAMix([q])
    of_parts.step()
    of_whole.step()
    with pytest.raises(ValueError, match="'exp_avg_fast' is a DTensor on "):
        of_whole.load_state_dict(of_parts.state_dict())
    of_parts.load_state_dict(of_whole.state_dict())  # each process takes its part
    p.grad = q.grad = None
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    of_parts.step()
    of_whole.step()
    assert_equal(p.detach(), q.detach())
    assert_equal(of_parts.state[p]["exp_avg_sq"], of_whole.state[q]["exp_avg_sq"])


class Block(nn.Module):
    """What tensor parallelism cuts by columns, by rows and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(64, 3))


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    rows = Shard(1)  # of tokens, between the blocks
    split = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=rows, use_local_output=True)
    plan: dict[str, Any] = {"0": split, "2": ColwiseParallel(input_layouts=rows, output_layouts=Replicate())}
    for block in "01":
        plan[f"{block}.norm"] = SequenceParallel()
        plan[f"{block}.up"] = ColwiseParallel(input_layouts=rows)
        plan[f"{block}.down"] = RowwiseParallel(output_layouts=rows)
    parallelize_module(model, mesh, plan)


def parallel(how: str) -> nn.Module:
    one, two = meshes()
    model = blocks()
    if how == "fsdp":
        fully_shard(model, mesh=one)
    elif how == "replicas of fsdp":
        fully_shard(model, mesh=two)
    elif how == "tensor parallel":
        tensor_parallel(model, one)
    else:
        tensor_parallel(model, two["tp"])
        for module in (*model, model):
            fully_shard(module, mesh=two["dp"])
    return model


@check
def models_under_fsdp_and_tensor_parallelism_train_as_on_one_process() -> None:
    pairs = [(how, "float32") for how in ("fsdp", "replicas of fsdp", "tensor parallel", "tensor parallel and fsdp")]
    pairs += [("fsdp", "compact"), ("replicas of fsdp", "compact"), ("tensor parallel and fsdp", "bfloat16")]
    if not hasattr(torch.cpu.Stream, "record_event"):  # as in torch 2.6, whose fully_shard trains on GPUs only
        pairs = [("tensor parallel", "float32")]
    for how, state in pairs:
        reference, model = blocks(), parallel(how)
        optimizers = [AdEMAMix(m.parameters(), lr=0.01, eps=1e-3, state=state, alpha=5.0) for m in (reference, model)]
        for step in range(4):
            x = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(step))
            for m, optimizer in zip((reference, model), optimizers, strict=True):
                m(x).square().mean().backward()  # every process has the same data: so has the mean
                optimizer.clip_grad_norm_(0.1)
                optimizer.step()
                optimizer.zero_grad()
        # Sums of a backward pass in another order are off by some 1e-6 of a gradient of up to 0.1. With eps = 1e-3 that
        # is 1e-4 of a step of lr; a code that falls otherwise moves it by a hundredth.
        error = 4 * 0.01 * (1e-4 if state == "float32" else 2e-2)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert isinstance(p, DTensor)
            where = f"{how} {state} {name}"
            torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=0.0, atol=error, msg=where)


class Widths(nn.Module):
    """Uneven parts, empty ones, ragged blocks, and parameters that stay float32 in any case."""

    def __init__(self) -> None:
        super().__init__()
        self.uneven, self.small, self.few = nn.Linear(700, 7), nn.Linear(7, 5), nn.Linear(2048, 3)

    def train_on(self, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(self.parameters()):
                g = gradient(i, step, p.shape, torch.float32)
                p.grad = part(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
            optimizer.step()
            optimizer.zero_grad()


def widths(mesh: DeviceMesh | None, state: str) -> tuple[Widths, AdEMAMix]:
    torch.manual_seed(0)
    model = Widths()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    options = {"lr": 0.01, "alpha": 5.0, "alpha_warmup": 6, "beta3_warmup": 5, "weight_decay": 0.1, "seed": 3}
    return model, AdEMAMix(model.parameters(), state=state, **options)


class Training(Stateful):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@check
def checkpoints_saved_on_n_processes_go_on_exactly_on_m() -> None:
    sizes = range(1, WORLD + 1)
    all_meshes = {n: DeviceMesh("cpu", list(range(n))) for n in sizes}
    groups = {n: mesh.get_group() for n, mesh in all_meshes.items() if n > RANK}
    for state in ("float32", "compact"):
        reference, of_reference = widths(None, state)
        reference.train_on(of_reference, range(6))
        for n in sizes:
            file = f"{FOLDER}/{state}-{n}"
            if n > RANK:
                model, optimizer = widths(all_meshes[n], state)
                model.train_on(optimizer, range(3))
                dcp.save({"all": Training(model, optimizer)}, checkpoint_id=file, process_group=groups[n])
            dist.barrier()
            for m in sizes:
                if m <= RANK:
                    continue
                model, optimizer = widths(all_meshes[m], state)
                for p in model.parameters():
                    nn.init.zeros_(p)
                dcp.load({"all": Training(model, optimizer)}, checkpoint_id=file, process_group=groups[m])
                model.train_on(optimizer, range(3, 6))
                for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                    assert_equal(p.detach(), q.detach(), state, n, m)
                    for name, value in optimizer.state[p].items():
                        assert_equal(value, of_reference.state[q][name], state, n, m, name)


@check
def checkpoints_of_any_placement_load_into_whole_tensors() -> None:
    params, optimizer = trained(WHOLE_BLOCKS, torch.bfloat16, meshes(), AdEMAMix, state="compact")
    whole, reference = trained(WHOLE_BLOCKS, torch.bfloat16, None, AdEMAMix, state="compact")
    saved = {f"{i}": {"p": p.detach(), **optimizer.state[p]} for i, p in enumerate(params)}
    dcp.save(saved, checkpoint_id=f"{FOLDER}/placements")
    expected = {f"{i}": {"p": p.detach(), **reference.state[p]} for i, p in enumerate(whole)}
    loaded = {i: {name: torch.zeros_like(t) for name, t in tensors.items()} for i, tensors in expected.items()}
    dcp.load(loaded, checkpoint_id=f"{FOLDER}/placements")
    for i, tensors in expected.items():
        for name, t in tensors.items():
            assert_equal(loaded[i][name], t, i, name)


@check
def state_in_host_memory_is_in_parts_too() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole, reference = trained(WHOLE_BLOCKS, dtype, None, AdEMAMix, state="compact", offload=True)
        params, optimizer = trained(WHOLE_BLOCKS, dtype, meshes(), AdEMAMix, state="compact", offload=True)
        for p, q, case in zip(params, whole, WHOLE_BLOCKS, strict=True):
            assert_equal(p.detach(), q.detach(), case, dtype)
            assert optimizer.state[p].keys() == reference.state[q].keys()
            for name, value in optimizer.state[p].items():
                assert isinstance(value, DTensor) or name == "step"
                assert_equal(value, reference.state[q][name], case, dtype, name)


@check
def state_loaded_in_another_format_or_placement_becomes_what_one_process_has() -> None:
    one, _ = meshes()
    cases = [case for case in WHOLE_BLOCKS if case[1] == 1]
    for before, after in (("float32", "compact"), ("compact", "float32"), ("bfloat16", "compact")):
        whole, old = trained(cases, torch.float32, None, AdEMAMix, state=before)
        params, of_parts = trained(cases, torch.float32, (one,), AdEMAMix, state=before)
        turned = [(shape, dims, [Replicate()]) for shape, dims, _ in cases]
        _, of_copies = trained(turned, torch.float32, (one,), AdEMAMix, state=before)
        for i, converted in to_adamw(of_parts.state_dict())["state"].items():
            assert_equal(converted["exp_avg_sq"], to_adamw(old.state_dict())["state"][i]["exp_avg_sq"], before, i)
        expected = AdEMAMix(whole, state=after)
        expected.load_state_dict(copy.deepcopy(old.state_dict()))
        for source in (of_parts, old, of_copies):
            optimizer = AdEMAMix(params, state=after)
            optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
            for p, q in zip(params, whole, strict=True):
                for name, value in optimizer.state[p].items():
                    if name != "step":
                        assert value.placements == p.placements
                    assert_equal(value, expected.state[q][name], before, after, name)
        copies = AdEMAMix(
            [nn.Parameter(p.detach().redistribute(placements=[Replicate()])) for p in params], state=before
        )
        copies.load_state_dict(of_parts.state_dict())
        for p, q in zip(copies.param_groups[0]["params"], whole, strict=True):
            for name, value in copies.state[p].items():
                assert_equal(value, old.state[q][name], before, name)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 64), nn.Tanh(), nn.Linear(64, 3))


SETTINGS: dict[str, Any] = {"lr": 0.01, "alpha": 5.0, "alpha_warmup": 6, "beta3_warmup": 5, "weight_decay": 0.1}


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(8, 70, generator=torch.Generator().manual_seed(10 * step + rank))


def same_everywhere(model: nn.Module) -> bool:
    mine = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    everyone = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, other) for other in everyone)


@check
def replicas_stay_equal_under_ddp_and_accumulate_with_no_sync() -> None:
    for dtype, state in ((torch.float32, "float32"), (torch.bfloat16, "compact")):
        replica = DistributedDataParallel(small().to(dtype))
        by_hand = small().to(dtype)
        optimizers = [AdEMAMix(m.parameters(), state=state, **SETTINGS) for m in (replica, by_hand)]
        for step in range(4):
            for half in range(2):
                with replica.no_sync() if half == 0 else contextlib.nullcontext():
                    replica(batch(2 * step + half, RANK).to(dtype)).square().mean().backward()
            for p, q in zip(by_hand.parameters(), replica.parameters(), strict=True):
                p.grad = q.grad.clone()
            for optimizer in optimizers:
                optimizer.clip_grad_norm_(0.5)
                optimizer.step()
                optimizer.zero_grad()
            assert same_everywhere(replica)
            assert all(map(torch.equal, replica.parameters(), by_hand.parameters()))
        # Noise is a hash: the state that each process has rounded for itself is the same too.
        for p, q in zip(replica.parameters(), by_hand.parameters(), strict=True):
            assert all(map(torch.equal, optimizers[0].state[p].values(), optimizers[1].state[q].values()))


@check
def zero_redundancy_optimizer_takes_the_same_steps() -> None:
    sharded, reference = DistributedDataParallel(small()), DistributedDataParallel(small())
    zero = ZeroRedundancyOptimizer(sharded.parameters(), optimizer_class=AdEMAMix, **SETTINGS)
    plain = AdEMAMix(reference.parameters(), **SETTINGS)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(zero, 10)
    for step in range(6):
        for m in (sharded, reference):
            m(batch(step, RANK)).square().mean().backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        plain.param_groups[0]["lr"] = zero.param_groups[0]["lr"]
        for optimizer in (zero, plain):
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        assert all(map(torch.equal, sharded.parameters(), reference.parameters()))
        if step == 2:
            zero.consolidate_state_dict(to=0)
            if RANK == 0:
                whole = AdEMAMix(small().parameters(), **SETTINGS)
                whole.load_state_dict(zero.state_dict())
                for p, q in zip(whole.param_groups[0]["params"], reference.parameters(), strict=True):
                    assert all(map(torch.equal, whole.state[p].values(), plain.state[q].values()))
    mine = sum(len(state) for state in zero.optim.state.values())
    assert 0 < mine < sum(len(state) for state in plain.state.values())


@check
def zero_redundancy_optimizer_takes_every_argument() -> None:
    options = {"state": "compact", "backend": "eager", "skip_nonfinite": True, "offload": True, **SETTINGS}
    model = small()
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdEMAMix, **options)
    for step in range(2):
        model(batch(step, 0)).square().mean().backward()
        zero.step()
        zero.zero_grad()
    assert same_everywhere(model)
    for p, state in zero.optim.state.items():
        assert state["exp_avg_slow"].dtype == (torch.int16 if p.numel() >= 4096 else torch.float32)
    with pytest.raises(ValueError, match="state is given to the optimizer, for all groups, got a group with"):
        zero.optim.add_param_group({"params": nn.Parameter(torch.ones(3)), "state": "float32"})


@check
def a_memory_filters_gradients_in_parts_and_sums_still_to_be_made() -> None:
    both = meshes()

    def make(params: Any, lr: float, state: str) -> GradientMemory:
        return GradientMemory(params, memory=AdEMAMix, state=state)

    for state, cases in (("bfloat16", WHOLE_BLOCKS + CUT_BLOCKS), ("compact", WHOLE_BLOCKS)):
        whole, _ = trained(cases, torch.float32, None, make, state=state)
        params, _ = trained(cases, torch.float32, both, make, state=state)
        for p, q, case in zip(params, whole, cases, strict=True):
            assert (p.grad.placements, p.grad.device_mesh) == (p.placements, p.device_mesh)
            assert_equal(p.grad, q.grad, case, state)

    p = nn.Parameter(distribute_tensor(torch.zeros(4, 6), both[0], [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(4, 6), both[0], [Partial()])
    GradientMemory([p], memory=AdEMAMix, alpha=0.0, betas=(0.0, 0.9, 0.9)).step()
    assert p.grad.placements == (Replicate(),)
    assert torch.equal(p.grad.to_local(), torch.full((4, 6), float(both[0].size())))


def main(*wanted: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{FOLDER}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=RANK, world_size=WORLD, timeout=datetime.timedelta(minutes=5)
    )
    results: dict[str, str] = {}
    for name, function in CHECKS.items():
        if wanted and name not in wanted:
            continue
        started = time.monotonic()
        try:
            dist.barrier()
            function()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
        (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
        if results[name]:
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[3:])
