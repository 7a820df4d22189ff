"""One optimizer step: ours against torch.optim, against other libraries where they are installed, and against memory.

    python benchmarks/step.py [--device cuda] [--state compact] [--rounds 15] [--only gpt2] [--out FILE]

Each program takes turns with ``copy`` and torch's fused AdamW, one step each round, on the same parameters and
gradients; only its own state and theirs are in memory then. Reported are medians over the rounds; ratios are medians of
the round-by-round ratios to torch's fused AdamW, so a machine that gets slower does not favour anyone. ``copy`` moves
the float32 parameters and gradients from one place to another: the speed of the memory. Each program's bytes are those
of the parameters and the state, read and written, and of the gradients, read.

On a GPU a step begins when the device is idle, so that its time includes what the host does before the first launch,
which a training hides; ``ms in kernels`` is what the GPU itself works in one step, as torch's profiler sees it.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType

import ademamix
from ademamix import KEMA, AdamW, ADana, AdEMAMix, SimplifiedAdEMAMix
from ademamix.optimizer import STATES

Step = Callable[[], Any]


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 148 tensors of GPT-2 small: 124.4M parameters."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(shape for _ in range(12) for shape in block), (d,), (d,)]


def llama_shapes() -> list[tuple[int, ...]]:
    """A Llama of 24 layers, 2048 wide: 1.3 billion parameters."""
    d, f = 2048, 5464
    block = [*[(d, d)] * 4, (f, d), (f, d), (d, f), (d,), (d,)]
    return [(32000, d), *(shape for _ in range(24) for shape in block), (d,)]


SHAPES = {
    "gpt2": ("GPT-2, 124.4M parameters", gpt2_shapes()),
    "small": ("1000 tensors of 64x64", [(64, 64)] * 1000),
    "1.3b": ("Llama, 1.28B parameters", llama_shapes()),
}
FUSED = {dtype: f"torch AdamW (fused), {str(dtype)[6:]}" for dtype in (torch.float32, torch.bfloat16)}


@dataclass
class Program:
    """Something that is timed."""

    step: Step
    bytes: int  # that it moves

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> "Program":
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.step()
        slots = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return Program(
            optimizer.step, sum(2 * p.nbytes + p.grad.nbytes for p in params) + 2 * sum(t.nbytes for t in slots)
        )


def programs(params: dict[torch.dtype, list[torch.Tensor]], states: Sequence[str]) -> Iterator[tuple[str, Program]]:
    single = params[torch.float32]
    copies = [torch.empty_like(t) for p in single for t in (p, p.grad)]
    sources = [t for p in single for t in (p.detach(), p.grad)]
    yield "copy", Program(lambda: torch._foreach_copy_(copies, sources), 2 * sum(t.nbytes for t in copies))
    for dtype, name in FUSED.items():
        yield name, Program.of(torch.optim.AdamW(params[dtype], fused=True))
    yield "torch AdamW (foreach)", Program.of(torch.optim.AdamW(single, foreach=True))
    for state in states:
        yield f"ademamix AdamW, state {state}", Program.of(AdamW(single, state=state))
        yield f"ademamix AdEMAMix, state {state}", Program.of(AdEMAMix(single, state=state))
        low = params[torch.bfloat16]
        yield f"ademamix AdEMAMix, state {state}, bfloat16 parameters", Program.of(AdEMAMix(low, state=state))
    if "float32" in states:
        yield "ademamix AdEMAMix, beta1 = 0", Program.of(AdEMAMix(single, betas=(0.0, 0.999, 0.9999)))
    try:
        from pytorch_optimizer import AdEMAMix as Theirs

        yield "pytorch_optimizer AdEMAMix", Program.of(Theirs(single))
    except ImportError:
        pass
    try:
        from bitsandbytes import optim

        yield "bitsandbytes AdEMAMix", Program.of(optim.AdEMAMix(single))
        yield "bitsandbytes AdEMAMix8bit", Program.of(optim.AdEMAMix8bit(single))
    except ImportError:
        pass


def seconds(step: Step, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def kernels(step: Step) -> tuple[int, float]:
    """How many kernels a step starts on the GPU, and the milliseconds that they take together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    # Beside these there are the calls that start them, on the CPU, and what is marked on the GPU's time line.
    on_gpu = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    taken = [e.time_range.elapsed_us() / 1e3 for e in on_gpu if not e.name.startswith("Mem")]
    return len(taken), sum(taken)


def timed(contenders: dict[str, Program], rounds: int, device: torch.device) -> dict[str, np.ndarray]:
    """Seconds of each program in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, program in contenders.items():
            times[name].append(seconds(program.step, device))
    return {name: np.array(values[1:]) for name, values in times.items()}  # in the first round caches are cold


def milliseconds(taken: np.ndarray, device: torch.device) -> list[str]:
    """Median and range, as cells; a GPU's steps are short."""
    least, median, most = (f"{1e3 * x:.{1 if device.type == 'cpu' else 3}f}" for x in np.quantile(taken, (0, 0.5, 1)))
    return [median, f"{least} to {most}"]


