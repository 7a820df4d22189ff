"""A step in Muon's geometry as one launch: the memory's fused pass, the orthogonalization, the step's fused pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ademamix import backends, geometries
from ademamix.backends import Batch
from ademamix.backends.pool import for_each
from ademamix.engine.kinds import DECOUPLED, Kind
from ademamix.engine.targets import number_format

SMALL = 256  # rows or columns below which threads gain nothing from sharing a product
TINY = 2.0**-126  # float32's smallest normal number


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
        return cls(steps, group["adjust_lr_fn"] or kind.scaling, max(float(group["eps"]), TINY))


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter: what lies behind its first dimension is one."""
    rows, *others = shape
    return rows, torch.Size(others).numel()


def check_matrices(name: str, params: Iterable[Any], which: Iterable[Any]) -> None:
    """Raise ValueError for a parameter that is no matrix, by what it is called."""
    for p, called in zip(params, which, strict=True):
        if isinstance(p, Tensor) and (p.ndim < 2 or p.is_complex()):
            raise ValueError(
                f"{name}: geometry='muon' takes real parameters of at least 2 dimensions, got parameter {called} of "
                f"shape {tuple(p.shape)} and dtype {p.dtype}; give it to a group with geometry='adam'"
            )


class Workspace:
    """Memory for directions, which launches use in turn. Whoever needs most asks first."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        flat = self._flat.get((device, dtype))
        if flat is None or len(flat) < size:
            flat = self._flat[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return flat[:size]


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
    ) -> None:
        self.targets, self.members, self.slices, self.iteration = targets, members, slices, iteration
        self.shape = matrix(params[0].shape)
        size, device = sum(t.numel() for t in targets), targets[0].device
        # As the iteration wants them: what it cannot see of them need not be written.
        accelerated = device.type in ("cuda", "xpu")
        dtype = torch.float64 if batch.double else torch.bfloat16 if accelerated else torch.float32
        flat = workspace.take(size, dtype, device)
        of_each = torch.split(flat, [t.numel() for t in targets])
        self.directions = [u.as_strided(t.shape, t.stride()) for u, t in zip(of_each, targets, strict=True)]
        written = number_format(flat, stochastic=False)
        directions = replace(batch, format=written, parameters=self._cut(self.directions))
        self.memory = backends.launch(backend, directions)
        none: list[list[None]] = [[] for _ in members]
        self.step = backends.launch(
            backend, replace(batch, rule=DECOUPLED, grad=written, formats=(), slots=none, scales=none)
        )

    def _cut(self, each: Sequence[Tensor]) -> list[Tensor]:
        return [
            each[m] if cut is None else each[m].view(-1)[cut] for m, cut in zip(self.members, self.slices, strict=True)
        ]

    def __call__(
        self,
        grads: Sequence[Tensor],
        rows: Sequence[int],
        remembered: Tensor,
        stepped: Tensor,
        skip: Tensor | None,
    ) -> None:
        """As :class:`ademamix.backends.Launch`, with the coefficients of the memory, and those of the step."""
        self.memory(grads, rows, remembered, skip)
        given = torch.stack([u.reshape(self.shape) for u in self.directions])
        made = orthogonal(given, self.iteration)
        steps = [
            y.view(t.shape) if t.is_contiguous() else torch.empty_like(t, dtype=y.dtype).copy_(y.view(t.shape))
            for y, t in zip(made.unbind(), self.targets, strict=True)
        ]
        self.step(self._cut(steps), rows, stepped, skip)


def orthogonal(x: Tensor, iteration: Iteration) -> Tensor:
    """All matrices [..., rows, columns], orthogonalized and scaled.

    On CPUs a matrix has the same bits whatever others there are: the library behind torch shares a small product
    among threads or not, as these leave it, so small matrices get one thread each and large ones all threads in turn.
    """
    factor = geometries.scale(iteration.scaling, *x.shape[-2:])

    def act(x: Tensor) -> Tensor:
        made: Tensor = geometries.orthogonalized(x, iteration.polynomials, factor, norm, _multiply)
        return made

    def norm(x: Tensor) -> Tensor:
        exact = torch.float64 if x.device.type == "cpu" or x.dtype == torch.float64 else torch.float32
        squares = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=exact)
        return squares.clamp(min=iteration.least).to(x.dtype)  # type: ignore[no-any-return]

    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu" or backends.is_fake(x):
            return act(x)
        if min(x.shape[1:]) >= SMALL:
            return torch.stack(list(map(act, x)))
        return _in_turn(act, x)


def _multiply(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return (torch.addmm if c.ndim == 2 else torch.baddbmm)(c, a, b, beta=beta, alpha=alpha)


def _in_turn(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``act`` of parts of x, each on one thread."""
    threads = min(len(x), torch.get_num_threads())
    parts = x.tensor_split(threads)
    made: dict[int, Tensor] = {}

    def one(i: int) -> None:
        with _one_thread():
            made[i] = act(parts[i])

    for_each(range(threads), one, threads)
    return torch.cat([made[i] for i in range(threads)])


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch, and the library behind it, use no other thread for what this one asks them to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, but for threads that first ask for the number meanwhile
    try:
        yield
    finally:
        torch.set_num_threads(before)
