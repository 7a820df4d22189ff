"""The same optimizers as optax transformations: each rule is bound to ``jax.numpy``.

    import optax
    from ademamix.jax import ademamix

    tx = ademamix(optax.cosine_decay_schedule(1e-3, T), b3=0.999, alpha=8.0, alpha_warmup=T, beta3_warmup=T)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)

:data:`ademamix`, :data:`adamw`, :data:`simplified_ademamix`, :data:`adana` and :data:`kema` are made by
:func:`transformation`, which takes any optimizer class of this library, also one of yours.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import Array

from ademamix.backends import bind, coefficient_names, slot_names
from ademamix.backends.jax import Blocks, Leaf, Stored
from ademamix.engine.arguments import check_flags, check_seed
from ademamix.engine.optimizer import RuleOptimizer
from ademamix.engine.state import MASTER
from ademamix.formats import keys
from ademamix.optimizers.adam import AdamW, AdEMAMix
from ademamix.optimizers.variants import KEMA, ADana, SimplifiedAdEMAMix


class State(NamedTuple):
    """The state of a transformation."""

    count: Array  # [], int32: steps done
    slots: dict[
        str, Any
    ]  # by the slot's name, a tree like the parameters whose leaves have their shapes, or are Blocks


class _Transformation:
    """A rule with its hyperparameters, each a number, an array or a schedule, and the formats of its slots."""

    def __init__(
        self,
        optimizer: type[RuleOptimizer],
        group: dict[str, Any],  # hyperparameters by torch's names
        known: dict[str, Any],  # the same, with the class's defaults for arrays and schedules
        *,
        mask: Any,
        mu_dtype: Any,
        state: str | Mapping[str, str],
        stochastic_rounding: bool,
        seed: int | None,
    ) -> None:
        rule = optimizer.checked_rule(known)
        self.slots, self.names = slot_names(rule), coefficient_names(rule)
        if mask is not None and "weight_decay" not in self.names:
            raise ValueError(f"mask must be None: the rule {rule.__name__} has no weight_decay, got {mask!r}")
        formats = optimizer.formats_of(known, state if mu_dtype is None else _moments(mu_dtype, state, self.slots))
        self.formats = {name: formats[name] for name in optimizer.stored(known)}
        self.group, self.mask, self.rounding, self.seed = group, mask, stochastic_rounding, seed or 0
        check_flags({"stochastic_rounding": stochastic_rounding}, "stochastic_rounding")
        check_seed(self.seed)
        self.rule, self.coefficients = bind(rule, jnp), bind(optimizer.coefficients, jnp)

    def _leaf(self, p: Any) -> Leaf:
        return Leaf(jnp.asarray(p), self.formats, stochastic_rounding=self.rounding)

    def init(self, params: Any) -> State:
        slots = {name: jax.tree.map(lambda p: self._leaf(p).empty(name), params) for name in self.formats}  # noqa: B023
        return State(jnp.zeros((), jnp.int32), slots)

    def update(self, updates: Any, state: State, params: Any = None, **extra_args: Any) -> tuple[Any, State]:
        if params is None:
            raise ValueError("the rule needs the parameters: call update(grads, state, params)")
        if missing := self.formats.keys() - state.slots.keys():
            raise ValueError(f"the state has no {sorted(missing)}, which the rule stores; it has {sorted(state.slots)}")
        every, tree = jax.tree.flatten(params)
        leaves = [self._leaf(p) for p in every]
        coefficients = self._coefficients(state.count, {leaf.dtype for leaf in leaves})
        key = keys([self.seed] * len(leaves), range(len(leaves)))
        grads, decays = tree.flatten_up_to(updates), tree.flatten_up_to(self._decays(params))
        slots = {name: tree.flatten_up_to(state.slots[name]) for name in self.formats}
        moves, news = [], []
        for i, leaf in enumerate(leaves):
            values, own = coefficients[leaf.dtype], {name: slots[name][i] for name in slots}
            if self.mask is not None:
                values = {**values, "weight_decay": values["weight_decay"] * decays[i]}
            move, new = leaf.update(self.rule, grads[i], own, self.slots, values, key[i], state.count)
            moves.append(move)
            news.append(new)
        stored = {name: tree.unflatten([new[name] for new in news]) for name in self.formats}
        return tree.unflatten(moves), State(optax.safe_increment(state.count), stored)

    def _decays(self, params: Any) -> Any:
        """For each leaf whether weight decay is for it."""
        mask = self.mask(params) if callable(self.mask) else self.mask
        return jax.tree.broadcast(True if mask is None else mask, params)

    def _coefficients(self, count: Array, dtypes: set[Any]) -> dict[Any, dict[str, Array]]:
        """By dtype and name. In float64, even where JAX is to do without: 1 - 0.9999 would be off by 3e-4 of itself."""
        group = jax.tree.map(lambda x: x(count) if callable(x) else x, self.group)
        with jax.enable_x64(True):
            group = jax.tree.map(lambda x: x.astype(jnp.float64) if isinstance(x, Array) else x, group)
            values = self.coefficients(count.astype(jnp.float64) + 1.0, group)
            return {d: {name: jnp.asarray(values[name], d) for name in self.names} for d in dtypes}


def _moments(mu_dtype: Any, state: str | Mapping[str, str], slots: Sequence[str]) -> dict[str, str]:
    """The formats that optax's ``mu_dtype`` asks for: of all slots but those of squares."""
    name = jnp.dtype(mu_dtype).name
    if name not in ("float32", "bfloat16") or state != "float32":
        allowed = "None, or float32 or bfloat16 with state='float32'"
        raise ValueError(f"mu_dtype must be {allowed}, got {name} with state={state!r}")
    return {slot: name for slot in slots if not slot.endswith("_sq")}


