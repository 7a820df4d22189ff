"""The geometry "muon" in JAX: against torch and optax, and under JAX's own tools. Run by test_jax.py."""

import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import torch

import ademamix.jax as ours
from ademamix import KEMA, AdamW, ADana, AdEMAMix, Muon, RuleOptimizer, SimplifiedAdEMAMix, geometries, optimizer_from
from ademamix.backends.jax import _multiply
from ademamix.jax import Blocks, State, state_from_torch, state_to_torch, transformation
from jax_transformations import like, same, stepping

Axes = optax.contrib.MuonDimensionNumbers


def of_signs(g: Any, near: Any, far: Any, *, share: float = 0.25, w: Any) -> Any:
    near, far = near + share * (g - near), far + w * (g - far)
    return near + far, near, far


OfSigns = optimizer_from(of_signs, lambda step, *, decay=0.9: {"w": 1.0 - decay**step})
WARM = {"alpha": 5.0, "beta3_warmup": 6, "alpha_warmup": 7, "weight_decay": 0.1}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # in torch, here, options of one name in both
    "AdEMAMix": (AdEMAMix, ours.ademamix, WARM),
    "AdamW": (AdamW, ours.adamw, {"weight_decay": 0.1, "ns_steps": 3}),
    "SimplifiedAdEMAMix": (SimplifiedAdEMAMix, ours.simplified_ademamix, {"alpha": 2.0, "eps": 10.0}),
    "ADana": (ADana, ours.adana, {"omega": 0.2, "peak_lr": 0.02, "ns_coefficients": "polar_express"}),
    "KEMA": (KEMA, ours.kema, {"count": 4, "shortest": 1.0, "ns_coefficients": (2.0, -1.5, 0.5)}),
    "Muon": (Muon, ours.muon, {"adjust_lr_fn": "match_rms_adamw"}),
    "a user's own": (OfSigns, transformation(OfSigns), {"share": 0.5}),
}
SHAPES = ((64, 96), (96, 64), (64, 96), (5000,), (3,))  # the matrices first: groups of torch have that order
ARE_MATRICES = [len(s) == 2 for s in SHAPES]
LR = 0.01
SHORT = {"ns_steps": 1}  # compiles faster, where the iteration does not matter


def by_shape(params: Any) -> Any:
    return jax.tree.map(lambda p: "muon" if p.ndim >= 2 else "adam", params)


def numbers(seed: int, shapes: Any = SHAPES) -> list[Any]:
    """Parameters (seed 0), or gradients of different sizes."""
    random = np.random.default_rng(seed)
    return [random.standard_normal(s) * 10.0 ** (random.integers(-3, 2) if seed else 0) for s in shapes]


def torch_run(cls: Any, dtype: torch.dtype, steps: int, first: int = 0, params: Any = None, **options: Any) -> Any:
    """An optimizer of all matrices in "muon" and all vectors in "adam", after some steps."""
    params = numbers(0) if params is None else params
    params = [torch.tensor(np.asarray(p, np.float64)).to(dtype).requires_grad_() for p in params]
    groups = [
        {"params": [p for p, m in zip(params, ARE_MATRICES, strict=True) if m is muon], "geometry": geometry}
        for muon, geometry in ((True, "muon"), (False, "adam"))
    ]
    optimizer = cls(groups, lr=LR, backend="eager", seed=3, **options)
    return torch_steps(optimizer, params, steps, first)


def torch_steps(optimizer: RuleOptimizer, params: Any, steps: int, first: int) -> Any:
    for t in range(first, first + steps):
        for p, g in zip(params, numbers(100 + t), strict=True):
            p.grad = torch.tensor(g).to(p.dtype)
        optimizer.step()
    return optimizer, params


def run(tx: Any, params: Any, steps: int, first: int = 0, state: Any = None, *, jit: bool = False) -> Any:
    state = tx.init(params) if state is None else state
    step = jax.jit(stepping(tx)) if jit else stepping(tx)
    for t in range(first, first + steps):
        params, state = step(params, state, [jnp.asarray(g, params[0].dtype) for g in numbers(100 + t)])
    return params, state


