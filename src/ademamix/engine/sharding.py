"""Parameters of which each process has a part (DTensors), and what is computed over all gradients at once.

A step works on the local parts, and only communicates in Muon's geometry (exchange.py). DTensors are torch's
to say: here is what the optimizer needs of it.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ademamix.backends import Rows, row_length, sent_to, whole
from ademamix.formats import BLOCK


def may_be_sharded() -> bool:
    """Whether there may be DTensors: importing them takes half a second, and who has one has done it."""
    return "torch.distributed.tensor" in sys.modules


def is_sharded(t: Any) -> bool:
    """Whether t is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Tensor:
    """This process's part of a DTensor, or any other tensor itself."""
    # to_local() would make a parameter's part a parameter.
    part: Any = t._local_tensor if is_sharded(t) else t
    waited: Tensor = part.wait() if hasattr(part, "wait") else part  # a sum that is under way
    return waited


def gradients(params: Sequence[Any], grads: list[Any]) -> list[Tensor]:
    """The parameters' gradients, placed as these are.

    Those that are sums still to be made, as tensor parallelism leaves them for replicated parameters, are made here.
    """
    if set(map(type, grads)) == {Tensor}:  # the common case, at no cost
        return grads
    grads = list(grads)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if not is_sharded(g):
            grads[i] = local(g)
        elif is_sharded(p) and g.placements != p.placements:
            grads[i] = g.redistribute(placements=p.placements)
    return grads


def local_part(t: Tensor, p: Any) -> Tensor:
    """The part of t that belongs to this process's part of p; a DTensor of another placement is sent around."""
    if is_sharded(p):
        if not is_sharded(t):
            if p.device_mesh.get_coordinate() is None:  # this process has no part
                return t.new_empty(0)
            shape, offsets = _place(t.shape, p)
            part = t
            for d, (size, offset) in enumerate(zip(shape, offsets, strict=True)):
                part = part.narrow(d, offset, size)
            # A view would keep all of t alive, and a step would write into it.
            return t if part.shape == t.shape else part.clone(memory_format=torch.contiguous_format)
        if t.placements != p.placements:  # type: ignore[attr-defined]
            sent: Any = t.int() if t.dtype == torch.int16 else t  # neither NCCL nor gloo sends 16-bit integers
            t = sent.redistribute(placements=p.placements).to(t.dtype)
    return local(t)


