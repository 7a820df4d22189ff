"""One optimizer step: ours against torch.optim, against other libraries where they are installed, and against memory.

    python benchmarks/step.py [--device cuda] [--state compact] [--rounds 15] [--only gpt2] [--out FILE]

Each program takes turns with ``copy`` and torch's fused AdamW, one step each round, on the same parameters and
gradients; only its own state and theirs are in memory then. Reported are medians over the rounds; ratios are medians of
the round-by-round ratios to torch's fused AdamW, so a machine that gets slower does not favor anyone. ``copy`` moves
the float32 parameters and gradients from one place to another: the speed of the memory. Each program's bytes are those
of the parameters and the state, read and written, and of the gradients, read.

On a GPU the time of a step is the GPU's own: a pause in its queue lets the host get ahead, as it is in a training run.
What the host needs for a step is measured separately, while nobody waits for the GPU. ``launches`` are the kernels that
torch's profiler sees. There is a table of the project's goals, which are for GPT-2. ``--tiny`` runs everything that is
measured on a GPU, but on a few small tensors: a dry run for a machine without one.
"""

import argparse
import contextlib
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType

import ademamix
from ademamix import KEMA, AdamW, ADana, AdEMAMix, SimplifiedAdEMAMix
from ademamix.engine.kinds import STATES

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
TINY = {name: (f"{title} (tiny: a dry run)", [(300, 64), (64, 64), (64,)]) for name, (title, _) in SHAPES.items()}
FUSED = {dtype: f"torch AdamW (fused), {str(dtype)[6:]}" for dtype in (torch.float32, torch.bfloat16)}
TORCHS = "torch AdamW (fused)"
PAUSE = 4_000_000  # cycles of a GPU, about 2 ms: for a start
LONGEST = 400_000_000  # about 0.2 s


@dataclass
class Program:
    """Something that is timed."""

    step: Step
    bytes: int  # that it moves
    prepare: Step = lambda: None  # what is done before each step, not timed

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> "Program":
        params = [p for group in optimizer.param_groups for p in group["params"]]
        compiled(optimizer).step()
        slots = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return Program(
            optimizer.step, sum(2 * p.nbytes + p.grad.nbytes for p in params) + 2 * sum(t.nbytes for t in slots)
        )

    @staticmethod
    def copy(params: Sequence[torch.Tensor]) -> "Program":
        """Parameters and gradients copied; on a GPU as many bytes in one piece (at most 4 GiB): as fast as it gets."""
        sources = [t for p in params for t in (p.detach(), p.grad)]
        if params[0].device.type == "cuda":
            whole = torch.ones(min(sum(t.numel() for t in sources), 1 << 30), device="cuda")
            copy = torch.empty_like(whole)
            return Program(lambda: copy.copy_(whole), 2 * copy.nbytes)
        copies = [torch.empty_like(t) for t in sources]
        return Program(lambda: torch._foreach_copy_(copies, sources), 2 * sum(t.nbytes for t in copies))


def compiled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer after a first step. Raises RuntimeError if that ran on eager, whose figures are not ours."""
    optimizer.step()
    if "eager" in getattr(optimizer, "backends_in_use", ()):  # others' optimizers have no such thing
        raise RuntimeError(f"{type(optimizer).__name__} ran on {optimizer.backends_in_use}, not on the fused backend")
    return optimizer


def programs(params: dict[torch.dtype, list[torch.Tensor]], states: Sequence[str]) -> Iterator[tuple[str, Program]]:
    single = params[torch.float32]
    yield "copy", Program.copy(single)
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
    """Seconds of a step; on a GPU those of its own work, unless the host takes longer than the longest pause."""
    if device.type == "cpu":
        return on_host(step, device)
    pause = PAUSE
    while True:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(pause)
        before.record()
        step()
        after.record()
        ahead = not before.query()  # the pause is not over yet
        after.synchronize()
        if ahead or (pause := 4 * pause) > LONGEST:
            return before.elapsed_time(after) / 1e3


def on_host(step: Step, device: torch.device) -> float:
    """Seconds that the host takes to carry a step out, or for a GPU to start it."""
    start = time.perf_counter()
    step()
    taken = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize()  # its queue never gets full
    return taken


def kernels(step: Step) -> tuple[int, int, float]:
    """How many kernels and copies a step starts on the GPU, and the milliseconds that the kernels take together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    # There are also the calls that start them, on the CPU, and what is marked on the GPU's time line.
    on_gpu = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    taken = [e.time_range.elapsed_us() / 1e3 for e in on_gpu if not e.name.startswith("Mem")]
    return len(taken), len(on_gpu) - len(taken), sum(taken)


