"""What optimizers are given: the options that all of them take, and checks of single arguments."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict, get_args

import numpy as np
from torch import Tensor

NUMBERS = (int, float, np.integer, np.floating)
LARGEST = float(np.finfo(np.float32).max)


class Common(TypedDict, total=False):
    """What every optimizer takes besides its hyperparameters and the geometry.

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
    flat_parameters: bool  # parameters of one dimension are parts of flattened ones, and get low-bit state too
    fused: bool | None  # torch.optim's: True for a fused backend
    foreach: bool | None  # torch.optim's: True for backend="eager"
    differentiable: bool  # torch.optim's: False
    amsgrad: bool  # torch.optim's: False


class Options(Common, total=False):
    """What every optimizer takes besides its hyperparameters, as ``**options: Unpack[Options]``."""

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
    """Raise ValueError unless the value is a number (not a bool), or a tensor of one element, that fits and is finite
    in float32, in which most steps are computed."""
    number = (isinstance(value, NUMBERS) and not isinstance(value, bool)) or _is_one(value)
    x = float(value.detach() if isinstance(value, Tensor) else value) if number else math.nan
    if not math.isfinite(x) or not fits(x):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    if abs(x) > LARGEST:
        raise ValueError(f"{name} must be {allowed}, and at most {LARGEST:.2g} (float32), got {value!r}")


def check_seed(value: Any) -> None:
    allowed = "an integer in [0, 2**63)"
    check_number("seed", value, allowed, lambda x: 0 <= x < 2**63 and x == int(x) and not isinstance(value, Tensor))


def check_flags(group: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless these are True or False."""
    for name in names:
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")


def check_torch_s(given: Mapping[str, Any], backend: str | None = None) -> None:
    """Raise ValueError for values of torch.optim's keywords that no optimizer here takes.

    Args:
        given: the keywords; those of a state dict say how another optimizer has run.
        backend: of the optimizer that is to run as they say.
    """
    whys = {"differentiable": "no step can be differentiated", "amsgrad": "no maximum of second moments is kept"}
    for name, why in whys.items():
        if (value := given.get(name)) is not None and value is not False:
            raise ValueError(f"{name} must be False, got {value!r}: {why}")
    for name in ("fused", "foreach"):
        if (value := given.get(name)) is not None and not isinstance(value, bool):
            raise ValueError(f"{name} must be None, True or False, got {value!r}")
    if backend is None:
        return
    if given.get("fused") and given.get("foreach"):
        raise ValueError("only one of fused and foreach may be True, got fused=True and foreach=True")
    if given.get("fused") and backend == "eager":
        raise ValueError("fused=True takes backend='auto', 'cpu' or 'triton', got 'eager'")
    if given.get("foreach") and backend != "eager":
        raise ValueError(f"foreach=True takes an optimizer with backend='eager', got {backend!r}")


def with_floats(group: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The group, with Python's numbers for NumPy's, and tuples of floats for sequences of numbers, under ``names``."""
    return {name: _plain(x) if name in names else x for name, x in group.items()}


def _plain(value: Any) -> Any:
    vector = isinstance(value, np.ndarray) and value.ndim == 1
    if vector or (isinstance(value, Sequence) and not isinstance(value, str)):
        return tuple(_float(x) for x in value)
    return value.item() if isinstance(value, np.generic) else value


def _float(x: Any) -> Any:
    """As a float, or as it is if it is not a number."""
    number = x.detach().item() if _is_one(x) else x
    return float(number) if isinstance(number, NUMBERS) and not isinstance(number, bool) else number


def _is_one(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta
