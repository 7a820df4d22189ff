"""State in host memory: gradients come to the host, the host steps, parameters go back, chunk by chunk.

Every parameter has a placeholder in host memory, which a step updates in its place: the float32 master weights of a
low-precision parameter, a copy of any other. All gradients are sent for at once; while one chunk is worked on, the
gradients of the next ones and the parameters of the last are under way.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ademamix.engine.memory import check_memory
from ademamix.engine.sharding import joined, local, local_part
from ademamix.engine.state import CPU, MASTER, check_state

LARGEST_SLAB = 1 << 26  # bytes that are allocated together, if a tensor has not more
ALIGNMENT = 64  # bytes
CHUNK = 1 << 24  # elements that are sent and worked on together, if a parameter has not more
LOW = (torch.bfloat16, torch.float16)


@dataclass
class StandIn:
    """A parameter's host memory. ``whole`` is a DTensor where the parameter is one; the others are this process's."""

    whole: Tensor  # what is updated
    rounded: Tensor  # in the parameter's dtype, as it is sent: the part of whole itself if that has it
    device: torch.device  # the parameter's
    grad: Tensor | None = None  # the gradient as it has arrived
    seen: tuple[int, ...] | None = None  # the parameter's versions after the last step


class _Slabs:
    """Contiguous host memory, which GPUs can copy from and to while others work.

    It is cut from slabs of a power of two: torch rounds each request for pinned memory up to one, which for every
    tensor of its own would be up to twice the memory.
    """

    def __init__(self) -> None:
        self.rooms: dict[bool, list[Tensor]] = {True: [], False: []}  # what is left of each slab, pinned or not
        self.bytes = 0

    def empty(self, like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        pinned = device.type == "cuda"
        rooms, size = self.rooms[pinned], like.numel() * dtype.itemsize
        n = next((n for n, room in enumerate(rooms) if len(room) >= size), len(rooms))
        if n == len(rooms):
            slab = max(_power_of_two(size), min(LARGEST_SLAB, _power_of_two(self.bytes)))
            rooms.append(torch.empty(slab, dtype=torch.uint8, device=CPU, pin_memory=pinned))
            self.bytes += slab
        room = rooms[n]
        rooms[n] = room[-(-size // ALIGNMENT) * ALIGNMENT :]
        return room[:size].view(dtype).view(like.shape)


def _power_of_two(size: int) -> int:
    """The least that is not less."""
    return 1 << max(0, size - 1).bit_length()


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _versions(p: Any) -> tuple[int, ...]:
    return p._version, local(p)._version, local(p).data_ptr()


class Host:
    """The placeholders of an optimizer's parameters."""

    def __init__(self) -> None:
        self.of: dict[Tensor, StandIn] = {}
        self.slabs = _Slabs()
        self.ways: dict[torch.device, tuple[Any, Any]] = {}  # a stream to the host, and one from it

    def stand_in(self, p: Tensor, master: Any = None) -> StandIn:
        """The parameter's placeholder, with these master weights if there are some already."""
        known = self.of.get(p)
        if known is not None and _is_of(known, p) and (master is None or known.whole is master):
            return known
        part = local(p).detach()
        if p.dtype not in LOW:
            copy = self.slabs.empty(part, p.dtype, part.device)
            made = StandIn(joined(copy, p, p.shape), copy, part.device)
        else:
            check_state({MASTER: master}, p, {})
            numbers = part if master is None else local_part(master, p)
            own = numbers.to(CPU, torch.float32).contiguous()
            fits = master is not None and own is local(master)
            if not fits:  # strides of dimensions of one element, too, as those of gradients in host memory
                own = own.view(-1).view(own.shape)
            whole = master if fits else joined(own, p, p.shape)
            made = StandIn(whole, self.slabs.empty(part, p.dtype, part.device), part.device)
        self.of[p] = made
        return made

    def stand_ins(self, name: str, params: Sequence[Tensor], states: Mapping[Tensor, Any]) -> list[Tensor]:
        """What to update in the parameters' place, with what others have made of these since the last step.

        Args:
            name: of the optimizer, for errors.
            params: its parameters.
            states: theirs.

        Raises:
            RuntimeError: parameters share memory.
        """
        versions = list(map(_versions, params))
        if any(p not in self.of or self.of[p].seen != now for p, now in zip(params, versions, strict=True)):
            check_memory(name, params)
        found = [self.stand_in(p, states[p].get(MASTER) if p in states and p.dtype in LOW else None) for p in params]
        for p, its, version in zip(params, found, versions, strict=True):
            # A version does not tell of changes through p.data; comparing costs nothing like a copy from a GPU would.
            if its.seen != version or (its.device == CPU and not torch.equal(local(p), its.rounded)):
                now, own = local(p).detach().to(CPU), local(its.whole)
                # Master weights that round to the parameter stay what they are.
                own.copy_(torch.where(own.to(p.dtype) == now, own, now.to(own.dtype)))
        return [its.whole for its in found]


