"""The optax transformations: against the eager backend, recorded trajectories and optax, and under JAX's own tools.

Run by test_jax.py, which gives JAX 8 virtual devices.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy as xp
import optax
import orbax.checkpoint
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

import ademamix.jax as ours
from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix, optimizer_from
from ademamix.backends.jax import decode
from ademamix.engine.coefficients import on_host
from ademamix.jax import Blocks, State, state_from_torch, state_to_torch, transformation

assert len(jax.devices()) == 8, "needs XLA_FLAGS=--xla_force_host_platform_device_count=8"

SHAPES = ((64, 96), (33, 300), (10, 20, 30), (5000,), (3,), ())
WARM = {"alpha": 5.0, "beta3_warmup": 6, "alpha_warmup": 7, "weight_decay": 0.1}


def own(p: Any, g: Any, short: Any, long: Any, *, lr: float = 0.1, bound: float = 0.5, w: Any) -> Any:
    short, long = short + 0.25 * (g - short), long + w * (g - long)
    agreed = xp.where(short * long > 0.0, xp.maximum(xp.minimum(long, bound), -bound), 0.0)
    return p - lr * (short + agreed), short, long


Own = optimizer_from(own, lambda step, *, decay=0.9: {"w": 1.0 - decay**step})
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # in torch, here, hyperparameters of one name in both
    "AdEMAMix": (AdEMAMix, ours.ademamix, WARM),
    "AdEMAMix log-time": (AdEMAMix, ours.ademamix, {"alpha": 1.0, "beta3_schedule": "log-time", "kappa": 0.7}),
    "AdamW": (AdamW, ours.adamw, {"weight_decay": 0.1}),
    "SimplifiedAdEMAMix": (SimplifiedAdEMAMix, ours.simplified_ademamix, {"alpha": 2.0, "beta1_warmup": 4}),
    "ADana": (ADana, ours.adana, {"omega": 0.2, "peak_lr": 0.02}),
    "KEMA": (KEMA, ours.kema, {"count": 4, "warmup": 5, "weight_decay": 0.1}),
    "a user's own": (Own, transformation(Own), {"bound": 0.3}),
}


def values(dtype: Any = np.float32) -> list[Any]:
    random = np.random.default_rng(0)
    return [random.standard_normal(s).astype(dtype) for s in SHAPES]


def gradients(step: int) -> list[Any]:
    random = np.random.default_rng(100 + step)
    return [random.standard_normal(s).astype(np.float32) * np.float32(10.0 ** random.integers(-4, 2)) for s in SHAPES]


def train(tx: Any, params: Any, steps: int = 5, *, jit: bool = True, state: Any = None, first: int = 0) -> Any:
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params) if state is None else state
    for t in range(first, first + steps):
        grads = [jnp.asarray(g, p.dtype) for g, p in zip(gradients(t), params, strict=True)]
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def torch_train(optimizer: RuleOptimizer, steps: int = 5, first: int = 0) -> None:
    for t in range(first, first + steps):
        for p, g in zip(optimizer.param_groups[0]["params"], gradients(t), strict=True):
            p.grad = torch.tensor(g).to(p.dtype)
        optimizer.step()


def torch_params(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor(v).to(dtype).requires_grad_() for v in values()]


def same(one: Any, other: Any) -> bool:
    """Bit for bit, dtypes and structure."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


# --------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize(
    ("kind", "dtype", "state"),
    [
        *((kind, "float32", "compact") for kind in KINDS),
        *(("AdEMAMix", "bfloat16", state) for state in ("float32", "bfloat16", "compact")),
    ],
)
def test_every_bit_of_the_state_is_that_of_eager(kind: str, dtype: str, state: str) -> None:
    """Without jit, JAX runs one operation at a time, as torch does."""
    cls, make, options = KINDS[kind]
    optimizer = cls(torch_params(getattr(torch, dtype)), lr=0.01, state=state, backend="eager", seed=3, **options)
    torch_train(optimizer, 3)
    tx = make(0.01, state=state, seed=3, **options)
    params, mine = train(tx, [jnp.asarray(v, dtype) for v in values()], 3, jit=False)
    expected = state_from_torch(optimizer.state_dict(), params)
    assert same(mine, expected)
    for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True):
        # torch's square root is off by a unit in the last place in 0.7 % of all cases, and p + (new - p) is rounded if
        # a step takes a parameter beyond its half or its double: by half a unit of what is of a step's size.
        unit = torch.finfo(p.dtype).eps
        error = np.abs(p.detach().float().numpy() - np.asarray(q, np.float32))
        assert (error <= 3 * unit * np.maximum(np.abs(np.asarray(q, np.float32)), 0.1)).all()
        if dtype == "bfloat16":
            assert (error > 0).mean() < 0.02


