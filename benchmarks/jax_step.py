"""One optimizer step in JAX: ours against optax.adamw and optax.contrib.ademamix.

    python benchmarks/jax_step.py [--params 124.4] [--rounds 9] [--state compact]

Programs take turns, one jitted step with donated buffers each round, on parameters of GPT-2's shapes, scaled to the
wanted size. Reported are medians over the rounds; ratios are medians of the round-by-round ratios to optax's AdEMAMix.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ademamix.jax as ours

REFERENCE = "optax.contrib.ademamix"


def shapes(millions: float) -> list[tuple[int, ...]]:
    """GPT-2 small's tensors (124.4 million elements), all of them narrower by the same factor."""
    d = max(8, 8 * round(96 * (millions / 124.4) ** 0.5))
    words = round(50257 * d / 768)
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(words, d), (1024, d), *(shape for _ in range(12) for shape in block), (d,), (d,)]


class Program:
    """A jitted step, its parameters and its state."""

    def __init__(self, tx: Any, start: list[Any]) -> None:
        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.params = [jnp.array(p) for p in start]
        self.state = tx.init(self.params)

    def seconds(self, grads: list[Any]) -> float:
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, grads))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=124.4, help="parameters in millions")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--state", nargs="*", default=[], help='also AdEMAMix with these: "bfloat16", "compact"')
    args = parser.parse_args()

    warm: dict[str, Any] = {"alpha": 8.0, "alpha_warmup": 1000, "beta3_warmup": 1000}
    makers: dict[str, Callable[[], Any]] = {
        "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
        REFERENCE: lambda: optax.contrib.ademamix(1e-3, alpha=8.0, weight_decay=0.1),
        "ademamix.jax.adamw": lambda: ours.adamw(1e-3, weight_decay=0.1),
        "ademamix.jax.ademamix": lambda: ours.ademamix(1e-3, weight_decay=0.1, **warm),
        "ademamix.jax.simplified_ademamix": lambda: ours.simplified_ademamix(1e-5, weight_decay=0.1),
        "ademamix.jax.adana": lambda: ours.adana(1e-3, weight_decay=0.1),
        "ademamix.jax.kema, K = 3": lambda: ours.kema(1e-3, weight_decay=0.1),
    }
    for state in args.state:
        makers[f"ademamix.jax.ademamix, state {state}"] = lambda state=state: ours.ademamix(1e-3, state=state, **warm)
    key = jax.random.key(0)
    start = [jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 148), shapes(args.params), strict=True)]
    grads = [0.01 * p for p in start]
    programs = {name: Program(make(), start) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(args.rounds + 1):
        for name, program in programs.items():
            times[name].append(program.seconds(grads))
    elements = sum(p.size for p in start)
    print(f"{elements / 1e6:.1f}M parameters, jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0]}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.rounds} rounds\n")
    print("| program | first step, s | ms per step, median | min to max | to optax's AdEMAMix | bytes per parameter |")
    print("|---|--:|--:|--:|--:|--:|")
    reference = np.array(times[REFERENCE][1:])
    for name, (first, *rest) in times.items():
        ms = 1e3 * np.array(rest)
        state = sum(x.nbytes for x in jax.tree.leaves(programs[name].state)) / elements
        cells = [f"{first:.1f}", f"{np.median(ms):.1f}", f"{ms.min():.1f} to {ms.max():.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {np.median(ms / 1e3 / reference):.2f} | {state:.1f} |")


if __name__ == "__main__":
    main()
