"""The Triton backend: in the interpreter, compiled ahead for GPUs that need not be there, and on one that is."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as xp
import pytest
import torch

from ademamix import KEMA, AdamW, ADana, AdEMAMix, SimplifiedAdEMAMix
from ademamix.backends import coefficient_names, slot_names
from ademamix.engine.tape import Tape
from ademamix.formats import FORMATS

triton = pytest.importorskip("triton", reason="Triton is only available on Linux")

from kernels import BITS, HEADS, TARGETS, compiled, rows, update  # noqa: E402

LLD = "/opt/rocm/llvm/bin/ld.lld"
STATES = {  # parameter, gradient, then the formats of AdEMAMix's slots
    "float32": ("float32", "float32", "float32", "float32", "float32"),
    "compact": ("float32", "float32", "int8", "int16", "float8"),
    "bfloat16": ("bfloat16", "bfloat16_nearest", "bfloat16", "bfloat16", "bfloat16"),
    "compact, bfloat16 parameters": ("bfloat16", "bfloat16_nearest", "int8", "int16", "float8"),
    "float16 parameters, no fast average": ("float16", "float32", None, "float32", "float32"),
    "float64": ("float64", "float64", "float64", "float64", "float64"),
}


@pytest.mark.first
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name("triton_interpreted.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)


def assembly_of(rule: Any, formats: Any, target: str, aligned: bool = True) -> str:
    linked_for(target)
    code = update(rule, formats, target, aligned).asm
    text: str = code.get("ptx") or code["amdgcn"]
    # Triton 3.2's division and square root of float32 flush subnormal numbers to zero, and no option changes that.
    return re.sub(r"(div|sqrt)\.rn\.ftz", r"\1.rn", text) if OLD else text


def linked_for(target: str) -> None:
    if OLD and target.startswith("gfx") and not Path(os.environ.get("TRITON_HIP_LLD_PATH", LLD)).exists():
        pytest.skip("this Triton links for AMD with the ld.lld of a ROCm installation")


def wide(assembly: str, kind: str) -> dict[int, int]:
    """How many loads ("ld") or stores ("st") of global memory there are in PTX, by their width in bits."""
    counts: dict[int, int] = {}
    for count, bits in re.findall(rf"{kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", assembly):
        width = int(count or 1) * int(bits)
        counts[width] = counts.get(width, 0) + 1
    return counts


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("state", STATES)
def test_nvidia_accesses_are_as_wide_as_they_can_be(state: str, target: str) -> None:
    """A thread of an aligned tile has 8 neighboring elements: 128 bits of 16-bit streams, two times 128 of float32,
    64 of codes of 8 bits."""
    formats = STATES[state]
    assembly = assembly_of(AdEMAMix.rule, formats, target)
    storages = [BITS[FORMATS[f].storage] for f in formats if f is not None]
    loads, stores = wide(assembly, "ld"), wide(assembly, "st")
    assert loads.get(128, 0) == sum(8 * bits // 128 for bits in storages if bits >= 16)
    assert stores.get(128, 0) == sum(8 * bits // 128 for i, bits in enumerate(storages) if bits >= 16 and i != 1)
    eights = storages.count(8)
    assert loads.get(64, 0) >= eights
    assert len(re.findall(r"ld\.global(?:\.\w+)*?\.v2\.b32", assembly)) == eights
    assert len(re.findall(r"st\.global(?:\.\w+)*?\.v2\.b32", assembly)) == eights
    for other in ("fma.rn", "div.full", "sqrt.approx", ".ftz"):  # eager fuses nothing and rounds everything to nearest
        assert other not in assembly


def test_kernels_are_no_worse_than_they_were() -> None:
    """Registers, spills, widths and instructions are those of the table; `python benchmarks/kernels.py --out
    docs/results/kernels.md` makes it anew."""
    text = (Path(__file__).parents[2] / "docs" / "results" / "kernels.md").read_text()
    if f"triton {triton.__version__}\n" not in text:
        pytest.skip(f"the table is of another Triton than {triton.__version__}")
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert table[0] == HEADS
    known = {tuple(cells[:3]): cells[3:] for cells in table[1:]}
    targets = ("sm_90", "gfx942")
    found = {tuple(cells[:3]): cells[3:] for cells in rows(targets)}
    assert len(found) == sum(key[2] in targets for key in known)
    for key, cells in found.items():
        assert [cell for cell in cells if cell] == [cell for cell in known[key] if cell.strip()], key
        assert cells[1] == "0"  # nothing is spilled


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdEMAMix, {"alpha_warmup": 100, "beta3_warmup": 100}),
        (AdEMAMix, {"beta3_schedule": "log-time"}),
        (AdamW, {}),
        (SimplifiedAdEMAMix, {"beta1_warmup": 100}),
        (ADana, {}),
        (KEMA, {}),
    ],
)
def test_coefficients_compile_without_a_number_in_them(kind: Any, options: Any, target: str) -> None:
    """The host's numbers are data: another learning rate compiles nothing."""
    from ademamix.engine.triton_coefficients import kernel as coefficients

    linked_for(target)
    runs = []
    for lr in (0.1, 0.2):
        optimizer = kind([torch.zeros(3, requires_grad=True)], lr=lr, weight_decay=lr, **options)
        names = coefficient_names(optimizer.rule)
        tape = Tape(optimizer.coefficients, names, optimizer.param_groups[0])
        assert len(tape.results) == 1 + len(names)
        runs.append(coefficients(tape.lines, tape.results, len(tape.numbers)))
    assert runs[0] is runs[1]
    signature = {"steps": "*i64", "rows": "*i32", "groups": "*i32", "numbers": "*fp64", "factor": "*fp32"}
    code = compiled(runs[0], {**signature, "skip": "*u8", "table": "*fp64", "members": "i32"}, {}, target)
    text = code.asm.get("ptx") or code.asm["amdgcn"]
    assert re.search(r"fma\.rn\.f64|v_fma_f64", text)  # exp and log of float64