@pytest.mark.parametrize("limit", [1.0, None])
def test_a_weight_of_1_and_slow_averages_above_their_limit_are_those_of_eager(limit: float | None) -> None:
    optimizer = AdEMAMix(torch_params(), lr=0.01, betas=(0.9, 0.0, 0.99), slow_limit=limit, backend="eager")
    torch_train(optimizer, 3)
    tx = ours.ademamix(0.01, b1=0.9, b2=0.0, b3=0.99, slow_limit=limit)
    params, mine = train(tx, [jnp.asarray(v) for v in values()], 3, jit=False)
    assert same(mine, state_from_torch(optimizer.state_dict(), params))
    for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True):
        # 60 roundings of sizes that add up to what elements have moved, lr (fast + alpha) rms and more
        moved = np.abs(np.asarray(q) - np.asarray(p.detach()))
        np.testing.assert_array_less(moved, 60 * 2**-24 * np.maximum(np.abs(np.asarray(q)), 1.0) + 1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_jit_gives_the_same_up_to_fused_multiply_adds(kind: str) -> None:
    """XLA contracts a * b + c on CPUs, which leaves out one rounding of 2**-24; a dozen of them in each of 5 steps."""
    cls, make, options = KINDS[kind]
    optimizer = cls(torch_params(), lr=0.01, backend="eager", **options)
    torch_train(optimizer)
    params, state = train(make(0.01, **options), [jnp.asarray(v) for v in values()])
    expected = state_from_torch(optimizer.state_dict(), params)
    theirs = [p.detach().numpy() for p in optimizer.param_groups[0]["params"]]
    for one, other in zip(jax.tree.leaves((params, state)), jax.tree.leaves((theirs, expected)), strict=True):
        size = np.abs(other).max(initial=1e-30)  # averages of gradients of both signs cancel: errors are the terms'
        np.testing.assert_allclose(one, other, rtol=60 * 2**-24, atol=60 * 2**-24 * size)


def test_jitted_low_bits_are_the_same_codes_up_to_those_on_a_border() -> None:
    optimizer = AdEMAMix(torch_params(), lr=0.01, backend="eager", state="compact", **WARM)
    torch_train(optimizer)
    params, state = train(ours.ademamix(0.01, state="compact", **WARM), [jnp.asarray(v) for v in values()])
    expected = state_from_torch(optimizer.state_dict(), params)
    leaves = [jax.tree.leaves(each, is_leaf=lambda x: isinstance(x, Blocks)) for each in (state, expected)]
    for one, other in zip(*leaves, strict=True):
        if isinstance(one, Blocks):
            a, b = (np.asarray(decode(each, jnp.float32)) for each in (one, other))
            width = {"int8": 2**-3, "uint8": 2**-3, "int16": 2**-11}[one.codes.dtype.name]
            # Around zero, codes of int8 lie 2**-19 of the maximum apart.
            assert (np.abs(a - b) <= 1.01 * width * np.abs(a) + 2**-18 * np.abs(a).max()).all()
            # A code of int16 is 2**-11 of the number wide, and numbers are off by some 2**-24.
            assert (np.asarray(one.codes) != np.asarray(other.codes)).mean() <= 0.01


def test_linear_codes_of_version_0_1_0_are_read() -> None:
    codes = jnp.arange(-127, 128, dtype=jnp.int8)[None]
    for kind in (jnp.int8, jnp.int16):
        stored = Blocks(codes.astype(kind), jnp.full((1, 1), 0.5, jnp.float32))
        np.testing.assert_array_equal(decode(stored, jnp.float32), 0.5 * np.arange(-127, 128)[None])


FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_trajectory_of_the_authors_program(file: Path, double: bool) -> None:
    golden = np.load(file)
    config = json.loads(str(golden["config"]))
    steps, shapes, rates = (config.pop(name) for name in ("steps", "shapes", "lr_per_step"))
    lr, betas = config.pop("lr"), config.pop("betas")
    decays = dict(zip(("b1", "b2", "b3"), betas, strict=True))
    tolerance, dtype = (1e-12, np.float64) if double else (2e-6, np.float32)  # as in test_golden.py
    with jax.enable_x64(double):
        schedule = lr if rates is None else lambda count: jnp.asarray(rates)[count]
        tx = ours.ademamix(schedule, **decays, **config)
        params = [jnp.asarray(golden[f"p0_{i}"], dtype) for i in range(len(shapes))]
        grads = [jnp.asarray(golden[f"grads_{i}"], dtype) for i in range(len(shapes))]

        def step(carry: Any, gs: Any) -> Any:
            params, state = carry
            updates, state = tx.update(gs, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        (_, state), trajectory = jax.jit(lambda c: jax.lax.scan(step, c, grads))((params, tx.init(params)))
    assert state.count == steps
    for i in range(len(shapes)):
        found = {f"params_{i}": trajectory[i], **{f"{name}_{i}": tree[i] for name, tree in state.slots.items()}}
        assert (f"exp_avg_fast_{i}" in found) == (f"exp_avg_fast_{i}" in golden)
        for name, x in found.items():
            assert np.abs(np.asarray(x) - golden[name]).max() <= tolerance * np.abs(golden[name]).max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_are_those_of_the_host_in_every_bit(kind: str) -> None:
    """Also where JAX has only float32."""
    cls, make, options = KINDS[kind]
    group = cls(torch_params(), lr=0.01, **options).param_groups[0]
    made = make(0.01, **options).update.__self__
    for done in (0, 1, 5, 700, 100_000):
        _, table = on_host(cls.coefficients, made.names, [group], [0], [float(done)])
        expected = table(torch.device("cpu"))[0, 2:].float().numpy()
        found = jax.jit(made._coefficients, static_argnums=1)(jnp.int32(done), frozenset([jnp.dtype("float32")]))
        np.testing.assert_array_equal([found[jnp.dtype("float32")][name] for name in made.names], expected)


# --------------------------------------------------------------------------------- against optax


def test_adamw_is_optax_s() -> None:
    """optax computes 1 - b2^t in float32: off by 2**-24 / (1 - b2) = 6e-5 of itself in the first step, less later."""
    params, _ = train(ours.adamw(0.01, weight_decay=0.1), [jnp.asarray(v) for v in values()], 20)
    theirs, _ = train(optax.adamw(0.01, weight_decay=0.1), [jnp.asarray(v) for v in values()], 20)
    for one, other in zip(params, theirs, strict=True):
        # Steps of 0.01 are off by half of 6e-5 / t: 3e-7 * (1 + 1 / 2 + ... + 1 / 20) in sum; the rest is rounding.
        np.testing.assert_allclose(one, other, rtol=20 * 2**-24, atol=1.5e-6)


def test_ademamix_is_optax_s_where_both_have_the_same_schedules() -> None:
    """optax's b3 and alpha may be functions of the steps done, and mu_dtype is nu's dtype too; the rest is equal."""

    def alpha(count: Any) -> Any:
        return 5.0 * jnp.minimum((count + 1) / 7, 1.0)

    theirs = optax.contrib.ademamix(0.01, b3=0.999, alpha=alpha, weight_decay=0.1)
    params, _ = train(theirs, [jnp.asarray(v) for v in values()], 20)
    for options in ({"alpha": 5.0, "alpha_warmup": 7}, {"alpha": alpha}):
        mine, _ = train(
            ours.ademamix(0.01, b3=0.999, weight_decay=0.1, **options), [jnp.asarray(v) for v in values()], 20
        )
        for one, other in zip(mine, params, strict=True):
            np.testing.assert_allclose(one, other, rtol=20 * 2**-24, atol=1e-5)  # updates are up to 6 times AdamW's


def test_arguments_are_those_of_optax() -> None:
    names = list(inspect.signature(ours.ademamix).parameters)
    own = ["alpha", "alpha_warmup", "beta3_warmup", "eps", "weight_decay", "mask"]
    assert names[:10] == ["learning_rate", "b1", "b2", "b3", *own]
    theirs = set(inspect.signature(optax.adamw).parameters) - {"eps_root", "nesterov"}
    assert theirs <= set(inspect.signature(ours.adamw).parameters)
    assert ours.ademamix(0.1, 0.8, 0.9, 0.99, 3.0).update.__self__.group["betas"] == (0.8, 0.9, 0.99)


# --------------------------------------------------------------------------------- what JAX and optax do to them


def arrays(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Parameters as a tree of dicts."""
    a, b, *rest = (jnp.asarray(v, dtype) for v in values())
    return {"dense": {"w": a, "b": rest[1]}, "embedding": b, "others": tuple(rest[2:]), "cube": rest[0]}


def like(params: Any, step: int = 0) -> Any:
    """Gradients."""
    random = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(random.standard_normal(p.shape), p.dtype), params)


def stepping(tx: Any) -> Any:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("state", ["float32", "compact"])
def test_the_state_is_a_tree_of_documented_shapes(state: str) -> None:
    params = arrays(jnp.bfloat16)
    tx = ours.ademamix(0.1, state=state)
    made = tx.init(params)
    assert isinstance(made, State)
    assert (made.count.shape, made.count.dtype) == ((), jnp.int32)
    assert list(made.slots) == ["exp_avg_fast", "exp_avg_slow", "exp_avg_sq"]
    cube, small = made.slots["exp_avg_slow"]["cube"], made.slots["exp_avg_slow"]["dense"]["b"]
    assert (small.shape, small.dtype) == ((5000,), jnp.float32)
    if state == "compact":
        assert isinstance(cube, Blocks)
        assert (cube.codes.shape, cube.codes.dtype) == ((10, 20, 30), jnp.int16)
        assert (cube.scale.shape, cube.scale.dtype) == ((10, 3), jnp.float32)
    else:
        assert (cube.shape, cube.dtype) == ((10, 20, 30), jnp.float32)
    updates, after = jax.eval_shape(tx.update, like(params), made, params)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(after) == shapes(made)
    assert shapes(updates) == shapes(params)
    assert list(ours.ademamix(0.1, b1=0.0).init(params).slots) == ["exp_avg_slow", "exp_avg_sq"]


def test_donated_buffers_are_used_again() -> None:
    tx = ours.ademamix(0.1, state="compact")
    params, grads = arrays(), like(arrays())
    state = tx.init(params)
    expected = jax.jit(stepping(tx))(params, state, grads)
    donated = jax.jit(stepping(tx), donate_argnums=(0, 1))(params, state, grads)  # a buffer of no use would warn
    assert same(expected, donated)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))


def test_vmap_is_a_loop() -> None:
    rates = jnp.asarray([0.01, 0.1, 0.3])
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((3, 64, 65), np.float32))}

    def run(lr: Any, params: Any) -> Any:
        step = stepping(tx := ours.ademamix(lr, state="compact", alpha_warmup=3))
        state = tx.init(params)
        for t in range(3):
            params, state = step(params, state, like({"w": jnp.zeros((64, 65))}, t))
        return params, state

    together = jax.jit(jax.vmap(run))(rates, params)
    assert together[1].count.shape == (3,)
    for i, lr in enumerate(rates):
        alone = jax.jit(run)(lr, {"w": params["w"][i]})
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(one, other[i], rtol=1e-6, atol=1e-6)  # multiply-adds may be fused otherwise


def test_injected_hyperparameters() -> None:
    rate = optax.linear_schedule(0.1, 0.0, 10)
    tx = optax.inject_hyperparams(ours.ademamix)(learning_rate=rate, alpha=3.0, alpha_warmup=5, beta3_warmup=5)
    plain = ours.ademamix(rate, alpha=3.0, alpha_warmup=5, beta3_warmup=5)
    (p, state), (q, _) = (train(t, [jnp.asarray(v) for v in values()]) for t in (tx, plain))
    for one, other in zip(p, q, strict=True):
        # b3 comes as a float32 number: 1 - b3 is off by 2e-4 of itself, and so is the slow EMA's part of 5 steps of
        # at most 0.1 * (1 + 3).
        np.testing.assert_allclose(one, other, atol=5 * 0.4 * 2e-4, rtol=1e-6)
    zeros = [jnp.zeros_like(x) for x in p]
    before, _ = tx.update(zeros, state, p)
    state.hyperparams["weight_decay"] = jnp.asarray(1.0)
    after, _ = tx.update(zeros, state, p)
    lr = float(rate(5))
    for x, u, v in zip(p, before, after, strict=True):
        np.testing.assert_allclose(v - u, -lr * x, rtol=1e-4, atol=1e-6)  # differences of numbers of size 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_hyperparameters_in_16_bits_are_refused(dtype: Any) -> None:
    """optax gives them the parameters' dtype, in which 0.9999 is 1."""
    p = [jnp.asarray(v, dtype) for v in values()]
    with pytest.raises(ValueError, match=r"must be float32 at least, got .*16; .* hyperparam_dtype=jnp.float32"):
        optax.inject_hyperparams(ours.ademamix)(learning_rate=0.1).init(p)
    tx = optax.inject_hyperparams(ours.ademamix, hyperparam_dtype=jnp.float32)(learning_rate=0.1)
    for one, other in zip(train(tx, p)[0], train(ours.ademamix(0.1), p)[0], strict=True):
        unit = float(jnp.finfo(dtype).eps)  # one rounding that falls otherwise, in 5 steps
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (one, other)), rtol=5 * unit, atol=5 * unit)


def test_numbers_of_python_and_numpy_are_taken() -> None:
    params = {"python": 1.5, "float32": np.ones((3, 2), np.float32), "float64": np.ones(4)}
    converted = jax.tree.map(jnp.asarray, params)
    grads = like(converted)
    outcomes = []
    for tree, alpha in ((params, np.asarray(3.0)), (converted, 3.0)):
        tx = ours.ademamix(0.1, alpha=alpha)
        state = tx.init(tree)
        updates, state = tx.update(grads, state, tree)
        outcomes.append((optax.apply_updates(tree, updates), state))
    assert same(*outcomes)


def test_injected_structure_is_refused() -> None:
    p = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"count decides the state's structure: .* \(or in static_args\), got"):
        optax.inject_hyperparams(ours.kema)(learning_rate=0.1).init(p)
    kema = optax.inject_hyperparams(ours.kema, static_args=("count", "mask"))(0.1, count=2, mask=lambda tree: True)
    assert list(kema.init(p).inner_state.slots) == ["exp_avg_1", "exp_avg_2", "exp_avg_sq"]


