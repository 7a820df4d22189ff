"""The same optimizers as optax transformations: each rule is bound to ``jax.numpy``.

    import optax
    from ademamix.jax import ademamix

    tx = ademamix(optax.cosine_decay_schedule(1e-3, T), b3=0.999, alpha=8.0, alpha_warmup=T, beta3_warmup=T)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)

:data:`ademamix`, :data:`adamw`, :data:`simplified_ademamix`, :data:`adana`, :data:`kema` and :data:`muon` are made by
:func:`transformation`, which takes any optimizer class of this library, also one of yours.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import Array
from jax.tree_util import keystr

from ademamix.backends import bind, coefficient_names, slot_names
from ademamix.backends.jax import Blocks, Leaf, Matrices, Stored, orthogonal
from ademamix.engine.arguments import check_flags, check_seed
from ademamix.engine.kinds import DECOUPLED
from ademamix.engine.muon import Iteration
from ademamix.engine.optimizer import RuleOptimizer
from ademamix.engine.state import MASTER, counter
from ademamix.formats import Format, keys
from ademamix.optimizers.adam import AdamW, AdEMAMix
from ademamix.optimizers.muon import Muon
from ademamix.optimizers.variants import KEMA, ADana, SimplifiedAdEMAMix


class State(NamedTuple):
    """The state of a transformation."""

    count: Array  # [], int32: steps done
    # By the slot's name, a tree like the parameters whose leaves have their shapes, or are Blocks; or Absent, where the
    # leaf's geometry has no such slot.
    slots: dict[str, Any]


class Absent(optax.MaskedNode):  # type: ignore[misc]
    """In a slot's tree, in the place of a parameter that does not have the slot."""


class _Way(NamedTuple):
    """How a step is taken in one geometry."""

    rule: Any  # bound to jax.numpy; gives the new parameter, or in "muon" the direction
    slots: tuple[str, ...]
    names: tuple[str, ...]  # of the rule's coefficients
    formats: dict[str, Format]  # of the slots that are stored
    foreign: set[str]  # slots of the other geometry


class _Part(NamedTuple):
    """A leaf of the parameters, and how its steps are taken."""

    path: str
    leaf: Leaf
    way: _Way
    matrices: Matrices | None  # in "muon"


_BY_LEAF = 'geometry=lambda params: jax.tree.map(lambda p: "muon" if p.ndim >= 2 else "adam", params) is of each leaf'
_decoupled = bind(DECOUPLED, jnp)