def update_error(shape: tuple[int, int], unit: float, steps: int = 5) -> float:
    """How far two computations of an update with 0.2 sqrt(max(shape)) may lie apart, for lr = 1.

    A product of matrices whose singular values are at most 1.3 sums k <= min(shape) or max(shape) roundings of random
    signs in each element; a polynomial has three products with coefficients of at most 10 in sum, or 50 for
    polar_express's first. What is off then is off 4 times as much after each further polynomial, whose slope is that
    of the singular value 0; polar_express's are 8, 4, 4, 3, 2.
    """
    amplified = sum(4.0**k for k in range(steps))
    return 0.2 * math.sqrt(max(shape)) * 10 * math.sqrt(max(shape)) * amplified * unit


# --------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_torch_s(kind: str) -> None:
    cls, make, options = KINDS[kind]
    optimizer, theirs = torch_run(cls, torch.float64, 3, **options)
    with jax.enable_x64(True):
        start = [jnp.asarray(v) for v in numbers(0)]
        params, state = run(make(LR, geometry=by_shape, **options), start, 3, jit=True)
        expected = state_from_torch(optimizer.state_dict(), params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        size = np.abs(other).max(initial=1e-300)
        np.testing.assert_allclose(one, other, rtol=60 * 2**-53, atol=60 * 2**-53 * size)
    for p, q in zip(params, theirs, strict=True):
        q = q.detach().numpy()
        allowed = 60 * 2**-53 * np.abs(q).max()
        if p.ndim == 2:
            allowed += 3 * LR * update_error(p.shape, 2**-53)
        assert np.abs(np.asarray(p) - q).max() <= allowed < 1e-9  # updates are 2e-3


@pytest.mark.parametrize(
    ("kind", "dtype", "state"),
    [
        *((kind, "float32", "compact") for kind in KINDS),
        *(("AdEMAMix", "float32", state) for state in ("float32", "bfloat16")),
        *((kind, "bfloat16", "compact") for kind in ("AdEMAMix", "Muon")),
    ],
)
def test_every_bit_of_the_state_is_that_of_eager(kind: str, dtype: str, state: str) -> None:
    cls, make, options = KINDS[kind]
    optimizer, theirs = torch_run(cls, getattr(torch, dtype), 3, state=state, **options)
    start = [jnp.asarray(v, dtype) for v in numbers(0)]
    params, mine = run(make(LR, geometry=by_shape, state=state, seed=3, **options), start, 3)
    assert same(mine, state_from_torch(optimizer.state_dict(), params))
    for p, q in zip(params, theirs, strict=True):
        p, q = np.asarray(p, np.float32), q.detach().float().numpy()
        unit = float(jnp.finfo(dtype).eps)
        error = np.abs(p - q)
        # As in jax_transformations.py for vectors; rounded stochastically, a number that differs may fall otherwise.
        allowed = 3 * unit * np.maximum(np.abs(q), 0.1)
        if p.ndim == 2:
            allowed = allowed + 3 * LR * update_error(p.shape, 2**-24)
        assert (error <= allowed).all()
        if dtype == "bfloat16":
            assert (error > 0).mean() < 0.02


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_layers_have_the_update_of_torch_s_layers(scaling: str) -> None:
    """torch has [out, in] and [out, in, h, w] where JAX has [in, out] and [h, w, in, out]."""
    axes = {(96, 64): (1, 0), (64, 96): (1, 0), (8, 6, 3, 2): (2, 3, 1, 0)}
    values, grads = numbers(0, axes), numbers(1, axes)
    weights = [torch.tensor(v, requires_grad=True) for v in values]
    optimizer = Muon(weights, lr=1.0, adjust_lr_fn=scaling, weight_decay=0.0, backend="eager")
    for w, g in zip(weights, grads, strict=True):
        w.grad = torch.tensor(g)
    optimizer.step()
    with jax.enable_x64(True):
        kernels = [jnp.asarray(v.transpose(a)) for v, a in zip(values, axes.values(), strict=True)]
        tx = ours.muon(1.0, adjust_lr_fn=scaling, weight_decay=0.0)
        moved, _ = tx.update(
            [jnp.asarray(g.transpose(a)) for g, a in zip(grads, axes.values(), strict=True)], tx.init(kernels), kernels
        )
    for u, w, v, a in zip(moved, weights, values, axes.values(), strict=True):
        # Scales of up to 2 sqrt(96) times what update_error is made for, and the rounding of w + u
        np.testing.assert_allclose(u, (w.detach().numpy() - v).transpose(a), atol=1e-9)


def test_an_array_is_seen_as_torch_sees_it_where_its_axes_say_so() -> None:
    shapes = ((96, 64), (64, 96), (6, 10, 4))
    weights = [torch.tensor(v, requires_grad=True) for v in numbers(0, shapes)]
    optimizer = Muon(weights, lr=1.0, weight_decay=0.0, backend="eager")
    for w, g in zip(weights, numbers(1, shapes), strict=True):
        w.grad = torch.tensor(g)
    optimizer.step()
    with jax.enable_x64(True):
        tx = ours.muon(
            1.0, weight_decay=0.0, geometry=lambda tree: jax.tree.map(lambda p: Axes(tuple(range(1, p.ndim)), 0), tree)
        )
        params = [jnp.asarray(v) for v in numbers(0, shapes)]
        moved, _ = tx.update([jnp.asarray(g) for g in numbers(1, shapes)], tx.init(params), params)
    for u, w, v in zip(moved, weights, numbers(0, shapes), strict=True):
        np.testing.assert_allclose(u, w.detach().numpy() - v, atol=1e-9)  # as above


# --------------------------------------------------------------------------------- against optax


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_muon_is_optax_s_where_the_scale_of_a_direction_is_all_that_differs(consistent_rms: float | None) -> None:
    """optax corrects the average's bias, which the norm takes out again where there is no Nesterov."""
    shapes = ((64, 96), (96, 64), (7,))
    own = ours.muon(
        LR,
        nesterov=False,
        weight_decay=0.0,
        eps=1e-8,
        geometry=by_shape,
        adjust_lr_fn="original" if consistent_rms is None else "match_rms_adamw",
    )
    theirs = optax.contrib.muon(LR, nesterov=False, consistent_rms=consistent_rms)
    outcomes = []
    for tx in (own, theirs):
        params = [jnp.asarray(v, jnp.float32) for v in numbers(0, shapes)]
        state, step = tx.init(params), jax.jit(stepping(tx))
        for t in range(4):
            params, state = step(params, state, [jnp.asarray(g, jnp.float32) for g in numbers(50 + t, shapes)])
        outcomes.append(params)
    for p, q in zip(*outcomes, strict=True):
        size = float(jnp.abs(p).max())
        # Scales of "original" are smaller. Vectors: as in test_adamw_is_optax_s.
        allowed = 4 * LR * update_error(p.shape, 2**-24) + 8 * 2**-24 * size if p.ndim == 2 else 1.5e-6 + 2**-20 * size
        assert float(jnp.abs(p - q).max()) <= allowed


# --------------------------------------------------------------------------------- what has which geometry


def tree() -> dict[str, Any]:
    a, b, c, e, f = (jnp.asarray(v, jnp.float32) for v in numbers(0))
    return {"dense": {"w": a, "b": e}, "embedding": a[:, 1:] * 2.0, "others": (b, c, f)}


ONE_BY_ONE = {"dense": {"w": "muon", "b": "adam"}, "embedding": "adam", "others": ("muon", "muon", "adam")}


def test_the_state_has_no_second_moment_of_matrices_in_muon() -> None:
    made = ours.ademamix(0.1, geometry=ONE_BY_ONE, state="compact").init(tree())
    assert list(made.slots) == ["exp_avg_fast", "exp_avg_slow", "exp_avg_sq"]
    squares, slow = made.slots["exp_avg_sq"], made.slots["exp_avg_slow"]
    assert squares["dense"]["w"] == squares["others"][0] == optax.MaskedNode()
    assert isinstance(squares["dense"]["w"], optax.MaskedNode)
    assert squares["dense"]["b"].shape == (5000,)
    assert squares["embedding"].codes.dtype == jnp.uint8
    assert slow["dense"]["w"].codes.shape == (64, 96)
    alone = ours.muon(0.1, state="compact").init({"w": jnp.ones((64, 96))})
    assert jax.tree.map(lambda x: x.dtype, alone.slots) == {"momentum_buffer": {"w": Blocks(jnp.int8, jnp.float32)}}
    both = ours.muon(0.1, geometry=by_shape).init(tree()).slots
    assert {name: len(jax.tree.leaves(of)) for name, of in both.items()} == {
        "momentum_buffer": 4,
        "exp_avg": 2,
        "exp_avg_sq": 2,
    }


def test_all_ways_of_saying_it_are_one() -> None:
    params, grads = tree(), like(tree())
    axes = Axes(reduction_axis=(0,), output_axis=-1)
    prefix = {"dense": {"w": axes, "b": "adam"}, "embedding": "adam", "others": ("muon", Axes(), "adam")}
    outcomes = []
    for geometry in (ONE_BY_ONE, prefix, lambda tree: ONE_BY_ONE):
        tx = ours.adana(0.1, geometry=geometry, weight_decay=0.1, **SHORT)
        outcomes.append(jax.jit(stepping(tx))(params, tx.init(params), grads))
    assert same(outcomes[0], outcomes[1])
    assert same(outcomes[0], outcomes[2])
    whole = ours.adana(0.1, geometry="muon", weight_decay=0.1, **SHORT)
    (alone,), _ = stepping(whole)([params["dense"]["w"]], whole.init([params["dense"]["w"]]), [grads["dense"]["w"]])
    np.testing.assert_allclose(alone, outcomes[0][0]["dense"]["w"], atol=0.1 * update_error((64, 96), 2**-24))


def test_adam_said_aloud_is_what_there_was_before() -> None:
    params = tree()
    plain, said = (ours.kema(0.1, state="compact", **o) for o in ({}, {"geometry": "adam", "ns_steps": 7}))
    assert same(*(jax.jit(stepping(tx))(params, tx.init(params), like(params)) for tx in (plain, said)))


def test_axes_say_what_a_stack_of_layers_is() -> None:
    """Scanned layers [layers, in, out], and heads [in, heads, out] and [heads, in, out]."""
    random = np.random.default_rng(0)
    stack, heads, merged = (random.standard_normal(s).astype(np.float32) for s in ((3, 16, 40), (24, 4, 8), (4, 8, 24)))
    given = {"stack": stack, "heads": heads, "merged": merged}
    axes = {"stack": Axes(1, 2), "heads": Axes(0, (1, 2)), "merged": "muon"}
    alone = {**{str(i): layer for i, layer in enumerate(stack)}, "heads": heads.reshape(24, 32)}
    alone["merged"] = merged.reshape(32, 24)
    results = []
    for params, geometry in ((given, axes), (alone, "muon")):
        tx = ours.muon(1.0, geometry=geometry, weight_decay=0.0)
        params = jax.tree.map(jnp.asarray, params)
        results.append(tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params)[0])
    one, other = results
    for found, expected in (
        *zip(one["stack"], (other[str(i)] for i in range(3)), strict=True),
        (one["heads"].reshape(24, 32), other["heads"]),
        (one["merged"].reshape(32, 24), other["merged"]),
    ):
        np.testing.assert_allclose(found, expected, atol=update_error(expected.shape, 2**-24))


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ("muon", r"at least 2 dimensions, got params\['dense'\]\['b'\] of shape \(5000,\); .* p.ndim >= 2"),
        (lambda params: "nuom", r"one of \('adam', 'muon'\), got 'nuom' for params\['dense'\]\['b'\]"),
        (
            {**ONE_BY_ONE, "embedding": Axes(0, 2)},
            r"axes from -2 to 1, each once, got params\['embedding'\] of shape \(64, 95\)",
        ),
        (
            {**ONE_BY_ONE, "embedding": Axes(0, -2)},
            r"Numbers\(reduction_axis=0, output_axis=-2\) must name axes .*, each once, got",
        ),
    ],
    ids=["vector", "name", "axis", "axes"],
)
def test_leaves_that_do_not_fit_are_named(geometry: Any, message: str) -> None:
    tx = ours.adamw(0.1, geometry=geometry)
    state = ours.adamw(0.1).init(tree())
    for call in (lambda: tx.init(tree()), lambda: tx.update(tree(), state, tree())):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometry": "muno"}, r"geometry must be one of \('adam', 'muon'\), got 'muno'"),
        ({"geometry": {"w": "muon", "b": "adma"}}, r"geometry must be one of .*, got 'adma'"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn must be one of .*, got 'none'"),
        ({"ns_steps": 0}, "ns_steps must be an integer from 1 to 99, got 0"),
        ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients must be .*, got \(1.0, 2.0\)"),
    ],
    ids=str,
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    for make in (ours.adana, ours.muon, transformation(OfSigns)):
        with pytest.raises(ValueError, match=message):
            make(**{"learning_rate": 0.1, **options})


