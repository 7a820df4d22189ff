"""A step in Muon's geometry as one launch: the memory's fused pass, the orthogonalization, the step's fused pass."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ademamix import backends, geometries
from ademamix.backends import Batch
from ademamix.backends.pool import for_each
from ademamix.engine.directions import Directions, Workspace
from ademamix.engine.exchange import Exchange
from ademamix.engine.kinds import DECOUPLED, Kind
from ademamix.engine.sharding import is_sharded

SMALL = 256  # rows or columns below which threads gain nothing from sharing a product


@dataclass(frozen=True)
class Iteration:
    """How the directions of a group are orthogonalized."""

    polynomials: tuple[geometries.Polynomial, ...]
    scaling: str  # of the result, see geometries.scale
    least: float  # norm that a direction is divided by

    @classmethod
    def of(cls, kind: type[Kind], group: Mapping[str, Any]) -> "Iteration | None":
        """That of a group in Muon's geometry."""
        if group["geometry"] != "muon":
            return None
        given = group["ns_coefficients"]
        steps = geometries.polynomials(given if isinstance(given, str) else tuple(given), int(group["ns_steps"]))
        return cls(steps, group["adjust_lr_fn"] or kind.scaling, float(group["eps"]))


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter: what lies behind its first dimension is one."""
    rows, *others = shape
    return rows, torch.Size(others).numel()


def check_matrices(name: str, params: Iterable[Any], which: Iterable[Any]) -> None:
    """Raise ValueError for a parameter that is not a matrix, by what it is called."""
    for p, called in zip(params, which, strict=True):
        if isinstance(p, Tensor) and (p.ndim < 2 or p.is_complex()):
            raise ValueError(
                f"{name}: geometry='muon' takes real parameters of at least 2 dimensions, got parameter {called} of "
                f"shape {tuple(p.shape)} and dtype {p.dtype}; give it to a group with geometry='adam', as "
                "split_parameters(model) does"
            )


class Orthogonal:
    """The update of parameters whose matrices have one shape.

    Args:
        backend: the optimizer's.
        batch: of the parameters, or of parts of them, with the memory's rule.
        members: the parameter of each of these, by its number among ``targets``.
        slices: and which part of it.
        targets: the parameters, each once, as backends update them.
        params: the same, as the optimizer has them.
        iteration: what is done to the directions.
        workspace: where they are.
        first: of the processes that have parts of DTensors, the one that orthogonalizes the first of them.
    """

    def __init__(
        self,
        backend: str,
        batch: Batch,
        members: Sequence[int],
        slices: Sequence[slice | None],
        targets: Sequence[Tensor],
        params: Sequence[Tensor],
        iteration: Iteration,
        workspace: Workspace,
        first: int,
    ) -> None:
        self.targets, self.iteration = targets, iteration
        self.shape = matrix(params[0].shape)
        # As the iteration wants them: what it cannot see of them need not be written.
        accelerated = targets[0].device.type in ("cuda", "xpu")
        dtype = torch.float64 if batch.double else torch.bfloat16 if accelerated else torch.float32
        self.directions = Directions(backend, batch, members, slices, targets, dtype, workspace)
        self.exchange = Exchange(params, first, self.directions.flat) if is_sharded(params[0]) else None
        # Elements that the iteration takes: matrices before and after, Gram matrices; of DTensors also what is sent.
        own, copies = (len(params), 2) if self.exchange is None else (len(self.exchange.shapes), 4)
        self.needed = own * (copies * math.prod(self.shape) + 2 * min(self.shape) ** 2)
        none: list[list[None]] = [[] for _ in members]
        written = self.directions.format
        self.step = backends.launch(
            backend, replace(batch, rule=DECOUPLED, grad=written, formats=(), slots=none, scales=none)
        )

    def __call__(
        self,
        grads: Sequence[Tensor],
        rows: Sequence[int],
        remembered: Tensor,
        stepped: Tensor,
        skip: Tensor | None,
    ) -> None:
        """As :class:`ademamix.backends.Launch`, with the coefficients of the memory, and those of the step."""
        # What the iteration needs is there, or missing now, before the memory has taken the gradients in.
        self.directions.flat.new_empty(self.needed)
        self.directions.launch(grads, rows, remembered, skip)
        self.step(self.directions.cut(self._orthogonalized()), rows, stepped, skip)

    def _orthogonalized(self) -> list[Tensor]:
        """What becomes of the directions, as the targets lie in memory."""
        if self.exchange is not None:
            self.exchange(partial(orthogonal, iteration=self.iteration))
            return self.directions.each
        if all(map(Tensor.is_contiguous, self.targets)):
            given = self.directions.flat.view(len(self.targets), *self.shape)
            made = orthogonal(given, self.iteration, out=given)
            return [y.view(t.shape) for y, t in zip(made.unbind(), self.targets, strict=True)]
        given = torch.stack([u.reshape(self.shape) for u in self.directions.each])
        made = orthogonal(given, self.iteration, out=given)
        return [u.copy_(y.view(u.shape)) for u, y in zip(self.directions.each, made.unbind(), strict=True)]


def orthogonal(x: Tensor, iteration: Iteration, out: Tensor | None = None) -> Tensor:
    """All matrices [..., rows, columns], orthogonalized and scaled.

    On CPUs a matrix has the same bits whatever others there are: the library behind torch shares a small product
    among threads or not, as these leave it, so small matrices get one thread each and large ones all threads in turn.

    Args:
        x: [matrices, rows, columns].
        iteration: what is done to them.
        out: where to put the result, x itself too.
    """
    if x.numel() == 0:
        return x
    factor = geometries.scale(iteration.scaling, *x.shape[-2:])

    def act(x: Tensor) -> Tensor:
        made: Tensor = geometries.orthogonalized(x, iteration.polynomials, factor, norm, _multiply)
        return made

    def norm(x: Tensor) -> Tensor:
        tiny = torch.finfo(x.dtype).tiny
        if x.device.type == "cpu" and x.dtype == torch.float32:
            size = of_all(x, 2.0, torch.float64)
        else:  # squares may be too large or too small for numbers
            most = of_all(x, math.inf).clamp(min=tiny)
            size = most * of_all(x / most, 2.0, torch.float64 if x.dtype == torch.float64 else torch.float32)
        return size.clamp(min=max(iteration.least, tiny)).to(x.dtype)

    def of_all(x: Tensor, kind: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.linalg.vector_norm(x, kind, (-2, -1), keepdim=True, dtype=dtype)  # type: ignore[no-any-return]

    kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"  # there is none of "meta"
    with torch.autocast(kind, enabled=False):
        if x.device.type != "cpu" or backends.is_fake(x):
            made = act(x)
            if out is None:
                return made
            torch._foreach_copy_([out], [made])  # launches keep tables of where they find what they are given
            return out
        out = torch.empty_like(x) if out is None else out
        if min(x.shape[1:]) >= SMALL:
            for each, made in zip(x, out, strict=True):
                made.copy_(act(each))
        else:
            _in_turn(act, x, out)
        return out


def _multiply(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return (torch.addmm if c.ndim == 2 else torch.baddbmm)(c, a, b, beta=beta, alpha=alpha)


def _in_turn(act: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> None:
    """``act`` of parts of x, each on one thread."""
    number = torch.get_num_threads()
    threads = min(len(x), number)
    parts = x.tensor_split(threads)
    made: dict[int, Tensor] = {}

    def one(i: int) -> None:
        with _one_thread(number):
            made[i] = act(parts[i])

    for_each(range(threads), one, threads)
    for i, written in enumerate(out.tensor_split(threads)):  # here, as other threads know of no inference mode
        written.copy_(made[i])


@contextmanager
def _one_thread(number: int) -> Iterator[None]:
    """torch, and the library behind it, use no other thread for what this one asks them to do.

    ``number`` of threads are used from then on. It is for this thread, but one that first asks for it gets what some
    thread was last given, 1 perhaps.
    """
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)
