"""Which optimizer a name stands for, and the arguments that a recipe gives to it."""

import hashlib
import inspect
import re
import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

import ademamix
from ademamix import RuleOptimizer, optimizer_from, split_parameters
from ademamix.engine.arguments import OF_GEOMETRY  # in `settings`, also of those that have a section
from ademamix.lab.config import BadInputError, Optimizer, Training, used
from ademamix.lab.own_code import refuse_unnamed, split

SECTIONS = ("adamw", "ademamix")  # whose settings are a section of their own in a recipe; all others share `settings`
REST_LR = "rest_lr"


def pinned(name: Optimizer) -> Optimizer:
    """The name as runs record it: in one spelling, and with a digest of the rule if that is the user's own.

    Raises:
        BadInputError: there is no such optimizer, or its rule is not the one that the name was pinned to.
    """
    kind, (path, attribute, _) = kind_of(name), split(name)
    return f"{path}:{attribute}@{_digest(kind)}" if path else kind.__name__.lower()


def title(name: Optimizer) -> str:
    """The optimizer's name for people: that of its class."""
    return kind_of(name).__name__


def folder_of(name: Optimizer) -> str:
    """A name for its runs' folder: no rule of the user's own shares one with an optimizer of the library's."""
    path, attribute, _ = split(name)
    return f"{Path(path).stem}-{attribute}" if path else name


def settings_of(name: Optimizer, recipe: Training) -> dict[str, Any]:
    """All settings of the optimizer that have an effect, as people know them."""
    if name in SECTIONS:
        return used(getattr(recipe, name)) | of_geometry(recipe)
    kind, given = arguments_of(name, recipe)
    settings = _defaults(kind, given) | given | of_geometry(recipe)
    unused = () if settings["geometry"] == "muon" else OF_GEOMETRY
    return {key: value for key, value in settings.items() if key == "geometry" or key not in unused}


def of_geometry(recipe: Training) -> dict[str, Any]:
    """The settings that decide the geometry of any optimizer of the recipe's."""
    return {key: value for key, value in recipe.settings.items() if key in (*OF_GEOMETRY, REST_LR)}


def optimizer_of(name: Optimizer, recipe: Training, model: torch.nn.Module) -> RuleOptimizer:
    """The recipe's optimizer of a model's parameters.

    In Muon's geometry these are two groups: the hidden matrices, and in Adam's geometry all others, whose learning rate
    is ``rest_lr``, by default the same. Weight decay is the same for both.
    """
    kind, arguments = arguments_of(name, recipe)
    if _defaults(kind, arguments)["geometry"] != "muon":
        return kind(model.parameters(), **arguments)
    split = {group["geometry"]: [p for _, p in group["params"]] for group in split_parameters(model)}
    rest = {"lr": recipe.settings[REST_LR]} if REST_LR in recipe.settings else {}
    own: dict[str, dict[str, Any]] = {"muon": {}, "adam": rest}
    return kind([{"params": params, "geometry": key, **own[key]} for key, params in split.items()], **arguments)


def buffers_of(name: Optimizer, recipe: Training) -> tuple[str, ...]:
    """What the optimizer remembers of each parameter, by name, with the recipe's settings."""
    kind, given = arguments_of(name, recipe)
    return kind.stored(_defaults(kind, given))


def kind_of(name: Optimizer) -> type[RuleOptimizer]:
    """The class that is meant: one that the library exports, in any case, or NAME in FILE.py:NAME.

    Args:
        name: NAME is a rule as :func:`ademamix.optimizer_from` takes it, or an optimizer class; a digest may follow.

    Raises:
        BadInputError: see :func:`pinned`; or the rule has a mistake, which the library's message names, or a command
            does not name its file.
    """
    path, attribute, digest = split(name)
    if not path:
        library = _library()
        if _folded(name) not in library:
            there = ", ".join(kind.__name__ for kind in library.values())
            raise BadInputError(f"unknown optimizer {name}; there are {there}, and FILE.py:NAME for a rule of your own")
        return library[_folded(name)]
    refuse_unnamed(path, attribute)
    kind = _own(Path(path), attribute)
    if digest and digest != _digest(kind):
        raise BadInputError(f"{path}:{attribute} has changed since: its digest was {digest} and is {_digest(kind)}")
    return kind


