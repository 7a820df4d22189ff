"""One optimizer step: ours against torch.optim, against other libraries where they are installed, and against memory.

    python benchmarks/step.py [--rounds 15] [--only gpt2|small|start|memory] [--out docs/results/step-cpu.md]

Programs take turns, one step each round, on the same parameters and gradients. Reported are medians over the rounds;
ratios are medians of the round-by-round ratios to torch's fused AdamW, so a machine that gets slower does not favour
anyone. ``stream`` is our engine with rules that only add: the time that the machine's memory needs for the traffic.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import ademamix
from ademamix import AdamW, AdEMAMix, RuleOptimizer

Step = Callable[[], Any]


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 148 tensors of GPT-2 small: 124.4M parameters."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(shape for _ in range(12) for shape in block), (d,), (d,)]


SHAPES = {"gpt2": ("GPT-2, 124.4M parameters", gpt2_shapes()), "small": ("1000 tensors of 64x64", [(64, 64)] * 1000)}


class Stream(RuleOptimizer):
    """The memory traffic of a rule without its arithmetic: all streams read, all but the gradient written."""

    def __init__(self, params: Any, rule: Any) -> None:
        self.rule = rule
        super().__init__(params, {"maximize": False}, backend="cpu")

    @staticmethod
    def check(group: Any) -> None:
        pass

    @staticmethod
    def coefficients(step: float, group: Any) -> dict[str, float]:
        return {}

    def stored(self, group: Any) -> tuple[str, ...]:  # type: ignore[override]
        return ademamix.backends.slot_names(self.rule)


def five_read_four_written(p: Any, g: Any, a: Any, b: Any, c: Any) -> Any:
    return p + g, a + g, b + g, c + g


def four_read_three_written(p: Any, g: Any, a: Any, b: Any) -> Any:
    return p + g, a + g, b + g


def programs(params: list[torch.Tensor]) -> Iterator[tuple[str, Step]]:
    yield "torch AdamW (fused)", torch.optim.AdamW(params, fused=True).step
    yield "torch AdamW (foreach)", torch.optim.AdamW(params, foreach=True).step
    yield "ademamix AdamW", AdamW(params).step
    yield "ademamix AdEMAMix", AdEMAMix(params).step
    yield "ademamix AdEMAMix, beta1 = 0", AdEMAMix(params, betas=(0.0, 0.999, 0.9999)).step
    yield "ademamix AdamW, state compact", AdamW(params, state="compact").step
    yield "ademamix AdEMAMix, state compact", AdEMAMix(params, state="compact").step
    yield "ademamix AdEMAMix, state bfloat16", AdEMAMix(params, state="bfloat16").step
    yield "stream: 4 read, 3 written", Stream(params, four_read_three_written).step
    yield "stream: 5 read, 4 written", Stream(params, five_read_four_written).step
    try:
        from pytorch_optimizer import AdEMAMix as Theirs

        yield "pytorch_optimizer AdEMAMix", Theirs(params).step
    except ImportError:
        pass
    try:
        from bitsandbytes import optim

        yield "bitsandbytes AdEMAMix", optim.AdEMAMix(params).step
        yield "bitsandbytes AdEMAMix8bit", optim.AdEMAMix8bit(params).step
    except ImportError:
        pass


def steps(which: str, rounds: int) -> list[str]:
    title, shapes = SHAPES[which]
    torch.manual_seed(0)
    params = [torch.randn(s).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    contenders = dict(programs(params))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    rows = [
        f"### {title}",
        "",
        "| program | ms a step, median | min to max | ratio to torch's fused AdamW |",
        "|---|--:|--:|--:|",
    ]
    reference = np.array(times["torch AdamW (fused)"][1:])  # the first round compiles and allocates
    for name, seconds in times.items():
        ms, ratios = 1e3 * np.array(seconds[1:]), np.array(seconds[1:]) / reference
        rows.append(f"| {name} | {np.median(ms):.1f} | {ms.min():.1f} to {ms.max():.1f} | {np.median(ratios):.2f} |")
    return rows


START = """
    import time; t0 = time.perf_counter()
    import torch; t1 = time.perf_counter()
    import ademamix; t2 = time.perf_counter()
    ps = [torch.ones(8, 8, requires_grad=True) for _ in range({tensors})]
    for p in ps: p.grad = torch.ones(8, 8)
    optimizer = ademamix.AdEMAMix(ps, backend="cpu")
    t3 = time.perf_counter(); optimizer.step(); t4 = time.perf_counter()
    print(t2 - t1, t4 - t3)
"""
MEMORY = """
    import torch, ademamix, re
    ps = [torch.ones(s, requires_grad=True) for s in {shapes}]
    for p in ps: p.grad = torch.ones_like(p)
    optimizer = ademamix.AdEMAMix(ps, backend="cpu")
    optimizer.step()
    def status():
        text = open("/proc/self/status").read()
        return {{name: int(value) for name, value in re.findall(r"(VmHWM|VmRSS):\\s+(\\d+)", text)}}
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again here
    before = status()["VmRSS"]
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    print((status()["VmHWM"] - before) * 1024, state)
"""


def fresh(code: str, **environment: str) -> list[float]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, **environment}
    return [float(x) for x in subprocess.run(command, env=environment, check=True, capture_output=True).stdout.split()]


def start(rounds: int) -> list[str]:
    rows = ["### A fresh process", "", "| what | seconds, median | min to max |", "|---|--:|--:|"]

    def row(what: str, seconds: list[float]) -> None:
        rows.append(f"| {what} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")

    imports, repeats = [], max(3, rounds // 3)
    for tensors in (3, 1000):
        cold, warm = [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                for seconds in (cold, warm):
                    more, first = fresh(START.format(tensors=tensors), ADEMAMIX_CACHE=folder)
                    imports.append(more)
                    seconds.append(first)
        row(f"first step, {tensors} tensors, cold cache", cold)
        row(f"first step, {tensors} tensors, warm cache", warm)
    row("import ademamix, after import torch", imports)
    return rows


def memory(rounds: int) -> list[str]:
    rows = [
        "### Memory during a step",
        "",
        "| parameters | state, MB | peak above it, MB | share |",
        "|---|--:|--:|--:|",
    ]
    for title, shapes in SHAPES.values():
        extra, state = fresh(MEMORY.format(shapes=shapes))
        rows.append(f"| {title} | {state / 1e6:.1f} | {extra / 1e6:.2f} | {extra / state:.3%} |")
    return rows


def machine() -> list[str]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    import numba

    return [
        f"- command: `python {' '.join(sys.argv)}`",
        f"- machine: {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}",
        f"- versions: ademamix {ademamix.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"numba {numba.__version__}",
        f"- date: {time.strftime('%Y-%m-%d')}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    parser.add_argument("--only", choices=[*SHAPES, "start", "memory"], help="one part alone")
    parser.add_argument("--out", help="also write the tables to this file")
    options = parser.parse_args()
    rows = ["## One optimizer step", "", *machine()]
    print("\n".join(rows), flush=True)
    parts: dict[str, Callable[[int], list[str]]] = {
        "gpt2": lambda rounds: steps("gpt2", rounds),
        "small": lambda rounds: steps("small", 4 * rounds),
        "start": start,
        "memory": memory,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            rows += (table := ["", *part(options.rounds)])
            print("\n".join(table), flush=True)
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