_NAMES = {"lr": "learning_rate", "beta1": "b1", "beta2": "b2", "beta3": "b3"}
_MASK = inspect.Parameter("mask", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
_SETTINGS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    for name, default in (("mu_dtype", None), ("state", "float32"), ("stochastic_rounding", True), ("seed", None))
]


def _arguments(optimizer: type[RuleOptimizer]) -> list[tuple[str, inspect.Parameter]]:
    """Hyperparameters of a class as arguments here: the learning rate, decays, then by the alphabet."""

    def place(q: inspect.Parameter) -> tuple[Any, ...]:
        decay = q.name == "betas" or q.name in _NAMES
        return q.kind, q.name != "lr", not decay, q.name in ("eps", "weight_decay"), q.name

    arguments = []
    every, common = inspect.signature(optimizer).parameters.values(), inspect.signature(RuleOptimizer).parameters
    for q in sorted((q for q in every if q.kind is not q.VAR_KEYWORD), key=place):
        if q.name == "betas":
            arguments += [(q.name, q.replace(name=f"b{i}", default=b)) for i, b in enumerate(q.default, start=1)]
        elif q.name not in common:
            arguments.append((q.name, q.replace(name=_NAMES.get(q.name, q.name))))
    return [(name, q.replace(annotation=q.empty)) for name, q in arguments]


def transformation(optimizer: type[RuleOptimizer]) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """A maker of optax transformations from one of this library's optimizer classes, or from one of yours.

    The maker's arguments are the class's hyperparameters under optax's names (``lr`` is ``learning_rate``, ``betas``
    are ``b1``, ``b2``, ...; the class says what they mean), each a number, an array or a schedule, that is, a function
    of the number of steps done. Beside them:

    - ``mask``: a tree of booleans, or a function from parameters to one: the leaves that weight decay is for.
    - ``mu_dtype``: float32 or bfloat16, for all slots but those of squares.
    - ``state``, ``stochastic_rounding``, ``seed`` (None for 0): as in the class, with the same formats and noise.

    An update is the difference between the rule's new parameter and the old one, in the parameter's dtype, so that
    ``optax.apply_updates`` makes the rule's result of it. The state is a :class:`State`. Leaves are counted as
    ``jax.tree.leaves`` counts them; that is their position in the noise.

    Under ``optax.inject_hyperparams`` give ``mask``, ``seed`` and what decides the state's structure (KEMA's ``count``)
    as ``static_args``. Hyperparameters become float32 there, which is coarse for decays near 1, or what the parameters
    are: for bfloat16 and float16, whose decays near 1 are 1, give ``hyperparam_dtype=jnp.float32``.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed. Of arrays only the
            dtype is checked, and of schedules nothing.
    """
    arguments = _arguments(optimizer)
    shown = [q.replace(default=q.empty) if name == "lr" else q for name, q in arguments]
    signature = inspect.Signature(sorted([*shown, _MASK, *_SETTINGS], key=lambda q: q.kind))

    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments

        def group(value: Callable[[inspect.Parameter], Any]) -> dict[str, Any]:
            values: dict[str, Any] = {"maximize": False}
            for name, q in arguments:
                values[name] = (*values.get(name, ()), value(q)) if name == "betas" else value(q)
            return values

        settings = {q.name: given[q.name] for q in (_MASK, *_SETTINGS)}
        every, known = group(lambda q: given[q.name]), group(lambda q: _known(q, given[q.name]))
        made = _Transformation(optimizer, every, known, **settings)
        return optax.GradientTransformationExtraArgs(made.init, made.update)

    make.__signature__ = signature  # type: ignore[attr-defined]
    make.__name__ = make.__qualname__ = optimizer.__name__
    make.__doc__ = f"{optimizer.__name__} as an optax transformation: see transformation, and {optimizer.__name__}."
    return make


