"""Steps beyond 2**24, from which on float32 lacks every other number: each is counted, and has its own noise."""

import copy
import io
from typing import Any

import pytest
import torch

from ademamix import AdamW, AdEMAMix, RuleOptimizer
from small_models import BACKENDS, same

LAST = 2**24  # that float32 counts to


def resumed(kind: type[RuleOptimizer], steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> RuleOptimizer:
    """An optimizer of a parameter of ones that has done so many steps with gradients of one."""
    p = torch.ones(64, 64, dtype=dtype, requires_grad=True)
    optimizer = kind([p], weight_decay=0.0, **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    (state,) = saved["state"].values()
    for name, value in state.items():
        state[name] = torch.tensor(float(steps), dtype=torch.float64) if name == "step" else torch.ones_like(value)
    with torch.no_grad():
        p.fill_(1.0)
    optimizer.load_state_dict(saved)
    return optimizer


def step_of(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    (state,) = optimizer.state.values()
    return state["step"]  # type: ignore[no-any-return]


@BACKENDS
@pytest.mark.parametrize("capturable", [False, True])
def test_every_step_is_counted_and_has_its_own_coefficients(capturable: bool, backend: str) -> None:
    optimizer = resumed(AdamW, LAST - 3, backend=backend, capturable=capturable)
    seen: list[float] = []
    coefficients = optimizer.coefficients

    def noted(step: Any, group: Any) -> dict[str, Any]:
        seen.append(float(step))
        return coefficients(step, group)

    optimizer.coefficients = noted  # type: ignore[method-assign]
    for t in range(LAST - 2, LAST + 6):
        optimizer.step()
        assert step_of(optimizer).item() == t
    assert seen == list(range(LAST - 2, LAST + 6))


@pytest.mark.parametrize("steps", [LAST - 3, LAST, LAST + 1, 20_000_001])
def test_checkpoints_have_torch_s_counter_where_it_is_exact(steps: int) -> None:
    """And what torch.optim reads in any case."""
    optimizer = resumed(AdamW, steps)
    assert step_of(optimizer).dtype == (torch.float32 if steps < LAST else torch.float64)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = AdamW([torch.ones(64, 64, requires_grad=True)])
    other.load_state_dict(saved)
    assert step_of(other).item() == steps + 1
    assert same(other.state_dict()["state"], saved["state"])
    torchs = torch.optim.AdamW([torch.ones(64, 64, requires_grad=True)])
    torchs.load_state_dict(saved)
    torchs.param_groups[0]["params"][0].grad = torch.ones(64, 64)
    torchs.step()


def test_a_counter_set_in_place_goes_on() -> None:
    optimizer = resumed(AdamW, 5)
    optimizer.step()
    for count in (LAST - 1, LAST, LAST - 7):
        step_of(optimizer).fill_(float(count))
        for t in range(1, 4):
            optimizer.step()
            assert step_of(optimizer).item() == count + t


@BACKENDS
@pytest.mark.parametrize("capturable", [False, True])
def test_small_updates_move_bfloat16_parameters_on(capturable: bool, backend: str) -> None:
    """Each update is lr = 1 / 390 of the distance between numbers below 1, and is taken with that probability."""
    steps, lr = 400, 1e-5
    optimizer = resumed(AdamW, LAST - 100, torch.bfloat16, lr=lr, backend=backend, capturable=capturable)
    (p,) = optimizer.state
    for _ in range(steps):
        optimizer.step()
    moved = 1.0 - p.detach().float()
    # A step's rounding has a variance of lr * 2**-8 at most, and all are independent.
    deviation = (steps * lr * 2**-8) ** 0.5
    assert moved.mean().item() == pytest.approx(steps * lr, abs=5 * deviation / 64)
    assert (moved - steps * lr).abs().max() < 6 * deviation


@BACKENDS
@pytest.mark.parametrize("state", ["float32", "compact"])
def test_warmups_longer_than_that_end(state: str, backend: str) -> None:
    """From the last step of its warmups on, an optimizer is the one without them."""
    end, runs = LAST + 6, []
    for warmup in (end, None):
        optimizer = resumed(
            AdEMAMix, end - 1, state=state, backend=backend, alpha_warmup=warmup, beta3_warmup=warmup, lr=0.1
        )
        for _ in range(3):
            optimizer.step()
        runs.append((*(p.detach() for p in optimizer.state), *optimizer.state.values()))
    assert same(*runs)


def test_both_backends_round_alike() -> None:
    runs = []
    for backend in ("cpu", "eager"):
        optimizer = resumed(AdEMAMix, LAST - 2, torch.bfloat16, state="compact", backend=backend, lr=0.1)
        for _ in range(6):
            optimizer.step()
        runs.append((*(p.detach() for p in optimizer.state), *optimizer.state.values()))
    assert same(*runs)