def rules(rounds: int, device: torch.device) -> list[str]:
    """Our optimizers against each other, and against what their bytes would cost at the speed of our AdamW."""
    title, shapes = SHAPES["gpt2"]
    torch.manual_seed(0)
    params = [torch.randn(s, device=device).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "AdamW": AdamW(params),
        "AdEMAMix": AdEMAMix(params),
        "AdEMAMix, beta1 = 0": AdEMAMix(params, betas=(0.0, 0.999, 0.9999)),
        "AdEMAMix, log-time": AdEMAMix(params, beta3_schedule="log-time"),
        "SimplifiedAdEMAMix": SimplifiedAdEMAMix(params),
        "ADana": ADana(params),
        **{f"KEMA, K = {k}": KEMA(params, count=k) for k in (2, 3, 4)},
    }
    contenders = {name: Program.of(optimizer) for name, optimizer in optimizers.items()}
    every = timed(contenders, rounds, device)
    heads = ["rule", "ms a step, median", "min to max", "to AdamW", "bytes to AdamW's", "time for its bytes"]
    rows = [f"### Rules, {title}", "", f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, taken in every.items():
        ratio = np.median(taken / every["AdamW"])
        share = contenders[name].bytes / contenders["AdamW"].bytes
        cells = [*milliseconds(taken, device), f"{ratio:.2f}", f"{share:.2f}"]
        rows.append(f"| {name} | {' | '.join(cells)} | {ratio / share:.2f} |")
    return rows


def steps(which: str, rounds: int, device: torch.device, states: Sequence[str]) -> list[str]:
    title, shapes = SHAPES[which]
    torch.manual_seed(0)
    params = {torch.float32: [torch.randn(s, device=device).requires_grad_() for s in shapes]}
    params[torch.bfloat16] = [p.detach().bfloat16().requires_grad_() for p in params[torch.float32]]
    for p in chain(*params.values()):
        p.grad = torch.randn_like(p)
    contenders = programs(params, states)
    references = dict(islice(contenders, 1 + len(FUSED)))
    heads = ["program", "ms a step, median", "min to max", "to torch, float32", "to torch, bfloat16", "GB/s", "of copy"]
    heads += ["launches", "ms in kernels"] * (device.type == "cuda")
    rows = [f"### {title}", "", f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]

    def add(name: str, program: Program, every: dict[str, np.ndarray]) -> None:
        speed, memory = program.bytes / every[name], references["copy"].bytes / every["copy"]
        ratios = [f"{np.median(every[name] / every[reference]):.2f}" for reference in FUSED.values()]
        cells = [*milliseconds(every[name], device), *ratios]
        cells += [f"{np.median(speed) / 1e9:.0f}", f"{np.median(speed / memory):.0%}"]
        if device.type == "cuda":
            count, busy = kernels(program.step)
            cells += [str(count), f"{busy:.3f}"]
        rows.append(f"| {name} | {' | '.join(cells)} |")

    every = timed(references, rounds, device)
    for name, program in references.items():
        add(name, program, every)
    for name, program in contenders:
        add(name, program, timed({**references, name: program}, rounds, device))
        del program  # its state, before that of the next is made
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
    for title, shapes in (SHAPES["gpt2"], SHAPES["small"]):
        extra, state = fresh(MEMORY.format(shapes=shapes))
        rows.append(f"| {title} | {state / 1e6:.1f} | {extra / 1e6:.2f} | {extra / state:.3%} |")
    return rows


def machine(device: torch.device) -> list[str]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    where = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    vectors = torch.backends.cpu.get_cpu_capability()  # processors of one name may differ in these
    names = ("numba", "triton", "bitsandbytes", "pytorch_optimizer")
    found = [f"{name} {version}" for name in names if (version := installed(name))]
    return [
        f"- command: `python {' '.join(sys.argv)}`",
        f"- machine: {where}{cpu}, {vectors}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{platform.system()}",
        f"- versions: ademamix {ademamix.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{', '.join(found)}",
        f"- date: {time.strftime('%Y-%m-%d')}",
    ]


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument(
        "--state", choices=STATES, nargs="+", default=STATES, help="how ours stores state; default: all"
    )
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    parser.add_argument("--only", choices=[*SHAPES, "rules", "start", "memory"], help="one part alone")
    parser.add_argument("--out", help="also write the tables to this file")
    options = parser.parse_args()
    if options.device.index is not None and options.device.type == "cuda":
        torch.cuda.set_device(options.device)  # events are recorded on the current one
    rows = ["## One optimizer step", "", *machine(options.device)]
    print("\n".join(rows), flush=True)
    parts: dict[str, Callable[[int], list[str]]] = {
        "gpt2": lambda rounds: steps("gpt2", rounds, options.device, options.state),
        "rules": lambda rounds: rules(rounds, options.device),
        "small": lambda rounds: steps("small", 4 * rounds, options.device, options.state),
    }
    if options.device.type == "cpu":
        parts |= {"start": start, "memory": memory}
    else:
        parts["1.3b"] = lambda rounds: steps("1.3b", rounds, options.device, options.state)
    if options.only and options.only not in parts:
        parser.error(f"--only {options.only} is not measured on {options.device}; there are {', '.join(parts)}")
    for name, part in parts.items():
        if options.only in (None, name):
            try:
                table = part(options.rounds)
            except torch.OutOfMemoryError as error:
                table = [f"{name}: {str(error).splitlines()[0]}"]
            rows += (table := ["", *table])
            print("\n".join(table), flush=True)
            if options.out:  # after each part: what is measured is not lost with a later one
                with open(options.out, "w") as file:
                    file.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
