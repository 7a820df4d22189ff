"""Checks of DTensors in Muon's geometry, run by test_exchange.py (see processes.py)."""

from collections.abc import Sequence
from typing import Any

import pytest
import sharding_processes as common
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding_processes import (
    FOLDER,
    RANK,
    WORLD,
    Training,
    Widths,
    assert_equal,
    part,
    rows_in_two_turns,
    snapshot,
    trained,
    unchanged,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ademamix import ADana, AdEMAMix, Muon
from ademamix.engine import launches, muon
from processes import check, main

ROWS, COLUMNS, COPIES = [Shard(0)], [Shard(1)], [Replicate()]
# Cut along one dimension of a mesh, in blocks of 256 that stay whole:
ALONG_ONE: list[tuple[tuple[int, ...], int, Sequence[Any]]] = [
    ((7, 700), 1, ROWS),  # uneven parts of 2, 3 and 4 processes
    ((3, 2048), 1, ROWS),  # and an empty one of 4
    ((64, 80), 1, COPIES),
    *[((40, 24), 1, ROWS)] * 5,  # more than processes, and not a multiple
    ((24, 40), 1, COLUMNS),
    ((40, 24), 1, COLUMNS),
    ((6, 4, 3, 3), 1, ROWS),
    ((6, 4, 3, 3), 1, COLUMNS),
    ((6, 9, 4), 1, COLUMNS),  # the same matrix, cut elsewhere
    ((2, 1, 36), 1, ROWS),  # fewer rows than processes
    ((257, 300), 1, ROWS),  # large ones are multiplied otherwise
    ((300, 257), 1, ROWS),
]
# along two, of a mesh of 2 x 2,
ALONG_TWO: list[tuple[tuple[int, ...], int, Sequence[Any]]] = [
    ((7, 700), 1, [Replicate(), Shard(0)]),
    ((7, 700), 1, [Shard(0), Replicate()]),
    *[((40, 24), 1, [Replicate(), Shard(0)])] * 3,
    ((40, 24), 1, [Replicate(), Replicate()]),
    ((6, 1024), 1, [Shard(0), Shard(1)]),
    ((6, 1024), 1, [Shard(1), Shard(0)]),
    ((10, 600), 1, [Shard(0), Shard(0)]),
    ((rows_in_two_turns(), 600), 1, [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2048), 1, [_StridedShard(1, split_factor=2), Shard(1)]),
    ((6, 4, 3, 3), 1, [Shard(1), Shard(2)]),  # rows of a part at more than one distance
]
# and of both kinds on the dimensions of a mesh, one by one.
ALONG_EACH = [(shape, dims, p) for shape, _, p in ALONG_ONE[:5] for dims in (1, 2)]
CUT_BLOCKS = [((5, 900), 1, COLUMNS), ((40, 200), 1, COLUMNS)]  # which compact state refuses

KINDS = [
    (AdEMAMix, torch.float32, "float32"),
    (ADana, torch.float32, "compact"),
    (Muon, torch.bfloat16, "bfloat16"),
    (AdEMAMix, torch.bfloat16, "compact"),
    (Muon, torch.float64, "float32"),
]


def some(*ranks: int) -> DeviceMesh:
    return DeviceMesh("cpu", list(ranks))  # made by all


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def orthogonal(make: Any) -> Any:
    return lambda params, **options: make(params, geometry="muon", **options)


def compile_once(make: Any, dtype: torch.dtype, **options: Any) -> None:
    """Process 0 compiles, and the others find its kernels in the cache."""
    if RANK > 0:
        dist.barrier()
    trained(ALONG_ONE[:2], dtype, None, make, **options)
    if RANK == 0:
        dist.barrier()


def assert_one_process_has_the_same(cases: Any, meshes: Sequence[DeviceMesh], make: Any, dtype: Any, **o: Any) -> None:
    whole, reference = trained(cases, dtype, None, make, **o)
    params, optimizer = trained(cases, dtype, meshes, make, **o)
    for p, q, case in zip(params, whole, cases, strict=True):
        assert_equal(p.detach(), q.detach(), case, dtype, o)
        mine, theirs = optimizer.state[p], reference.state[q]
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert_equal(mine[name], theirs[name], case, dtype, o, name)


@check
def any_sharding_gives_the_bits_of_one_process() -> None:
    two = square()
    every = [
        (ALONG_ONE, [some(0, 1, 2, 3)]),
        (ALONG_ONE, [some(2, 0, 1)]),  # in any order, and not all processes
        (ALONG_ONE, [some(1, 3)]),
        (ALONG_TWO, [two]),
        (ALONG_EACH, [two["dp"], two["tp"]]),
    ]
    for make, dtype, state in KINDS:
        options = {"state": state, "seed": 5}
        compile_once(orthogonal(make), dtype, **options)
        for cases, meshes in every:
            if meshes[0].get_coordinate() is None:  # the others need nothing of this process
                continue
            cut = [] if state == "compact" or meshes[0].ndim == 2 else CUT_BLOCKS
            assert_one_process_has_the_same(cases + cut, meshes, orthogonal(make), dtype, **options)
    assert_one_process_has_the_same(ALONG_TWO, [two], orthogonal(ADana), torch.bfloat16, backend="eager")


@check
def groups_of_both_geometries_in_one_optimizer() -> None:
    def both(params: Any, **options: Any) -> AdEMAMix:
        groups = [{"params": params[::2], "geometry": "muon"}, {"params": params[1::2]}]
        return AdEMAMix(groups, **options)

    compile_once(both, torch.bfloat16, state="compact")
    assert_one_process_has_the_same(ALONG_ONE, [some(0, 1, 2, 3)], both, torch.bfloat16, state="compact")


@check
def state_in_host_memory() -> None:
    mesh, two = some(0, 1, 2, 3), square()
    for dtype, meshes, cases in ((torch.float32, [mesh], ALONG_ONE), (torch.bfloat16, [two], ALONG_TWO)):
        compile_once(orthogonal(Muon), dtype, state="compact", offload=True)
        assert_one_process_has_the_same(cases, meshes, orthogonal(Muon), dtype, state="compact", offload=True)


def counted(cases: Any, meshes: Sequence[DeviceMesh], **options: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Matrices that each process orthogonalizes in a step, bytes that it sends, and the most messages to another."""
    matrices, elements, sent, receivers = 0, 0, 0, []
    act, exchange = muon.orthogonal, dist.batch_isend_irecv

    def counting(x: torch.Tensor, iteration: Any) -> torch.Tensor:
        nonlocal matrices, elements
        matrices, elements = matrices + len(x), elements + x.numel()
        return act(x, iteration)

    def sending(messages: list[Any]) -> Any:
        nonlocal sent
        sends = [m for m in messages if m.op is dist.isend]
        sent += sum(m.tensor.nbytes for m in sends)
        receivers.append([m.peer for m in sends])
        return exchange(messages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonal", counting)
        patch.setattr(dist, "batch_isend_irecv", sending)
        _, optimizer = trained(cases, torch.float32, meshes, orthogonal(Muon), **options)
    # What is reserved is for the process's own matrices: before, after, sent, received, and two Gram matrices.
    assert sum(call.launch.needed for call in optimizer._launches.calls) <= 6 * elements // 3
    most = max((peers.count(peer) for peers in receivers for peer in peers), default=0)
    mine = torch.tensor([matrices, sent])
    every = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(every, mine)
    per_step = torch.stack(every, dim=1) // 3  # trained() takes three steps
    return per_step[0], per_step[1], most


@check
def each_matrix_is_orthogonalized_by_one_process_and_sent_there_and_back_once() -> None:
    one, two = some(0, 1, 2, 3), square()
    shapes = [(16, 24)] * 5 + [(24, 16)] * 6 + [(8, 8)] * 3
    for placements, mesh in (
        (ROWS, one),
        (COLUMNS, one),
        (COPIES, one),
        ([Replicate(), Shard(0)], two),
        ([Shard(1), Replicate()], two),
        ([Shard(0), Shard(1)], two),
    ):
        matrices, sent, most = counted([(shape, 1, placements) for shape in shapes], [mesh])
        assert matrices.sum() == len(shapes), (placements, matrices)
        assert matrices.max() - matrices.min() <= 1, (placements, matrices)
        assert most == 1
        parts = [n for n, p in zip(mesh.shape, placements, strict=True) if p != Replicate()]
        n = torch.Size(parts).numel()
        replicas = WORLD // n
        elements = sum(rows * columns for rows, columns in shapes)
        # To the owner all but its own part; from there a part to each process but its own: docs/how-to/distributed.md.
        assert sent.sum() == 4 * (1 + replicas - 2 / n) * elements, (placements, sent)


@check
def clipping_and_a_bad_number_anywhere() -> None:
    for meshes, cases in (([some(0, 1, 2, 3)], ALONG_ONE), ([square()], ALONG_TWO)):
        for options in ({}, {"skip_nonfinite": True}):
            whole, reference = trained(cases, torch.float32, None, orthogonal(AdEMAMix))
            params, optimizer = trained(cases, torch.float32, meshes, orthogonal(AdEMAMix), **options)
            optimizer.clip_grad_norm_(1e-3)
            reference.clip_grad_norm_(1e-3)
            optimizer.step()
            reference.step()
            for p, q in zip(params, whole, strict=True):
                like = part(q.detach(), p.device_mesh, p.placements).to_local()
                # Norms of float32 squares in another order give factors that differ by 1e-6 or so of gradients.
                torch.testing.assert_close(p.detach().to_local(), like, rtol=1e-4, atol=1e-5)
            if RANK == 1:  # whose part counts in the norm, replicas or not
                params[0].grad.to_local().view(-1)[-1:] = torch.nan
            before = snapshot(params, optimizer)
            if not options:
                assert not optimizer.clip_grad_norm_(1.0).isfinite()
            optimizer.step()
            assert optimizer.skipped_steps == 1
            assert unchanged(before, params, optimizer)


def widths(mesh: DeviceMesh | None, state: str) -> tuple[Widths, ADana]:
    torch.manual_seed(0)
    model = Widths()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.endswith("weight")], "geometry": "muon"},
        {"params": [p for name, p in named if name.endswith("bias")]},
    ]
    return model, ADana(groups, lr=0.01, state=state, seed=3)


@check
def checkpoints_saved_on_n_processes_go_on_exactly_on_m() -> None:
    of_size = {n: some(*range(n)) for n in (2, 3, 4)}
    for state in ("float32", "compact"):
        reference, of_reference = widths(None, state)
        reference.train_on(of_reference, range(4))
        for n, m in ((2, 3), (3, 4), (4, 2)):
            file = f"{FOLDER}/muon-{state}-{n}"
            if n > RANK:
                model, optimizer = widths(of_size[n], state)
                model.train_on(optimizer, range(2))
                saved = {"all": Training(model, optimizer)}
                dcp.save(saved, checkpoint_id=file, process_group=of_size[n].get_group())
            dist.barrier()
            if m > RANK:
                model, optimizer = widths(of_size[m], state)
                for p in model.parameters():
                    nn.init.zeros_(p)
                loaded = {"all": Training(model, optimizer)}
                dcp.load(loaded, checkpoint_id=file, process_group=of_size[m].get_group())
                model.train_on(optimizer, range(2, 4))
                for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                    assert_equal(p.detach(), q.detach(), state, n, m)
                    for name, value in optimizer.state[p].items():
                        assert_equal(value, of_reference.state[q][name], state, n, m, name)


@check
def processes_may_have_other_parameters_too() -> None:
    """As experts of their own: who shares out a matrix decides by what all of its processes have."""
    one = some(0, 1, 2, 3)
    shapes = [(40, 24), (24, 40), (7, 30), (40, 24), (24, 40)]
    whole = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    params = [nn.Parameter(part(p.detach(), one, ROWS)) for p in whole]
    for offload in (False, True):
        own = [nn.Parameter(torch.ones(30 + RANK, 50 * RANK + 5)) for _ in range(RANK)]
        optimizers = Muon(whole), Muon([*own, *params], offload=offload)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "CHUNK", 1000)  # elements, which some processes' own parameters fill
            for i, (p, q) in enumerate(zip(whole, params, strict=True)):
                p.grad = common.gradient(i, 0, p.shape, torch.float32)
                q.grad = part(p.grad, one, ROWS)
            for p in own:
                p.grad = torch.ones_like(p)
            for optimizer in optimizers:
                optimizer.step()
        for p, q in zip(whole, params, strict=True):
            assert_equal(q.detach(), p.detach())


@check
def pretended_tensors_are_sent_nowhere() -> None:
    mesh = some(0, 1, 2, 3)
    with FakeTensorMode():
        local = torch.ones(4, 6)
        params = [nn.Parameter(DTensor.from_local(local, mesh, ROWS, shape=(16, 6), stride=(6, 1))) for _ in range(3)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = Muon(params)
        optimizer.step()
        assert optimizer.state[params[0]]["momentum_buffer"].to_local().shape == local.shape


@check
def a_process_group_that_cannot_send_is_named_before_anything_changes() -> None:
    p = nn.Parameter(part(torch.ones(8, 6), some(0, 1, 2, 3), ROWS))
    p.grad = torch.ones_like(p)
    optimizer = Muon([p])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        with pytest.raises(
            RuntimeError, match="backend 'cuda:nccl' cannot send; allowed: a process group for CPUs too"
        ):
            optimizer.step()
    assert torch.equal(p.to_local(), torch.ones_like(p.to_local()))
    assert not optimizer.state


if __name__ == "__main__":
    main(WORLD)
