"""The memory's fused pass on its own: it writes directions into a workspace, for another pass or another optimizer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ademamix import backends
from ademamix.backends import Batch, sent_to
from ademamix.engine.sharding import local
from ademamix.engine.targets import number_format


class Workspace:
    """Memory for directions, which launches use in turn. Whoever needs most asks first."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        flat = self._flat.get((device, dtype))
        if flat is None or len(flat) < size:
            flat = self._flat[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return flat.narrow(0, 0, size)  # fake tensors of a GPU that is not there cannot be sliced


class Directions:
    """The memory's pass over parameters.

    Args:
        backend: the optimizer's.
        batch: of the parameters, or of parts of them, with the memory's rule.
        members: the parameter of each of these, by its number among ``targets``.
        slices: and which part of it.
        targets: the parameters, each once, as backends update them.
        dtype: of the directions.
        workspace: where they are.

    Attributes:
        align: each direction starts at a multiple of so many elements.
        flat: all directions, one after another.
        each: the direction of each parameter, of its shape and strides.
        format: theirs.
        launch: writes them.
    """

    align: ClassVar[int] = 1

    def __init__(
        self,
        backend: str,
        batch: Batch,
        members: Sequence[int],
        slices: Sequence[slice | None],
        targets: Sequence[Tensor],
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        self.members, self.slices = members, slices
        sizes = [-(-t.numel() // self.align) * self.align for t in targets]
        self.flat = workspace.take(sum(sizes), dtype, targets[0].device)
        of_each = torch.split(self.flat, sizes)
        self.each = [u.as_strided(t.shape, t.stride()) for u, t in zip(of_each, targets, strict=True)]
        self.format = number_format(self.flat, stochastic=False)
        self.launch = backends.launch(backend, replace(batch, format=self.format, parameters=self.cut(self.each)))

    def cut(self, each: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors for each parameter, the parts that launches work on."""
        return [
            each[m] if cut is None else each[m].view(-1)[cut] for m, cut in zip(self.members, self.slices, strict=True)
        ]


class Filter(Directions):
    """Directions for another optimizer, which finds them in the gradients' place."""

    align = 16  # as the Triton backend's widest accesses have it

    def __call__(self, grads: Sequence[Tensor], rows: Sequence[int], remembered: Tensor, skip: Tensor | None) -> None:
        """As :class:`ademamix.backends.Launch`."""
        self.launch(grads, rows, remembered, skip)

    def replace(self, grads: Sequence[Tensor], skip: Tensor | None, scale: Tensor | None) -> None:
        """Write each direction into a gradient, in place and rounded to nearest.

        Where ``skip`` is true, write zeros. With the ``scale`` of a GradScaler, which multiplies all, write NaN then.
        """
        if skip is not None:
            self.flat.masked_fill_(skip, 0.0 if scale is None else torch.nan)
        if scale is not None:
            self.flat.mul_(sent_to(self.flat.device, scale))
        for g, u in zip(map(local, grads), self.each, strict=True):
            g.copy_(torch.view_as_complex(u) if g.is_complex() else u)
