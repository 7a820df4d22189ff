import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from ademamix.lab.config import Training
from ademamix.lab.experiments.trials import Grid, Point, Value
from ademamix.lab.training.loop import Result

Loss = Callable[[str, Any, Mapping[str, Value]], float]  # of an optimizer, its recipe, and the point of the grid


class Pretended:
    """Takes the place of `Trials`: the final loss of a run is a function of it; infinity for one that diverged.

    Args:
        loss: that function.
        clipped: the share of steps that are clipped, as a function of the same.
        held_out: the losses of each held-out batch, by step, as a function of the same.
    """

    def __init__(
        self, loss: Loss, clipped: Loss | None = None, held_out: Callable[..., list[dict[int, float]]] | None = None
    ) -> None:
        self.loss, self.clipped, self.held_out = loss, clipped, held_out
        self.recipes: dict[tuple[str, Point], Any] = {}  # of all runs, by grid and point
        self.losses: dict[tuple[str, Point], float] = {}

    def run(self, *grids: Grid) -> list[dict[Point, Result | None]]:
        return [dict(self._answers(grid)) for grid in grids]

    def _answers(self, grid: Grid) -> Iterator[tuple[Point, Result | None]]:
        for point in grid.points():
            optimizer, recipe = grid.run(**point)
            loss, key = self.loss(optimizer, recipe, point), tuple(point.values())
            assert (grid.name, key) not in self.recipes  # nothing is trained twice
            self.recipes[grid.name, key], self.losses[grid.name, key] = recipe, loss
            yield key, None if math.isinf(loss) else self._result(optimizer, recipe, point, loss)

    def _result(self, optimizer: str, recipe: Training, point: Mapping[str, Value], loss: float) -> Result:
        looks = [*range(recipe.eval_every, recipe.steps, recipe.eval_every), recipe.steps]
        curve = [{"step": n, recipe.unit: n * recipe.units_per_step, "seconds": 1.0, "valid_loss": loss} for n in looks]
        share = self.clipped(optimizer, recipe, point) if self.clipped else 0.0
        held_out = self.held_out(optimizer, recipe, point) if self.held_out else []
        return Result(optimizer, recipe.steps, 0, 0.0, loss, 1.5, 8.0, 0, share, 0, "", "", curve, held_out)


@pytest.fixture(scope="session")
def pretended() -> type[Pretended]:
    return Pretended
