"""AdamW against AdEMAMix, or another: same text, batches and initial weights; and AdamW's tokens to the same loss."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from ademamix.lab.config import Job, Match, Optimizer, Recipe, to_json, used
from ademamix.lab.experiments.arms import Arm, carry_out
from ademamix.lab.experiments.statistics import crossing
from ademamix.lab.reports.pictures import Chart, Line, Picture, around
from ademamix.lab.reports.report import Report, Rows
from ademamix.lab.training.loop import Result
from ademamix.lab.training.optimizers import SECTIONS, folder_of, settings_of, title

RESULTS = "results.json"
# Nats. The standard deviation over seeds of AdamW's final loss minus AdEMAMix's, same seed: 0.023 for the 3 seeds of
# docs/results/lm.md, 0.021, 0.022 and 0.019 for the 8 seeds at each batch size of docs/results/geometry.md.
BETWEEN_SEEDS = 0.02
BUSY = (
    0.9  # a run that had a core for less of its time had to wait for one: a single thread has little else to wait for
)


@dataclass(frozen=True)
class Matched:
    """How much more AdamW needs: its runs with growing budgets, as (factor, validation loss)."""

    trials: list[tuple[float, float]]
    factor: float | None  # the budget, in the other's, at which AdamW has the other's loss; None: not up to the cap

    def headline(self, other: str) -> str:
        """Say it in one sentence."""
        if self.factor is None:
            return f"AdamW did not reach {other}'s loss with up to {self.trials[-1][0]:g} times the tokens"
        return f"AdamW needs {100 * (self.factor - 1):+.0f} % tokens to reach {other}'s loss"


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to."""

    recipe: Recipe
    adamw: Result
    other: Result
    matched: Matched | None

    @property
    def titles(self) -> tuple[str, str]:
        """The two optimizers' names for people."""
        return title(self.adamw.optimizer), title(self.other.optimizer)

    @property
    def reached_at(self) -> float | None:
        """The fraction of the budget after which the other was at AdamW's final loss, or None if it never was."""
        return reached_at(self.other, self.adamw.valid_loss)

    def headlines(self) -> list[str]:
        """Say what came out, a sentence each."""
        gain, at, (_, other) = self.adamw.valid_loss - self.other.valid_loss, self.reached_at, self.titles
        lines = [f"{other} ends {abs(gain):.4f} nats per token {'below' if gain > 0 else 'above'} AdamW"]
        if at is not None:
            lines[0] += f" and was at AdamW's final loss after {100 * at:.1f} % of the budget"
        if self.matched is not None:
            lines.append(self.matched.headline(other))
        within = ", so this one says little" if abs(gain) < 2 * BETWEEN_SEEDS else ""
        lines.append(f"This is one seed; from seed to seed such differences vary by about ±{BETWEEN_SEEDS}{within}")
        return [*lines, *self._times()]

    @property
    def core_shares(self) -> list[str]:
        """For which share of its time each run had a core, for people; empty if they were not both on a CPU."""
        shares = [f"{100 * run.core_share:.0f} %" for run in (self.adamw, self.other) if run.core_share is not None]
        return shares if len(shares) == 2 else []

    def _times(self) -> list[str]:
        """Say how long steps take, and whether other programs had a part in that."""
        (a, b), adamw, other = self.titles, self.adamw, self.other
        if adamw.device != other.device:
            return [f"Step times are not compared: {a} was trained on {adamw.device}, {b} on {other.device}"]
        ratio, ms = other.step_ms / adamw.step_ms, f"{other.step_ms:.2f} ms against {adamw.step_ms:.2f} ms"
        lines = [f"A training step takes {ratio:.2f} times as long with {b} as with {a}: {ms}, medians"]
        if self.core_shares and any((run.core_share or 0) < BUSY for run in (adamw, other)):
            had = " and ".join(self.core_shares)
            lines.append(f"The machine was busy: the runs had a core for {had} of their time, so the times are rough")
        return lines


def compare(optimizer: Optimizer, recipe: Recipe, job: Job, match: Match, out: Path) -> Comparison:
    """Run or resume the comparison of AdamW with another in the folder `out`; finished runs are not done again.

    Raises:
        Interrupted, StoppedError, DivergedError, BadInputError, SaveError: as `carry_out` does.
    """
    folder = folder_of(optimizer)
    names: tuple[Optimizer, Optimizer] = ("adamw", optimizer)
    arms = [Arm(title(name), name, recipe, out / folder_of(name)) for name in names]
    adamw, other = carry_out(arms, job)
    if adamw.initial_weights != other.initial_weights:
        raise RuntimeError("the two runs did not start from the same weights")
    matched = _match(recipe, job, match, out, adamw, other) if match.match else None
    comparison = Comparison(recipe, adamw, other, matched)
    found = dataclasses.asdict(comparison)
    to_json(out / RESULTS, {folder if key == "other" else key: value for key, value in found.items()})
    return comparison