def test_a_whole_rule_has_no_geometry_but_its_own() -> None:
    def rule(p: Any, g: Any, *, lr: float = 0.1) -> Any:
        return (p - lr * g,)

    make = transformation(optimizer_from(rule))
    with pytest.raises(ValueError, match=r"one of \('adam',\) for Rule, which is made of a whole rule .*, got 'muon'"):
        make(0.1, geometry="muon")
    tx = make(0.1, geometry=by_shape)
    with pytest.raises(ValueError, match=r"one of \('adam',\), got 'muon' for params\['dense'\]\['w'\]"):
        tx.init(tree())


def test_parts_of_a_model_that_are_none_have_none() -> None:
    """As equinox.partition and optax.masked make them."""
    params = {"w": jnp.ones((3, 4)), "static": None, "b": optax.MaskedNode()}
    for geometry in ({"w": "muon", "static": None, "b": "adam"}, by_shape, "muon"):
        tx = ours.adana(0.1, geometry=geometry, **SHORT)
        moved, state = stepping(tx)(params, tx.init(params), params)
        assert jax.tree.structure(moved) == jax.tree.structure(params)
        assert state.slots["exp_avg"]["w"].shape == (3, 4)
    nothing = {"static": None}
    tx = ours.adana(0.1, geometry=nothing)
    assert tx.update(nothing, tx.init(nothing), nothing)[0] == nothing