@pytest.mark.parametrize("state", STATES)
def test_it_compiles_for_amd(state: str) -> None:
    """A lane has 4 neighboring elements of a block: 128 bits of float32 streams, 64 of 16-bit ones."""
    assembly = assembly_of(AdEMAMix.rule, STATES[state], "gfx942")
    for kind in ("load", "store"):
        widths = re.findall(rf"(?:global|buffer|flat)_{kind}_dword(x\d)?", assembly)
        assert "x4" in widths or "x2" in widths


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "rule",
    [AdamW.rule, SimplifiedAdEMAMix.rule, ADana.rule, KEMA.rule_of({"count": 3})],
    ids=lambda r: r.__name__,
)
def test_the_other_rules_compile_too(rule: Any, target: str) -> None:
    for format, *own in (("float32", "float32", "float32"), ("bfloat16", "int8", "float8")):
        averages = own[:1] * (len(slot_names(rule)) - 1)
        assert assembly_of(rule, (format, "float32", *averages, own[1]), target)


THIRD = 1.0 / 3.0


def varied(p: Any, g: Any, a: Any, b: Any, *, lr: Any, w: Any) -> Any:
    """Numbers and coefficients on both sides of everything."""
    a = xp.maximum(a + THIRD / 7.0 * g, 1.0 / a) - g / 3.0 - 2.0 / 4.0
    b = xp.minimum(0.5, b) + (1.0 - w) / (3.0 / lr) * xp.where(g <= THIRD, w, THIRD)
    return p - lr * w / 5.0 * xp.where(g > w, 1, 2) * -a * xp.sqrt(xp.abs(b)) / a, a, b


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("number", ["float32", "float64"])
def test_a_user_s_rule_compiles_and_rounds_to_nearest(number: str, target: str) -> None:
    assembly = assembly_of(varied, (number,) * 4, target)
    if target != "gfx942":
        size = number[-2:]
        for name in (f"div.rn.f{size}", f"sqrt.rn.f{size}", *(["max.NaN.f32", "min.NaN.f32"] if size == "32" else [])):
            assert name in assembly
        for other in ("fma.rn.f32", "div.full", "sqrt.approx", ".ftz"):
            assert other not in assembly
        assert set(re.findall(r"(?:add|sub|mul|div|neg)\.(?:rn\.)?f(\d+)", assembly)) == {size}


