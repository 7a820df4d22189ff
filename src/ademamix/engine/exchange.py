"""Matrices of which each process has a part (DTensors): each is sent to one process, its owner, and back in parts."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ademamix.engine.sharding import local

Box = tuple[slice, ...]  # where a part lies in a parameter: a slice of each dimension


class Exchange:
    """The matrices of one call, shared out among the processes of their mesh. Making it communicates nothing.

    All processes of the mesh make it alike, of parameters in the same order. An owner has consecutive matrices, so what
    a process sends to it, and gets back, is one piece of its memory: one message for each pair of processes.

    Args:
        params: DTensors on one mesh with the same placements, all of them matrices of one shape.
        first: the process, by its place in the mesh, that owns the first matrices. Where owners have not equally many,
            this one and those behind it have one more.
        flat: this process's parts, one behind the other. What the owners make of them comes back to the same place.

    Raises:
        RuntimeError: processes cannot send tensors from where ``flat`` lies, or parts have gaps.
    """

    def __init__(self, params: Sequence[Any], first: int, flat: Tensor) -> None:
        mesh, placements = params[0].device_mesh, params[0].placements
        self.flat, self.group = flat, None  # of all processes, unless the mesh has one group
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        here = mesh.get_coordinate()
        if here is None:  # this process has no part
            self.ranks, self.shapes = [], []
            return
        if mesh.ndim == 1:
            self.group = mesh.get_group()
        if flat.device.type == "cpu" and len(self.ranks) > 1 and "cpu:" not in dist.get_backend_config(self.group):
            found = dist.get_backend_config(self.group)
            raise RuntimeError(
                f"geometry='muon' sends between processes what lies on the CPU (parameters, or all with offload=True), "
                f"got a process group of {found!r}; allowed: one for CPUs too, as init_process_group('cpu:gloo,cuda:nccl')"
            )
        cut = [not placement.is_replicate() for placement in placements]

        def along(place: Sequence[int], which: bool) -> tuple[int, ...]:
            return tuple(at for at, c in zip(place, cut, strict=True) if c == which)

        places = list(product(*map(range, mesh.shape)))
        self.me = places.index(tuple(here))
        self.part = [along(place, True) for place in places]  # processes of one part have the same elements
        mine = along(here, False)
        self.replica = [q for q, place in enumerate(places) if along(place, False) == mine]  # they have all, each once

        each, more = divmod(len(params), len(places))
        ends = [0, *accumulate(each + (i < more) for i in range(len(places)))]
        spans = [slice(*ends[turn : turn + 2]) for q in range(len(places)) for turn in [(q - first) % len(places)]]
        begins = [0, *accumulate(local(p).numel() for p in params)]
        self.pieces = [flat[begins[span.start] : begins[span.stop]] for span in spans]  # my parts of each owner's
        self.shapes = [p.shape for p in params[spans[self.me]]]
        self.matrix = params[0].shape[0], params[0].shape[1:].numel()
        boxes = {shape: _boxes(shape, mesh.shape, placements) for shape in set(self.shapes)}
        parts = product(*(range(n) for n, c in zip(mesh.shape, cut, strict=True) if c))
        self.boxes = {part: [boxes[shape][i] for shape in self.shapes] for i, part in enumerate(parts)}
        self.sizes = {
            part: sum(math.prod(s.stop - s.start for s in box) for box in of_each)
            for part, of_each in self.boxes.items()
        }

    def __call__(self, act: Callable[[Tensor], Tensor]) -> None:
        """Replace all matrices by what their owners' ``act`` makes of [matrices, rows, columns]."""
        if not self.ranks:
            return
        # A part of the owner's matrices is its own, and where it should be.
        buffers = {
            part: self.pieces[self.me] if part == self.part[self.me] else self.flat.new_empty(size)
            for part, size in self.sizes.items()
        }
        own = [buffers[part] for part in self.part]
        self._send({q: self.pieces[q] for q in self.replica}, {q: own[q] for q in self.replica})
        if self.shapes:
            matrices = self.flat.new_empty(len(self.shapes), *self.matrix)
            for part, buffer in buffers.items():
                views = self._views(matrices, part)
                torch._foreach_copy_(views, _like(views, buffer))
            made = act(matrices)
            for part, buffer in buffers.items():
                views = self._views(made, part)
                torch._foreach_copy_(_like(views, buffer), views)
        self._send(dict(enumerate(own)), dict(enumerate(self.pieces)))

    def _views(self, matrices: Tensor, part: tuple[int, ...]) -> list[Tensor]:
        """The part of each of the owner's matrices."""
        return [m.view(shape)[box] for m, shape, box in zip(matrices, self.shapes, self.boxes[part], strict=True)]

    def _send(self, there: dict[int, Tensor], back: dict[int, Tensor]) -> None:
        """Send to other processes and receive from others, all at once."""
        messages = [
            dist.P2POp(way, t, self.ranks[q], self.group)
            for way, tensors in ((dist.isend, there), (dist.irecv, back))
            for q, t in tensors.items()
            if q != self.me and len(t)
        ]
        for message in dist.batch_isend_irecv(messages) if messages else ():
            message.wait()


def _like(views: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """A flat tensor in pieces of these shapes."""
    pieces = torch.split(flat, [v.numel() for v in views])
    return [piece.view(v.shape) for piece, v in zip(pieces, views, strict=True)]


def _boxes(shape: Sequence[int], sizes: Sequence[int], placements: Sequence[Any]) -> list[Box]:
    """Where each part of a tensor lies in it, in the order of the mesh. ``sizes`` are the mesh's."""
    parts = [[torch.arange(n, device="cpu").view([1] * d + [n]) for d, n in enumerate(shape)]]
    for size, placement in zip(sizes, placements, strict=True):
        if not placement.is_replicate():
            d = placement.dim
            # As torch cuts parameters; the functions that say where parts begin are others in each version.
            cut = [placement._split_tensor(p[d], size, with_padding=False, contiguous=True)[0] for p in parts]
            parts = [[*p[:d], piece, *p[d + 1 :]] for p, pieces in zip(parts, cut, strict=True) for piece in pieces]
    return [tuple(map(_slice, part)) for part in parts]


def _slice(index: Tensor) -> slice:
    numbers = index.flatten().tolist()
    if not numbers:
        return slice(0, 0)
    if numbers[-1] - numbers[0] >= len(numbers):
        raise RuntimeError(f"geometry='muon' takes parts without gaps, got one with numbers {numbers} of a dimension")
    return slice(numbers[0], numbers[-1] + 1)