class _Transformation:
    """A rule with its hyperparameters, each a number, an array or a schedule, and the formats of its slots."""

    def __init__(
        self,
        optimizer: type[RuleOptimizer],
        group: dict[str, Any],  # hyperparameters by torch's names
        known: dict[str, Any],  # the same, with the class's defaults for arrays and schedules
        *,
        geometry: Any,
        mask: Any,
        mu_dtype: Any,
        state: str | Mapping[str, str],
        stochastic_rounding: bool,
        seed: int | None,
    ) -> None:
        self.group, self.geometry, self.mask = group, geometry, mask
        self.rounding, self.seed = stochastic_rounding, seed or 0
        check_flags({"stochastic_rounding": stochastic_rounding}, "stochastic_rounding")
        check_seed(self.seed)
        optimizer.check(known)
        # What a function will say is not known yet: its state has a tree for each slot of either geometry.
        given = optimizer.geometries_of(known) if callable(geometry) else _kinds(geometry)
        groups = {kind: {**known, "geometry": kind} for kind in given}
        rules = {kind: optimizer.checked_rule(group) for kind, group in groups.items()}
        slots = {kind: slot_names(rule) for kind, rule in rules.items()}
        if mu_dtype is not None:
            state = _moments(mu_dtype, state, [name for names in slots.values() for name in names])
        self.ways: dict[Any, _Way] = {}
        for kind, group in groups.items():
            formats = optimizer.formats_of(group, state)
            stored = {name: formats[name] for name in optimizer.stored(group)}
            foreign = formats.keys() - {*slots[kind]}
            self.ways[kind] = _Way(bind(rules[kind], jnp), slots[kind], coefficient_names(rules[kind]), stored, foreign)
        self.iteration = Iteration.of(optimizer, groups["muon"]) if "muon" in groups else None
        passes = chain.from_iterable(map(optimizer.rules_of, groups.values()))
        self.names = tuple(dict.fromkeys(chain.from_iterable(map(coefficient_names, passes))))
        if mask is not None and "weight_decay" not in self.names:
            raise ValueError(f"mask must be None: {optimizer.__name__} has no weight_decay, got {mask!r}")
        self.stored = tuple(dict.fromkeys(chain.from_iterable(way.formats for way in self.ways.values())))
        self.coefficients = bind(optimizer.coefficients, jnp)

    def _parts(self, params: Any) -> tuple[list[_Part], Any]:
        """Of each leaf, and the structure of the tree."""
        every, tree = jax.tree_util.tree_flatten_with_path(params)
        if not every:  # so optax asks for the structure of states
            return [], tree
        given = self.geometry(params) if callable(self.geometry) else self.geometry
        geometries = tree.flatten_up_to(jax.tree.broadcast(given, params, is_leaf=_has_axes))
        return [self._part(f"params{keystr(path)}", p, x) for (path, p), x in zip(every, geometries, strict=True)], tree

    def _part(self, path: str, p: Any, geometry: Any) -> _Part:
        kind = _kind(geometry)
        if kind not in self.ways:
            raise ValueError(f"geometry must be one of {tuple(self.ways)}, got {geometry!r} for {path}")
        way, p = self.ways[kind], jnp.asarray(p)
        leaf = Leaf(p, way.formats, stochastic_rounding=self.rounding)
        try:
            matrices = Matrices.of(p.shape, geometry) if kind == "muon" else None
        except ValueError as error:
            raise ValueError(f"{error}, got {path} of shape {p.shape}; {_BY_LEAF}") from None
        return _Part(path, leaf, way, matrices)

    def init(self, params: Any) -> State:
        parts, tree = self._parts(params)

        def empty(name: str) -> Any:
            return tree.unflatten([leaf.empty(name) if name in way.formats else Absent() for _, leaf, way, _ in parts])

        return State(jnp.zeros((), jnp.int32), {name: empty(name) for name in self.stored})

    def update(self, updates: Any, state: State, params: Any = None, **extra_args: Any) -> tuple[Any, State]:
        if params is None:
            raise ValueError("the rule needs the parameters: call update(grads, state, params)")
        parts, tree = self._parts(params)
        coefficients = self._coefficients(state.count, {leaf.dtype for _, leaf, _, _ in parts})
        key = keys([self.seed] * len(parts), range(len(parts)))
        grads, decays = tree.flatten_up_to(updates), tree.flatten_up_to(self._decays(params))
        columns = {name: tree.flatten_up_to(column) for name, column in state.slots.items()}
        noises, values, firsts, news = [], [], [], []
        for i, (path, leaf, way, _) in enumerate(parts):
            has = {name: column[i] for name, column in columns.items() if not isinstance(column[i], optax.MaskedNode)}
            if missing := sorted(way.formats.keys() - has.keys()):
                raise ValueError(f"the state has no {missing}, which the rule stores; it has {sorted(has)} for {path}")
            if foreign := sorted(way.foreign & has.keys()):
                raise ValueError(f"the state has {foreign} for {path}, whose geometry has no such slot")
            values.append(coefficients[leaf.dtype])
            if self.mask is not None:
                values[i] = {**values[i], "weight_decay": values[i]["weight_decay"] * decays[i]}
            noises.append(leaf.noise(key[i], state.count))
            own, of_rule = {name: has[name] for name in way.formats}, {name: values[i][name] for name in way.names}
            first, new = leaf.run(way.rule, grads[i], own, way.slots, of_rule, noises[i])
            firsts.append(first)
            news.append(new)
        which = {i: part.matrices for i, part in enumerate(parts) if part.matrices is not None}
        made = self._orthogonal([firsts[i] for i in which], [*which.values()], state.count)
        for i, u in zip(which, made, strict=True):
            rate = {name: values[i][name] for name in ("lr", "weight_decay")}
            (firsts[i],) = _decoupled(parts[i].leaf.numbers, u, **rate)
        moves = [part.leaf.moved(*each) for part, *each in zip(parts, firsts, noises, strict=True)]
        stored = {name: tree.unflatten([new.get(name, Absent()) for new in news]) for name in self.stored}
        return tree.unflatten(moves), State(optax.safe_increment(state.count), stored)

    def _orthogonal(self, directions: list[Array], matrices: list[Matrices], count: Array) -> list[Array]:
        if self.iteration is None:
            return []
        least = self._at(count)["eps"]
        return orthogonal(directions, matrices, self.iteration.polynomials, self.iteration.scaling, least)

    def _decays(self, params: Any) -> Any:
        """For each leaf whether weight decay is for it."""
        mask = self.mask(params) if callable(self.mask) else self.mask
        return jax.tree.broadcast(True if mask is None else mask, params)

    def _at(self, count: Array) -> Any:
        """The hyperparameters after so many steps."""
        return jax.tree.map(lambda x: x(count) if callable(x) else x, self.group)

    def _coefficients(self, count: Array, dtypes: set[Any]) -> dict[Any, dict[str, Array]]:
        """By dtype and name. In float64, even where JAX is to do without: 1 - 0.9999 would be off by 3e-4 of itself."""
        group = self._at(count)
        with jax.enable_x64(True):
            group = jax.tree.map(lambda x: x.astype(jnp.float64) if isinstance(x, Array) else x, group)
            values = self.coefficients(count.astype(jnp.float64) + 1.0, group)
            return {d: {name: jnp.asarray(values[name], d) for name in self.names} for d in dtypes}


def _has_axes(geometry: Any) -> bool:
    """Whether it is optax's MuonDimensionNumbers, which not all its versions have."""
    return hasattr(geometry, "reduction_axis")


def _kind(geometry: Any) -> Any:
    return "muon" if _has_axes(geometry) else geometry


def _kinds(geometry: Any) -> list[Any]:
    """All that there are in a tree, each once."""
    return list(dict.fromkeys(map(_kind, jax.tree.leaves(geometry, is_leaf=_has_axes))))


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
_GEOMETRIC = ("geometry", "adjust_lr_fn", "ns_coefficients", "ns_steps")


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
    of the number of steps done. In addition:

    - ``mask``: a tree of booleans, or a function from parameters to one: the leaves that weight decay is for.
    - ``mu_dtype``: float32 or bfloat16, for all slots but those of squares.
    - ``state``, ``stochastic_rounding``, ``seed`` (None for 0): as in the class, with the same formats and noise.
    - ``geometry``: "adam" or "muon" for all leaves, a tree of these (or a prefix of one), or a function from parameters
      to one. A leaf in "muon" has 2 dimensions or more, the last of which are its outputs, and all others its inputs:
      kernels are [in, out] and [h, w, in, out] here. Other axes, such as those of stacked layers or of heads, are given
      by ``optax.contrib.MuonDimensionNumbers`` in the place of "muon"; what it does not name counts the matrices.
    - ``adjust_lr_fn``, ``ns_coefficients``, ``ns_steps`` (None for the class's): of "muon", as in the class; rows are
      outputs, columns inputs. Matrices of one shape are orthogonalized in one batch, in bfloat16 on GPUs and TPUs, in
      float32 on CPUs and in float64 for float64 leaves.

    An update is the difference between the rule's new parameter and the old one, in the parameter's dtype, so that
    ``optax.apply_updates`` makes the rule's result of it. The state is a :class:`State`. Leaves are counted as
    ``jax.tree.leaves`` counts them; that is their position in the noise.

    Under ``optax.inject_hyperparams`` give ``mask``, ``seed``, ``geometry``, ``ns_steps`` and what decides the state's
    structure (KEMA's ``count``) as ``static_args``. Hyperparameters become float32 there, which is coarse for decays
    near 1, or what the parameters are: for bfloat16 and float16, whose decays near 1 are 1, give
    ``hyperparam_dtype=jnp.float32``.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed. Of arrays only the
            dtype is checked, and of schedules nothing. ``init`` and ``update`` raise it for a leaf that is not for its
            geometry, by the leaf's path.
    """
    arguments = _arguments(optimizer)
    shown = [q.replace(default=q.empty) if name == "lr" else q for name, q in arguments]
    asked = {**inspect.signature(RuleOptimizer).parameters, **inspect.signature(optimizer).parameters}
    of_class = {name: asked[name].default for name in _GEOMETRIC}
    # inject_hyperparams takes a number for a hyperparameter that may change.
    default = {name: None if type(x) is int else x for name, x in of_class.items()}
    geometric = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default[name]) for name in _GEOMETRIC]
    signature = inspect.Signature(sorted([*shown, _MASK, *_SETTINGS, *geometric], key=lambda q: q.kind))

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
        chosen = {name: x if given[name] is None else given[name] for name, x in of_class.items()}
        settings["geometry"] = chosen.pop("geometry")
        every, known = group(lambda q: given[q.name]), group(lambda q: _known(q, given[q.name]))
        made = _Transformation(optimizer, every, {**known, **chosen}, **settings)
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
muon = transformation(Muon)


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
    # All parameters of a geometry have the slots of its first.
    of_each = [group.get("geometry", "adam") for group in state_dict["param_groups"] for _ in group["params"]]
    names = {geometry: _names(states[of_each.index(geometry)]) for geometry in of_each}
    every = dict.fromkeys(chain.from_iterable(names.values()))
    if leaves and not every:
        raise ValueError("the state dict has no state of its parameters: the optimizer has done no step")
    slots: dict[str, list[Any]] = {name: [] for name in every}
    for name, column in slots.items():
        for i, (s, p, geometry) in enumerate(zip(states, leaves, of_each, strict=True)):
            stored = name in names[geometry]
            if stored and (name not in s or tuple(s[name].shape) != p.shape):
                found = tuple(s[name].shape) if name in s else "none"
                raise ValueError(f"{name!r} of parameter {i} must have shape {p.shape}, got {found}")
            column.append(_leaf_from_torch(s[name], s.get(f"{name}_scale")) if stored else Absent())
    count = jnp.asarray(int(steps[0]) if steps else 0, jnp.int32)
    return State(count, {name: tree.unflatten(column) for name, column in slots.items()})


def _names(state: Mapping[str, Any]) -> list[str]:
    """The slots in the state of one parameter. Master weights have no place here."""
    other = ("step", MASTER)
    return [n for n, t in state.items() if n not in other and not n.endswith("_scale") and t is not None]


def _leaf_from_torch(t: torch.Tensor, scale: torch.Tensor | None) -> Stored:
    t = t.detach().cpu().contiguous()
    bits = t.dtype == torch.bfloat16
    codes = jnp.array(t.view(torch.int16).numpy().view(jnp.bfloat16) if bits else t.numpy())
    return codes if scale is None else Blocks(codes, jnp.array(scale.detach().cpu().numpy()))


def state_to_torch(state: State) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors with which a torch optimizer of the same rule resumes::

        optimizer.load_state_dict({**optimizer.state_dict(), "state": state_to_torch(state)})

    Its parameters must be in the order of ``jax.tree.leaves``, and have those shapes.
    """
    columns = {
        name: jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Blocks | Absent))
        for name, tree in state.slots.items()
    }
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, leaves in columns.items():
        for i, leaf in enumerate(leaves):
            tensors = states.setdefault(i, {"step": counter(float(state.count))})
            if isinstance(leaf, Absent):
                continue
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