def test_a_mask_spares_leaves_from_weight_decay() -> None:
    params, zeros = arrays(), jax.tree.map(jnp.zeros_like, arrays())
    mask = {"dense": {"w": True, "b": False}, "embedding": False, "others": False, "cube": True}  # a prefix
    expected = jax.tree.map(
        lambda p, decays: p - np.float32(0.1) * (np.float32(0.5 * decays) * p), params, jax.tree.broadcast(mask, params)
    )
    for given in (mask, lambda tree: mask):
        tx = ours.ademamix(0.1, weight_decay=0.5, mask=given)
        assert same(optax.apply_updates(params, tx.update(zeros, tx.init(params), params)[0]), expected)


def test_optax_s_wrappers_take_them() -> None:
    """Parts of a tree, accumulated gradients, steps left out where something is not finite; and scan."""
    params = arrays(jnp.bfloat16)
    label = {"dense": "a", "embedding": "b", "others": "b", "cube": "b"}
    parts = optax.multi_transform({"a": ours.ademamix(0.1, state="compact"), "b": ours.adana(0.1)}, label)
    empty = optax.masked(ours.kema(0.1), jax.tree.map(lambda p: False, params))
    grads = jax.tree.map(lambda x: jnp.stack([x] * 3), like(params))
    for tx in (parts, empty, optax.MultiSteps(parts, 2), optax.apply_if_finite(parts, 3)):

        def run(carry: Any, step: Any) -> Any:
            return jax.lax.scan(lambda c, g: (step(*c, g), None), carry, grads)[0]

        moved, _ = jax.jit(run, static_argnums=1)((params, tx.init(params)), stepping(tx))
        assert jax.tree.map(lambda x: x.dtype, moved) == jax.tree.map(lambda x: x.dtype, params)
        assert not same(moved, params)
    marked = optax.tree.map_params(
        parts, lambda x: "like a parameter", parts.init(params), transform_non_params=lambda x: "not"
    )
    assert jax.tree.leaves(marked).count("not") == 2  # the counts


