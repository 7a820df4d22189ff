"""State dicts of other optimizers as those of AdEMAMix, and back: a training moves over and goes on.

Every function here is pure: it takes what the other program's ``optimizer.state_dict()`` gave and returns a new dict;
tensors that need no change are shared with the old one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ademamix.optimizer import RuleOptimizer

StateDict = dict[str, Any]

# Entries of a torch.optim.AdamW's group that say how it runs, not what it computes.
RUNNING = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def from_adamw(state_dict: Mapping[str, Any], optimizer: RuleOptimizer) -> StateDict:
    """A running AdamW training's state dict as one that ``optimizer``, an AdEMAMix, loads and goes on from.

    As in the paper (arXiv 2409.03137, section 4): the first moment becomes the fast EMA, the second moment and the
    steps done stay (bias corrections go on), and the slow EMA starts at zero. The warmups of alpha and beta3 count from
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
        ValueError: an entry is missing, unknown, or one that AdEMAMix cannot go on from (amsgrad); it is named.
    """
    source = "from_adamw"
    own = optimizer.state_dict()["param_groups"]
    groups = _groups(source, state_dict, betas=2)
    if len(groups) != len(own):
        raise ValueError(f"{source}: the state dict has {len(groups)} parameter groups, the optimizer {len(own)}")
    state: dict[Any, Any] = {}
    converted = []
    for new, old in zip(own, groups, strict=True):
        _refuse(source, old, "amsgrad", False)
        if old["weight_decay"]:
            _refuse(source, old, "decoupled_weight_decay", True)
        done = 0.0
        for i, slots in _states(source, state_dict, old, {"exp_avg": "exp_avg_fast", "exp_avg_sq": "exp_avg_sq"}):
            fast = slots["exp_avg_fast"]
            number = fast.dtype if fast.is_floating_point() or fast.is_complex() else torch.float32
            slots["exp_avg_slow"] = torch.zeros_like(fast, dtype=number)
            state[i] = slots
            done = max(done, float(slots["step"]))
        kept = {name: value for name, value in old.items() if name not in RUNNING}
        betas = (*old["betas"], new["betas"][2])
        converted.append({**new, **kept, "betas": betas, "schedule_start": int(done)})
    return {"state": state, "param_groups": converted}


def _groups(source: str, state_dict: Mapping[str, Any], betas: int) -> list[dict[str, Any]]:
    """The parameter groups, after what every optimizer of the family has was found in them."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"{source}: an optimizer's state dict has {key!r}, this one has {sorted(state_dict)}")
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    for index, group in enumerate(groups):
        for key in ("params", "lr", "betas", "eps", "weight_decay"):
            if key not in group:
                raise ValueError(f"{source}: parameter group {index} has no {key!r}; it has {sorted(group)}")
        if len(group["betas"]) != betas:
            raise ValueError(f"{source}: 'betas' of parameter group {index} must be {betas}, got {group['betas']!r}")
    return groups


def _refuse(source: str, group: Mapping[str, Any], key: str, allowed: Any) -> None:
    """Raise ValueError where a group's entry is there and is not what AdEMAMix computes."""
    if group.get(key, allowed) != allowed:
        raise ValueError(f"{source}: {key}={group[key]!r} is nothing that AdEMAMix can go on from; allowed: {allowed}")


def _states(
    source: str, state_dict: Mapping[str, Any], group: Mapping[str, Any], slots: Mapping[str, str]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The state of each parameter of a group that has one, with its slots (and their scales) by their new names."""
    for i in group["params"]:
        saved = {key: value for key, value in state_dict["state"].get(i, {}).items() if value is not None}
        if not saved:
            continue
        where, expected = f"{source}: the state of parameter {i!r}", ["step", *slots]
        if missing := [key for key in expected if key not in saved]:
            raise ValueError(f"{where} has no {missing[0]!r}; it has {sorted(saved)}")
        new: dict[str, Any] = {"step": _step(saved["step"])}
        for key, value in saved.items():
            slot = key.removesuffix("_scale")
            if slot not in expected:
                raise ValueError(f"{where} has {key!r}, which has no place here; expected: {expected}")
            if not isinstance(value, Tensor) and slot != "step":
                raise ValueError(f"{where} has {key!r} as {type(value).__name__}; expected: a tensor")
            if slot != "step":
                new[key.replace(slot, slots[slot], 1)] = value
        yield i, new


def _step(value: Any) -> Tensor:
    return torch.tensor(float(value))
