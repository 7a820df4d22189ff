"""From parameters, gradients and state to launches of the backends: checks, layouts, batches."""

from __future__ import annotations

import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ademamix import backends
from ademamix.backends import sent_to
from ademamix.engine.coefficients import Tape, on_device, on_host
from ademamix.engine.offload import CHUNK, Trip
from ademamix.engine.sharding import is_sharded, local, rows_of
from ademamix.engine.state import CPU, fits, slot_formats, state_of, tensor_names
from ademamix.formats import FORMATS, Format, keys

if TYPE_CHECKING:
    from ademamix.engine.optimizer import RuleOptimizer


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Plan:
    """All of a step that stays the same while parameters, state tensors and the gradients' dtypes do."""

    def __init__(
        self,
        optimizer: RuleOptimizer,
        params: Sequence[Tensor],  # the optimizer's, or their stand-ins in host memory
        grads: Sequence[Tensor],
        saved: Sequence[Mapping[str, Any] | None],  # their states so far
        of_group: Sequence[int],
        settings: Sequence[GroupSettings],
        with_tensors: bool,
    ) -> None:
        self.params, self.of_group, self.settings = params, of_group, settings
        # Steps that live on an accelerator stay there: reading them would wait for it.
        self.on_device = with_tensors or any(s and "step" in s and s["step"].device.type != "cpu" for s in saved)
        for i, p, g in zip(of_group, params, grads, strict=True):
            check_tensors(optimizer, i, p, g)
        formats = [slot_formats(p, settings[i].formats) for i, p in zip(of_group, params, strict=True)]
        self.states = [
            state_of(s, p, f, p.device if self.on_device else CPU)
            for s, p, f in zip(saved, params, formats, strict=True)
        ]
        self.fresh = True  # the optimizer takes the states over once the step has succeeded
        self.all_states = list(optimizer.state.values())
        self.steps = [state["step"] for state in self.states]
        # Read and written through these, many scalars take a tenth of the time that torch takes.
        self.counters: list[Any] = [] if self.on_device else [memoryview(t.numpy()) for t in self.steps]
        self.entries = [value for state in self.states for value in state.values()]
        slots = [
            (state, name)
            for state, f in zip(self.states, formats, strict=True)
            for n in f
            for name in tensor_names(n, f)
        ]
        self.tensors = [*params, *self.steps, *(state[name] for state, name in slots)]
        self.sharded = any(map(is_sharded, params))
        self.pointers, self.shapes = self._pointers(), self._shapes()
        self.grad_kinds = _kinds(grads)

        # Backends update real, dense tensors: views of the parameters, or a copy where a parameter is not dense.
        fit = [fits(p, f) for p, f in zip(params, formats, strict=True)]
        self.targets = [
            _real(p if good else torch.empty_like(p, memory_format=torch.contiguous_format))
            for p, good in zip((local(p).detach() for p in params), fit, strict=True)
        ]
        self.copied = [i for i, good in enumerate(fit) if not good]
        self.complex = [i for i, p in enumerate(params) if p.is_complex()]
        self.layouts = [t.stride() for t in self.targets]

        self.places: dict[torch.device, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, (i, p) in enumerate(zip(of_group, params, strict=True)):
            self.places[p.device][i].append(index)
        self.rows = [0] * len(params)  # in tables that are made on devices
        for of_device in self.places.values():
            for row, m in enumerate(chain.from_iterable(of_device.values())):
                self.rows[m] = row
        buckets: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        names = backends.slot_names(optimizer.rule)
        every = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        positions = [n for n, p in enumerate(every) if p.grad is not None]
        random = keys([settings[i].seed for i in of_group], positions)
        before = 0
        for index, (i, g, target, f) in enumerate(zip(of_group, grads, self.targets, formats, strict=True)):
            grad = _number_format(_real(local(g)), stochastic=False)
            own = _number_format(target, stochastic=settings[i].stochastic_rounding)
            chunk = before // CHUNK if optimizer.offload else 0
            buckets[target.device, own, grad, tuple(f.get(name) for name in names), chunk].append(index)
            before += target.numel()
        self.launches = []
        for (_, own, grad, kept, _), bucket in buckets.items():
            blocked = any(f is not None and f.scale is not None for f in kept)
            noisy = any(f is not None and f.stochastic for f in (own, *kept))
            cuts = [(m, cut, rows) for m in bucket for cut, rows in self._rows(m, blocked, noisy)]
            named = list(zip(names, kept, strict=True))
            scales = [(f"{n}_scale", f is not None and f.scale is not None) for n, f in named]
            members = [m for m, _, _ in cuts]
            batch = backends.Batch(
                optimizer.rule,
                own,
                grad,
                kept,
                [_cut(self.targets[m], cut) for m, cut, _ in cuts],
                [[None if f is None else _cut(self._slot(m, n), cut) for n, f in named] for m, cut, _ in cuts],
                [[self._slot(m, n) if scaled else None for n, scaled in scales] for m in members],
                random[members],
                [rows for _, _, rows in cuts],
            )
            slices = [cut for _, cut, _ in cuts]
            self.launches.append((backends.launch(optimizer.backend, batch), members, slices if any(slices) else None))
        used: dict[torch.device, set[str]] = defaultdict(set)
        for launch, members, _ in self.launches:
            used[self.targets[members[0]].device].add(backends.name_of(launch))
        self.backends = tuple(sorted(set().union(*used.values())))
        self.tables = {
            device: importlib.import_module("ademamix.engine.triton_coefficients").Table(
                [self.steps[m] for members in self.places[device].values() for m in members],
                [i for i, members in self.places[device].items() for _ in members],
            )
            for device, names_there in used.items()
            if self.on_device and names_there == {"triton"}
        }
        self.dropped: list[Any] = []  # tables that serve no more, which graphs may read

    def _pointers(self) -> list[int]:
        return list(map(Tensor.data_ptr, map(local, self.tensors) if self.sharded else self.tensors))

    def _shapes(self) -> list[Any]:
        return [*map(Tensor.numel, self.params), *map(Tensor.stride, self.params)]

    def _slot(self, member: int, name: str) -> Tensor:
        return _real(local(self.states[member][name]))

    def _rows(self, member: int, blocked: bool, noisy: bool) -> list[tuple[slice | None, backends.Rows]]:
        """Where the elements lie in the whole parameter, if noise makes that matter."""
        if noisy:
            return rows_of(self.params[member], blocked)
        return [(None, backends.whole(self.targets[member], blocked))]

    def serves(
        self,
        optimizer: RuleOptimizer,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        of_group: Sequence[int],
        settings: Sequence[GroupSettings],
        with_tensors: bool,
    ) -> bool:
        """Whether all is as it was when this plan was made, also if somebody exchanged tensors or their memory."""
        return (
            of_group == self.of_group
            and settings == self.settings
            and with_tensors <= self.on_device
            and all(map(is_, params, self.params))
            and len(optimizer.state) == len(self.all_states)  # compared in their order: hashing tensors is slow
            and all(map(is_, optimizer.state.values(), self.all_states))
            and sum(map(len, self.states)) == len(self.entries)
            and all(map(is_, chain.from_iterable(map(dict.values, self.states)), self.entries))
            and self._pointers() == self.pointers
            and self._shapes() == self.shapes
            and _kinds(grads) == self.grad_kinds
            and {g.layout for g in grads} == {torch.strided}
        )

    def run(
        self,
        optimizer: RuleOptimizer,
        grads: list[Tensor],
        factor: Tensor | None,
        skip: Tensor | None,
        trip: Trip | None = None,
    ) -> bool:
        """Update all parameters and count the step.

        Args:
            optimizer: its rule's coefficients and groups are read.
            grads: a gradient for each parameter.
            factor: multiplies all gradients; of one element.
            skip: boolean, of one element: if it is true, nothing changes.
            trip: brings the gradients of stand-ins, and these back.

        Returns:
            Whether the step was taken, as far as the host knows: False if its skip is true.
        """
        chunks = [list(dict.fromkeys(members)) for _, members, _ in self.launches] if trip is not None else []
        events = []
        if trip is not None:
            events = trip.begin(chunks)  # under way before the host waits to know what to do with them
            factor, skip = (None if t is None else t.to(CPU) for t in (factor, skip))
            if skip:
                for event in events:  # the gradients' memory may be used for other things once the step is over
                    trip.arrived(event)
                trip.finish()
                return False
            skip = None
        rows, table = self._table(optimizer, factor, skip)
        if self.sharded:
            grads = list(map(local, grads))
        for i in self.complex:
            grads[i] = _real(grads[i].resolve_conj())
        if any(map(Tensor.is_neg, grads)):  # as the backward of a complex conjugate's imaginary part leaves them
            grads = [g.resolve_neg() for g in grads]
        strides = list(map(Tensor.stride, grads))
        if strides != self.layouts:
            if trip is not None:
                for event in events:
                    trip.arrived(event)
            for i, (stride, layout) in enumerate(zip(strides, self.layouts, strict=True)):
                if stride != layout:
                    grads[i] = torch.empty_like(self.targets[i], dtype=grads[i].dtype).copy_(grads[i])
        for i in self.copied:
            self.targets[i].copy_(_real(local(self.params[i])))
        given: dict[torch.device, tuple[Tensor, Tensor | None]] = {}  # each device's own table and flag
        for n, (launch, members, slices) in enumerate(self.launches):
            device = self.targets[members[0]].device
            if device not in given:
                given[device] = table(device), None if skip is None else sent_to(device, skip)
            theirs = [grads[m] for m in members]
            if slices is not None:
                theirs = list(map(_cut, theirs, slices))
            if trip is not None:
                trip.arrived(events[n])
            launch(theirs, [rows[m] for m in members], *given[device])
            if trip is not None:
                trip.send(chunks[n])
        for i in self.copied:
            _real(local(self.params[i])).copy_(self.targets[i])
        for counter in self.counters:
            counter[()] += 1.0
        return True

    def _table(
        self, optimizer: RuleOptimizer, factor: Tensor | None, skip: Tensor | None
    ) -> tuple[Sequence[int], Callable[[torch.device], Tensor]]:
        """The parameters' rows in tables of coefficients, and what gives a device its own."""
        names, groups = backends.coefficient_names(optimizer.rule), optimizer.param_groups
        if self.on_device:
            tapes = self._tapes(optimizer)
            return self.rows, lambda device: self._counted(optimizer, tapes, device, factor, skip)
        done = [counter[()] for counter in self.counters]
        rows, table = on_host(optimizer.coefficients, names, groups, self.of_group, done)
        return rows, lambda device: _multiplied(table(device), factor, device)

    def _tapes(self, optimizer: RuleOptimizer) -> list[Tape]:
        """Each group's coefficients, for devices that compute them in one launch."""
        names = backends.coefficient_names(optimizer.rule)
        try:
            return [Tape(optimizer.coefficients, names, group) for group in optimizer.param_groups if self.tables]
        except (TypeError, ValueError, AttributeError):  # made of other things than arithmetic
            self.dropped += self.tables.values()
            self.tables.clear()
            return []

    def _counted(
        self,
        optimizer: RuleOptimizer,
        tapes: Sequence[Tape],
        device: torch.device,
        factor: Tensor | None,
        skip: Tensor | None,
    ) -> Tensor:
        """A device's table, for the step that is counted there at once."""
        skip = None if skip is None else sent_to(device, skip)
        if factor is not None and factor.device.type != "cpu":
            factor = sent_to(device, factor)
        if tapes and device in self.tables:
            inside = factor is not None and factor.device == device
            made = self._in_one_launch(tapes, device, factor if inside else None, skip)
            if made is not None:
                return made if inside else _multiplied(made, factor, device)
        names, groups = backends.coefficient_names(optimizer.rule), optimizer.param_groups
        of_group = {i: [self.steps[m] for m in members] for i, members in self.places[device].items()}
        table = torch.cat([on_device(optimizer.coefficients, names, groups[i], of_group[i]) for i in of_group])
        steps = list(chain.from_iterable(of_group.values()))
        if skip is None:
            torch._foreach_add_(steps, 1.0)
        else:  # without alpha, torch would take the tensor for a number and wait for it
            torch._foreach_add_(steps, 1.0 - skip.float(), alpha=1.0)
        return _multiplied(table, factor, device)

    def _in_one_launch(
        self, tapes: Sequence[Tape], device: torch.device, factor: Tensor | None, skip: Tensor | None
    ) -> Tensor | None:
        """The device's table by a kernel of its own; None, with nothing counted, where torch must compute it."""
        own = self.tables[device]
        try:
            made: Tensor | None = own(tapes, factor, skip)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its kernel did not compile
            self.dropped.append(self.tables.pop(device))
            if own.counted:
                raise
            why = f"torch computes the coefficients of a step, in some 40 launches ({backends.reason(error)})"
            warnings.warn(f"ademamix: {why}", stacklevel=6)
            return None
        return made


def _multiplied(table: Tensor, factor: Tensor | None, device: torch.device) -> Tensor:
    """A table with a factor on the gradients, which a device knows, or the host: then it multiplies on any device."""
    if factor is None:
        return table
    if factor.device.type != "cpu":
        table, factor = sent_to(device, table), sent_to(device, factor)
    table[:, 0] *= factor.squeeze()
    return table


def _kinds(grads: Sequence[Tensor]) -> list[Any]:
    return [*map(type, grads), *(g.dtype for g in grads)]


def _cut(t: Tensor, cut: slice | None) -> Tensor:
    return t if cut is None else t.view(-1)[cut]


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


@dataclass(frozen=True)
class GroupSettings:
    """What of a parameter group decides how its tensors are stored."""

    formats: dict[str, Format]  # of the slots that are stored
    stochastic_rounding: bool
    seed: int


def _number_format(t: Tensor, *, stochastic: bool) -> Format:
    """How a parameter's or a gradient's numbers are stored."""
    if t.dtype == torch.bfloat16:
        return FORMATS["bfloat16" if stochastic else "bfloat16_nearest"]
    return FORMATS[str(t.dtype).removeprefix("torch.")]


def check_tensors(optimizer: RuleOptimizer, group: int, p: Any, g: Any) -> None:
    """Raise RuntimeError for a parameter and a gradient that cannot be served together."""
    name = type(optimizer).__name__
    where = f"the gradient of a parameter of shape {tuple(p.shape)} in group {group}"
    if g.layout != torch.strided:
        raise RuntimeError(f"{name} takes dense gradients (torch.strided) alone; {where} is {g.layout}")
    for what, t in (("parameter", p), ("gradient", g)):
        if t.dtype.to_real() not in DTYPES or t.is_complex() != p.is_complex():
            allowed = "float64, float32, bfloat16, float16 or, both of them, complex"
            raise RuntimeError(f"{name} cannot update a {what} of dtype {t.dtype} in group {group}; allowed: {allowed}")
        part, device = local(t), CPU if optimizer.offload else t.device
        fused = backends.choose(optimizer.backend, device) != "eager"
        if fused and part.numel() and not part.data_ptr():
            kind = f"a {what} in group {group} is a {type(part.data).__name__}, which has no memory of its own"
            raise RuntimeError(f"{name}: {kind}; allowed with backend='eager' alone")
    if is_sharded(g) != is_sharded(p):
        raise RuntimeError(f"{name}: of a parameter and its gradient in group {group}, one alone is a DTensor")
    if is_sharded(p) and (g.device_mesh != p.device_mesh or any(x.is_partial() for x in p.placements)):
        found = f"{p.placements} on {p.device_mesh}, with a gradient on {g.device_mesh}"
        allowed = "allowed: Shard and Replicate, the gradient on the same mesh"
        raise RuntimeError(f"{name}: a parameter in group {group} is placed as {found}; {allowed}")
    if g.shape != p.shape:
        raise RuntimeError(f"{name}: {where} has shape {tuple(g.shape)}: they must be equal")