def test_mu_dtype_is_for_averages_of_gradients() -> None:
    state = ours.ademamix(0.1, mu_dtype=jnp.bfloat16).init(arrays())
    assert [tree["cube"].dtype for tree in state.slots.values()] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert same(ours.ademamix(0.1, mu_dtype="float32").init(arrays()), ours.ademamix(0.1).init(arrays()))


COLLECTIVES = re.compile(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective")


@pytest.mark.parametrize(
    ("state", "axes"),
    [("float32", ("x", "y")), ("bfloat16", ("x", "y")), ("compact", ("x",))],
    ids=["float32, two dimensions", "bfloat16, two dimensions", "compact, dimension 0"],
)
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_sharded_parameters_have_state_like_theirs_and_steps_without_communication(
    state: str, axes: Any, kind: Any
) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    where = NamedSharding(mesh, PartitionSpec(*axes))
    random = np.random.default_rng(1)
    whole = {
        name: jnp.asarray(random.standard_normal(s, np.float32)) for name, s in (("a", (64, 96)), ("b", (16, 8, 64)))
    }
    tx = ours.ademamix(0.1, state=state, weight_decay=0.1, alpha_warmup=3)
    params, grads = jax.device_put(whole, where), jax.device_put(like(whole), where)
    made = tx.init(params)
    for leaf in jax.tree.leaves(made.slots):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), leaf.sharding
    step = jax.jit(stepping(tx))
    assert not COLLECTIVES.search(step.lower(params, made, grads).compile().as_text())
    moved, alone = (params, made), (whole, tx.init(whole))
    for _ in range(2):
        moved, alone = step(*moved, grads), step(*alone, like(whole))
    pairs = zip(jax.tree.leaves((moved[0], moved[1].slots)), jax.tree.leaves((alone[0], alone[1].slots)), strict=True)
    for one, other in pairs:
        assert one.sharding.is_equivalent_to(where, one.ndim)
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("state", ["float32", "compact"])
def test_orbax_checkpoints_resume_exactly(state: str, tmp_path: Path) -> None:
    tx = ours.ademamix(0.01, state=state, **WARM)
    params, done = train(tx, [jnp.asarray(v, jnp.bfloat16) for v in values()], 2)
    saved = {"params": params, "state": done}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.eval_shape(lambda: saved))
    assert same(restored, saved)
    once, again = (train(tx, s["params"], 2, state=s["state"], first=2) for s in (saved, restored))
    assert same(once, again)


