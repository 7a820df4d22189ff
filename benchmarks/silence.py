"""What bounds AdEMAMix's steps where gradients stop: `python benchmarks/silence.py FOLDER [--out TABLE]`.

The first table compares candidates on 256 elements in float64. The second trains the demo's language model with and
without the limit, from the same weights on the same batches, three seeds each. Runs are kept in FOLDER/runs.jsonl as
they end: a second call does those that are missing.
"""

import argparse
import dataclasses
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ademamix
from ademamix import AdEMAMix, suggest
from ademamix.lab.config import PRESETS
from ademamix.lab.reports.report import machine
from ademamix.lab.training.tasks import Text

Array = np.ndarray[Any, Any]
EPS, BETAS = 1e-8, (0.9, 0.999, 0.9999)
ELEMENTS, ACTIVE, SILENT = 256, 5_000, 60_000

# Of a step, in units of lr: (m1_hat, m2, rms, alpha) -> direction
CANDIDATES: dict[str, Callable[[Array, Array, Array, float], Array]] = {
    "the paper's": lambda m1, m2, rms, alpha: (m1 + alpha * m2) / (rms + EPS),
    "the direction held to 1 + alpha": lambda m1, m2, rms, alpha: np.clip(
        (m1 + alpha * m2) / (rms + EPS), -1 - alpha, 1 + alpha
    ),
    "m2 held to rms": lambda m1, m2, rms, alpha: (m1 + alpha * np.clip(m2, -rms, rms)) / (rms + EPS),
    "v at least m2^2": lambda m1, m2, rms, alpha: (m1 + alpha * m2) / (np.maximum(rms, abs(m2)) + EPS),
    "m2 above rms counts as 0": lambda m1, m2, rms, alpha: (m1 + alpha * np.where(abs(m2) > rms, 0, m2)) / (rms + EPS),
    "m2 above rms counts as rms^2 / m2": lambda m1, m2, rms, alpha: (
        (m1 + alpha * np.where(abs(m2) > rms, rms * rms / np.where(m2 == 0, 1, m2), m2)) / (rms + EPS)
    ),
    "v forgets only where g is not 0": lambda m1, m2, rms, alpha: (m1 + alpha * m2) / (rms + EPS),
}


def stopping(random: np.random.Generator) -> Iterator[Array | None]:
    """Normal gradients, then none."""
    for _ in range(ACTIVE):
        yield random.standard_normal(ELEMENTS)
    for _ in range(SILENT):
        yield None


def touched(every: int, random: np.random.Generator) -> Iterator[Array | None]:
    """A gradient in each so many steps."""
    for t in range(60_000 if every > 1000 else 10_000):
        yield random.standard_normal(ELEMENTS) if t % every == 0 else None


def moves(name: str, alpha: float, gradients: Iterator[Array | None]) -> Iterator[Array]:
    """The steps that a candidate takes, in units of lr."""
    m1, m2, v = np.zeros((3, ELEMENTS))
    b1, b2, b3 = BETAS
    for t, g in enumerate(gradients, start=1):
        g = np.zeros(ELEMENTS) if g is None else g
        m1, m2 = b1 * m1 + (1 - b1) * g, b3 * m2 + (1 - b3) * g
        v = np.where((g == 0) & (name == "v forgets only where g is not 0"), v, b2 * v + (1 - b2) * g * g)
        yield CANDIDATES[name](m1 / (1 - b1**t), m2, np.sqrt(v / (1 - b2**t)), alpha)


def figures(name: str, alpha: float) -> tuple[float, float, float, float]:
    """Largest step and largest way of an element after its gradients stop; largest step of one that has a gradient in
    10,000 steps; way of one that has it in 100."""
    way, largest = np.zeros(ELEMENTS), 0.0
    for t, step in enumerate(moves(name, alpha, stopping(np.random.default_rng(0)))):
        if t >= ACTIVE:
            way, largest = way + step, max(largest, abs(step).max())
    rare = max(abs(step).max() for step in moves(name, alpha, touched(10_000, np.random.default_rng(0))))
    often = np.mean([abs(step).mean() for step in moves(name, alpha, touched(100, np.random.default_rng(0)))])
    return largest, abs(way).max(), rare, float(often) * 100


