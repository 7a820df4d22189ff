"""The coefficients of one step as a table: a row for each parameter, or for each group and number of steps done.

A row holds a factor on the gradient, the steps done before this one, then the rule's coefficients in their order, all
in float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ademamix.backends import bind

Coefficients = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]  # of the step, from 1 on, and the group


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
        values = coefficients(before + 1.0, groups[i])
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
    here = {name: _on(before.device, value) for name, value in group.items() if name not in ("params", "param_names")}
    values = bind(coefficients, _xp)(before + 1.0, here)
    table = before.new_empty(len(before), 2 + len(names))
    for column, value in enumerate((-1.0 if group["maximize"] else 1.0, before, *(values[name] for name in names))):
        table[:, column] = value.squeeze() if isinstance(value, Tensor) else value
    return table


def _on(device: torch.device, value: Any) -> Any:
    """A hyperparameter for what is computed on the device: tensors there, and numbers in place of the host's."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else sent_to(device, value)
    return tuple(_on(device, each) for each in value) if isinstance(value, tuple | list) else value


def sent_to(device: torch.device, t: Tensor) -> Tensor:
    """The tensor on the device, copied if it is not there.

    Copies between GPUs are ordered by their streams. Host memory is not: what leaves it unwaited must be pinned and
    nobody else's, who might write it before it is read, and what arrives in it has to be waited for.
    """
    if "cpu" not in (device.type, t.device.type):
        return t.to(device, non_blocking=True)
    own = t.pin_memory() if device.type == "cuda" and t.device.type == "cpu" else t  # itself if it was pinned before
    return own.to(device, non_blocking=own is not t)