def test_where_it_may_run() -> None:
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"backend='triton' cannot serve a parameter on 'cpu'; allowed there: 'auto', 'eager', 'cpu'"
    ):
        AdEMAMix([p], backend="triton")


# --------------------------------------------------------------------------------- on a GPU


def gpu(test: Any) -> Any:
    """A test that `make gpu` runs."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


SHAPES = ((64, 96), (5,), (3, 7000), (), (128, 1024))


def parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in SHAPES]


def give_gradients(params: list[torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to("cuda", p.dtype)
        p.grad = g if p.grad is None else p.grad.copy_(g)


@gpu
@pytest.mark.parametrize("kind", [AdEMAMix, AdamW])
@pytest.mark.parametrize("state", ["float32", "bfloat16", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_eager_on_the_gpu(kind: Any, state: str, dtype: torch.dtype) -> None:
    """To the bit: neither fuses operations, and both round each to nearest."""
    runs = []
    for which in ("auto", "eager"):
        params = parameters(dtype)
        optimizer = kind(params, lr=0.1, backend=which, state=state)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
        runs.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@gpu
def test_a_step_waits_for_nothing_and_is_a_launch_for_each_kind_of_state() -> None:
    params = parameters(torch.float32)
    lr = torch.tensor(0.1, device="cuda")
    for capturable in (False, True):
        optimizer = AdEMAMix(params, lr=lr, state="compact", capturable=capturable)
        give_gradients(params, 0)
        optimizer.clip_grad_norm_(1.0)  # the first time, what counts steps goes to the GPU
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer._launches is not None
        assert len(optimizer._launches.calls) == 2


@gpu
def test_a_graph_captures_the_step() -> None:
    runs = []
    for captured in (False, True):
        params = parameters(torch.float32)
        lr = torch.tensor(0.1, device="cuda")
        optimizer = AdEMAMix(params, lr=lr, state="compact", capturable=True, alpha_warmup=5, beta3_warmup=5)
        give_gradients(params, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            before = [copy.deepcopy(p.detach()) for p in params]
            with torch.cuda.graph(graph):
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        for step in range(1, 6):
            give_gradients(params, step)
            lr.fill_(0.1 / step)
            if step == 3:
                params[0].grad[0, 0] = torch.nan
            if captured:
                graph.replay()
            else:
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
        assert optimizer.skipped_steps == 1
        assert optimizer.state[params[0]]["step"] == 5.0
        runs.append([t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@gpu
def test_a_graph_is_replayed_rightly_whatever_steps_are_taken_beside_it() -> None:
    """Steps with gradients elsewhere, other numbers, and of only some parameters, have other tables; memory that is
    freed is used."""
    runs = []
    for captured in (False, True):
        params = parameters(torch.float32)
        lr = torch.tensor(0.1, device="cuda")
        optimizer = AdEMAMix(params, lr=lr, state="compact", capturable=True)
        give_gradients(params, 0)
        optimizer.step()
        grads = [p.grad for p in params]
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(1, 7):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            give_gradients(params, step)
            # Numbers of the host's, other than those that the graph has.
            optimizer.param_groups[0]["weight_decay"] = 0.0 if step in (1, 5) else 0.1 * step
            if step == 3:
                params[0].grad = None
            elif step % 2 == 0:
                for p in params:
                    p.grad = p.grad.clone()
            if captured and step in (1, 5):
                graph.replay()
            else:
                optimizer.step()
            rubbish = [torch.full((1 << n,), -1, device="cuda") for n in range(14) for _ in range(4)]
            del rubbish
        runs.append([t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@gpu
def test_a_grad_scaler_on_the_gpu() -> None:
    params, plain = parameters(torch.float32), parameters(torch.float32)
    a, b = AdEMAMix(params, fused=True), AdEMAMix(plain)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step in range(4):
        scaler.scale(torch.zeros((), device="cuda", requires_grad=True))
        give_gradients(params, step)
        give_gradients(plain, step)
        for p in params:
            p.grad *= 1024.0
        if step == 2:
            params[0].grad[0, 0] = torch.inf
        scaler.step(a)
        scaler.update(1024.0)
        if step != 2:
            b.step()
    assert a.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