def run_examples(page: str) -> dict[str, Any]:
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, scope)
    return scope


def test_a_memory_of_your_own_has_compact_state_in_jax() -> None:
    state = run_examples("tutorials/your-own-memory.md")["state"]
    assert {name: leaf.codes.dtype for name, leaf in state.slots.items()} == {
        "short": jnp.int16,
        "long": jnp.int16,
        "exp_avg_sq": jnp.uint8,
    }


def test_the_page_s_examples_run_one_after_the_other_and_train_their_model() -> None:
    scope = run_examples("how-to/jax.md")
    assert scope["loss"] < 6.4  # a tenth of the start's: 64, the variance of a sum of 64
    assert int(scope["state"].count) == scope["T"]


SCALE = 0.5
SHARES = (0.25, 0.125)


def divided(x: Any, k: int) -> Any:
    return x if k == 0 else divided(xp.maximum(x, x) / 2.0, k - 1)


def varied(p: Any, g: Any, m: Any, last: Any, hidden: Any, *, lr: float = 1.0) -> Any:
    """With all that Python offers: what it computes is p - lr last, 1.125 SCALE g, m, max(g, 0.5)."""
    for share in SHARES:
        m = m + (lambda x: divided(x, 1))(share * g)
    quarter, *_ = [2.0 * share * g for share in SHARES]
    m = m + SCALE * (g + quarter / 4.0) - m
    return p - lr * last, m, m, xp.maximum(g, 0.5)