def timed(
    contenders: dict[str, Program], rounds: int, device: torch.device, measure: Callable[..., float] = seconds
) -> dict[str, np.ndarray]:
    """Seconds of each program in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, program in contenders.items():
            program.prepare()
            times[name].append(measure(program.step, device))
    return {name: np.array(values[1:]) for name, values in times.items()}  # in the first round caches are cold


def milliseconds(taken: np.ndarray, device: torch.device) -> list[str]:
    """Median and range, as cells; a GPU's steps are short."""
    least, median, most = (f"{1e3 * x:.{1 if device.type == 'cpu' else 3}f}" for x in np.quantile(taken, (0, 0.5, 1)))
    return [median, f"{least} to {most}"]


def made(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[torch.Tensor]:
    """Parameters with gradients."""
    torch.manual_seed(0)
    params = [torch.randn(s, device=device).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def head(title: str, columns: Sequence[str], align: str = "--:") -> list[str]:
    return [f"### {title}", "", f"| {' | '.join(columns)} |", "|---|" + f"{align}|" * (len(columns) - 1)]


def rules(rounds: int, device: torch.device) -> Iterator[str]:
    """Our optimizers against each other, and against what their bytes would cost at the speed of our AdamW."""
    title, shapes = SHAPES["gpt2"]
    params = made(shapes, device)
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
    heads = ["rule", "ms per step, median", "min to max", "to AdamW", "bytes to AdamW's", "time for its bytes"]
    yield from head(f"Rules, {title}", heads)
    for name, taken in every.items():
        ratio = np.median(taken / every["AdamW"])
        share = contenders[name].bytes / contenders["AdamW"].bytes
        cells = [*milliseconds(taken, device), f"{ratio:.2f}", f"{share:.2f}"]
        yield f"| {name} | {' | '.join(cells)} | {ratio / share:.2f} |"


@dataclass
class Figures:
    """What is said about a program in comparison with others."""

    to_fused: float  # its time, to that of torch's fused AdamW in float32
    of_copy: float  # its bytes per second, to those of a copy
    launches: int | None = None  # kernels; None on a CPU


def steps(
    which: str, rounds: int, device: torch.device, states: Sequence[str]
) -> Generator[str, None, dict[str, Figures]]:
    """The rows of a table; returns the figures of each program."""
    title, shapes = SHAPES[which]
    params = {torch.float32: made(shapes, device)}
    params[torch.bfloat16] = [p.detach().bfloat16().requires_grad_() for p in params[torch.float32]]
    for p in params[torch.bfloat16]:
        p.grad = torch.randn_like(p)
    figures = {}
    contenders = programs(params, states)
    references = dict(islice(contenders, 1 + len(FUSED)))
    heads = [
        "program",
        "ms per step, median",
        "min to max",
        "to torch, float32",
        "to torch, bfloat16",
        "GB/s",
        "of copy",
    ]
    heads += ["launches", "ms in kernels"] * (device.type == "cuda")
    yield from head(title, heads)

    def row(name: str, program: Program, every: dict[str, np.ndarray]) -> str:
        speed, memory = program.bytes / every[name], references["copy"].bytes / every["copy"]
        ratios = [float(np.median(every[name] / every[reference])) for reference in FUSED.values()]
        figures[name] = Figures(ratios[0], float(np.median(speed / memory)))
        cells = [*milliseconds(every[name], device), *(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{np.median(speed) / 1e9:.0f}", f"{figures[name].of_copy:.0%}"]
        if device.type == "cuda":
            count, copies, busy = kernels(program.step)
            if count or copies:  # a profiler that sees nothing has counted nothing
                figures[name].launches = count
            cells += [str(count), f"{busy:.3f}"]
        return f"| {name} | {' | '.join(cells)} |"

    every = timed(references, rounds, device)
    for name, program in references.items():
        yield row(name, program, every)
    for name, program in contenders:
        yield row(name, program, timed({**references, name: program}, rounds, device))
        del program  # its state, before that of the next is made
    return figures


OURS, OURS_COMPACT = "ademamix AdEMAMix, state float32", "ademamix AdEMAMix, state compact, bfloat16 parameters"
Goal = tuple[str, str, Callable[[Figures], float | None], Callable[[float], bool]]
GOALS: list[Goal] = [
    (OURS, "at least 90 % of the copy's bandwidth", lambda f: f.of_copy, lambda x: x >= 0.9),
    (OURS, "at most 1.29 x the time of torch's fused AdamW", lambda f: f.to_fused, lambda x: x <= 1.29),
    (
        OURS_COMPACT,
        "at most 0.6 x the time of torch's fused AdamW in float32",
        lambda f: f.to_fused,
        lambda x: x <= 0.6,
    ),
    (OURS, "at most 3 launches per step", lambda f: f.launches, lambda x: x <= 3),
]


def goals(figures: dict[str, Figures]) -> list[str]:
    """What steps of GPT-2 are to cost on a GPU, and what they do."""
    rows = head("Goals", ["program", "goal", "measured", "met"], align="---")
    for program, goal, figure, met in GOALS:
        value = figure(figures[program]) if program in figures else None
        cells = ["not measured", "-"] if value is None else [f"{value:.3g}", "yes" if met(value) else "**no**"]
        rows.append(f"| {program} | {goal} | {' | '.join(cells)} |")
    return rows


def gpt2_and_goals(rounds: int, device: torch.device, states: Sequence[str]) -> Iterator[str]:
    figures = yield from steps("gpt2", rounds, device, states)
    yield from ["", *goals(figures)]


def ways(params: list[torch.Tensor]) -> dict[str, Program]:
    """Steps as training runs take them: plain, clipped, with gradients that are elsewhere each time, capturable."""
    grads = [[p.grad for p in params], *([p.grad.clone() for p in params] for _ in range(2))]
    fixed, moving = itertools.repeat(grads[0]), itertools.cycle(grads[1:])

    def way(optimizer: torch.optim.Optimizer, clip: Step | None = None, where: Iterator[Any] = fixed) -> Program:
        def prepare() -> None:
            for p, g in zip(params, next(where), strict=True):
                p.grad = g

        def step() -> None:
            if clip:
                clip()
            optimizer.step()

        compiled(optimizer)
        step()
        return Program(step, 0, prepare)

    def torchs(clip: bool = False) -> Program:
        return way(
            torch.optim.AdamW(params, fused=True),
            (lambda: torch.nn.utils.clip_grad_norm_(params, 1.0)) if clip else None,
        )

    def ours(clip: bool = False, where: Iterator[Any] = fixed, **options: Any) -> Program:
        optimizer = AdEMAMix(params, **options)
        return way(optimizer, (lambda: optimizer.clip_grad_norm_(1.0)) if clip else None, where)

    return {
        TORCHS: torchs(),
        f"{TORCHS}, clipped": torchs(clip=True),
        "AdEMAMix": ours(),
        "AdEMAMix, clipped": ours(clip=True),
        "AdEMAMix, gradients that move": ours(where=moving),
        "AdEMAMix, clipped, gradients that move": ours(clip=True, where=moving),
        "AdEMAMix, capturable": ours(capturable=True),
        "AdEMAMix, capturable, clipped": ours(clip=True, capturable=True),
    }


def host(rounds: int, device: torch.device) -> Iterator[str]:
    """The host's own time: of tensors so small that a GPU is never behind it."""
    counts = [len(SHAPES[name][1]) for name in ("gpt2", "small")]
    columns = [c for count in counts for c in (f"{count} tensors, us", "to torch's", "to torch's, clipped")]
    yield from head("The host's time for a step of small tensors", ["step", *columns])
    found = [timed(ways(made([(8, 8)] * count, device)), 4 * rounds, device, on_host) for count in counts]
    for name in found[0]:
        cells = [f"{1e6 * np.median(times[name]):.0f}" for times in found]
        ratios = [[f"{np.median(t[name] / t[n]):.2f}" for n in (TORCHS, f"{TORCHS}, clipped")] for t in found]
        yield f"| {name} | {' | '.join(c for cell, more in zip(cells, ratios, strict=True) for c in (cell, *more))} |"


def launches(rounds: int, device: torch.device) -> Iterator[str]:
    """What each way of taking a step costs a GPU, and what it starts there."""
    title, shapes = SHAPES["gpt2"]
    counted = ["kernels", "copies", "ms in kernels"] * (device.type == "cuda")
    yield from head(f"Clipped, moving, capturable: {title}", ["step", "ms per step, median", "min to max", *counted])
    contenders = ways(made(shapes, device))
    for name, taken in timed(contenders, rounds, device).items():
        cells = milliseconds(taken, device)
        if device.type == "cuda":
            contenders[name].prepare()
            count, copies, busy = kernels(contenders[name].step)
            cells += [str(count), str(copies), f"{busy:.3f}"]
        yield f"| {name} | {' | '.join(cells)} |"


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


def start(rounds: int) -> Iterator[str]:
    yield from head("A fresh process", ["what", "seconds, median", "min to max"])

    def row(what: str, seconds: list[float]) -> str:
        return f"| {what} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |"

    imports, repeats = [], max(3, rounds // 3)
    for tensors in (3, 1000):
        cold, warm = [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                for seconds in (cold, warm):
                    more, first = fresh(START.format(tensors=tensors), ADEMAMIX_CACHE=folder)
                    imports.append(more)
                    seconds.append(first)
        yield row(f"first step, {tensors} tensors, cold cache", cold)
        yield row(f"first step, {tensors} tensors, warm cache", warm)
    yield row("import ademamix, after import torch", imports)


def memory(rounds: int) -> Iterator[str]:
    yield from head("Memory during a step", ["parameters", "state, MB", "peak above it, MB", "share"])
    for title, shapes in (SHAPES["gpt2"], SHAPES["small"]):
        extra, state = fresh(MEMORY.format(shapes=shapes))
        yield f"| {title} | {state / 1e6:.1f} | {extra / 1e6:.2f} | {extra / state:.3%} |"


def machine(device: torch.device, command: str = f"python {' '.join(sys.argv)}") -> list[str]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    where = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    vectors = torch.backends.cpu.get_cpu_capability()  # processors of one name may differ in these
    names = ("numba", "triton", "bitsandbytes", "pytorch_optimizer")
    found = [f"{name} {version}" for name in names if (version := installed(name))]
    return [
        f"- command: `{command}`",
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
    only = [*SHAPES, "host", "launches", "rules", "start", "memory"]
    parser.add_argument("--only", choices=only, help="only one part")
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run of what is measured on a GPU, with small tensors"
    )
    parser.add_argument("--out", help="also write the tables to this file")
    options = parser.parse_args()
    device, states = options.device, options.state
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
    warnings.filterwarnings("error", message="ademamix: ")  # eager's times must not pass for those of another backend
    if options.tiny:
        SHAPES.update(TINY)
    parts: dict[str, Callable[[int], Iterator[str]]] = {
        "gpt2": lambda rounds: steps("gpt2", rounds, device, states),
        "rules": lambda rounds: rules(rounds, device),
        "small": lambda rounds: steps("small", 4 * rounds, device, states),
    }
    if device.type == "cpu" and not options.tiny:
        parts |= {"start": start, "memory": memory}
    else:
        parts = {
            "gpt2": lambda rounds: gpt2_and_goals(rounds, device, states),
            "host": lambda rounds: host(rounds, device),
            "launches": lambda rounds: launches(rounds, device),
            "1.3b": lambda rounds: steps("1.3b", rounds, device, states),
            "small": parts["small"],
            "rules": parts["rules"],
        }
    if options.only and options.only not in parts:
        parser.error(f"--only {options.only} is not measured on {device}; there are {', '.join(parts)}")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(options.out, "w")) if options.out else None

        def write(line: str) -> None:
            """At once: what is measured is not lost with what comes after it."""
            print(line, flush=True)
            if file:
                print(line, file=file, flush=True)

        where = "GPU" if device.type == "cuda" else "CPU"
        for line in (f"# One optimizer step on a {where}", "", *machine(device)):
            write(line)
        chosen = [name for name in parts if options.only in (None, name)]
        failed = [name for name in chosen if not written(name, parts[name], options.rounds, write)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def written(name: str, part: Callable[[int], Iterator[str]], rounds: int, write: Callable[[str], None]) -> bool:
    """Whether a part's lines came to an end; if not, its error is written: it does not keep others from running."""
    write("")
    try:
        for line in part(rounds):
            write(line)
    except Exception as error:
        traceback.print_exc()
        write(f"\n{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return isinstance(error, torch.OutOfMemoryError)
    return True


if __name__ == "__main__":
    main()
