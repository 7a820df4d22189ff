"""AdamW against AdEMAMix: same text, same batches, same initial weights; and AdamW's tokens to the same loss."""

import dataclasses
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ademamix.lab.config import Job, Match, Recipe, to_json
from ademamix.lab.train import Result, train

RESULTS = "results.json"


@dataclass(frozen=True)
class Matched:
    """How much more AdamW needs: its runs with growing budgets, as (factor, validation loss)."""

    trials: list[tuple[float, float]]
    factor: float | None  # the budget, in AdEMAMix's, at which AdamW has AdEMAMix's loss; None: not up to the cap

    def headline(self) -> str:
        """Say it in one sentence."""
        if self.factor is None:
            return f"AdamW did not reach AdEMAMix's loss with up to {self.trials[-1][0]:g} times the tokens"
        return f"AdamW needs {100 * (self.factor - 1):+.0f} % tokens to reach AdEMAMix's loss"


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to."""

    recipe: Recipe
    adamw: Result
    ademamix: Result
    matched: Matched | None
    versions: dict[str, str]
    machine: str
    commands: list[str]  # as typed, the first one started it

    @property
    def reached_at(self) -> float | None:
        """The fraction of the budget after which AdEMAMix was at AdamW's final loss, or None if it never was."""
        return reached_at(self.ademamix, self.adamw.valid_loss)

    def headlines(self) -> list[str]:
        """Say what came out, a sentence each."""
        gain, at = self.adamw.valid_loss - self.ademamix.valid_loss, self.reached_at
        lines = [f"AdEMAMix ends {abs(gain):.4f} nats a token {'below' if gain > 0 else 'above'} AdamW"]
        if at is not None:
            lines[0] += f" and was at AdamW's final loss after {100 * at:.1f} % of the budget"
        return lines if self.matched is None else [*lines, self.matched.headline()]


def compare(recipe: Recipe, job: Job, match: Match, out: Path, commands: list[str]) -> Comparison:
    """Run or go on with the comparison in the folder `out`; finished runs are not done again.

    Raises:
        BadInputError, StoppedError, DivergedError: as `train` does.
    """
    adamw = train("adamw", recipe, job, out / "adamw")
    ademamix = train("ademamix", recipe, job, out / "ademamix")
    if adamw.initial_weights != ademamix.initial_weights:
        raise RuntimeError("the two runs did not start from the same weights")
    matched = _match(recipe, job, match, out, adamw, ademamix) if match.match else None
    packages = ("ademamix", "torch", "transformers", "numpy", "numba")
    versions = {"python": platform.python_version()} | {name: _version(name) for name in packages}
    comparison = Comparison(recipe, adamw, ademamix, matched, versions, _machine(adamw.device), commands)
    to_json(out / RESULTS, dataclasses.asdict(comparison))
    return comparison


def _match(recipe: Recipe, job: Job, match: Match, out: Path, adamw: Result, ademamix: Result) -> Matched:
    """Train AdamW with growing budgets, each a full schedule of its own, until it has AdEMAMix's loss."""
    trials = [(1.0, adamw.valid_loss)]
    while trials[-1][1] > ademamix.valid_loss and trials[-1][0] + match.match_step <= match.match_cap:
        factor = trials[-1][0] + match.match_step
        longer = dataclasses.replace(recipe, steps=round(factor * recipe.steps))
        result = train("adamw", longer, job, out / f"adamw-{factor:g}x", label=f"adamw {factor:g}x")
        trials.append((factor, result.valid_loss))
    return Matched(trials, crossing(trials, ademamix.valid_loss))


def crossing(trials: list[tuple[float, float]], loss: float) -> float | None:
    """Return the budget at which the last trial or the way to it reaches `loss`, linear in the budget's logarithm."""
    if trials[-1][1] > loss:
        return None
    if len(trials) == 1:
        return trials[0][0]
    (x0, y0), (x1, y1) = trials[-2:]
    return math.exp(math.log(x0) + (y0 - loss) / (y0 - y1) * (math.log(x1) - math.log(x0)))


def reached_at(run: Result, loss: float) -> float | None:
    """Return the fraction of its budget after which a run's validation loss was first at `loss`, interpolated."""
    before: dict[str, float] | None = None
    for point in run.curve:
        if point["valid_loss"] <= loss:
            if before is None:
                return point["step"] / run.steps
            share = (before["valid_loss"] - loss) / (before["valid_loss"] - point["valid_loss"])
            return (before["step"] + share * (point["step"] - before["step"])) / run.steps
        before = point
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"


def _machine(device: str) -> str:
    names: list[Any] = [platform.processor() or platform.machine(), platform.system(), device]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux has the processor's name nowhere else
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        names[0] = next(lines, f": {names[0]}").partition(": ")[2]
    return ", ".join(names)
