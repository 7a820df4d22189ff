"""Checks on four processes (gloo), run by test_distributed.py: `python distributed_processes.py RANK FOLDER`.

All checks share one start of the processes. Each process writes what became of each check into FOLDER.
"""

import datetime
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from ademamix import AdamW, AdEMAMix

WORLD = 4
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    return init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


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
    ((10, 600), 2, [_StridedShard(0, split_factor=2), Shard(0)]),  # tensor parallelism, then FSDP, of one dimension
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
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


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
    for state in ("float32", "bfloat16", "compact", {"exp_avg_slow": "int16"}):
        cases = WHOLE_BLOCKS if "compact" in state or isinstance(state, dict) else WHOLE_BLOCKS + CUT_BLOCKS
        for dtype in (torch.float32, torch.bfloat16):
            for backend in ("cpu", "eager"):
                options = {"state": state, "backend": backend, "seed": 5}
                whole, reference = trained(cases, dtype, None, AdEMAMix, **options)
                with CommDebugMode() as communication:
                    params, optimizer = trained(cases, dtype, both, AdEMAMix, **options)
                assert communication.get_total_counts() == 0, communication.get_comm_counts()
                for p, q, case in zip(params, whole, cases, strict=True):
                    where = (case, state, dtype, backend)
                    assert_equal(p.detach(), q.detach(), where)
                    mine, theirs = optimizer.state[p], reference.state[q]
                    assert mine.keys() == theirs.keys(), where
                    for name in sorted(mine.keys() - {"step"}):
                        assert (mine[name].placements, mine[name].device_mesh) == (p.placements, p.device_mesh)
                        assert_equal(mine[name], theirs[name], where, name)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=50)
    )
    results: dict[str, str] = {}
    for name, function in CHECKS.items():
        try:
            dist.barrier()
            function()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if results[name]:
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
