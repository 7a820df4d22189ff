"""One optimizer step in Muon's geometry: ours against torch.optim.Muon, and where the time of ours goes.

    python benchmarks/muon.py [--device cuda] [--layers 2] [--rounds 5] [--out FILE]

Parameters are the hidden matrices of GPT-2 small (each layer has 2304x768, 768x768, 3072x768 and 768x3072): those of 2
layers by default, since a step with all 12 takes about 10 s on 2 cores; all 12 on a GPU. They are float32 on a CPU and
bfloat16 on a GPU. torch's iteration is in bfloat16 everywhere, ours in bfloat16 on GPUs and in float32 on CPUs.

Programs take turns, one step each round. Reported are medians over the rounds; ratios are medians of the round-by-round
ratios to torch.optim.Muon. The second table has the three parts of a step: the memory's fused pass, which writes the
directions, their orthogonalization, and the fused pass of the step. ``--tiny`` is a dry run with narrow layers.
"""

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from step import Program, compiled, head, machine, milliseconds, timed

from ademamix import ADana, AdEMAMix, Muon, RuleOptimizer
from ademamix.engine import muon

WIDTH = 768
TORCHS = "torch.optim.Muon"
PARTS = ("memory", "iteration", "step")


def programs(params: list[torch.Tensor]) -> dict[str, torch.optim.Optimizer]:
    low = params[0].dtype == torch.bfloat16
    own: dict[str, Any] = {"state": "bfloat16"} if low else {}  # torch's is in the parameters' dtype
    return {
        TORCHS: torch.optim.Muon(params),
        "ademamix Muon": Muon(params, **own),
        "ademamix ADana": ADana(params, geometry="muon", **own),
        "ademamix AdEMAMix": AdEMAMix(params, geometry="muon", **own),
        "ademamix ADana, compact": ADana(params, geometry="muon", state="compact"),
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    slots = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    return sum(t.nbytes for t in slots if torch.is_tensor(t))


@contextlib.contextmanager
def watched(optimizer: RuleOptimizer, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of each part of the steps within."""
    seconds: dict[str, float] = defaultdict(float)

    def timer(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(device)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        assert optimizer._launches is not None
        for call in optimizer._launches.calls:
            launch = call.launch
            for name, owner, attribute in (("memory", launch.directions, "launch"), ("step", launch, "step")):
                stack.enter_context(mock.patch.object(owner, attribute, timer(name, getattr(owner, attribute))))
        stack.enter_context(mock.patch.object(muon, "orthogonal", timer("iteration", muon.orthogonal)))
        yield seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tables(layers: int, width: int, rounds: int, device: torch.device) -> Iterator[str]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    params = [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes * layers]
    for p in params:
        p.grad = torch.randn_like(p)
    elements = sum(p.numel() for p in params)
    optimizers = programs(params)
    contenders = {name: Program(compiled(optimizer).step, 0) for name, optimizer in optimizers.items()}
    every = timed(contenders, rounds, device)

    size = f"{len(params)} matrices, {elements / 1e6:.1f}M parameters, {str(dtype)[6:]}"
    title = f"{layers} of GPT-2's 12 layers: {size}" if width == WIDTH else f"A dry run: {size}"
    yield from head(
        title, ["program", "ms per step, median", "min to max", "to torch's", "bytes of state per parameter"]
    )
    for name, taken in every.items():
        cells = [*milliseconds(taken, device), f"{np.median(taken / every[TORCHS]):.2f}"]
        yield f"| {name} | {' | '.join(cells)} | {state_bytes(optimizers[name]) / elements:.2f} |"
    yield ""
    yield from head("Parts of a step, in ms", ["program", *PARTS, "the rest"])
    for name, optimizer in optimizers.items():
        if isinstance(optimizer, RuleOptimizer):
            found = []
            for _ in range(max(3, rounds // 2)):
                with watched(optimizer, device) as seconds:
                    wait(device)
                    start = time.perf_counter()
                    optimizer.step()
                    wait(device)
                    whole = time.perf_counter() - start
                parts = [seconds[part] for part in PARTS]
                found.append([*parts, whole - sum(parts)])
            cells = [f"{1e3 * x:.{1 if device.type == 'cpu' else 3}f}" for x in np.median(found, axis=0)]
            yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--layers", type=int, help="of GPT-2's 12 (default: 2 on a CPU, 12 on a GPU)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--tiny", action="store_true", help="a dry run with narrow layers")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if not hasattr(torch.optim, "Muon"):
        parser.error(f"torch.optim.Muon is measured against, which torch 2.9 brought, got torch {torch.__version__}")
    layers = options.layers or (2 if options.device.type == "cpu" else 12)
    where = "GPU" if options.device.type == "cuda" else "CPU"
    top = (f"# One step in Muon's geometry on a {where}", "", *machine(options.device), "")
    lines = []
    for line in chain(top, tables(layers, 64 if options.tiny else WIDTH, options.rounds, options.device)):
        lines.append(line)
        print(line, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
