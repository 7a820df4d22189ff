"""The orthogonalization, against the polynomials of singular values that it is."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from ademamix import Muon, geometries
from ademamix.engine.muon import Iteration, orthogonal

Array = Any

F64 = torch.float64
UNIT = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, F64)}


def iteration(coefficients: Any = geometries.NEWTON_SCHULZ, steps: int = 5, eps: float = 1e-7, **options: Any) -> Any:
    own = {"geometry": "muon", "ns_coefficients": coefficients, "ns_steps": steps, "adjust_lr_fn": None, "eps": eps}
    return Iteration.of(Muon, {**own, **options})


def of_singular_values(s: Array, coefficients: Any, steps: int) -> Array:
    """The same polynomials applied to numbers."""
    if coefficients == "polar_express":
        s = s / 1.01  # arXiv 2505.16932, listing 2
        table = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in geometries.POLAR_EXPRESS[:-1]]
        table = [*table, *[geometries.POLAR_EXPRESS[-1]] * steps][:steps]
    else:
        table = [coefficients] * steps
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    return s


def exact(x: Array, coefficients: Any, steps: int, least: float = 1e-7) -> Array:
    """U p(S / |S|) V^T of each matrix, by its singular value decomposition in float64."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    norm = np.maximum(np.sqrt((s**2).sum(-1, keepdims=True)), least)
    return u * of_singular_values(s / norm, coefficients, steps)[..., None, :] @ vt


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


COEFFICIENTS = pytest.mark.parametrize(
    "coefficients", [geometries.NEWTON_SCHULZ, "polar_express", (2.0, -1.5, 0.5)], ids=str
)
SHAPES = [(5, 9), (9, 5), (8, 8), (1, 7), (7, 1), (1, 1), (3, 200), (300, 270)]


def tolerance(dtype: torch.dtype, columns: int) -> float:
    """Of an element of a matrix whose singular values are about 1.

    The first steps multiply a small singular value by at most 8.3, 4.1, 4.0, 3.3, 2.3 in turn, all of them by at most
    1000 (8.3 and 4.1 see what 1.01 divides; those of Newton and Schulz make 3.4^5 = 490 of it). Each of their products
    errs by a few units of numbers of at most 1, and sums of so many terms by the root of it.
    """
    return 1000 * 4 * math.sqrt(columns) * UNIT[dtype]


@COEFFICIENTS
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_iteration_is_polynomials_of_singular_values(shape: Any, dtype: torch.dtype, coefficients: Any) -> None:
    x = random(2, *shape)
    rows, columns = shape
    found = orthogonal(torch.tensor(x, dtype=dtype), iteration(coefficients)).double().numpy()
    expected = math.sqrt(max(1, rows / columns)) * exact(x, coefficients, 5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(dtype, columns))


@COEFFICIENTS
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12])
def test_as_many_polynomials_as_asked_for(steps: int, coefficients: Any) -> None:
    x = random(1, 6, 4)
    found = orthogonal(torch.tensor(x), iteration(coefficients, steps)).numpy()
    expected = math.sqrt(6 / 4) * exact(x, coefficients, steps)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(F64, 6))


@pytest.mark.parametrize(
    ("coefficients", "smallest", "low", "high"),
    [(geometries.NEWTON_SCHULZ, 0.01, 0.68, 1.14), ("polar_express", 0.001, 0.84, 1.13)],
    ids=str,
)
def test_the_singular_values_of_a_direction_are_about_1(
    coefficients: Any, smallest: float, low: float, high: float
) -> None:
    """Of all from ``smallest`` to 1 times the norm; the band is that of the polynomials."""
    band = of_singular_values(np.linspace(smallest, 1.0, 200_000), coefficients, 5)
    assert low <= band.min() <= band.max() <= high
    u, _, vt = np.linalg.svd(random(40, 64), full_matrices=False)
    s = np.geomspace(0.015, 0.6, 40)
    assert (s / np.linalg.norm(s)).min() >= smallest
    for x in (u * s @ vt, (u * s @ vt).T):
        made = orthogonal(torch.tensor(x, dtype=torch.float32)[None], iteration(coefficients))[0].double().numpy()
        made /= math.sqrt(max(1, x.shape[0] / x.shape[1]))
        found = np.linalg.svd(made, compute_uv=False)
        off = tolerance(torch.float32, 1)
        assert low - off <= found.min() <= found.max() <= high + off


@COEFFICIENTS
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_matrices_of_low_rank_keep_it_and_zeros_stay_zeros(dtype: torch.dtype, coefficients: Any) -> None:
    x = random(30, 3) @ random(3, 20, seed=1)
    found = orthogonal(torch.tensor(x, dtype=dtype)[None], iteration(coefficients))[0].double().numpy()
    expected = math.sqrt(1.5) * exact(x, coefficients, 5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(dtype, 30))
    zeros = orthogonal(torch.zeros(3, 4, 5, dtype=dtype), iteration(coefficients, eps=0.0))
    assert torch.equal(zeros, torch.zeros_like(zeros))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)], ids=str)
def test_the_size_of_a_matrix_does_not_matter(shape: Any, dtype: torch.dtype) -> None:
    """A power of two changes no rounding, from numbers whose norm is subnormal to those whose norm is the largest."""
    x = torch.tensor(random(1, *shape), dtype=dtype)
    reference = orthogonal(x, iteration(eps=0.0))
    powers = (-120, -100, -60, 60, 100, 120) if dtype == torch.float32 else (-480, -400, -126, 126, 400, 500)
    for power in powers:
        assert torch.equal(orthogonal(x * 2.0**power, iteration(eps=0.0)), reference)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_what_is_smaller_than_any_norm_comes_to_nothing_bad(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    sizes = [info.smallest_normal * 2.0**-k for k in range(60)] + [info.tiny**power for power in (0.4, 0.5, 0.6, 0.8)]
    for size in sizes:
        made = orthogonal(torch.tensor(random(1, 6, 8), dtype=dtype) * size, iteration(eps=0.0))
        assert np.linalg.svd(made[0].double().numpy(), compute_uv=False).max() <= 1.3


def test_eps_is_the_least_norm() -> None:
    x = random(1, 4, 6)
    x *= 1e-3 / np.linalg.norm(x)
    for eps in (1e-4, 1e-2, 10.0):
        found = orthogonal(torch.tensor(x), iteration(eps=eps)).numpy()
        np.testing.assert_allclose(found, exact(x, geometries.NEWTON_SCHULZ, 5, least=eps), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0)], ids=str)
@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_empty_matrices(shape: Any, scaling: str) -> None:
    assert orthogonal(torch.zeros(3, *shape), iteration(adjust_lr_fn=scaling)).shape == (3, *shape)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (50, 50), (200, 10)], ids=str)
def test_the_scale_of_an_update(shape: Any) -> None:
    """An orthogonal matrix of rank k = min(rows, columns) has the norm sqrt(k), spread over all its elements.

    "match_rms_adamw" makes the root mean square 0.2. Keller Jordan's "original" gives the update of a wide matrix the
    spectral norm 1, and that of a tall one sqrt(rows / columns).
    """
    x = torch.tensor(random(1, *shape))
    rows, columns = shape
    made = orthogonal(x, iteration((1.875, -1.25, 0.375), 30, adjust_lr_fn="match_rms_adamw"))  # to convergence
    assert made.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-9)
    made = orthogonal(x, iteration((1.875, -1.25, 0.375), 30, adjust_lr_fn="original"))
    expected = math.sqrt(rows / columns) if rows > columns else 1.0
    assert torch.linalg.matrix_norm(made, 2).item() == pytest.approx(expected, rel=1e-9)


# --------------------------------------------------------------------------------- Polar Express


def best_quintic(low: float, high: float) -> tuple[Array, float]:
    """The odd quintic nearest to 1 on [low, high], and its distance: four points of equal error, moved to where the
    error is largest (Remez)."""
    x = np.concatenate([[low], low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, 20_001)[1:-1])) / 2, [high]])
    points = np.array([low, low + (high - low) / 4, low + 3 * (high - low) / 4, high])
    signs = np.array([-1.0, 1.0, -1.0, 1.0])
    for _ in range(50):
        powers = points[:, None] ** [1, 3, 5]
        *polynomial, distance = np.linalg.solve(np.column_stack([powers, -signs]), np.ones(4))
        derivative = [5 * polynomial[2], 0, 3 * polynomial[1], 0, polynomial[0]]
        inner = np.sort([r.real for r in np.roots(derivative) if abs(r.imag) < 1e-9 and low < r.real < high])
        points = np.array([low, *inner, high])
    error = x[:, None] ** [1, 3, 5] @ np.array(polynomial) - 1
    assert np.abs(error).max() == pytest.approx(abs(distance), rel=1e-9)  # equal at four points, nowhere more
    return np.array(polynomial), abs(distance)


def test_the_constants_of_polar_express_are_the_best_there_are() -> None:
    """Each quintic is the best for where the values of [1e-3, 1] have come to lie, centered around 1; but not for less
    than 0.0241 of the largest (the paper's cushion), below which the best would lower what lies in between too much."""
    low, high = 1e-3, 1.0
    for found in geometries.POLAR_EXPRESS[:-2]:
        polynomial, _ = best_quintic(max(low, 0.02407327424182761 * high), high)
        ends = np.array([low, high])[:, None] ** [1, 3, 5] @ polynomial
        np.testing.assert_allclose(found, polynomial * 2 / ends.sum(), rtol=1e-6)
        low, high = ends * 2 / ends.sum()
    # Around 1 the best is that of Newton and Schulz, but for about the square of how far the interval reaches.
    for found in geometries.POLAR_EXPRESS[-2:]:
        np.testing.assert_allclose(found, (15 / 8, -10 / 8, 3 / 8), rtol=2 * (1 - low) ** 2)
    assert geometries.POLAR_EXPRESS[-1] == (15 / 8, -10 / 8, 3 / 8)
