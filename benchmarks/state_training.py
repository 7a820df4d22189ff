"""What low-bit state costs in loss: `python benchmarks/state_training.py FOLDER [--out TABLE]`.

Trains the demo's model with AdEMAMix for every way of storing, three seeds each, from the same weights on the same
batches as the float32 run of the seed; as many runs at a time as there are cores, each on one thread. Runs are kept in
FOLDER: a second call goes on where the first was cut off.
"""

import argparse
import dataclasses
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import ademamix
from ademamix.lab.config import PRESETS, Job
from ademamix.lab.train import Result, train

SEEDS = (0, 1, 2)
VARIANTS = {  # state, parameters
    "float32": ("float32", "float32"),
    "compact": ("compact", "float32"),
    "bfloat16": ("bfloat16", "float32"),
    "bfloat16, bfloat16 parameters": ("bfloat16", "bfloat16"),
    "compact, bfloat16 parameters": ("compact", "bfloat16"),
}


def run(folder: Path, name: str, seed: int) -> Result:
    torch.set_num_threads(1)
    state, dtype = VARIANTS[name]
    demo = PRESETS["demo"]
    optimizer = dataclasses.replace(demo.ademamix, state=state)
    recipe = dataclasses.replace(demo, seed=seed, dtype=dtype, ademamix=optimizer)
    return train("ademamix", recipe, Job(), folder / f"{state}-{dtype}-{seed}", label=f"{name}, seed {seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--out", help="also write the table to this file")
    options = parser.parse_args()
    jobs = [(options.folder, name, seed) for name in VARIANTS for seed in SEEDS]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        results = pool.starmap(run, jobs, chunksize=1)
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    sizes: dict[str, float] = {}
    for (_, name, _), result in zip(jobs, results, strict=True):
        losses[name].append(result.valid_loss)
        sizes[name] = result.state_bytes_per_parameter
    rows = [
        "## Training with low-bit state",
        "",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- machine: {platform.machine()}, {os.cpu_count()} cores, one thread a run",
        f"- versions: ademamix {ademamix.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"- date: {time.strftime('%Y-%m-%d')}",
        "",
        "The demo's AdEMAMix run (0.43M parameters, 4.1 million bytes of Python source); final validation loss, nats a",
        "byte, and how much higher it is than that of the float32 run.",
        "",
        f"| state | bytes a parameter | {' | '.join(f'seed {s}' for s in SEEDS)} | mean | higher by | worst seed |",
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
