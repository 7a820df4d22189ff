"""From parameters, gradients and state to launches of the backends, which serve until one of these has changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ademamix import backends
from ademamix.backends import Batch, Rule, sent_to
from ademamix.engine.coefficients import CountedByNobody, CountedOnDevice, CountedOnHost, Source
from ademamix.engine.directions import Filter, Workspace
from ademamix.engine.kinds import DECOUPLED
from ademamix.engine.memory import check_memory
from ademamix.engine.muon import Iteration, Orthogonal, check_matrices, matrix
from ademamix.engine.offload import CHUNK, Trip
from ademamix.engine.sharding import average_part, is_sharded, local, rows_of
from ademamix.engine.state import CPU, slot_formats, state_of, tensor_names
from ademamix.engine.targets import Targets, number_format, real
from ademamix.formats import Format, keys

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Program(NamedTuple):
    """What launches need to know of an optimizer."""

    name: str  # of its class, for errors
    source: Source  # of the coefficients of all its rules
    formats: Mapping[str, Format]  # of all their slots
    backend: str
    offload: bool
    flat: bool  # whether parameters of one dimension are parts of flattened ones
    scale: Tensor | None = None  # that directions in the gradients' place get


Then = Iteration | type[Filter] | None  # in Muon's geometry; where another optimizer steps; nothing, in Adam's


@dataclass(frozen=True)
class GroupSettings:
    """What of a parameter group decides how its tensors are stored and updated."""

    rule: Rule  # of the first pass
    then: Then  # what follows upon it
    formats: dict[str, Format]  # of the slots that are stored
    stochastic_rounding: bool
    seed: int


class Inputs(NamedTuple):
    """What a step works on."""

    params: Sequence[Tensor]  # with a gradient: the optimizer's, or their placeholders in host memory
    grads: Sequence[Tensor]  # of each of them
    of_group: Sequence[int]  # the group of each of them
    settings: Sequence[GroupSettings]  # of each group
    counted_there: bool  # whether steps have to be counted where the parameters are
    states: Mapping[Tensor, Any]  # of all the optimizer's parameters


class Launches:
    """All of a step that stays the same while parameters, state tensors and the gradients' dtypes do.

    Args:
        program: of the optimizer.
        inputs: of the first step.
        saved: the states of the inputs' parameters so far.

    Attributes:
        states: theirs from now on.
        fresh: whether the optimizer does not have them yet: it takes them over once a step has succeeded.
        calls: launches of the backends, each with what it updates.
        filters: whether they change gradients, not parameters.
        backends: names of those in use.

    Raises:
        RuntimeError: a parameter and its gradient cannot be served.
        ValueError: a state does not fit its parameter.
    """

    def __init__(self, program: Program, inputs: Inputs, saved: Sequence[Mapping[str, Any] | None]) -> None:
        for i, p, g in zip(inputs.of_group, inputs.params, inputs.grads, strict=True):
            check_tensors(program, i, p, g)
            if isinstance(inputs.settings[i].then, Iteration):
                check_matrices(program.name, [p], [f"in group {i}"])
        # Steps that live on an accelerator stay there: reading them would wait for it.
        there = any(s and "step" in s and s["step"].device.type != "cpu" for s in saved)
        self.on_device = inputs.counted_there or there
        if not program.offload:
            check_memory(program.name, inputs.params)
        formats = [
            slot_formats(p, _kept(program, i, inputs.settings[i], s), program.flat)
            for i, p, s in zip(inputs.of_group, inputs.params, saved, strict=True)
        ]
        self.states = [
            state_of(s, p, f, p.device if self.on_device else None)
            for s, p, f in zip(saved, inputs.params, formats, strict=True)
        ]
        self.fresh = True
        self.seen = _Seen(inputs, self.states, formats)
        self.targets = Targets(inputs.params, formats)
        self.calls = _calls(program, inputs, formats, self.targets.tensors, self.states)
        self.filters = any(isinstance(call.launch, Filter) for call in self.calls)
        self.columns = {
            (call.device, rule): _columns(rule, program.source.names, call.device)
            for call in self.calls
            for rule in call.rules
        }
        self.chunks = [list(dict.fromkeys(call.members)) for call in self.calls]
        used: dict[torch.device, set[str]] = defaultdict(set)
        for call in self.calls:
            used[call.device] |= call.backends
        self.backends = tuple(sorted(set().union(*used.values())))
        steps = [state["step"] for state in self.states]
        self.steps: CountedOnDevice | CountedOnHost | CountedByNobody
        if self.seen.fake:
            self.steps = CountedByNobody(steps)
        elif self.on_device:
            in_one_launch = [device for device, names in used.items() if names == {"triton"}]
            self.steps = CountedOnDevice(steps, inputs.of_group, in_one_launch)
        else:
            self.steps = CountedOnHost(steps, inputs.of_group)

    def serve(self, inputs: Inputs) -> bool:
        """Whether all is as it was, also if somebody exchanged tensors or their memory."""
        return inputs.counted_there <= self.on_device and self.seen.again(inputs)

    def taken_over(self, states: Mapping[Tensor, Any]) -> None:
        """The optimizer has the states now, among those of other parameters."""
        self.seen.every = list(states.values())
        self.fresh = False

    def run(
        self,
        program: Program,
        grads: Sequence[Tensor],
        factor: Tensor | None,
        skip: Tensor | None,
        trip: Trip | None = None,
    ) -> None:
        """Update all parameters and count the step.

        Args:
            program: its coefficients and groups are read.
            grads: a gradient for each parameter.
            factor: multiplies all gradients; of one element.
            skip: boolean, of one element: if it is true, nothing changes.
            trip: brings the gradients of placeholders, and these back.
        """
        rows, table = self.steps.next(program.source, factor, skip)
        own, grads = grads, self.targets.resolved(grads)
        if not self.targets.lie_alike(grads):
            if trip is not None:
                trip.all_arrived()
            grads = self.targets.laid_out(grads)
        if not self.filters:
            self.targets.read()
        # Each device's own tables and flag, all of them before anything is written.
        tables = {d: table(d) for d in dict.fromkeys(call.device for call in self.calls)}
        flags = {d: None if skip is None else sent_to(d, skip) for d in tables}
        given = {key: _columns_of(tables[key[0]], key[1], columns) for key, columns in self.columns.items()}
        for n, call in enumerate(self.calls):
            theirs = [grads[m] for m in call.members]
            if any(call.slices):
                theirs = list(map(_cut, theirs, call.slices))
            if trip is not None:
                trip.arrived(n)
            of_rules = [given[call.device, rule] for rule in call.rules]
            call.launch(theirs, [rows[m] for m in call.members], *of_rules, flags[call.device])
            if isinstance(call.launch, Filter):
                call.launch.replace([own[m] for m in dict.fromkeys(call.members)], flags[call.device], program.scale)
            if trip is not None:
                trip.send(n)
        if not self.filters:
            self.targets.write()
        self.steps.taken()


Columns = dict[torch.device, Tensor]


def _columns(rule: Rule, names: Sequence[str], device: torch.device) -> Columns | None:
    """Where in a table of all coefficients those of the rule are, on each device that the table may be on; None where
    they are all of it."""
    own = backends.coefficient_names(rule)
    if own == names and rule is not DECOUPLED:  # which gets a factor of its own
        return None
    columns = torch.tensor([0, 1, *(2 + names.index(name) for name in own)], device=CPU)
    return {CPU: columns, device: columns.to(device)}


def _columns_of(table: Tensor, rule: Rule, columns: Columns | None) -> Tensor:
    if columns is None:
        return table
    own = table.index_select(1, columns[table.device])
    if rule is DECOUPLED:
        own[:, 0] = 1.0  # what it gets for a gradient has had its factor
    return own


def _kept(program: Program, group: int, settings: GroupSettings, saved: Mapping[str, Any] | None) -> dict[str, Format]:
    """The formats of a parameter's slots: of those that its group stores, and of those that it has had before.

    These continue as the equations say, also where a hyperparameter makes them needless for some time.

    Raises:
        ValueError: a slot is stored from now on whose past nobody has kept, or no longer.
    """
    stored = settings.formats
    if saved is None:
        return dict(stored)
    slots = backends.slot_names(settings.rule)
    had = [name for name in program.formats if name not in slots and saved.get(name) is not None]
    if had and float(saved.get("step", 0.0)) > 0.0:
        raise ValueError(
            f"{program.name}: a parameter in group {group} has a state of {float(saved['step']):.0f} steps with {had}, "
            f"which another geometry has kept; allowed: the geometry that it had"
        )
    lost = [name for name in stored if saved.get(name) is None]
    if lost and float(saved.get("step", 0.0)) > 0.0:
        raise ValueError(
            f"{program.name}: a parameter in group {group} has a state of {float(saved['step']):.0f} steps without "
            f"{lost}, which the group's geometry and hyperparameters have needed from the first step on; allowed: "
            "those that it had"
        )
    return {name: program.formats[name] for name in slots if name in stored or saved.get(name) is not None}


class _Seen:
    """What launches were made for, to be recognized in microseconds."""

    def __init__(
        self, inputs: Inputs, states: Sequence[dict[str, Any]], formats: Sequence[Mapping[str, Format]]
    ) -> None:
        self.params, self.of_group, self.settings = inputs.params, inputs.of_group, inputs.settings
        self.states, self.every = states, list(inputs.states.values())
        self.entries = [value for state in states for value in state.values()]
        slots = [
            state[name]
            for state, f in zip(states, formats, strict=True)
            for slot in f
            for name in tensor_names(slot, f)
        ]
        self.tensors = [*self.params, *(state["step"] for state in states), *slots]
        self.sharded = any(map(is_sharded, self.params))
        self.inference = torch.is_inference_mode_enabled()
        self.fake = any(map(backends.is_fake, map(local, self.params)))
        self.pointers, self.shapes, self.kinds = self._pointers(), self._shapes(), self._kinds(inputs.grads)

    def again(self, inputs: Inputs) -> bool:
        """Whether these are the same, and as they were."""
        return (
            inputs.of_group == self.of_group
            and inputs.settings == self.settings
            and all(map(is_, inputs.params, self.params))
            and self._has_states(inputs.states)
            and not self.fake
            and torch.is_inference_mode_enabled() == self.inference
            and self._pointers() == self.pointers
            and self._shapes() == self.shapes
            and {g.layout for g in inputs.grads} == {torch.strided}
            and self._kinds(inputs.grads) == self.kinds
        )

    def _has_states(self, states: Mapping[Tensor, Any]) -> bool:
        return (
            len(states) == len(self.every)  # compared in their order: hashing tensors is slow
            and all(map(is_, states.values(), self.every))
            and sum(map(len, self.states)) == len(self.entries)
            and all(map(is_, chain.from_iterable(map(dict.values, self.states)), self.entries))
        )

    def _pointers(self) -> list[int]:
        if self.fake:
            return []
        return list(map(Tensor.data_ptr, map(local, self.tensors) if self.sharded else self.tensors))

    def _shapes(self) -> list[Any]:
        return [*map(Tensor.numel, self.params), *map(Tensor.stride, self.params), *[p.dtype for p in self.params]]

    def _kinds(self, grads: Sequence[Tensor]) -> list[Any]:
        kinds = [*map(type, grads), *[g.shape for g in grads], *[g.dtype for g in grads]]
        if not self.fake:  # whether they have memory: somebody may have freed it
            kinds += map(bool, map(Tensor.data_ptr, map(local, grads) if self.sharded else grads))
        return kinds


Members = list[int]  # numbers of parameters
Slices = list["slice | None"]  # parts of their flat memory, where noise makes a tensor several


@dataclass(frozen=True)
class Call:
    """A launch, with all that it is called with but for numbers."""

    launch: Any  # a backends.Launch, an Orthogonal or a Filter
    rules: tuple[Rule, ...]  # whose coefficients it gets
    members: Members
    slices: Slices
    device: torch.device
    backends: frozenset[str]


def _calls(
    program: Program,
    inputs: Inputs,
    formats: Sequence[Mapping[str, Format]],
    targets: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
) -> list[Call]:
    workspace, calls = Workspace(), []
    turns: dict[Any, int] = defaultdict(int)  # of a mesh: matrices that its processes have shared out
    batches = list(_batches(program, inputs, formats, targets, states))

    def size(members: Members) -> int:
        return sum(average_part(inputs.params[m]) for m in set(members))

    # The largest first: the others' directions find room where its were. All processes have the same order.
    for batch, members, slices, then in sorted(batches, key=lambda each: -size(each[1]) if each[3] else 1):
        device = batch.parameters[0].device
        once = {m: n for n, m in enumerate(dict.fromkeys(members))}
        parts = (program.backend, batch, [once[m] for m in members], slices, [targets[m] for m in once])
        launch: Any
        if then is None:
            launch = backends.launch(program.backend, batch)
            passes = {batch.rule: launch}
        elif isinstance(then, Iteration):
            params = [inputs.params[m] for m in once]
            mesh = getattr(params[0], "device_mesh", None)
            launch = Orthogonal(*parts, params, then, workspace, turns[mesh])
            turns[mesh] += len(once)
            passes = {batch.rule: launch.directions.launch, DECOUPLED: launch.step}
        else:
            launch = then(*parts, torch.float64 if batch.double else torch.float32, workspace)
            passes = {batch.rule: launch.launch}
        used = frozenset(map(backends.name_of, passes.values()))
        calls.append(Call(launch, tuple(passes), members, slices, device, used))
    return calls


def _batches(
    program: Program,
    inputs: Inputs,
    formats: Sequence[Mapping[str, Format]],
    targets: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Batch, Members, Slices, Then]]:
    """Parameters that one launch can update: of one device, with the same formats, and with offloading of one chunk.

    Where directions are written, not more of them than one chunk has room for; in Muon's geometry, of one shape. Of
    DTensors, all processes make the same batches, whatever parts and other parameters each of them has.
    """
    settings = inputs.settings
    every = chain.from_iterable(group["params"] for group in program.source.groups)
    positions = [n for n, p in enumerate(every) if p.grad is not None]
    random = keys([settings[i].seed for i in inputs.of_group], positions)
    alike: dict[tuple[Any, ...], Members] = defaultdict(list)
    before, of_shape = 0, defaultdict[Any, int](int)  # elements
    for m, (i, g, target, f) in enumerate(zip(inputs.of_group, inputs.grads, targets, formats, strict=True)):
        grad = number_format(local(g).real, stochastic=False)  # which may be lazily conjugated
        own = number_format(target, stochastic=settings[i].stochastic_rounding)
        rule, then = settings[i].rule, settings[i].then
        kept = tuple(f.get(name) for name in backends.slot_names(rule))
        chunk: Any = before // CHUNK if program.offload else 0
        shape: tuple[Any, ...] | None = None
        kind = (target.device, backends.has_memory(target), rule, own, grad, kept)
        if then is not None:
            p: Any = inputs.params[m]
            shape = (then,)
            if isinstance(then, Iteration):
                shape = (then, matrix(p.shape), *((p.device_mesh, p.placements) if is_sharded(p) else ()))
            of_shape[kind, shape] += average_part(p)
            chunk = of_shape[kind, shape] // CHUNK
        alike[kind, shape, chunk].append(m)
        before += target.numel()
    for ((_, _, rule, own, grad, kept), shape, _), bucket in alike.items():
        blocked = any(f is not None and f.scale is not None for f in kept)
        noisy = any(f is not None and f.stochastic for f in (own, *kept))
        cuts = [
            (m, cut, rows)
            for m in bucket
            # Where the elements lie in the whole parameter, if noise makes that matter.
            for cut, rows in (
                rows_of(inputs.params[m], blocked) if noisy else [(None, backends.whole(targets[m], blocked))]
            )
        ]
        names = backends.slot_names(rule)
        stored = [(n, f is not None, f is not None and f.scale is not None) for n, f in zip(names, kept, strict=True)]
        members, slices = [m for m, _, _ in cuts], [cut for _, cut, _ in cuts]
        yield (
            Batch(
                rule,
                own,
                grad,
                kept,
                [_cut(targets[m], cut) for m, cut, _ in cuts],
                [[_cut(_slot(states[m][n]), cut) if there else None for n, there, _ in stored] for m, cut, _ in cuts],
                [[_slot(states[m][f"{n}_scale"]) if scaled else None for n, _, scaled in stored] for m in members],
                random[members],
                [rows for _, _, rows in cuts],
            ),
            members,
            slices,
            None if shape is None else shape[0],
        )


def _slot(t: Tensor) -> Tensor:
    return real(local(t))


def _cut(t: Tensor, cut: slice | None) -> Tensor:
    return t if cut is None else t.view(-1)[cut]


def check_layout(name: str, group: int, p: Tensor, g: Tensor) -> None:
    """Raise RuntimeError for a sparse gradient of an optimizer of this name."""
    if g.layout != torch.strided:
        where = f"the gradient of a parameter of shape {tuple(p.shape)} in group {group}"
        raise RuntimeError(f"{name} only takes dense gradients (torch.strided); {where} is {g.layout}")


def check_tensors(program: Program, group: int, p: Any, g: Any) -> None:
    """Raise RuntimeError for a parameter and a gradient that cannot be served together."""
    name = program.name
    where = f"the gradient of a parameter of shape {tuple(p.shape)} in group {group}"
    check_layout(name, group, p, g)
    for what, t in (("parameter", p), ("gradient", g)):
        if backends.is_freed(local(t)):
            raise RuntimeError(
                f"{name}: a {what} of shape {tuple(t.shape)} in group {group} has no memory: its storage was freed"
            )
        if t is p and p.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name}: a parameter in group {group} was made in inference mode, and only changes there"
            )
        if t.dtype.to_real() not in DTYPES or t.is_complex() != p.is_complex():
            allowed = "float64, float32, bfloat16, float16 or, both of them, complex"
            raise RuntimeError(f"{name} cannot update a {what} of dtype {t.dtype} in group {group}; allowed: {allowed}")
        device = CPU if program.offload else t.device
        eager = backends.choose(program.backend, device) == "eager" or (
            program.backend == "auto" and not backends.has_memory(local(p))
        )
        if (program.offload or not eager) and not backends.has_memory(local(t)):
            kind = f"a {what} in group {group} is a {type(local(t).detach()).__name__}, which has no memory of its own"
            allowed = "offload=False" if program.offload else "backend='eager'"
            raise RuntimeError(f"{name}: {kind}; only allowed with {allowed}")
    if is_sharded(g) != is_sharded(p):
        raise RuntimeError(f"{name}: of a parameter and its gradient in group {group}, only one is a DTensor")
    if is_sharded(p) and (g.device_mesh != p.device_mesh or any(x.is_partial() for x in p.placements)):
        found = f"{p.placements} on {p.device_mesh}, with a gradient on {g.device_mesh}"
        allowed = "allowed: Shard and Replicate, the gradient on the same mesh"
        raise RuntimeError(f"{name}: a parameter in group {group} is placed as {found}; {allowed}")
    if g.device != p.device:
        raise RuntimeError(f"{name}: {where} on {p.device} is on {g.device}: they must be on one device")
    if g.shape != p.shape:
        raise RuntimeError(f"{name}: {where} has shape {tuple(g.shape)}: they must be equal")