def joined(part: Tensor, p: Any, shape: Sequence[int]) -> Tensor:
    """The tensor of that shape of which ``part`` is this process's part, placed as p is: part itself for a plain p."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # DTensor.from_local would move parts that are offloaded to the CPU to the mesh's device.
    meta = TensorMeta(torch.Size(shape), _strides(shape), part.dtype)
    spec = DTensorSpec(p.device_mesh, p.placements, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _place(shape: Sequence[int], p: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this process's part of a tensor that is placed as p is, and where it begins in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(torch.Size(shape), p.device_mesh, p.placements)


def cut_dimensions(p: Any) -> dict[int, list[int]]:
    """The dimensions of a DTensor that are cut, each with the numbers of parts that it is cut into, in turn."""
    cut: dict[int, list[int]] = defaultdict(list)
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if not placement.is_replicate() and size > 1:
            cut[placement.dim].append(size)
    return cut


def average_part(p: Any) -> int:
    """How many elements of a parameter a process has, the same number on all of them."""
    return int(p.numel()) // math.prod(chain.from_iterable(cut_dimensions(p).values())) if is_sharded(p) else p.numel()


def blocks_are_whole(p: Any) -> bool:
    """Whether each block along the rows of [dim 0, rest] lies in one part, and their scales are cut just as p is."""
    if not is_sharded(p):
        return True
    cut = cut_dimensions(p)
    cut.pop(0, None)
    if not cut:
        return True
    parts, length = cut.pop(1, []), p.shape[1]
    n, inner = math.prod(parts), math.prod(p.shape[2:])
    if cut or (len(parts) > 1 and length % n):
        return False
    blocks = -(-length * inner // BLOCK)
    aligned: bool = -(-length // n) * inner == -(-blocks // n) * BLOCK
    return aligned


def rows_of(p: Any, blocked: bool) -> list[tuple[slice | None, Rows]]:
    """Where the elements of this process's part, which is contiguous, lie in the whole of p.

    Returns:
        The part's rows, after None; or, where they do not follow upon each other at one distance (as when dimensions 1
        and 2 of three are cut), slices of the flat part, each with its own.
    """
    part = local(p)
    number = part.shape[0] if blocked else 1
    if part is p or part.numel() == 0:
        return [(None, whole(part, blocked))]
    shape, offsets = _place(p.shape, p)
    strides = _strides(p.shape)
    first = sum(o * s for o, s in zip(offsets, strides, strict=True))
    if blocked:
        stride = row_length(p.shape)
        return [(None, Rows(number, offsets[0] * stride + first % strides[0], stride))]
    levels = [(1, 0)]  # (how many, how far apart): neighboring dimensions without a gap between them are one
    for size, stride in zip(shape, strides, strict=True):
        if size > 1 and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        elif size > 1:
            levels.append((size, stride))
    if levels[-1][1] != 1:
        levels.append((1, 1))
    *outer, (number, stride), (length, _) = levels
    starts = torch.full((1,), first, device="cpu")
    for size, distance in outer:
        starts = (starts[:, None] + distance * torch.arange(size, device="cpu")).flatten()
    if len(starts) == 1:
        return [(None, Rows(number, first, stride))]
    size = number * length
    return [(slice(i * size, (i + 1) * size), Rows(number, at, stride)) for i, at in enumerate(starts.tolist())]


def global_norm(grads: Sequence[Tensor], params: Sequence[Any]) -> Tensor:
    """The 2-norm of all gradients together, a tensor of no dimensions on the first one's device; each is read once.

    It is float64 if gradients are, as torch's is, and else accumulated in float32. DTensors cost one all-reduce of one
    number for each device mesh that ``params`` lie on: all of them, with a gradient here or not, since another process
    may have one.
    """
    plain: Sequence[Tensor] = grads
    sharded: dict[Any, list[Any]] = {}
    double = False  # the same on all processes
    if may_be_sharded():
        double = any(is_sharded(p) and p.dtype.to_real() == torch.float64 for p in params)
        sharded = {p.device_mesh: [] for p in params if is_sharded(p)}
        plain = [g for g in grads if not is_sharded(g)]
        for g in filter(is_sharded, grads):
            sharded.setdefault(g.device_mesh, []).append(g)  # type: ignore[attr-defined]
    norms = _norms(plain)
    double |= any(each.dtype == torch.float64 for each in norms)
    norms += [_norm_over(mesh, members).view(1) for mesh, members in sharded.items()]
    if not norms:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    together = [sent_to(norms[0].device, each.double() if double else each.float()) for each in norms]
    norm: Tensor = torch.linalg.vector_norm(together[0] if len(together) == 1 else torch.cat(together))
    return norm


def _norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each gradient: a vector for each device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for g in grads:
        alike[g.device, g.dtype].append(g)
    norms = []
    for (_, dtype), members in alike.items():
        if dtype.is_complex:
            members = [torch.view_as_real(g.resolve_conj()) for g in members]
        wide = torch.float64 if dtype.to_real() == torch.float64 else torch.float32
        norms.append(torch.stack(torch._foreach_norm(members, 2.0, dtype=wide)))
    return norms


def _norm_over(mesh: Any, grads: Sequence[Any]) -> Tensor:
    """The norm of gradients on one mesh, the same on all its processes."""
    # Of the copies of a replicated part, the one of the first process counts.
    place = mesh.get_coordinate()
    if place is None:
        raise RuntimeError(f"the norm of gradients on {mesh} only needs processes of that mesh, got {dist.get_rank()}")
    counted = []
    for g in grads:
        if not any(placement.is_replicate() and at > 0 for placement, at in zip(g.placements, place, strict=True)):
            counted.append(local(g))
    devices = [local(g).device for g in grads]  # the mesh's, unless they are offloaded; it need not be the current one
    on = next((device for device in devices if device.type == mesh.device_type), mesh.device_type)
    total = torch.zeros((), dtype=torch.float64, device=on)
    for norms in _norms(counted):
        total += sent_to(total.device, norms).double().square().sum()
    everyone = mesh.size() == dist.get_world_size()
    for group in [None] if everyone else [mesh.get_group(d) for d in range(mesh.ndim)]:
        dist.all_reduce(total, group=group)
    return total.sqrt()