def _known(q: inspect.Parameter, value: Any) -> Any:
    """The value itself, or the default in the place of an array or a schedule."""
    if not callable(value) and not isinstance(value, Array | np.ndarray):
        return value
    if getattr(value, "dtype", None) in (jnp.bfloat16, jnp.float16):  # 1 - 0.999 would be 0
        hint = "under optax.inject_hyperparams, give it hyperparam_dtype=jnp.float32"
        raise ValueError(f"{q.name} must be float32 at least, got {value.dtype}; {hint}")
    if type(q.default) is int:
        raise ValueError(
            f"{q.name} decides the state's structure: it must be a number (or in static_args), got {value!r}"
        )
    return q.default


ademamix = transformation(AdEMAMix)
adamw = transformation(AdamW)
simplified_ademamix = transformation(SimplifiedAdEMAMix)
adana = transformation(ADana)
kema = transformation(KEMA)


# --------------------------------------------------------------------------------- from torch and to it


def state_from_torch(state_dict: Mapping[str, Any], params: Any) -> State:
    """The state that continues a torch run: what ``optimizer.state_dict()`` of the same rule has returned.

    Args:
        state_dict: with tensors in whatever format they have; the first update brings them into the transformation's.
        params: the parameters, a tree whose leaves, in the order of ``jax.tree.leaves``, have the shapes of the torch
            optimizer's.

    Raises:
        ValueError: parameters do not fit, have no state, or differ in the number of steps done, which is one here.
    """
    leaves, tree = jax.tree.flatten(params)
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(ids) != len(leaves):
        raise ValueError(f"the state dict has {len(ids)} parameters, the tree {len(leaves)}")
    states = [state_dict["state"].get(i, {}) for i in ids]
    steps = sorted({float(s.get("step", 0.0)) for s in states})
    if len(steps) > 1:
        raise ValueError(f"all parameters must have done the same number of steps, got {steps}")
    # Master weights have no place here.
    names = [n for n, t in (states[0] if states else {}).items() if n not in ("step", MASTER) and t is not None]
    if leaves and not names:
        raise ValueError("the state dict has no state of its parameters: the optimizer has done no step")
    slots = {}
    for name in (n for n in names if not n.endswith("_scale")):
        for i, (s, p) in enumerate(zip(states, leaves, strict=True)):
            if name not in s or tuple(s[name].shape) != p.shape:
                found = tuple(s[name].shape) if name in s else "none"
                raise ValueError(f"{name!r} of parameter {i} must have shape {p.shape}, got {found}")
        slots[name] = tree.unflatten([_leaf_from_torch(s[name], s.get(f"{name}_scale")) for s in states])
    return State(jnp.asarray(int(steps[0]) if steps else 0, jnp.int32), slots)


def _leaf_from_torch(t: torch.Tensor, scale: torch.Tensor | None) -> Stored:
    t = t.detach().cpu().contiguous()
    bits = t.dtype == torch.bfloat16
    codes = jnp.array(t.view(torch.int16).numpy().view(jnp.bfloat16) if bits else t.numpy())
    return codes if scale is None else Blocks(codes, jnp.array(scale.detach().cpu().numpy()))


def state_to_torch(state: State) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors by which a torch optimizer of the same rule goes on::

        optimizer.load_state_dict({**optimizer.state_dict(), "state": state_to_torch(state)})

    Its parameters must be in the order of ``jax.tree.leaves``, and have those shapes.
    """
    columns = {
        name: jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Blocks)) for name, tree in state.slots.items()
    }
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, leaves in columns.items():
        for i, leaf in enumerate(leaves):
            tensors = states.setdefault(
                i, {"step": torch.tensor(float(state.count), dtype=torch.float32, device="cpu")}
            )
            codes, scale = leaf if isinstance(leaf, Blocks) else (leaf, None)
            tensors[name] = _tensor(codes)
            if scale is not None:
                tensors[f"{name}_scale"] = _tensor(scale)
    return states


def _tensor(x: Array) -> torch.Tensor:
    copied = np.array(x)
    if copied.dtype == jnp.bfloat16:
        return torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copied)
