"""The coefficients of one step as a table: a row for each parameter, or for each group and number of steps done.

A row holds a factor on the gradient, the steps done before this one, then the rule's coefficients in their order, all
in float64. Steps are counted on the host, or where the parameters are: then nobody waits for the device, and a graph
can hold the step.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ademamix.backends import bind, reason, sent_to, warn
from ademamix.engine.tape import Coefficients, Tape, Values

EXACT = 2.0**24  # steps, from which on float32 lacks every other number


class Source(NamedTuple):
    """What a step's coefficients are computed of."""

    coefficients: Coefficients
    names: Sequence[str]  # in the rule's order
    groups: Sequence[Mapping[str, Any]]


def _number_or(function: Callable[..., float], of_tensors: Callable[..., Tensor]) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        like = next((a for a in args if isinstance(a, Tensor)), None)
        if like is None:
            return function(*args)
        return of_tensors(*(a if isinstance(a, Tensor) else torch.full_like(like, a) for a in args))

    return apply


class _xp:  # noqa: N801 - the namespace that coefficients are computed in on a device
    sqrt, abs = _number_or(math.sqrt, torch.sqrt), _number_or(abs, torch.abs)
    exp, log = _number_or(math.exp, torch.exp), _number_or(math.log, torch.log)
    minimum, maximum = _number_or(min, torch.minimum), _number_or(max, torch.maximum)
    where = torch.where


def on_host(
    coefficients: Coefficients,
    names: Sequence[str],
    groups: Sequence[Mapping[str, Any]],
    of_group: Sequence[int],
    done: Sequence[float],
) -> tuple[list[int], Callable[[torch.device], Tensor]]:
    """Row numbers of the parameters, and their table for those on a device, computed in Python.

    The table stays on the CPU, unless a hyperparameter is a tensor on an accelerator: nobody waits for its value.
    """
    kinds = list(zip(of_group, done, strict=True))
    rows = {kind: row for row, kind in enumerate(dict.fromkeys(kinds))}
    table = np.empty((len(rows), 2 + len(names)))
    late = []
    for (i, before), row in rows.items():
        values = coefficients(before + 1.0, Values(groups[i]))
        line = [-1.0 if groups[i]["maximize"] else 1.0, before, *(values[name] for name in names)]
        for column, value in enumerate(line):
            if isinstance(value, Tensor) and value.device.type != "cpu":
                late.append((row, column, value))
            else:
                table[row, column] = float(value)

    def placed(device: torch.device) -> Tensor:
        sent = torch.tensor(table, device="cpu")  # a copy: each device's table gets factors of its own
        if late:
            sent = sent_to(device, sent)
        for row, column, value in late:
            sent[row, column] = sent_to(device, value).squeeze()
        return sent

    return [rows[kind] for kind in kinds], placed


def on_device(
    coefficients: Coefficients, names: Sequence[str], group: Mapping[str, Any], done: Sequence[Tensor]
) -> Tensor:
    """The rows of some parameters of one group whose numbers of steps only the device knows."""
    before = torch.stack(list(done))
    before = before.to(torch.float32 if before.device.type == "mps" else torch.float64)  # MPS has no float64
    values = bind(coefficients, _xp)(before + 1.0, Values(group, lambda x: sent_to(before.device, x)))
    table = before.new_empty(len(before), 2 + len(names))
    for column, value in enumerate((-1.0 if group["maximize"] else 1.0, before, *(values[name] for name in names))):
        table[:, column] = value.squeeze() if isinstance(value, Tensor) else value
    return table


def _multiplied(table: Tensor, factor: Tensor | None, device: torch.device) -> Tensor:
    """A table with a factor on the gradients, which a device knows, or the host: then it multiplies on any device."""
    if factor is None:
        return table
    if factor.device.type != "cpu":
        table, factor = sent_to(device, table), sent_to(device, factor)
    table[:, 0] *= factor.squeeze()
    return table


class CountedOnHost:
    """The steps of parameters, counted in memory that the host reads."""

    def __init__(self, steps: Sequence[Tensor], of_group: Sequence[int]) -> None:
        self.steps, self.of_group = steps, of_group
        # Read and written through these, many scalars take a tenth of the time that torch takes.
        self.counters: list[Any] = list(map(_memory, steps))

    def next(
        self, source: Source, factor: Tensor | None, skip: Tensor | None
    ) -> tuple[Sequence[int], Callable[[torch.device], Tensor]]:
        """The parameters' rows in tables, and what gives a device its table for the step after those counted.

        Args:
            source: of the coefficients.
            factor: multiplies all gradients; of one element.
            skip: boolean, of one element: the step that is not taken is not counted, where that happens at once.
        """
        done = [counter[()] for counter in self.counters]
        if max(done, default=0.0) >= EXACT:
            self._widen(done)
        rows, table = on_host(*source, self.of_group, done)
        return rows, lambda device: _multiplied(table(device), factor, device)

    def taken(self) -> None:
        """Count the step, once it has been taken."""
        for counter in self.counters:
            counter[()] += 1.0

    def _widen(self, done: Sequence[float]) -> None:
        """Count in float64 from now on where float32 would lack the next number."""
        for i, (step, count) in enumerate(zip(self.steps, done, strict=True)):
            if step.dtype == torch.float32 and count >= EXACT:
                step.data = step.double()
                self.counters[i] = _memory(step)


def _memory(step: Tensor) -> Any:
    return memoryview(step.numpy())  # type: ignore[arg-type]


class CountedByNobody:
    """The steps of fake parameters, whose numbers are nobody's: what is computed of them only has a shape."""

    def __init__(self, steps: list[Tensor]) -> None:
        self.steps = steps

    def next(
        self, source: Source, factor: Tensor | None, skip: Tensor | None
    ) -> tuple[Sequence[int], Callable[[torch.device], Tensor]]:
        """As :meth:`CountedOnHost.next`, with any coefficients."""
        return [0] * len(self.steps), lambda device: torch.ones(1, 2 + len(source.names))

    def taken(self) -> None:
        """Count the step, as it would be."""
        torch._foreach_add_(self.steps, 1.0)


class CountedOnDevice:
    """The steps of parameters, counted where these are, in the moment in which a table is computed there.

    Args:
        steps: the counters, each where its parameter is.
        of_group: the group of each.
        in_one_launch: devices with Triton, where one launch computes all coefficients.
    """

    def __init__(
        self, steps: Sequence[Tensor], of_group: Sequence[int], in_one_launch: Collection[torch.device]
    ) -> None:
        self.steps: dict[torch.device, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        members: dict[torch.device, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for m, (i, step) in enumerate(zip(of_group, steps, strict=True)):
            self.steps[step.device][i].append(step)
            members[step.device][i].append(m)
        self.rows = [0] * len(steps)
        for there in members.values():
            for row, m in enumerate(chain.from_iterable(there.values())):
                self.rows[m] = row
        self.tables = {device: self._table_on(device) for device in in_one_launch}
        self.dropped: list[Any] = []  # tables that serve no more, which graphs may read

    def _table_on(self, device: torch.device) -> Any:
        from ademamix.engine.triton_coefficients import Table

        there = self.steps[device]
        return Table(list(chain.from_iterable(there.values())), [i for i, steps in there.items() for _ in steps])

    def next(
        self, source: Source, factor: Tensor | None, skip: Tensor | None
    ) -> tuple[Sequence[int], Callable[[torch.device], Tensor]]:
        """As :meth:`CountedOnHost.next`; a device's table may be asked for once, and counts the step."""
        tapes = self._tapes(source)
        return self.rows, lambda device: self._counted(source, tapes, device, factor, skip)

    def taken(self) -> None:
        """Nothing is left to do: what computed the table has counted the step."""

    def _tapes(self, source: Source) -> list[Tape]:
        """Each group's coefficients, for devices that compute them in one launch."""
        try:
            return [Tape(source.coefficients, source.names, group) for group in source.groups if self.tables]
        except (TypeError, ValueError, AttributeError):  # made of other things than arithmetic
            self.dropped += self.tables.values()
            self.tables.clear()
            return []

    def _counted(
        self, source: Source, tapes: Sequence[Tape], device: torch.device, factor: Tensor | None, skip: Tensor | None
    ) -> Tensor:
        skip = None if skip is None else sent_to(device, skip)
        if factor is not None and factor.device.type != "cpu":
            factor = sent_to(device, factor)
        if tapes and device in self.tables:
            inside = factor is not None and factor.device == device
            made = self._in_one_launch(tapes, device, factor if inside else None, skip)
            if made is not None:
                return made if inside else _multiplied(made, factor, device)
        there = self.steps[device]
        table = torch.cat(
            [on_device(source.coefficients, source.names, source.groups[i], steps) for i, steps in there.items()]
        )
        steps = list(chain.from_iterable(there.values()))
        if skip is None:
            torch._foreach_add_(steps, 1.0)
        else:  # without alpha, torch would take the tensor for a number and wait for it
            torch._foreach_add_(steps, 1.0 - skip.to(steps[0].dtype), alpha=1.0)
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
            warn(f"torch computes the coefficients of a step, in some 40 launches ({reason(error)})")
            return None
        return made