def _match(recipe: Recipe, job: Job, match: Match, out: Path, adamw: Result, other: Result) -> Matched:
    """Train AdamW with growing budgets, each a full schedule of its own, until it has the other's loss."""
    trials = [(1.0, adamw.valid_loss)]
    while trials[-1][1] > other.valid_loss and trials[-1][0] + match.match_step <= match.match_cap:
        factor = trials[-1][0] + match.match_step
        longer = dataclasses.replace(recipe, steps=round(factor * recipe.steps))
        (result,) = carry_out([Arm(f"AdamW {factor:g}x", "adamw", longer, out / f"adamw-{factor:g}x")], job)
        trials.append((factor, result.valid_loss))
    factor = crossing(trials, other.valid_loss)
    return Matched(trials, factor if math.isfinite(factor) else None)


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


def report_of(c: Comparison) -> Report:
    """The comparison's report."""
    recipe = {key: v for key, v in used(c.recipe).items() if key not in (*SECTIONS, "settings")}
    about = {"parameters": f"{c.adamw.parameters:,}", "initial weights, SHA-256": c.adamw.initial_weights[:16]}
    adamw, other = (settings_of(run.optimizer, c.recipe) for run in (c.adamw, c.other))
    optimizers = [(key, adamw.get(key, ""), other.get(key, "")) for key in adamw | other]
    return Report(
        f"AdamW against {c.titles[1]}",
        c.headlines(),
        _pictures(c),
        [table for table in (_results(c), _matches(c)) if table],
        [[("run", ""), *about.items(), *recipe.items()], [("optimizer", *c.titles), *optimizers]],
    )


def _pictures(c: Comparison) -> list[Picture]:
    """The loss against tokens and, with --match, AdamW's budget."""
    runs = dict(zip(c.titles, (c.adamw, c.other), strict=True))
    # Without the steep start, a tenth of the budget: the ends of the curves are what one wants to tell apart.
    ends = around(
        [point["valid_loss"] for run in runs.values() for point in run.curve if 10 * point["step"] >= run.steps]
    )
    label = "validation loss, nats per token"
    unit, last = c.recipe.unit, c.adamw.valid_loss
    curves = [Line(name, [p[unit] for p in r.curve], [p["valid_loss"] for p in r.curve]) for name, r in runs.items()]
    if c.reached_at is not None:
        there = f"{c.titles[1]} at AdamW's final loss, after {100 * c.reached_at:.1f} % of the budget"
        curves.append(Line(there, [c.reached_at * c.other.seen], [last], mode="markers"))
    reference = ((last, "AdamW's final loss"),)
    shown: list[Picture] = [
        Chart(f"Validation loss against {unit}", f"training {unit}", label, curves, ends, reference=reference)
    ]
    if c.matched is not None:
        budgets, losses = [x for x, _ in c.matched.trials], [y for _, y in c.matched.trials]
        goal, other = c.other.valid_loss, c.titles[1]
        lines = [
            Line("AdamW", budgets, losses, mode="lines+markers"),
            Line(other, [budgets[0], budgets[-1]], [goal, goal]),
        ]
        text = f"AdamW's tokens to {other}'s loss"
        shown.append(Chart(text, f"AdamW's budget ({other} = 1)", label, lines, around([*losses, goal])))
    return shown


def _results(c: Comparison) -> Rows:
    def row(what: str, form: str, key: str) -> tuple[str, ...]:
        return (what, *(format(getattr(run, key), form) for run in (c.adamw, c.other)))

    at = c.reached_at
    return [
        ("", *c.titles),
        row("final validation loss, nats per token", ".4f", "valid_loss"),
        ("budget until AdamW's final loss", "100 %", "never there" if at is None else f"{100 * at:.1f} %"),
        row("training step, median ms", ".2f", "step_ms"),
        row("of that the optimizer, median ms", ".2f", "optimizer_ms"),
        *([("time with a core of the CPU", *c.core_shares)] if c.core_shares else []),
        row("optimizer state, bytes per parameter", ".1f", "state_bytes_per_parameter"),
        row("steps skipped, gradient not finite", ",", "skipped_steps"),
    ]


def _matches(c: Comparison) -> Rows:
    """The budgets that AdamW tried with --match and what they came to; empty without."""
    if c.matched is None:
        return []
    tried = [(f"AdamW, {factor:g} x the tokens", f"{loss:.4f}") for factor, loss in c.matched.trials]
    return [("run", "final loss"), *tried, (c.titles[1], f"{c.other.valid_loss:.4f}")]
