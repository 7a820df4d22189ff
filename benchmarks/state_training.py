"""What low-bit state costs in loss: `python benchmarks/state_training.py FOLDER [--only ...] [--out TABLE]`.

Trains the demo's model with AdEMAMix for every way of storing, three seeds each, from the same weights on the same
batches as the float32 run of the seed; one run per core. Runs are kept in FOLDER: a second call continues where the
first was cut off.
"""

import argparse
import dataclasses
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

import ademamix
from ademamix.lab.config import PRESETS, Optimizer, Recipe
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.report import machine

SEEDS = (0, 1, 2)
VARIANTS = {  # state, parameters
    "float32": ("float32", "float32"),
    "compact": ("compact", "float32"),
    "bfloat16": ("bfloat16", "float32"),
    "bfloat16, bfloat16 parameters": ("bfloat16", "bfloat16"),
    "compact, bfloat16 parameters": ("compact", "bfloat16"),
}


def made(variant: str, seed: int) -> tuple[Optimizer, Recipe]:
    state, dtype = VARIANTS[variant]
    demo = PRESETS["demo"]
    optimizer = dataclasses.replace(demo.ademamix, state=state)
    return "ademamix", dataclasses.replace(demo, seed=seed, dtype=dtype, ademamix=optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="besides float32")
    parser.add_argument("--out", help="also write the table to this file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    names = tuple(dict.fromkeys(("float32", *options.only)))
    grids = [
        Grid(name.replace(", ", "-").replace(" ", "-"), {"variant": (name,), "seed": SEEDS}, made) for name in names
    ]
    with Trials(options.folder, "cpu", 0) as trials:
        found = trials.run(*grids)
    losses: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    for name, results in zip(names, found, strict=True):
        runs = [results[name, seed] for seed in SEEDS]
        losses[name] = [float("inf") if run is None else run.valid_loss for run in runs]
        sizes[name] = next((run.state_bytes_per_parameter for run in runs if run is not None), 0.0)
    rows = [
        "## Training with low-bit state",
        "",
        f"- command: `python {shlex.join(sys.argv)}`",
        f"- machine: {machine()}, one thread a run",
        f"- versions: ademamix {ademamix.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"- date: {time.strftime('%Y-%m-%d')}",
        "",
        "The demo's AdEMAMix run (0.1M parameters, 1.3 million bytes of Python source); final validation loss, nats a",
        "byte, and by how much it is higher than that of the float32 run of the seed. Parameters of one dimension, and",
        "those of less than 4096 elements, keep float32 state.",
        "",
        f"| state | bytes per parameter | {' | '.join(f'seed {s}' for s in SEEDS)} | mean | higher by | worst seed |",
        f"|---|--:|{'--:|' * len(SEEDS)}--:|--:|--:|",
    ]
    for name, values in losses.items():
        changes = [100 * (x / y - 1) for x, y in zip(values, losses["float32"], strict=True)]
        cells = " | ".join(f"{x:.4f}" for x in values)
        mean, change, worst = statistics.mean(values), statistics.mean(changes), max(changes, key=abs)
        rows.append(f"| {name} | {sizes[name]:.2f} | {cells} | {mean:.4f} | {change:+.3f} % | {worst:+.3f} % |")
    print("\n".join(rows))
    if options.out:
        Path(options.out).write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
