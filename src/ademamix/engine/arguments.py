"""What optimizers are given: the options that all of them take, and checks of single arguments."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypedDict, get_args

import numpy as np
from torch import Tensor

NUMBERS = (int, float, np.integer, np.floating)


class Common(TypedDict, total=False):
    """What every optimizer takes beside its hyperparameters and what it says of geometries.

    :class:`ademamix.AdEMAMix` says at length what they mean, :class:`ademamix.RuleOptimizer` has their defaults.
    """

    maximize: bool  # go along the gradient, not against it
    state: str | Mapping[str, str]  # "float32", "bfloat16", "compact", or a mapping of slots to formats
    backend: str  # "auto" (what is fused for the device, else eager), "eager", "cpu" or "triton" (CUDA and ROCm)
    stochastic_rounding: bool  # of bfloat16 parameters
    seed: int  # of the noise for stochastic rounding
    capturable: bool  # count steps and compute coefficients on the parameters' devices
    skip_nonfinite: bool | None  # what to do about gradients with a NaN or an infinity in them
    offload: bool  # keep state in host memory and step there
    fused: bool | None  # True: a GradScaler leaves its scale and its check to the step


class Options(Common, total=False):
    """What every optimizer takes beside its hyperparameters, as ``**options: Unpack[Options]``."""

    geometry: str  # "adam" (each element divided by its root mean square) or "muon" (matrices, orthogonalized)
    adjust_lr_fn: str | None  # of "muon": "match_rms_adamw" or "original"
    ns_coefficients: tuple[float, float, float] | str  # of "muon": of its iteration, or "polar_express"
    ns_steps: int  # of "muon"


OF_GEOMETRY = tuple(name for name in Options.__annotations__ if name not in Common.__annotations__)


def show_options(function: Any, options: Iterable[inspect.Parameter]) -> None:
    """Give a function that takes ``**options: Unpack[Options]`` a signature with each of them."""
    signature = inspect.signature(function)
    own = [q for q in signature.parameters.values() if not _are_options(q.annotation)]
    if len(own) < len(signature.parameters):
        names = {q.name for q in own}
        function.__signature__ = signature.replace(parameters=[*own, *(q for q in options if q.name not in names)])


def _are_options(annotation: Any) -> bool:
    """Whether it is ``Unpack[Options]``, or its text, which ``from __future__ import annotations`` leaves."""
    if isinstance(annotation, str):
        return re.fullmatch(r"(\w+\.)*Unpack\[(\w+\.)*(Options|Common)\]", annotation) is not None
    return get_args(annotation) in ((Options,), (Common,))


def check_number(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> None:
    """Raise ValueError unless the value is a finite number (not a bool), or a tensor of one element, that fits."""
    number = (isinstance(value, NUMBERS) and not isinstance(value, bool)) or _is_one(value)
    x = float(value.detach() if isinstance(value, Tensor) else value) if number else math.nan
    if not math.isfinite(x) or not fits(x):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_seed(value: Any) -> None:
    allowed = "an integer in [0, 2**63)"
    check_number("seed", value, allowed, lambda x: 0 <= x < 2**63 and x == int(x) and not isinstance(value, Tensor))


def check_flags(group: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless these are True or False."""
    for name in names:
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")


def with_floats(group: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The group, with Python's numbers for others and for tensors of one element in its tuples and lists ``names``."""
    return {name: _floats(x) if name in names and type(x) in (tuple, list) else x for name, x in group.items()}


def _floats(values: Any) -> Any:
    return type(values)(
        x.detach().item() if _is_one(x) else x.item() if isinstance(x, np.generic) else x for x in values
    )


def _is_one(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta
