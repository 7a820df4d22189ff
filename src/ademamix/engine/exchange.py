"""Matrices of which each process has a part (DTensors): each is sent to one process, its owner, and back in parts."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ademamix import backends
from ademamix.engine.sharding import local

Part = tuple[int, ...]  # coordinates of a process along the mesh's dimensions that cut parameters
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
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        mesh, placements = params[0].device_mesh, params[0].placements
        places = list(product(*map(range, mesh.shape)))
        self.flat, self.here = flat, mesh.get_coordinate()
        self.shapes: list[torch.Size] = []  # of the matrices that this process owns
        if self.here is None:  # this process has no part
            return
        self.group = mesh.get_group() if mesh.ndim == 1 else None  # of all processes
        self.me, n = places.index(tuple(self.here)), len(places)
        if flat.device.type == "cpu" and n > 1 and "cpu:" not in dist.get_backend_config(self.group):
            raise RuntimeError(
                "geometry='muon' sends directions between processes, here CPU tensors (as with offload=True), which "
                f"the process group's backend {dist.get_backend_config(self.group)!r} cannot send; allowed: a process "
                "group for CPUs too, as of init_process_group('cpu:gloo,cuda:nccl')"
            )
        cuts = [d for d, placement in enumerate(placements) if not placement.is_replicate()]
        copies = [d for d in range(mesh.ndim) if d not in cuts]
        self.part = [tuple(place[d] for d in cuts) for place in places]
        # Those that have all parts together with this process: it exchanges directions with no other replica.
        self.replica = [q for q, place in enumerate(places) if all(place[d] == self.here[d] for d in copies)]

        each, more = divmod(len(params), n)
        ends = [0, *accumulate(each + (i < more) for i in range(n))]
        spans = [slice(ends[i], ends[i + 1]) for i in ((q - first) % n for q in range(n))]  # of the owners
        begins = [0, *accumulate(local(p).numel() for p in params)]
        self.pieces = [flat[begins[span.start] : begins[span.stop]] for span in spans]
        self.shapes = [p.shape for p in params[spans[self.me]]]
        self.matrix = params[0].shape[0], params[0].shape[1:].numel()
        with unset_fake_temporarily():  # these numbers are none of a model's
            self.ranks: list[int] = mesh.mesh.flatten().tolist()
            boxes = {shape: _boxes(shape, mesh.shape, placements) for shape in set(self.shapes)}
        parts = sorted(set(self.part))
        self.boxes = {part: [boxes[shape][i] for shape in self.shapes] for i, part in enumerate(parts)}
        self.sizes = {part: sum(map(_size, own)) for part, own in self.boxes.items()}

    def __call__(self, act: Callable[[Tensor], Tensor]) -> None:
        """Replace all matrices by what their owners' ``act`` makes of [matrices, rows, columns]."""
        if self.here is None:
            return
        # This process's part of the matrices that it owns is where it should be.
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

    def _views(self, matrices: Tensor, part: Part) -> list[Tensor]:
        """A part of each of the matrices that this process owns."""
        return [m.view(shape)[box] for m, shape, box in zip(matrices, self.shapes, self.boxes[part], strict=True)]

    def _send(self, there: Mapping[int, Tensor], back: Mapping[int, Tensor]) -> None:
        """Send to the other processes and receive from them, all at once."""
        messages = [
            dist.P2POp(way, t, self.ranks[q], self.group)
            for way, tensors in ((dist.isend, there), (dist.irecv, back))
            for q, t in tensors.items()
            if q != self.me and t.numel() > 0 and not backends.is_fake(t)
        ]
        for message in dist.batch_isend_irecv(messages) if messages else ():
            message.wait()


def _like(views: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """A flat tensor in pieces of these shapes."""
    pieces = torch.split(flat, [v.numel() for v in views])
    return [piece.view(v.shape) for piece, v in zip(pieces, views, strict=True)]


def _boxes(shape: Sequence[int], sizes: Sequence[int], placements: Sequence[Any]) -> list[Box]:
    """Where each part of a tensor lies in it, in the order of the mesh, whose sizes these are."""
    # The numbers along each dimension, cut as torch cuts parameters: its functions that compute where parts begin are
    # others in each version.
    parts = [[torch.arange(n, device="cpu").view([1] * d + [n]) for d, n in enumerate(shape)]]
    for size, placement in zip(sizes, placements, strict=True):
        if not placement.is_replicate():
            d = placement.dim
            cut = [placement._split_tensor(part[d], size, with_padding=False, contiguous=True)[0] for part in parts]
            parts = [[*part[:d], p, *part[d + 1 :]] for part, pieces in zip(parts, cut, strict=True) for p in pieces]
    return [tuple(map(_slice, part)) for part in parts]


def _slice(index: Tensor) -> slice:
    numbers = index.flatten().tolist()
    if not numbers:
        return slice(0, 0)
    if numbers[-1] - numbers[0] >= len(numbers):
        raise RuntimeError(f"geometry='muon' takes parts without gaps, got one with numbers {numbers} of a dimension")
    return slice(numbers[0], numbers[-1] + 1)


def _size(box: Box) -> int:
    return math.prod(s.stop - s.start for s in box)