def test_state_of_another_geometry_is_refused() -> None:
    params = tree()
    state = ours.adana(0.1, geometry=ONE_BY_ONE).init(params)
    with pytest.raises(ValueError, match=r"no \['exp_avg_sq'\], which the rule stores; it has \['exp_avg'\] for .*'w'"):
        ours.adana(0.1).update(params, state, params)
    state = ours.adana(0.1).init(params)
    with pytest.raises(
        ValueError, match=r"the state has \['exp_avg_sq'\] for params\['dense'\]\['w'\], whose geometry"
    ):
        ours.adana(0.1, geometry=ONE_BY_ONE).update(params, state, params)


# --------------------------------------------------------------------------------- what JAX and optax do to them


def test_optax_s_wrappers_take_them() -> None:
    params = tree()
    labels = {"dense": {"w": "a", "b": "b"}, "embedding": "b", "others": ("a", "a", "b")}
    parts = optax.multi_transform(
        {"a": ours.muon(0.1, state="compact", **SHORT), "b": ours.ademamix(0.1, geometry=by_shape, **SHORT)}, labels
    )
    rate = optax.linear_schedule(0.1, 0.01, 10)
    whole = ours.ademamix(rate, geometry=by_shape, mask=by_mask, weight_decay=rate, **SHORT)
    injected = optax.inject_hyperparams(ours.ademamix, static_args=("geometry", "mask", "ns_steps"))(
        rate, geometry=by_shape, mask=by_mask, weight_decay=rate, alpha=3.0, **SHORT
    )
    chained = optax.chain(optax.clip_by_global_norm(1.0), whole)
    grads = jax.tree.map(lambda x: jnp.stack([x] * 3), like(params))
    for tx in (parts, injected, chained, optax.MultiSteps(whole, 2), optax.apply_if_finite(parts, 3)):

        def scanned(carry: Any, each: Any, step: Any = None) -> Any:
            return jax.lax.scan(lambda c, g: (step(*c, g), None), carry, each)[0]

        step = stepping(tx)
        moved, _ = jax.jit(lambda c, g, step=step: scanned(c, g, step))((params, tx.init(params)), grads)
        assert not any(np.array_equal(*each) for each in zip(*map(jax.tree.leaves, (moved, params)), strict=True))
    for tx in (parts, whole):
        marked = optax.tree.map_params(tx, lambda x: "its", tx.init(params), transform_non_params=lambda x: "not")
        assert set(jax.tree.leaves(marked)) == {"its", "not"}


def by_mask(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def test_hyperparameters_may_be_injected() -> None:
    """Flags and settings are numbers of Python, which inject_hyperparams tells apart by their types."""
    params = {"w": tree()["dense"]["w"]}
    for make, options in ((ours.muon, {"nesterov": False, "ns_coefficients": "polar_express"}), (ours.kema, {})):
        static = ("count",) if make is ours.kema else ()
        tx = optax.inject_hyperparams(make, static_args=static)(0.1, geometry="muon", **options)
        plain = make(0.1, geometry="muon", **options)
        (p, _), (q, _) = (jax.jit(stepping(each))(params, each.init(params), like(params)) for each in (tx, plain))
        # Decays near 1 become float32 numbers: the averages' weights are off by 6e-5 of themselves, and a direction
        # that is off by 6e-5 gives an update that is off by 4**5 times that where singular values are almost 0.
        assert float(jnp.abs(p["w"] - q["w"]).max()) < 0.1 * 0.2 * math.sqrt(96) * 1024 * 6e-5 * 0.1
    injected = optax.inject_hyperparams(ours.muon)(0.1, ns_steps=3)
    with pytest.raises(ValueError, match="ns_steps must be an integer from 1 to 99"):
        injected.init(params)


def test_weight_decay_spares_what_the_mask_does() -> None:
    params = tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = ours.muon(0.1, weight_decay=0.5, geometry=by_shape, mask={"dense": True, "embedding": True, "others": False})
    moved, _ = stepping(tx)(params, tx.init(params), zeros)
    for group, decays in (("dense", 0.5), ("embedding", 0.5), ("others", 0.0)):
        expected = jax.tree.map(lambda p, d=decays: p - np.float32(0.1) * (np.float32(d) * p), params[group])
        assert same(moved[group], expected)


def test_vmap_is_a_loop() -> None:
    rates, many = (
        jnp.asarray([0.01, 0.1]),
        jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 80), np.float32)),
    )

    def once(lr: Any, w: Any) -> Any:
        tx = ours.adana(lr, geometry="muon")
        return stepping(tx)(w, tx.init(w), jnp.cos(w))[0]

    together = jax.jit(jax.vmap(once))(rates, many)
    for i, lr in enumerate(rates):
        allowed = float(lr) * update_error((64, 80), 2**-24) + 2**-22 * 4
        np.testing.assert_allclose(together[i], once(lr, many[i]), atol=allowed)


def test_donated_buffers_are_used_again() -> None:
    tx, params, grads = ours.adana(0.1, geometry=by_shape, **SHORT), tree(), like(tree())
    state = tx.init(params)
    expected = jax.jit(stepping(tx))(params, state, grads)
    donated = jax.jit(stepping(tx), donate_argnums=(0, 1))(params, state, grads)
    assert same(expected, donated)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_sharded_matrices_have_the_updates_of_whole_ones(kind: Any) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    places = {"w": ("x", "y"), "again": ("y", None), "b": ("x",)}
    random = np.random.default_rng(1)
    shapes = {"w": (64, 96), "again": (64, 96), "b": (64,)}
    whole = {name: jnp.asarray(random.standard_normal(s, np.float32)) for name, s in shapes.items()}
    where = {name: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for name, axes in places.items()}
    tx = ours.adana(0.1, geometry=by_shape)
    step = jax.jit(stepping(tx))
    outcomes = [step(p, tx.init(p), p) for p in (whole, jax.device_put(whole, where))]
    for name in shapes:
        alone, parts = (o[0][name] for o in outcomes)
        np.testing.assert_allclose(parts, alone, atol=0.1 * update_error((64, 96), 2**-24) + 2**-21)
        assert outcomes[1][1].slots["exp_avg"][name].sharding.is_equivalent_to(where[name], alone.ndim)
        if kind is jax.sharding.AxisType.Explicit:
            assert parts.sharding.is_equivalent_to(where[name], alone.ndim)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
@pytest.mark.parametrize("axes", [{"x", "y"}, {"x"}], ids=["all axes", "one axis"])
def test_whole_matrices_step_under_shard_map(axes: set[str], kind: Any) -> None:
    tx, w = ours.adana(0.1, geometry="muon", **SHORT), tree()["dense"]["w"]

    def update(g: Any, w: Any) -> Any:
        return tx.update(jax.lax.pmean(g, "x"), tx.init(w), w)[0]

    mesh, everywhere = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind)), jax.sharding.PartitionSpec()
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(update, in_specs=(everywhere, everywhere), out_specs=everywhere, axis_names=axes)
        found = jax.jit(mapped)(w, w)
    np.testing.assert_allclose(found, tx.update(w, tx.init(w), w)[0], atol=0.1 * update_error((64, 96), 2**-24))


def test_bfloat16_rounds_numbers_and_no_coefficients() -> None:
    """On CPUs it is nobody's; here it is asked for by itself."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((48, 64)), jnp.bfloat16)[None]
    for given, lowest, highest in ((geometries.NEWTON_SCHULZ, 0.6, 1.25), ("polar_express", 0.8, 1.2)):
        steps = geometries.polynomials(given, 5)
        norm = lambda y: jnp.linalg.norm(y.astype(jnp.float32), axis=(1, 2), keepdims=True).astype(y.dtype)  # noqa: E731
        made = geometries.orthogonalized(x, steps, 1.0, norm, _multiply)
        assert made.dtype == jnp.bfloat16
        found = np.linalg.svd(np.asarray(made[0], np.float32), compute_uv=False)
        assert (lowest < found).all()
        assert (found < highest).all()
    one, none = jnp.full((1, 1), 255 / 128, jnp.bfloat16), jnp.zeros((1, 1), jnp.bfloat16)
    assert _multiply(one, none, none, 3.4445, 1.0) == 6.875  # of 3.4375, which bfloat16 has, it would be 6.84375


def test_matrices_of_a_shape_are_one_batch_in_bfloat16_where_that_is_fast() -> None:
    tx, params = ours.adana(0.1, geometry="muon"), [jnp.ones((64, 96))] * 4 + [jnp.ones((40, 8))]
    traced = jax.jit(tx.update).trace(params, tx.init(params), params)
    for platform, dtype in (("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = re.findall(r"dot_general.*: \(tensor<(\w+)>", text)
        assert len(products) == 2 * 5 * 3  # for each shape five polynomials of three products
        assert {p.split("x")[-1] for p in products} == {dtype}
        assert {p.split("x")[0] for p in products} == {"4", "8", "40"}  # four matrices, and a single one, of 40 by 8


def test_float32_is_float32_whatever_products_are_elsewhere() -> None:
    tx, w = ours.adana(1.0, geometry="muon"), tree()["dense"]["w"]
    expected = tx.update(w, tx.init(w), w)[0]
    with jax.default_matmul_precision("bfloat16"):
        assert same(tx.update(w, tx.init(w), w)[0], expected)
        text = jax.jit(tx.update).lower(w, tx.init(w), w).as_text()
    assert set(re.findall(r"precision = \[(\w+), (\w+)\]", text)) == {("HIGHEST", "HIGHEST")}


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_directions_of_any_size_have_the_same_update(size: float) -> None:
    w = tree()["dense"]["w"]
    tx = ours.adana(1.0, geometry="muon", eps=0.0)
    expected, found = (tx.update(g, tx.init(w), w)[0] for g in (w, w * size))
    np.testing.assert_allclose(found, expected, atol=update_error((64, 96), 2**-24) + 2**-22 * 4)


def test_no_direction_is_no_step() -> None:
    params = [jnp.ones((3, 4)), jnp.ones((0, 4)), jnp.ones((4, 0, 2))]
    zeros = [jnp.zeros_like(p) for p in params]
    for eps in (0.0, 1e-8, lambda count: 1e-8):
        tx = ours.adana(0.1, geometry="muon", eps=eps)
        assert same(jax.jit(stepping(tx))(params, tx.init(params), zeros)[0], params)


# --------------------------------------------------------------------------------- files, and runs that move


@pytest.mark.parametrize("state", ["float32", "compact"])
def test_orbax_checkpoints_resume_exactly(state: str, tmp_path: Path) -> None:
    tx = ours.ademamix(LR, geometry=by_shape, state=state, **WARM, **SHORT)
    params, done = run(tx, [jnp.asarray(v, jnp.bfloat16) for v in numbers(0)], 2)
    saved = {"params": params, "state": done}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.eval_shape(lambda: saved))
    assert same(restored, saved)
    assert same(*(run(tx, s["params"], 2, 2, s["state"]) for s in (saved, restored)))


@pytest.mark.parametrize("state", ["float32", "compact"])
@pytest.mark.parametrize("kind", ["AdEMAMix", "Muon"])
def test_a_run_goes_from_torch_to_jax_and_back(kind: str, state: str) -> None:
    cls, make, options = KINDS[kind]
    straight, straight_params = torch_run(cls, torch.float32, 3, state=state, **options)
    first, params = torch_run(cls, torch.float32, 1, state=state, **options)
    params = [jnp.asarray(p.detach().numpy()) for p in params]
    tx = make(LR, geometry=by_shape, state=state, seed=3, **options)
    begun = state_from_torch(first.state_dict(), params)
    assert jax.tree.structure(begun) == jax.tree.structure(tx.init(params))
    params, done = run(tx, params, 1, 1, begun)
    last, last_params = torch_run(cls, torch.float32, 0, params=params, state=state, **options)
    last.load_state_dict({**last.state_dict(), "state": state_to_torch(done)})
    torch_steps(last, last_params, 1, 2)
    for p, q in zip(straight_params, last_params, strict=True):
        assert straight.state[p].keys() == last.state[q].keys()
        assert all(torch.equal(straight.state[p][k], last.state[q][k]) for k in straight.state[p])


def test_states_to_torch_count_the_leaves_that_store_nothing() -> None:
    def plain(g: Any) -> Any:
        return (g,)

    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(3), "c": None, "d": optax.MaskedNode(), "e": jnp.ones(2)}
    tx = transformation(optimizer_from(plain))(0.1, geometry=by_shape)
    states = state_to_torch(tx.init(params))
    assert [list(states[i]) for i in range(3)] == [["step"], ["step", "exp_avg_sq"], ["step", "exp_avg_sq"]]


def test_state_that_does_not_fit_is_named() -> None:
    optimizer, params = torch_run(ADana, torch.float32, 1)
    saved = optimizer.state_dict()
    del saved["state"][4]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"'exp_avg_sq' of parameter 4 must have shape \(3,\), got none"):
        state_from_torch(saved, [jnp.asarray(p.detach().numpy()) for p in params])


def test_old_states_have_no_geometry() -> None:
    """A state dict from before there were geometries."""
    p = torch.ones(3, 2, requires_grad=True)
    optimizer = AdamW([p])
    p.grad = torch.ones(3, 2)
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in ("geometry", "adjust_lr_fn", "ns_coefficients", "ns_steps"):
            del group[name]
    params = [jnp.ones((3, 2))]
    assert isinstance(begun := state_from_torch(saved, params), State)
    assert jax.tree.structure(begun) == jax.tree.structure(ours.adamw(0.1).init(params))
