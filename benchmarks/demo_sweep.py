"""Tune AdamW and AdEMAMix for the demo, equally hard: `python benchmarks/demo_sweep.py OUT` (35 minutes on 2 cores).

Both get the same number of trials of one and the same search. It starts from the paper's values, takes one setting at
a time, and walks along that setting's grid for as long as the final validation loss falls. One process with one thread
for each optimizer; OUT/trials.jsonl grows with every trial, and a second call goes on where the first was cut off.
"""

import dataclasses
import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from ademamix.lab.config import PRESETS, Job, Optimizer, Recipe
from ademamix.lab.train import DivergedError, train

TRIALS = 11  # of each optimizer
SEED = 1  # the demo itself runs with seed 0: nothing was tuned on it
LR = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
GRIDS = {
    "adamw": {
        "lr": LR,
        "beta2": (0.95, 0.98, 0.99, 0.999),
        "beta1": (0.8, 0.9, 0.95),
        "weight_decay": (0.03, 0.1, 0.3),
    },
    "ademamix": {
        "lr": LR,
        "alpha": (3.0, 5.0, 8.0, 12.0),
        "beta3": (0.996, 0.998, 0.999, 0.9995),
        "beta2": (0.99, 0.999),
    },
}
START = {
    "adamw": {"lr": 4e-3, "beta2": 0.999, "beta1": 0.9, "weight_decay": 0.1},
    "ademamix": {"lr": 4e-3, "alpha": 8.0, "beta3": 0.999, "beta2": 0.999},
}

Settings = dict[str, float]


def recipe_with(name: Optimizer, settings: Settings) -> Recipe:
    demo = dataclasses.replace(PRESETS["demo"], seed=SEED, eval_every=PRESETS["demo"].steps)
    return dataclasses.replace(demo, **{name: dataclasses.replace(getattr(demo, name), **settings)})


def search(name: Optimizer, out: Path) -> None:
    torch.set_num_threads(1)
    log = out / "trials.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {str(line["settings"]): line["valid_loss"] for line in lines if line["optimizer"] == name}

    def trial(settings: Settings) -> float:
        if str(settings) not in known:
            if len(known) == TRIALS:
                raise StopIteration
            began = time.perf_counter()
            folder = out / ("-".join([name, *(f"{key}{value:g}" for key, value in settings.items())]))
            try:
                loss = train(name, recipe_with(name, settings), Job(), folder).valid_loss
            except DivergedError:
                loss = float("inf")
            known[str(settings)] = loss
            line = {"optimizer": name, "settings": settings, "valid_loss": loss, "seconds": time.perf_counter() - began}
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
        return known[str(settings)]

    best = START[name]
    try:
        while True:
            before = best
            for key, grid in GRIDS[name].items():
                for direction in (1, -1):
                    at = grid.index(best[key]) + direction
                    while 0 <= at < len(grid) and trial(best | {key: grid[at]}) < trial(best):
                        best = best | {key: grid[at]}
                        at += direction
            if best == before:
                return
    except StopIteration:
        return


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=search, args=(name, out)) for name in GRIDS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    for line in sorted(lines, key=lambda line: (line["optimizer"], line["valid_loss"])):
        print(f"| {line['optimizer']} | {line['settings']} | {line['valid_loss']:.4f} | {line['seconds']:.0f} |")


if __name__ == "__main__":
    main()