def test_a_rule_means_here_what_it_means_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers from anywhere, slots that take over from others and NaN; and it stays what it was."""
    varied_ = optimizer_from(varied)
    monkeypatch.setitem(globals(), "SCALE", 7.0)
    grads, params = jnp.array([1.0, -2.0, jnp.nan]), jnp.ones(3)
    tx = transformation(varied_)(1.0)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    m = 0.5 * 1.125 * np.array([1.0, -2.0, np.nan], np.float32)
    np.testing.assert_array_equal(params, 1.0 - m)
    for name, expected in {"m": m, "last": m, "hidden": [1.0, 0.5, np.nan]}.items():
        np.testing.assert_array_equal(state.slots[name], expected)


# --------------------------------------------------------------------------------- converters


@pytest.mark.parametrize(("state", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("compact", "bfloat16")])
def test_a_run_goes_from_torch_to_jax_and_back(state: str, dtype: str) -> None:
    def optimizer(params: Any) -> RuleOptimizer:
        return AdEMAMix(params, lr=0.01, backend="eager", state=state, seed=4, **WARM)

    kind = getattr(torch, dtype)
    straight, first = optimizer(torch_params(kind)), optimizer(torch_params(kind))
    torch_train(straight, 3)
    torch_train(first, 1)
    params = [jnp.asarray(p.detach().float().numpy(), dtype) for p in first.param_groups[0]["params"]]
    tx = ours.ademamix(0.01, state=state, seed=4, **WARM)
    begun = state_from_torch(first.state_dict(), params)
    assert jax.tree.structure(begun) == jax.tree.structure(tx.init(params))
    params, done = train(tx, params, 1, jit=False, state=begun, first=1)
    last = optimizer([torch.tensor(np.asarray(p, np.float32)).to(kind).requires_grad_() for p in params])
    last.load_state_dict({**last.state_dict(), "state": state_to_torch(done)})
    torch_train(last, 1, first=2)
    for p, q in zip(straight.param_groups[0]["params"], last.param_groups[0]["params"], strict=True):
        assert straight.state[p].keys() == last.state[q].keys()
        assert all(torch.equal(straight.state[p][k], last.state[q][k]) for k in straight.state[p])


def test_the_first_update_brings_state_of_another_format_into_the_own_one() -> None:
    optimizer = AdEMAMix(torch_params(), lr=0.01, backend="eager", **WARM)
    torch_train(optimizer, 2)
    params = [jnp.asarray(p.detach().numpy()) for p in optimizer.param_groups[0]["params"]]
    tx = ours.ademamix(0.01, state="compact", **WARM)
    _, state = train(tx, params, 1, state=state_from_torch(optimizer.state_dict(), params), first=2)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_master_weights_stay_in_torch() -> None:
    p = torch.ones(64, 70, dtype=torch.bfloat16).requires_grad_()
    optimizer = AdEMAMix([p], offload=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    params = [jnp.ones((64, 70), jnp.bfloat16)]
    state = state_from_torch(optimizer.state_dict(), params)
    assert jax.tree.structure(state) == jax.tree.structure(ours.ademamix(0.1).init(params))
    with pytest.raises(ValueError, match=r"the state has no \['exp_avg'\], which the rule stores; it has \['exp_avg_f"):
        ours.adamw(0.1).update(params, state, params)


def test_state_that_does_not_fit_is_named() -> None:
    p, q = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    optimizer = AdEMAMix([p, q])
    with pytest.raises(ValueError, match="the state dict has no state of its parameters"):
        state_from_torch(optimizer.state_dict(), [jnp.ones((3, 2))] * 2)
    p.grad, q.grad = torch.ones(3, 2), torch.ones(3, 2)
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="the state dict has 2 parameters, the tree 1"):
        state_from_torch(saved, [jnp.ones((3, 2))])
    with pytest.raises(ValueError, match=r"'exp_avg_fast' of parameter 1 must have shape \(2, 3\), got \(3, 2\)"):
        state_from_torch(saved, [jnp.ones((3, 2)), jnp.ones((2, 3))])
    q.grad = None
    optimizer.step()
    with pytest.raises(ValueError, match=r"the same number of steps, got \[1.0, 2.0\]"):
        state_from_torch(optimizer.state_dict(), [jnp.ones((3, 2))] * 2)


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ours.ademamix, {"learning_rate": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        (ours.ademamix, {"b3": 1.0}, r"betas\[2\] must be a number in \[0, 1\), got 1.0"),
        (ours.kema, {"count": 1}, "count must be an integer from 2 to 8, got 1"),
        (ours.adana, {"omega": 4.0}, "peak_lr must be a finite number > 0 .*, got None"),
        (ours.adamw, {"state": "int4"}, "state must be one of .*, got 'int4'"),
        (ours.adamw, {"mu_dtype": "int8"}, "mu_dtype must be None, or float32 or bfloat16 .*, got int8"),
        (ours.adamw, {"mu_dtype": "bfloat16", "state": "compact"}, "mu_dtype must be .* with state='compact'"),
        (ours.adamw, {"seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
        (ours.adamw, {"stochastic_rounding": 1}, "stochastic_rounding must be True or False, got 1"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"learning_rate": 0.1, **options})


def test_bad_calls_are_named() -> None:
    tx = ours.adamw(0.1)
    with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    with pytest.raises(TypeError, match="must be float64, float32, bfloat16 or float16, got int32"):
        tx.init(jnp.ones(3, jnp.int32))
    with pytest.raises(TypeError, match="alpha"):
        ours.adamw(0.1, alpha=1.0)
