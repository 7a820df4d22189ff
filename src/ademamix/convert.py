"""State dicts of other optimizers as those of AdEMAMix, and back, so that a run can resume with another optimizer.

Every function here is pure: it takes what the other program's ``optimizer.state_dict()`` gave and returns a new dict;
tensors that need no change are shared with the old one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ademamix.engine.optimizer import RuleOptimizer
from ademamix.engine.state import MASTER, counter, decoded
from ademamix.formats import BLOCK
from ademamix.optimizers.adam import WARMUPS, AdEMAMix

StateDict = dict[str, Any]

SLOTS = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
ADAMW = ("params", "lr", "betas", "eps", "weight_decay")
ADEMAMIX = (*ADAMW, "alpha")
BITSANDBYTES = "__bnb_optimizer_quant_state__"

# Entries of a torch.optim.AdamW's group that say how it runs, not what it computes.
RUNNING = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def from_adamw(state_dict: Mapping[str, Any], optimizer: RuleOptimizer) -> StateDict:
    """The state dict of an AdamW run as one that ``optimizer``, an AdEMAMix, can load and resume from.

    As in the paper (arXiv 2409.03137): the first moment becomes the fast EMA, the second moment and the
    steps done stay (bias corrections continue), and the slow EMA starts at zero. The warmups of alpha and beta3 start
    here: ``schedule_start`` of a group becomes the largest number of steps that a parameter of it has done.

    What AdamW has (lr, the first two betas, eps, weight_decay, maximize, a scheduler's entries) comes from
    ``state_dict``; alpha, beta3 and the warmups from ``optimizer``, which is not changed.

    Warning:
        With both warmups the first steps are AdamW's. Without them the slow EMA fills up at full weight: within a few
        half-lives of beta3, steps along a steady gradient become 1 + alpha times as long, and the loss may jump.

    Args:
        state_dict: of a torch.optim.AdamW (or an Adam without weight decay), or of an :class:`ademamix.AdamW`.
        optimizer: the AdEMAMix over the same parameters in the same groups.

    Raises:
        ValueError: an entry is missing, unknown, or one that AdEMAMix cannot resume from (amsgrad); it is named. Or
            the optimizer is not an AdEMAMix.
    """
    source = "from_adamw"
    if not isinstance(optimizer, AdEMAMix):
        raise ValueError(f"{source}: optimizer must be an ademamix.AdEMAMix, got {type(optimizer).__name__}")
    own = optimizer.state_dict()["param_groups"]
    groups = _groups(source, state_dict, ADAMW)
    if len(groups) != len(own):
        raise ValueError(f"{source}: the state dict has {len(groups)} parameter groups, the optimizer {len(own)}")
    state: dict[Any, Any] = {}
    converted = []
    for new, old in zip(own, groups, strict=True):
        _refuse(source, old, "amsgrad", False)
        if old["weight_decay"]:
            _refuse(source, old, "decoupled_weight_decay", True)
        names = {"exp_avg": "exp_avg_fast", "exp_avg_sq": "exp_avg_sq"}
        dropped: tuple[str, ...] = ()
        if {**new, **old}["geometry"] == "muon":  # which has no second moment
            dropped = ("exp_avg_sq", "exp_avg_sq_scale")
            del names["exp_avg_sq"]
        members = {}
        for i, saved in _saved(source, state_dict, old):
            slots = _renamed(source, i, _without(saved, dropped), names)
            fast = slots["exp_avg_fast"]
            number = fast.dtype if fast.is_floating_point() or fast.is_complex() else torch.float32
            slow = torch.zeros_like(fast, dtype=number)
            members[i] = {"step": _step(source, i, saved), **_of(old, slots), "exp_avg_slow": slow}
        state |= members
        betas = (*old["betas"], new["betas"][2])
        start = int(max((float(m["step"]) for m in members.values()), default=0.0))
        converted.append({**new, **_without(old, RUNNING), "betas": betas, "schedule_start": start})
    return {"state": state, "param_groups": converted}


def from_authors(state_dict: Mapping[str, Any]) -> StateDict:
    """A state dict of the authors' AdEMAMix (github.com/apple/ml-ademamix) as one that ours loads.

    Hyperparameters come with it. An AdEMAMix loads such a dict without this function too; here it is checked first.

    Raises:
        ValueError: an entry is missing or unknown; it is named.
    """
    source = "from_authors"
    groups = _groups(source, state_dict, (*ADEMAMIX, "beta3_warmup", "alpha_warmup"))
    state = {}
    for group in groups:
        names = SLOTS if group["betas"][0] > 0.0 else SLOTS[1:]
        for i, saved in _saved(source, state_dict, group):
            slots = _renamed(source, i, saved, {name: name for name in names})
            state[i] = {"step": _step(source, i, saved), **slots}
    return {"state": state, "param_groups": [dict(group) for group in groups]}


def from_bitsandbytes(state_dict: Mapping[str, Any]) -> StateDict:
    """A state dict of a bitsandbytes AdEMAMix or AdamW (32 or 8 bits, paged or not) as one that ours loads.

    8-bit state becomes float32 by the checkpoint's own tables (``qmap``: the 256 numbers that codes stand for;
    ``absmax``: the factor of each 256 elements); loading rounds it to the optimizer's format. Hyperparameters come with
    it: ``t_alpha`` and ``t_beta3`` are called alpha_warmup and beta3_warmup here. An AdamW's becomes one that
    :class:`ademamix.AdamW` loads, and that :func:`from_adamw` takes.

    Raises:
        ValueError: an entry is missing, unknown, or of a shape that these optimizers have not; it is named.
    """
    source = "from_bitsandbytes"
    groups = _groups(source, state_dict, ADAMW, (2, 3))
    adamw = all(len(group["betas"]) == 2 for group in groups)
    if not adamw:
        groups = _groups(source, state_dict, ADEMAMIX)
    state = {}
    for group in groups:
        for i, wrapped in _saved(source, state_dict, group):
            saved = {**wrapped, **wrapped.get(BITSANDBYTES, {})}  # newer versions put all tensors into a dict of theirs
            saved.pop(BITSANDBYTES, None)
            eight = getattr(saved.get("state2"), "dtype", None) == torch.uint8
            tables = ("qmap1", "absmax1", "qmap2", "absmax2") if eight else ()
            slots = _renamed(source, i, saved, {name: name for name in ("state1", "state2", *tables)})
            averages, squares = slots["state1"], slots["state2"]
            both = () if adamw else (2,)  # an AdEMAMix stacks its two averages
            blocks = -(-squares.numel() // BLOCK)
            shapes = ((*both, *squares.shape), squares.shape, (256,), (*both, blocks), (256,), (blocks,))
            _check_shapes(source, i, slots, dict(zip(("state1", "state2", *tables), shapes, strict=False)))
            averages = averages.view(-1, *squares.shape)
            if eight:
                factors = slots["absmax1"].view(-1, blocks)
                averages = [_dequantized(a, slots["qmap1"], f) for a, f in zip(averages, factors, strict=True)]
                squares = _dequantized(squares, slots["qmap2"], slots["absmax2"])
            named = dict(zip(("exp_avg", "exp_avg_sq") if adamw else SLOTS, (*averages, squares), strict=True))
            state[i] = {"step": _step(source, i, saved), **(named if adamw else _of(group, named))}
    kept = [_without(group, ("t_alpha", "t_beta3")) for group in groups]
    if adamw:  # whose groups have bitsandbytes' entries for AdEMAMix, too
        return {"state": state, "param_groups": [_without(group, ("alpha",)) for group in kept]}
    warmups = [{"alpha_warmup": g.get("t_alpha") or None, "beta3_warmup": g.get("t_beta3") or None} for g in groups]
    return {"state": state, "param_groups": [{**g, **own} for g, own in zip(kept, warmups, strict=True)]}


def from_pytorch_optimizer(state_dict: Mapping[str, Any]) -> StateDict:
    """A state dict of pytorch_optimizer's AdEMAMix as one that ours loads.

    Hyperparameters come with it, ``t_alpha_beta3`` as both warmups; ``maximize``, which its state dicts do not hold,
    is that of the optimizer that loads.

    Raises:
        ValueError: an entry is missing or unknown, or asks for what AdEMAMix does not compute (a weight decay that is
            not decoupled or not multiplied by lr, cautious or stable steps); it is named.
    """
    source = "from_pytorch_optimizer"
    groups = _groups(source, state_dict, (*ADEMAMIX, "t_alpha_beta3"))
    state, converted = {}, []
    for group in groups:
        if group["weight_decay"]:
            _refuse(source, group, "weight_decouple", True)
            _refuse(source, group, "fixed_decay", False)
        for key in ("cautious", "stable_adamw"):
            _refuse(source, group, key, False)
        for i, saved in _saved(source, state_dict, group):
            own = {"exp_avg": "exp_avg_fast", "exp_avg_slow": "exp_avg_slow", "exp_avg_sq": "exp_avg_sq"}
            slots = _of(group, _renamed(source, i, saved, own))
            state[i] = {"step": _step(source, i, group), **slots}
        kept = _without(group, ("weight_decouple", "fixed_decay", "cautious", "stable_adamw", "foreach", "step"))
        warmup = kept.pop("t_alpha_beta3")
        converted.append({**kept, "alpha_warmup": warmup, "beta3_warmup": warmup})
    return {"state": state, "param_groups": converted}


def to_adamw(state_dict: Mapping[str, Any]) -> StateDict:
    """An AdEMAMix state dict as one that torch.optim.AdamW or :class:`ademamix.AdamW` can load and resume from.

    The fast EMA becomes the first moment (zeros with beta1 = 0, where the next gradient replaces it), the second moment
    and the steps done stay, the slow EMA is dropped; codes of low-bit state become float32 numbers. Master weights that
    ``offload=True`` has made stay, for an :class:`ademamix.AdamW` with it.

    Raises:
        ValueError: an entry is missing or unknown; it is named.
    """
    source = "to_adamw"
    groups = _groups(source, state_dict, ADEMAMIX)
    state = {}
    for group in groups:
        names = SLOTS if group["betas"][0] > 0.0 else SLOTS[1:]
        for i, saved in _saved(source, state_dict, group):
            slots = _renamed(source, i, saved, {name: name for name in names})
            squares = _numbers(source, i, slots, "exp_avg_sq")
            average = _numbers(source, i, slots, names[0]) if len(names) == 3 else torch.zeros_like(squares)
            master = {MASTER: slots[MASTER]} if MASTER in slots else {}
            state[i] = {"step": _step(source, i, saved), "exp_avg": average, "exp_avg_sq": squares, **master}
    dropped = ("alpha", *WARMUPS, "schedule_start", "beta3_schedule", "delta", "kappa", "slow_limit")
    converted = [{**_without(group, dropped), "betas": tuple(group["betas"][:2])} for group in groups]
    return {"state": state, "param_groups": converted}


def _groups(
    source: str, state_dict: Mapping[str, Any], keys: Sequence[str], betas: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The parameter groups, which must have ``keys`` and so many betas; by default three if alpha is among the keys."""
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise ValueError(f"{source}: state_dict must be what an optimizer's state_dict() returned, got {kind}")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"{source}: an optimizer's state dict has {key!r}, this one has {sorted(state_dict)}")
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    for index, group in enumerate(groups):
        for key in keys:
            if key not in group:
                raise ValueError(f"{source}: parameter group {index} has no {key!r}; it has {sorted(group)}")
        allowed = betas or (3 if "alpha" in keys else 2,)
        if len(group["betas"]) not in allowed:
            number = " or ".join(map(str, allowed))
            raise ValueError(f"{source}: 'betas' of parameter group {index} must be {number}, got {group['betas']!r}")
    return groups


def _refuse(source: str, group: Mapping[str, Any], key: str, allowed: Any) -> None:
    """Raise ValueError where a group's entry is there and is not what AdEMAMix computes."""
    if group.get(key, allowed) != allowed:
        raise ValueError(f"{source}: {key}={group[key]!r} is not supported by AdEMAMix; allowed: {allowed}")


def _without(group: Mapping[str, Any], dropped: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in dropped}


def _of(group: Mapping[str, Any], slots: dict[str, Any]) -> dict[str, Any]:
    """The slots that an AdEMAMix of the group's betas stores."""
    return slots if group["betas"][0] > 0.0 else _without(slots, ("exp_avg_fast", "exp_avg_fast_scale"))


def _saved(
    source: str, state_dict: Mapping[str, Any], group: Mapping[str, Any]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What is kept of each parameter of a group that has a state."""
    for i in group["params"]:
        saved = state_dict["state"].get(i) or {}
        if kept := {key: value for key, value in saved.items() if value is not None}:
            yield i, kept


def _renamed(source: str, i: Any, saved: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The tensors of a parameter's state, with the scales of those that have some, under their new names."""
    where = f"{source}: the state of parameter {i!r}"
    if missing := [key for key in names if key not in saved]:
        raise ValueError(f"{where} has no {missing[0]!r}; it has {sorted(saved)}")
    renamed = {}
    for key, value in saved.items():
        slot = key.removesuffix("_scale")
        if key == "step":
            continue
        if slot not in names and key != MASTER:
            raise ValueError(f"{where} has {key!r}, which has no place here; expected: {['step', *names]}")
        if not isinstance(value, Tensor):
            raise ValueError(f"{where} has a {type(value).__name__} as {key!r}; expected: a tensor")
        renamed[names.get(slot, slot) + key[len(slot) :]] = value
    return renamed


def _step(source: str, i: Any, kept: Mapping[str, Any]) -> Tensor:
    if "step" not in kept:
        raise ValueError(f"{source}: parameter {i!r} has a state but no 'step'")
    return counter(float(kept["step"]))


def _numbers(source: str, i: Any, slots: Mapping[str, Tensor], name: str) -> Tensor:
    value, scale = slots[name], slots.get(f"{name}_scale")
    if scale is None and not value.is_floating_point() and not value.is_complex():
        raise ValueError(f"{source}: parameter {i!r} has codes of {value.dtype} as {name!r} but no '{name}_scale'")
    return decoded(value, scale)


def _check_shapes(source: str, i: Any, slots: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for key, wanted in shapes.items():
        if tuple(slots[key].shape) != tuple(wanted):
            found = tuple(slots[key].shape)
            raise ValueError(f"{source}: {key!r} of parameter {i!r} has shape {found}; expected: {tuple(wanted)}")


def _dequantized(codes: Tensor, table: Tensor, absmax: Tensor) -> Tensor:
    """The numbers that 8-bit codes stand for; a factor serves BLOCK elements of the whole tensor in its order."""
    factors = absmax.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return table[codes.long()] * factors
