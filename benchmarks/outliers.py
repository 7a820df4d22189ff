"""Compact state where the gradients of a block differ in size: `python benchmarks/outliers.py [--out TABLE]`.

Three tables, in a few minutes on one core: a linear layer with one large input feature, the steps of columns whose
gradients are small, and each moment's distance from float32's after 20,000 steps. Runs that are compared have the same
data.
"""

import argparse
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import ademamix
from ademamix import AdamW, AdEMAMix, RuleOptimizer
from ademamix.engine.state import decoded
from ademamix.lab.reports.report import machine

STATES = ("float32", "compact")
KINDS = (AdamW, AdEMAMix)
SEEDS = (0, 1, 2)
FEATURES = 256  # one block a row


def layer(kind: type[RuleOptimizer], state: str, outlier: float, seed: int, steps: int = 2000) -> tuple[float, float]:
    """Linear regression with one feature larger than the others: the relative error of the weights, 1 at the start, and
    the largest step of one, by lr."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.ones(FEATURES)
    features[7] = outlier
    solution = torch.randn(32, FEATURES, generator=generator)
    p = torch.zeros(32, FEATURES, requires_grad=True)
    optimizer, largest = kind([p], lr=1e-3, weight_decay=0.0, state=state, backend="cpu"), 0.0
    for _ in range(steps):
        x = torch.randn(64, FEATURES, generator=generator) * features
        p.grad = (x @ (p.detach() - solution).T).T @ x / len(x)
        largest = max(largest, step(optimizer, p).max().item())
    return ((p.detach() - solution).norm() / solution.norm()).item(), largest


def column(kind: type[RuleOptimizer], state: str, ratio: float, steps: int = 1000) -> tuple[float, float]:
    """The largest step by lr, and their root mean square, in columns whose gradients, noise of mean 0, are ``ratio`` of
    those of their neighbors."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.ones(FEATURES)
    sizes[::2] = ratio
    p = torch.zeros(16, FEATURES, requires_grad=True)
    optimizer, taken = kind([p], lr=1e-3, weight_decay=0.0, state=state, backend="cpu"), []
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator) * sizes
        taken.append(step(optimizer, p)[:, ::2])
    together = torch.stack(taken)
    return together.max().item(), together.square().mean().sqrt().item()


def step(optimizer: RuleOptimizer, p: Tensor) -> Tensor:
    """How far a step moves p, by lr."""
    before = p.detach().clone()
    optimizer.step()
    return (p.detach() - before).abs() / optimizer.param_groups[0]["lr"]


def drift(ratios: tuple[float, ...], steps: int = 20_000) -> Iterator[tuple[str, list[float]]]:
    """For each moment of AdEMAMix, how far it is from float32's where gradients (mean 0.03, noise 1) are multiplied by
    each of the ratios: the norm of the difference by the norm."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(ratios).repeat(FEATURES // len(ratios))
    pool = [(0.03 + torch.randn(16, FEATURES, generator=generator)) * sizes for _ in range(500)]
    params = [torch.zeros(16, FEATURES, requires_grad=True) for _ in STATES]
    optimizers = [AdEMAMix([p], lr=0.0, state=s, backend="cpu") for p, s in zip(params, STATES, strict=True)]
    for i in torch.randint(len(pool), (steps,), generator=generator).tolist():
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = pool[i]
            optimizer.step()
    for name in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"):
        states = [optimizer.state[p] for p, optimizer in zip(params, optimizers, strict=True)]
        exact, low = (decoded(s[name], s.get(f"{name}_scale")).unflatten(1, (-1, len(ratios))) for s in states)
        yield name, ((low - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))).tolist()


def rows() -> Iterator[str]:
    pairs = list(product(KINDS, STATES))
    heads = " | ".join(f"{kind.__name__}, {state}" for kind, state in pairs)
    yield from ("## A linear layer with one large input feature", "")
    yield "The relative error of 32 x 256 weights after 2,000 steps of lr 1e-3 (1 at the start), the mean of three"
    yield "seeds, and the largest step of any weight, divided by lr."
    yield from ("", f"| feature / others | {heads} |", f"|--:|{'--:|' * len(pairs)}")
    for outlier in (1.0, 10.0, 30.0, 100.0, 1e3, 1e4):
        runs = [[layer(kind, state, outlier, seed) for seed in SEEDS] for kind, state in pairs]
        cells = [f"{statistics.mean(e for e, _ in run):.3f}, {max(s for _, s in run):.1f}" for run in runs]
        yield f"| {outlier:,.0f} | {' | '.join(cells)} |"
    yield from ("", "## Columns of small gradients", "")
    yield "The largest of 1,000 steps, and their root mean square, divided by lr, in columns whose gradients are"
    yield "smaller than their neighbors'."
    yield from ("", f"| gradients / neighbors' | {heads} |", f"|--:|{'--:|' * len(pairs)}")
    for ratio in (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        found = [column(kind, state, ratio) for kind, state in pairs]
        yield f"| {ratio:g} | {' | '.join(f'{largest:.2f}, {mean:.3f}' for largest, mean in found)} |"
    ratios = (1.0, 1e-2, 1e-3, 1e-4)
    yield from ("", "## Drift", "")
    yield "The relative error of AdEMAMix's moments after 20,000 steps at beta3 = 0.9999, for gradients of these sizes"
    yield "in one block."
    yield from ("", f"| slot | {' | '.join(f'{ratio:g}' for ratio in ratios)} |", f"|---|{'--:|' * len(ratios)}")
    for name, errors in drift(ratios):
        yield f"| `{name}` | {' | '.join(f'{100 * error:.2f} %' for error in errors)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Compact state and gradients of different sizes",
        "",
        f"- command: `python {shlex.join(sys.argv)}`",
        f"- machine: {machine()}, one thread",
        f"- versions: ademamix {ademamix.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"- date: {time.strftime('%Y-%m-%d')}",
        "",
    ]
    print("\n".join(lines))
    for row in rows():
        print(row, flush=True)
        lines.append(row)
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