def arguments_of(name: Optimizer, recipe: Training) -> tuple[type[RuleOptimizer], dict[str, Any]]:
    """The recipe's optimizer class and its arguments.

    Raises:
        BadInputError: there is no such optimizer or setting, or a setting is out of its range.
    """
    kind, planned = kind_of(name), recipe.horizon
    given: dict[str, Any]
    s, m, section = recipe.adamw, recipe.ademamix, _folded(name) in SECTIONS
    shared = {key: value for key, value in of_geometry(recipe).items() if key != REST_LR}
    if _folded(name) == "adamw":
        given = {"lr": s.lr, "betas": (s.beta1, s.beta2), "eps": s.eps, "weight_decay": s.weight_decay}
        given |= {"state": s.state, **shared}
    elif _folded(name) == "ademamix":
        over_run = m.warmup and m.beta3_schedule != "log-time"
        warmup = max(1.0, m.warmup * (planned - recipe.switch_at)) if over_run else None
        given = {"lr": m.lr, "betas": (m.beta1, m.beta2, m.beta3), "eps": m.eps, "weight_decay": m.weight_decay}
        given |= {"alpha": m.alpha, "alpha_warmup": warmup, "beta3_warmup": warmup, "state": m.state}
        given |= {"beta3_schedule": m.beta3_schedule, "delta": m.delta, "kappa": m.kappa, **shared}
    else:
        given = {key: _in_steps(value, planned) for key, value in recipe.settings.items() if key != REST_LR}
        _check_names(kind, given)
    defaults = _defaults(kind, given)
    if "lr" not in defaults:
        raise BadInputError(f"{kind.__name__} has no lr, which the schedule of the learning rate would set")
    if REST_LR in recipe.settings and defaults["geometry"] == "muon":
        try:
            _defaults(kind, {**given, "lr": recipe.settings[REST_LR]})
        except BadInputError as error:
            raise BadInputError(f"rest_{error}") from error
    elif REST_LR in recipe.settings and not section:
        raise BadInputError(f"{REST_LR} is for geometry=muon, where it is the lr of all but the hidden matrices")
    return kind, given


def _defaults(kind: type[RuleOptimizer], given: dict[str, Any]) -> dict[str, Any]:
    """What the class makes of its arguments, unless it refuses them."""
    try:
        defaults: dict[str, Any] = kind(
            [torch.zeros(1, 1)], **given
        ).defaults  # a matrix: Muon's geometry takes no other
    except (TypeError, ValueError) as error:
        raise BadInputError(str(error)) from error
    return defaults


def _in_steps(value: Any, planned: int) -> Any:
    """0.5T stands for half of the planned steps."""
    part = re.fullmatch(r"(\d+\.?\d*|\.\d+|)T", value) if isinstance(value, str) else None
    return float(part[1] or 1) * planned if part else value


def _check_names(kind: type[RuleOptimizer], given: Mapping[str, Any]) -> None:
    taken = dict(inspect.signature(kind).parameters)
    if any(q.kind is q.VAR_KEYWORD for q in taken.values()):  # handed on to the classes that it is made of
        for base in (base for base in kind.__mro__[1:] if issubclass(base, RuleOptimizer)):
            taken |= inspect.signature(base).parameters
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [q.name for q in taken.values() if q.kind not in several and q.name not in ("params", "defaults")]
    for name in given:
        if name not in names:
            raise BadInputError(f"{kind.__name__} has no setting {name}; it has {', '.join(names)}")


def _folded(name: Optimizer) -> str:
    return re.sub("[-_]", "", name).lower()


def _library() -> dict[str, type[RuleOptimizer]]:
    exported = [getattr(ademamix, name) for name in ademamix.__all__]
    kinds = [x for x in exported if isinstance(x, type) and issubclass(x, RuleOptimizer) and x is not RuleOptimizer]
    return {kind.__name__.lower(): kind for kind in kinds}


def _own(path: Path, attribute: str) -> type[RuleOptimizer]:
    if not path.is_file():
        raise BadInputError(f"no such file: {path}")
    scope = _run(path, path.read_bytes())
    found = scope.get(attribute)
    if isinstance(found, type) and issubclass(found, RuleOptimizer):
        return found
    if not isinstance(found, types.FunctionType):
        own = [n for n, x in scope.items() if getattr(x, "__module__", None) == scope["__name__"]]
        raise BadInputError(f"{path} has no rule or optimizer {attribute}; it defines {', '.join(own) or 'nothing'}")
    try:
        return optimizer_from(found)
    except ValueError as error:
        raise BadInputError(str(error)) from error


@cache  # as long as the text is the same, so is the rule, and what was compiled for it
def _run(path: Path, text: bytes) -> dict[str, Any]:
    module = sys.modules[f"ademamix_own_{path.stem}"] = types.ModuleType(f"ademamix_own_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever a file of the user's raises
        raise BadInputError(f"{path} cannot be run ({type(error).__name__}: {error})") from error
    return module.__dict__


def _digest(kind: type[RuleOptimizer]) -> str:
    """Of all that decides what an optimizer computes, its settings aside."""
    from ademamix.backends.cpu import fingerprint

    coefficients: Any = kind.coefficients
    defaults = _defaults(kind, {})
    # Adam's geometry has none of these settings, and digests from before there were others are without them.
    dropped = OF_GEOMETRY if defaults["geometry"] == "adam" else ()
    counted = {key: value for key, value in defaults.items() if key not in dropped}
    computed = fingerprint(kind.checked_rule(defaults)) + fingerprint(coefficients) + repr(counted)
    return hashlib.sha256(computed.encode()).hexdigest()[:8]
