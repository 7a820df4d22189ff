"""Files that version 0.1.0 wrote: optimizers load them, runs continue from them, and kernels are compiled anew.

`data/optimizers.pt` holds, for each optimizer, its state dict and parameters after 6 steps, and the parameters after
6 more. Those with compact state have linear codes, which later versions read but do not write. `data/runs` are runs of
400 steps that were stopped at step 151, each with the metrics of its unbroken twin.
"""

import copy
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ademamix
from ademamix.engine.state import decoded

DATA = Path(__file__).parent / "data"
SAVED: list[dict[str, Any]] = torch.load(DATA / "optimizers.pt", weights_only=True)


def gradients(shapes: list[torch.Size], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def loaded(saved: dict[str, Any]) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    params = [p.requires_grad_() for p in map(torch.clone, saved["params"])]
    kind = getattr(ademamix, saved["name"])
    optimizer = kind(params, backend="eager", state=saved["state"], **saved["options"])
    optimizer.load_state_dict(saved["state_dict"])
    return params, optimizer


def go_on(saved: dict[str, Any]) -> list[torch.Tensor]:
    params, optimizer = loaded(saved)
    for step in range(7, 13):
        for p, g in zip(params, gradients([p.shape for p in params], step), strict=True):
            p.grad = g
        optimizer.step()
    return params


def named(state: str) -> Any:
    cases = [saved for saved in SAVED if saved["state"] == state]
    return pytest.mark.parametrize("saved", cases, ids=lambda s: s["name"])


@named("float32")
def test_a_state_dict_goes_on_to_the_same_parameters(saved: dict[str, Any]) -> None:
    # The same bits on one kind of processor. torch's square root is off by a unit in the last place on some, which may
    # round each of 6 steps of parameters below 4 differently: by a unit of 2**-22.
    for p, after in zip(go_on(saved), saved["after"], strict=True):
        torch.testing.assert_close(p.detach(), after, rtol=0.0, atol=6 * 2.0**-22)


@named("compact")
def test_linear_codes_become_the_nearest_of_today_s(saved: dict[str, Any]) -> None:
    before = copy.deepcopy(saved["state_dict"])
    params, optimizer = loaded(saved)
    for p, old in zip(params, before["state"].values(), strict=True):
        for name in (name for name, t in old.items() if t.dtype in (torch.int8, torch.int16)):
            numbers, half = old[name] * old[f"{name}_scale"], {torch.int8: 2**-4, torch.int16: 2**-12}[old[name].dtype]
            widths = half * (numbers.abs() + 2**-15 * numbers.abs().amax(1, keepdim=True))
            new = decoded(optimizer.state[p][name], optimizer.state[p][f"{name}_scale"])
            assert ((new - numbers).abs() <= 1.001 * widths).all()
            # Conversions read the file itself.
            assert torch.equal(decoded(old[name], old[f"{name}_scale"]), numbers)
    for value, kept in zip(saved["state_dict"]["state"].values(), before["state"].values(), strict=True):
        assert all(torch.equal(value[name], kept[name]) for name in kept)  # the caller's
    saving = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saving)
    for value, kept in zip(optimizer.state.values(), saving["state"].values(), strict=True):
        assert all(torch.equal(value[name], kept[name]) for name in kept)


@named("compact")
def test_a_state_dict_with_linear_codes_goes_on_to_about_the_same(saved: dict[str, Any]) -> None:
    for before, p, after in zip(saved["params"], go_on(saved), saved["after"], strict=True):
        # Moments of a few steps, off by 4 % as codes of 2**-3 round. Read as today's codes, they would be off by all.
        assert (p - after).norm() <= 0.06 * (after - before).norm()


@pytest.mark.parametrize(("name", "optimizer"), [("ademamix", "ademamix"), ("own", "own.py:lion")])
def test_a_run_is_resumed(name: str, optimizer: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / "runs", tmp_path / "runs")
    run = f"{name}-stopped"
    assert json.loads((tmp_path / "runs" / run / "config.json").read_text())["optimizer"].startswith(optimizer)
    command = [sys.executable, "-m", "ademamix", "train", "--resume", run, "--optimizer", optimizer]
    done = subprocess.run(command, cwd=tmp_path / "runs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def losses(file: Path) -> list[float]:
        return [json.loads(line).get("loss", 0.0) for line in file.read_text().splitlines()]

    went, whole = losses(tmp_path / "runs" / run / "metrics.jsonl"), losses(DATA / "runs" / f"{name}.jsonl")
    # torch multiplies matrices in another order on other processors: rounding, which 400 steps make larger. A state
    # that was not loaded moves the loss by 0.1 and more.
    np.testing.assert_allclose(went, whole, rtol=1e-3)


def test_a_cache_of_kernels_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipfile.ZipFile(DATA / "kernels.zip").extractall(tmp_path)
    monkeypatch.setenv("ADEMAMIX_CACHE", str(tmp_path))
    code = (
        "import torch, ademamix; p = torch.ones(4, requires_grad=True); p.grad = torch.ones(4);"
        "ademamix.AdEMAMix([p], lr=0.5, backend='cpu').step(); print(*p.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # Both EMAs are of the gradient 1: p - lr (1 + alpha (1 - beta3)).
    assert list(map(float, done.stdout.split())) == pytest.approx([0.5 - 0.5 * 2.0 * 1e-4] * 4), done.stderr
    assert len(list((tmp_path / "kernels").glob("ademamix_float32_*.kernel"))) == 1  # a new one next to the old
