"""The host's time for a step on a GPU, on a machine without one: ours against torch's fused AdamW.

    python benchmarks/host.py [--rounds 15] [--out docs/results/host.md]

Kernels are compiled for sm_90 and launched by Triton's own code, with a driver that does nothing at its end; torch's
kernels that would run on the GPU (the fused update, norms and products of many tensors) return at once, for both.
Copies to a GPU are missing on both sides. So what is timed is Python and torch's dispatch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu import standin  # noqa: F401 - the Triton backend serves CPU tensors from here on
from step import host, machine


def without_work() -> None:
    """Leave torch's own kernels out."""
    one = torch.ones(())

    def norms(tensors: Sequence[torch.Tensor], *_: Any, **__: Any) -> list[torch.Tensor]:
        return [one] * len(tensors)

    torch._foreach_norm = norms
    torch._foreach_mul_ = torch._fused_adamw_ = lambda *_, **__: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="a quarter of the counted rounds (default 15)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    without_work()
    device = torch.device("cpu")
    lines = ["## The host's time", "", *machine(device), ""]
    print("\n".join(lines))
    for line in host(options.rounds, device):
        lines.append(line)
        print(line, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
