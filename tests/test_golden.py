"""Every backend against trajectories of the reference implementation (float64, the 1e-8 in its logarithm taken out)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ademamix import AdEMAMix

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))
# float64: both sides round differently in each of up to 50 steps, about 1e-16 each; 1e-12 is far above their sum.
# float32: in each step the parameter is rounded, by 6e-8 of its size, a random walk over 50 steps; and the state is.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_trajectory_of_the_authors_program(file: Path, dtype: torch.dtype, backend: str) -> None:
    golden = np.load(file)
    config = json.loads(str(golden["config"]))
    steps, shapes, rates = (config.pop(name) for name in ("steps", "shapes", "lr_per_step"))
    params = [torch.tensor(golden[f"p0_{i}"], dtype=dtype, requires_grad=True) for i in range(len(shapes))]
    optimizer = AdEMAMix(params, backend=backend, **config)

    for t in range(steps):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[t]
        for i, p in enumerate(params):
            p.grad = torch.tensor(golden[f"grads_{i}"][t], dtype=dtype)
        optimizer.step()
        for i, p in enumerate(params):
            expected = golden[f"params_{i}"][t]
            error = np.abs(p.detach().double().numpy() - expected).max() / np.abs(expected).max()
            assert error <= TOLERANCE[dtype], (t, i)

    for i, p in enumerate(params):
        for slot in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"):
            if f"{slot}_{i}" not in golden:
                assert slot not in optimizer.state[p]
                continue
            expected = golden[f"{slot}_{i}"]
            error = np.abs(optimizer.state[p][slot].double().numpy() - expected).max() / np.abs(expected).max()
            assert error <= TOLERANCE[dtype], slot


def test_golden_files_are_there() -> None:
    assert [f.stem for f in FILES] == ["alpha_only", "beta1_zero", "lr_schedule", "plain", "warmups"]
