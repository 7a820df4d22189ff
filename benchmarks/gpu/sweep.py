"""Tiles, warps and registers of the Triton kernel, for steps of 268M aligned elements: writes sweep.md."""

import gc
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from step import Program, timed

from gpu.report import CUDA, DEVICE, Page, collect, left, said

if not CUDA:
    import gpu.standin  # noqa: F401

from triton.compiler import CompiledKernel

from ademamix import AdEMAMix
from ademamix.backends import triton

KINDS = {  # parameters, state
    "float32, float32 state": (torch.float32, "float32"),
    "float32, compact": (torch.float32, "compact"),
    "bfloat16, compact": (torch.bfloat16, "compact"),
    "bfloat16, bfloat16 state": (torch.bfloat16, "bfloat16"),
}
if not CUDA:  # compiling takes long
    KINDS = {"bfloat16, compact": KINDS["bfloat16, compact"]}
ROUNDS = 7 if CUDA else 1


@dataclass(frozen=True)
class Variant:
    """What differs from the backend's own constants."""

    constants: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def use(self) -> None:
        """Make the backend's next kernels so."""
        for name, value in {**OWN, **self.constants}.items():
            setattr(triton, name, value)
        triton.OPTIONS = {**OWN_OPTIONS, **self.options}
        triton.kernel.cache_clear()


def tiles(rows: int, walked: int, warps: int, **options: Any) -> Variant:
    return Variant({"ROWS": rows, "TILES": walked}, {"num_warps": warps, **options})


OWN = {name: getattr(triton, name) for name in ("ROWS", "TILES") if hasattr(triton, name)}
OWN_OPTIONS = dict(triton.OPTIONS)
VARIANTS = {
    "as it is": Variant(),
    "4 blocks, 4 warps": tiles(4, 1, 4),
    "4 blocks, 4 warps, 2 tiles": tiles(4, 2, 4),
    "4 blocks, 4 warps, 4 tiles": tiles(4, 4, 4),
    "4 blocks, 4 warps, 8 tiles": tiles(4, 8, 4),
    "2 blocks, 2 warps": tiles(2, 1, 2),
    "2 blocks, 4 warps": tiles(2, 1, 4),
    "8 blocks, 8 warps": tiles(8, 1, 8),
    "8 blocks, 4 warps": tiles(8, 1, 4),
    "1 block, 1 warp": tiles(1, 1, 1),
    "4 blocks, 8 warps": tiles(4, 1, 8),
    "as it is, at most 64 registers": Variant(options={"maxnreg": 64}),
    "as it is, at most 96 registers": Variant(options={"maxnreg": 96}),
    "as it is, at most 128 registers": Variant(options={"maxnreg": 128}),
    "as it is, 1 stage": Variant(options={"num_stages": 1}),
    "as it is, 4 stages": Variant(options={"num_stages": 4}),
    "as it is, fused multiply-add": Variant(options={"enable_fp_fusion": True}),
}


def optimizer(kind: str, shapes: list[tuple[int, ...]]) -> AdEMAMix:
    dtype, state = KINDS[kind]
    params = [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return AdEMAMix(params, state=state, backend="triton")


def registers(known: set[int]) -> str:
    """What the driver says of the kernels that were loaded since."""
    found = [k for k in gc.get_objects() if isinstance(k, CompiledKernel) and id(k) not in known]
    of_each = {(k.n_regs, k.n_spills) for k in found if getattr(k, "n_regs", None)}
    return ", ".join(f"{registers} registers, {spilt} spilt" for registers, spilt in sorted(of_each)) or "?"


def main() -> None:
    shapes = [(16384, 8192), *[(2048, 2048)] * 32] if CUDA else [(64, 512)]
    page = Page("sweep.md", "Tiles of the Triton kernel", "AdEMAMix, ms a step on the GPU; blocks have 256 elements.")
    page.add(f"As it is: {OWN}, {OWN_OPTIONS}.", "")
    page.table(f"{sum(torch.Size(s).numel() for s in shapes) / 1e6:.0f}M elements", ["variant", *KINDS])
    best: dict[str, tuple[float, str]] = {}
    own: dict[str, float] = {}
    for name, variant in VARIANTS.items():
        cells = []
        for kind in KINDS:
            if left() < 5.0:
                cells.append("not run")
                continue
            variant.use()
            known = {id(k) for k in gc.get_objects() if isinstance(k, CompiledKernel)}
            try:
                program = Program.of(optimizer(kind, shapes))
                taken = timed({name: program}, ROUNDS, DEVICE)[name]
                ms = 1e3 * float(sorted(taken)[len(taken) // 2])
                if variant == Variant():
                    own[kind] = ms
                best[kind] = min(best.get(kind, (ms, name)), (ms, name))
                cells.append(f"{ms:.3f} ({program.bytes / ms / 1e6:.0f} GB/s; {registers(known)})")
            except Exception as error:
                cells.append(said(error)[:120])
            program = None
            collect()
        page.row(name, *cells)
    Variant().use()
    page.add("")
    page.table("Best", ["parameters, state", "ms as it is", "ms at best", "which"])
    for kind, (ms, name) in best.items():
        page.row(kind, f"{own[kind]:.3f}" if kind in own else "-", f"{ms:.3f}", name)
    sys.exit(0 if own.keys() == KINDS.keys() else "the kernel as it is was not measured for everything")


if __name__ == "__main__":
    main()