def compared() -> list[str]:
    rows = [
        "| | alpha | largest step in silence | way in silence | largest step, a gradient each 10,000 steps "
        "| way per gradient, one each 100 steps |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in CANDIDATES:
        for alpha in (2.0, 8.0):
            cells = " | ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in figures(name, alpha))
            rows.append(f"| {name} | {alpha:.0f} | {cells} |")
            print(rows[-1], flush=True)
    return rows


# --------------------------------------------------------------------------------- a language model

STEPS, SEEDS = 1000, (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    "suggest's": suggest(STEPS),
    "the defaults": {},
    "alpha 8 at once": {"betas": (0.9, 0.99, 0.998), "alpha": 8.0},
}


def trained(setting: str, seed: int, slow_limit: float | None) -> dict[str, float]:
    """The final validation loss, and the share of elements and steps that the limit changes or would change."""
    task = Text(dataclasses.replace(PRESETS["demo"], seed=seed))
    model = task.model()
    optimizer = AdEMAMix(model.parameters(), lr=2e-3, weight_decay=0.1, slow_limit=slow_limit, **SETTINGS[setting])
    (group,) = optimizer.param_groups
    above = total = 0
    for t in range(STEPS):
        group["lr"] = 2e-3 * min(1.0, (t + 1) / (STEPS / 20)) * (0.5 + 0.5 * math.cos(math.pi * t / STEPS))
        loss = task.loss(model, task.batch(t))
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        c = AdEMAMix.coefficients(t + 1.0, {**group, "slow_limit": 1.0})
        for state in optimizer.state.values():
            slow = float(c["alpha"]) * state["exp_avg_slow"]
            above += int((float(c["floor"]) * slow * slow > state["exp_avg_sq"]).sum())
            total += slow.numel()
    batches = task.valid_batches(64)
    with torch.no_grad():
        valid = sum(task.loss(model, batch).item() for batch in batches) / len(batches)
    return {"valid_loss": valid, "share": above / total}


def runs(folder: Path) -> dict[tuple[str, int, bool], dict[str, float]]:
    file = folder / "runs.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(x["setting"], x["seed"], x["limited"]): x for x in lines}
    for setting in SETTINGS:
        for seed in SEEDS:
            for limited in (False, True):
                if (setting, seed, limited) in done:
                    continue
                found = trained(setting, seed, 1.0 if limited else None)
                line = {"setting": setting, "seed": seed, "limited": limited, **found}
                done[setting, seed, limited] = line
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(line, flush=True)
    return done


def losses(folder: Path) -> list[str]:
    done = runs(folder)
    rows = [
        "| settings | without, seeds 0 to 2 | with | mean difference | above the limit, without | with |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for setting in SETTINGS:
        without, limited = ([done[setting, seed, x] for seed in SEEDS] for x in (False, True))
        means = [
            statistics.mean(b["valid_loss"] - a["valid_loss"] for a, b in zip(without, limited, strict=True)),
            *(statistics.mean(x["share"] for x in each) for each in (without, limited)),
        ]
        cells = [" ".join(f"{x['valid_loss']:.4f}" for x in each) for each in (without, limited)]
        rows.append(f"| {setting} | {cells[0]} | {cells[1]} | {means[0]:+.4f} | {means[1]:.1e} | {means[2]:.1e} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--out", help="also write the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        "## Gradients that stop",
        "",
        f"- command: `python {shlex.join(sys.argv)}`",
        f"- machine: {machine()}, one thread",
        f"- versions: ademamix {ademamix.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"- date: {time.strftime('%Y-%m-%d')}",
        "",
        f"AdEMAMix with betas {BETAS} and no warmups: {ELEMENTS} elements with normal gradients for {ACTIVE:,} steps",
        f"and none for {SILENT:,} more. Steps and ways are in units of lr, those of the element with the largest.",
        "rms is the root of v_hat.",
        "",
        *compared(),
        "",
        f"The demo's model (0.1M parameters) after {STEPS:,} steps of lr 2e-3 with a warmup of a twentieth and a",
        "cosine: validation loss in nats per byte with and without `slow_limit`, and the share of elements and steps",
        "above it.",
        "",
        *losses(options.folder),
    ]
    print("\n".join(rows))
    if options.out:
        Path(options.out).write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
