"""What the GPU kernels compile to, on a machine without a GPU: a regression is seen before it is measured.

    python benchmarks/kernels.py [--out docs/results/kernels.md]

For each kernel and target: registers of a thread, bytes that it spills, warps that fit on one multiprocessor (32 at
most), loads and stores of 128 bits, and instructions per element in the loop over blocks, with those for rare cases of
division and square root. For the H100 (sm_90) also what issuing only these instructions would take (132
multiprocessors at 1.755 GHz), and what moving the bytes would take at 3.0 TB/s.
"""

import argparse
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ademamix import AdamW, AdEMAMix
from ademamix.backends.triton import OPTIONS, kernel
from ademamix.engine.tracing import traced
from ademamix.formats import BLOCK, FORMATS

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
BITS = {"float64": 64, "float32": 32, "float16": 16, "bits16": 16, "int16": 16, "int8": 8, "uint8": 8}
KERNELS: dict[
    str, tuple[Any, tuple[str | None, ...]]
] = {  # formats of the parameter, the gradient and the rule's slots
    "AdamW, float32": (AdamW.rule, ("float32",) * 4),
    "float32": (AdEMAMix.rule, ("float32",) * 5),
    "float32, bfloat16 parameters": (AdEMAMix.rule, ("bfloat16", "bfloat16_nearest", *("float32",) * 3)),
    "bfloat16, bfloat16 parameters": (AdEMAMix.rule, ("bfloat16", "bfloat16_nearest", *("bfloat16",) * 3)),
    "compact": (AdEMAMix.rule, ("float32", "float32", "int8", "int16", "float8")),
    "compact, bfloat16 parameters": (AdEMAMix.rule, ("bfloat16", "bfloat16_nearest", "int8", "int16", "float8")),
}
POINTERS = {
    **{"tensors": "*i32", "begins": "*i32", "skip": "*u8", "table": "*i64", "shapes": "*i64", "lengths": "*i64"},
    **{"coefficients": "*fp64", "keys": "*i32"},
}


def compiled(function: Any, signature: Mapping[str, str], constants: Mapping[str, Any], target: str) -> Any:
    """A kernel of Triton's as a launch would have it compiled, all its pointers aligned."""
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    if "constexprs" in inspect.signature(ASTSource).parameters:
        given: dict[str, Any] = {
            "signature": {**signature, **dict.fromkeys(constants, "constexpr")},
            "constexprs": dict(constants),
            "attrs": {(i,): [["tt.divisibility", 16]] for i in aligned},
        }
    else:  # before Triton 3.3
        from triton.backends.compiler import AttrsDescriptor

        properties = {"arg_properties": {"tt.divisibility": tuple(aligned)}, "cls": "AttrsDescriptor"}
        attributes = AttrsDescriptor.from_dict(properties)
        given = {"signature": dict(signature), "constants": dict(constants), "attrs": attributes}
    return triton.compile(ASTSource(fn=function, **given), target=GPUTarget(*TARGETS[target]), options=OPTIONS)


def update(rule: Any, formats: Sequence[str | None], target: str, aligned: bool = True) -> Any:
    """The kernel of a step, compiled."""
    used = tuple(f and FORMATS[f] for f in formats)
    made = kernel(traced(rule), used, any(f and f.scale for f in used), False)
    return compiled(made, POINTERS, {"ALIGNED": aligned}, target)


class Measures(NamedTuple):
    registers: int
    spilled: int  # bytes
    loads: int  # of 128 bits
    stores: int
    instructions: float  # per element


def measured(code: Any) -> Measures:
    if "amdgcn" in code.asm:
        text = code.asm["amdgcn"].split("s_endpgm")[0]
        notes = {name: int(number) for name, number in re.findall(r"\.(vgpr\w+):\s*(\d+)", code.asm["amdgcn"])}
        loads, stores = (len(re.findall(rf"(?:global|buffer|flat)_{x}_dwordx4", text)) for x in ("load", "store"))
        lines = re.findall(r"^(?:(\.LBB\w+):|\s+([a-z]\w+_\w+)(?:.*?(\.LBB\w+))?)", text, re.MULTILINE)
        return Measures(notes["vgpr_count"], 4 * notes["vgpr_spill_count"], loads, stores, 64 / BLOCK * _loop(lines))
    ptx = code.asm["ptx"]
    loads, stores = (len(re.findall(rf"{x}\.global(?:\.\w+)*?\.v4\.b32", ptx)) for x in ("ld", "st"))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([tools / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    pattern = r"^(?:(\.L_x_\d+):|\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)(?:.*?\((\.L_x_\d+)\))?)"
    lines = re.findall(pattern, text, re.MULTILINE)
    return Measures(int(found["REG"]), int(found["STACK"]), loads, stores, 32 / BLOCK * _loop(lines))


def _loop(lines: Sequence[tuple[str, str, str]]) -> int:
    """Instructions of the longest loop, from lines of (label, instruction, label that it names)."""
    labels: dict[str, int] = {}
    count = longest = 0
    for label, instruction, named in lines:
        if label:
            labels[label] = count
        else:
            count += 1
            if named in labels and re.match("BRA|s_c?branch", instruction):
                longest = max(longest, count - labels[named])
    return longest


def moved(formats: Sequence[str | None]) -> float:
    """Bytes that a step moves per element, without scales: the gradient is read, the others are read and written."""
    return sum(BITS[FORMATS[f].storage] / 8 * (1 if i == 1 else 2) for i, f in enumerate(formats) if f is not None)


HEADS = ["kernel", "memory", "target", "registers", "spilled bytes", "warps", "128-bit loads", "128-bit stores"]
HEADS += ["instructions per element", "issue, ps", "bandwidth, ps"]


def rows(targets: Sequence[str] = tuple(TARGETS)) -> Iterator[list[str]]:
    for name, (rule, formats) in KERNELS.items():
        for aligned in (True, False):
            for target in targets:
                found = measured(update(rule, formats, target, aligned))
                cells = [name, "aligned" if aligned else "any", target, str(found.registers), str(found.spilled)]
                nvidia = target.startswith("sm")
                warps = str(min(32, 65536 // (256 * -(-found.registers * 32 // 256)))) if nvidia else ""
                cells += [warps, str(found.loads), str(found.stores), f"{found.instructions:.1f}"]
                if target == "sm_90":
                    cells += [f"{found.instructions / (132 * 128 * 1.755e-3):.2f}", f"{moved(formats) / 3.0:.2f}"]
                yield cells + [""] * (len(HEADS) - len(cells))


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    lines = ["## What the GPU kernels compile to", "", "- command: `python benchmarks/kernels.py`"]
    lines += [f"- versions: triton {triton.__version__}", "", line(HEADS), "|---|---|---|" + "--:|" * (len(HEADS) - 3)]
    print("\n".join(lines), flush=True)
    for cells in rows():
        lines.append(line(cells))
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
