import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ademamix import AdEMAMix, suggest

LENGTHS = st.one_of(st.none(), st.integers(100, 10_000), st.integers(100, 10**12))
DECAYS = st.floats(0.0, 1.0, exclude_max=True)


def group_of(settings: dict[str, Any]) -> dict[str, Any]:
    return AdEMAMix([torch.nn.Parameter(torch.zeros(3))], lr=1e-3, **settings).param_groups[0]


@settings(deadline=None, max_examples=40)  # the first step imports its backend
@given(total_steps=LENGTHS, beta1=DECAYS, beta2=DECAYS)
@example(total_steps=100, beta1=0.0, beta2=0.0)
@example(total_steps=None, beta1=0.0, beta2=0.95)
@example(total_steps=10**12, beta1=math.nextafter(1.0, 0.0), beta2=0.999)
def test_ademamix_steps_with_whatever_is_suggested(total_steps: int | None, beta1: float, beta2: float) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([p], lr=1e-3, backend="eager", **suggest(total_steps, beta1=beta1, beta2=beta2))
    b1, b2, b3 = optimizer.param_groups[0]["betas"]
    assert (b1, b2) == (beta1, beta2)
    assert beta1 <= b3 <= max(beta1, 0.9999)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.isfinite(p).all()
    assert (p < 1.0).all()  # along a constant gradient a step goes against it


def test_the_paper_s_length_gives_the_paper_s_settings() -> None:
    """Alpha 8, beta3 0.9999, both warmups over all steps."""
    group = group_of(suggest(256_000))
    assert (group["betas"], group["alpha"]) == ((0.9, 0.999, 0.9999), 8.0)
    assert group["alpha_warmup"] == group["beta3_warmup"] == 256_000


def test_100_000_steps_give_the_settings_of_apertus() -> None:
    """Of arXiv 2509.14233: warmups of 100,000 steps, whatever the length of the run."""
    apertus = {"betas": (0.9, 0.999, 0.9999), "alpha": 8.0, "alpha_warmup": 100_000, "beta3_warmup": 100_000}
    assert suggest(100_000) == apertus


@pytest.mark.parametrize(("steps", "beta3"), [(100, 0.92), (477, 0.983229), (3218, 0.997514), (4000, 0.998)])
def test_short_runs_get_a_short_slow_average(steps: int, beta3: float) -> None:
    """It reaches back an eighth of the run."""
    assert suggest(steps)["betas"][2] == pytest.approx(beta3, abs=1e-6)


def test_the_slow_average_is_never_the_shorter_one() -> None:
    assert suggest(100, beta1=0.95)["betas"] == (0.95, 0.999, 0.95)


def test_without_a_length_no_schedule_has_one() -> None:
    """The slow EMA forgets by 8 / (8 + t), and alpha reaches the paper's 8 at about a million steps."""
    group = group_of(suggest(None, beta2=0.95))
    assert group["alpha_warmup"] is group["beta3_warmup"] is None
    early, late = (AdEMAMix.coefficients(t, group) for t in (8, 1_000_000))
    assert (early["w3"], late["w3"]) == pytest.approx((0.5, 8e-6), rel=1e-5)
    assert (early["alpha"], late["alpha"]) == pytest.approx((9**0.15, 10**0.9), rel=1e-6)


def test_what_is_suggested_are_plain_numbers_for_checkpoints() -> None:
    settings = suggest(np.int64(1000), beta1=np.float64(0.9), beta2=np.float32(0.5))
    assert settings == suggest(1000, beta1=0.9, beta2=0.5)
    assert {type(x) for x in (*settings["betas"], settings["alpha_warmup"])} == {float, int}


@pytest.mark.parametrize("steps", [99, 0, -5, 1e5, math.nan, "1000", True, False, torch.tensor(1000)])
def test_a_bad_number_of_steps_is_named(steps: Any) -> None:
    with pytest.raises(
        ValueError, match=r"total_steps must be a whole number >= 100, got .* None for a run of unknown"
    ):
        suggest(steps)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("beta", [1.0, -0.1, 1.5, math.nan, math.inf, "0.9", None, True, False, (0.9, 0.95)])
def test_a_bad_decay_is_named(name: str, beta: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 1\), got ") as error:
        suggest(1000, **{name: beta})
    assert repr(beta) in str(error.value)