def _is_of(its: StandIn, p: Any) -> bool:
    """Whether it can stand in for what the parameter is now."""
    part, placed = local(p), getattr(p, "placements", None)
    return (
        (its.rounded.dtype, its.rounded.shape, its.device) == (part.dtype, part.shape, part.device)
        and its.whole.shape == p.shape
        and getattr(its.whole, "placements", None) == placed
    )


def with_master(state: Mapping[str, Any] | None, p: Tensor, stand_in: Tensor) -> dict[str, Any]:
    """A parameter's state, with its master weights where it has some."""
    if p.dtype in LOW:
        return {**(state or {}), MASTER: stand_in}
    return {name: value for name, value in (state or {}).items() if name != MASTER}


class Trip:
    """The ways of one step's gradients to the host and of its parameters back, in chunks that are worked on in turn."""

    def __init__(self, host: Host, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        # torch resolves what is lazy where the copy goes to, which would be before it is there.
        self.grads = [local(g).resolve_conj().resolve_neg() for g in grads]
        self.params, self.ways = params, host.ways
        self.stand_ins = [host.of[p] for p in params]
        for device in {g.device for g in self.grads if g.is_cuda}:
            if device not in self.ways:
                self.ways[device] = (_stream(device), _stream(device))
            to_host, back = self.ways[device]
            to_host.wait_stream(back)  # it reads host memory that is written once the gradients are there
            for way in (to_host, back):
                way.wait_stream(torch.cuda.current_stream(device))
        for its, g in zip(self.stand_ins, self.grads, strict=True):
            if its.grad is None or its.grad.dtype != g.dtype:
                its.grad = host.slabs.empty(its.rounded, g.dtype, g.device)

    def arriving(self) -> list[Tensor]:
        """The gradients in host memory, once :meth:`arrived` has waited for them."""
        return [joined(_there(its.grad), p, p.shape) for its, p in zip(self.stand_ins, self.params, strict=True)]

    def begin(self, chunks: Sequence[Sequence[int]]) -> None:
        """Send for all gradients, chunk by chunk."""
        self.chunks = chunks
        self.events = [self._fetch(members) for members in chunks]  # of their arrival, one for each GPU

    def _fetch(self, members: Sequence[int]) -> list[Any]:
        events = []
        for way, here in self._by_way(members, 0):
            with torch.cuda.stream(way):
                for m in here:
                    _there(self.stand_ins[m].grad).copy_(self.grads[m], non_blocking=way is not None)
            if way is not None:
                events.append(way.record_event())
        return events

    def _by_way(self, members: Sequence[int], direction: int) -> Iterator[tuple[Any, list[int]]]:
        """The stream of each GPU among the members' devices, with its members; None for other devices, which wait."""
        of_device: dict[torch.device, list[int]] = defaultdict(list)
        for m in members:
            of_device[self.grads[m].device].append(m)
        for device, here in of_device.items():
            yield self.ways[device][direction] if device.type == "cuda" else None, here

    def arrived(self, chunk: int) -> None:
        """Wait for a chunk of gradients."""
        for event in self.events[chunk]:
            event.synchronize()

    def all_arrived(self) -> None:
        """Wait for all gradients."""
        for chunk in range(len(self.chunks)):
            self.arrived(chunk)

    def send(self, chunk: int) -> None:
        """Send the updated parameters of a chunk back."""
        for way, here in self._by_way(self.chunks[chunk], 1):
            with torch.cuda.stream(way):
                for m in here:
                    its = self.stand_ins[m]
                    if its.rounded.dtype != its.whole.dtype:
                        its.rounded.copy_(local(its.whole))
                    local(self.params[m]).copy_(its.rounded, non_blocking=way is not None)

    def finish(self) -> None:
        """Let the devices wait for their parameters, and remember these as they are now."""
        for device, (_, back) in self.ways.items():
            torch.cuda.current_stream(device).wait_stream(back)
        for its, p in zip(self.stand_ins, self.params, strict=True):
            its.seen = _versions(p)


def _there(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad
