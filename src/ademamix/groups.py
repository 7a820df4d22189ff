"""Which parameters of a model are hidden matrices, decided by its modules and by what they share."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from sys import modules as imported
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

Geometry = Literal["muon", "adam"]
Layer = tuple[str, nn.Module, bool]  # the prefix of its parameters' names, the module, whether it is in the stack
HIDDEN = "hidden matrix"
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
RECURRENT_OR_ATTENTION = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
# Children whose names wrappers add to every name: torch.compile, activation checkpointing, FullyShardedDataParallel.
WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Placement:
    """Where one parameter went, and why."""

    name: str
    shape: tuple[int, ...]
    geometry: Geometry | None  # None: frozen, left out
    reason: str


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer; printed, a table of what went where and why.

    Attributes:
        placements: one :class:`Placement` per parameter, in the model's order, frozen ones included.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], placements: Iterable[Placement]) -> None:
        super().__init__(groups)
        self.placements = tuple(placements)

    def __repr__(self) -> str:
        lines = []
        for geometry in ("muon", "adam", None):
            placed = [q for q in self.placements if q.geometry == geometry]
            if not placed:
                continue
            numbers = sum(math.prod(q.shape) for q in placed)
            tensors = "1 tensor" if len(placed) == 1 else f"{len(placed)} tensors"
            lines.append(f"{geometry or 'left out'}: {tensors}, {numbers:,} parameters")
            # Layers that differ in their number only share a row.
            rows = defaultdict[Any, list[str]](list)
            for q in placed:
                rows[re.sub(r"(?<![^.])\d+(?![^.])", "*", q.name), q.shape, q.reason].append(q.name)
            cells = [
                (name if len(names) > 1 else names[0], f"{len(names)} x {list(shape)}", reason)
                for (name, shape, reason), names in rows.items()
            ]
            first, second = (max(len(cell[i]) for cell in cells) for i in range(2))
            lines += [f"  {name:{first}}  {shapes:{second}}  {reason}" for name, shapes, reason in cells]
        return "\n".join(lines)


def split_parameters(
    model: nn.Module, *, adam: str | Iterable[str] = (), muon: str | Iterable[str] = ()
) -> ParameterGroups:
    """Parameter groups of a model: hidden matrices for Muon, all others for Adam without weight decay.

    ``ADana(split_parameters(model), lr=1e-3)``. Printing the groups shows what went where and why. Names of parameters
    decide nothing:

    - Hidden matrices are the matrices of ``nn.Linear``, of other layers that declare ``in_features`` and
      ``out_features``, of transformers' ``Conv1D``, of recurrent layers and of ``nn.MultiheadAttention``, and the
      weights of convolutions without groups. LoRA's A and B are linear layers like others.
    - Not hidden are output heads: what ``get_output_embeddings()`` of the transformers library gives; a layer tied to
      an embedding; a linear layer outside the stack of blocks whose weight has an embedding's shape; and the last
      linear layer or convolution outside the stack. The stack: modules with children in an ``nn.ModuleList``, or in an
      ``nn.Sequential`` or ``nn.ModuleDict`` with others of their class and shapes. A model that is only a stack has no
      head.
    - Not hidden is the first convolution, which takes data, unless it takes an embedding's channels. A linear layer
      that takes data counts as hidden.
    - All others are Adam's: embeddings, vectors (matrices with one row or one column too), and the parameters of
      modules that are none of these layers: learned positions, stacks of experts [experts, out, in] (Muon would take
      such a stack for one matrix), grouped convolutions (one matrix per group), complex weights.
    - A parameter that several modules share is hidden if it is for all of them. Frozen parameters are left out.

    Args:
        model: may be on the meta device, sharded by ``fully_shard``, compiled, or in DistributedDataParallel; names are
            given without the prefixes of wrappers.
        adam: shell patterns of full names (``"*.router.weight"``), one or several, of parameters that go to Adam.
        muon: patterns of parameters that go to Muon.

    Returns:
        A list of at most two groups, whose ``params`` are (name, parameter) pairs: ``geometry="muon"``, and
        ``geometry="adam"`` with ``weight_decay=0.0``. Empty groups are left out.

    Raises:
        TypeError: model is not an ``nn.Module``.
        ValueError: no parameter is trainable; a pattern matches no parameter; a parameter matches patterns of both
            kinds; a pattern for Muon matches a vector or a complex parameter; parameters are not initialized yet, or
            flattened by FullyShardedDataParallel or DeepSpeed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = list(_layers(model, "", False, set()))
    owners: dict[nn.Parameter, dict[str, nn.Module]] = {}
    for path, module, _ in layers:
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            _check_whole(path, name, module, p)
            owners.setdefault(p, {})[path + name] = module
    heads = {id(p) for head in _heads(layers) for p in head.parameters() if p.ndim > 1}
    first = _input_layer(layers)

    asked = {g: [q] if isinstance(q, str) else list(q) for g, q in (("adam", adam), ("muon", muon))}
    for geometry, patterns in asked.items():
        for pattern in patterns:
            if not any(_match(names, [pattern]) for names in owners.values()):
                example = f"; they are named like {next(iter(next(iter(owners.values()))))!r}" if owners else ""
                raise ValueError(f"{geometry} pattern {pattern!r} matches no parameter of the model{example}")

    placements = []
    params: dict[str, list[tuple[str, nn.Parameter]]] = {"muon": [], "adam": []}
    for p, names in owners.items():
        name = next(iter(names))
        if not p.requires_grad:
            placements.append(Placement(name, tuple(p.shape), None, "frozen"))
            continue
        geometry, reason = _override(p, names, asked) or _decide(p, names, heads, first)
        placements.append(Placement(name, tuple(p.shape), geometry, reason))
        params[geometry].append((name, p))
    options: dict[str, dict[str, Any]] = {"muon": {}, "adam": {"weight_decay": 0.0}}
    groups = [{"params": params[g], "geometry": g, **options[g]} for g in params if params[g]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    return ParameterGroups(groups, placements)


def _layers(module: nn.Module, prefix: str, stacked: bool, seen: set[nn.Module]) -> Iterator[Layer]:
    """All modules once, in the order of ``named_modules``, without the names of wrappers."""
    if module in seen:
        return
    seen.add(module)
    yield prefix, module, stacked
    blocks = _blocks(module)
    parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    for name, child in module.named_children():
        inner = prefix if parallel or name in WRAPPED else f"{prefix}{name}."
        yield from _layers(child, inner, stacked or child in blocks, seen)


def _blocks(parent: nn.Module) -> set[nn.Module]:
    """The children that are blocks of a stack."""
    if not isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return set()
    composed = [child for child in parent.children() if next(child.children(), None) is not None]
    build = {child: (type(child), *(p.shape for p in child.parameters())) for child in composed}
    same = Counter(build.values())
    return {child for child in composed if isinstance(parent, nn.ModuleList) or same[build[child]] > 1}


def _check_whole(path: str, name: str, module: nn.Module, p: nn.Parameter) -> None:
    if is_lazy(p):
        raise ValueError(f"{path}{name} has no shape yet: run the model once, so that its lazy layers are initialized")
    if getattr(p, "_is_flat_param", False) or (
        isinstance(module, nn.Linear) and name == "weight" and p.ndim < 2 and p.requires_grad
    ):
        raise ValueError(
            f"{path}{name} of shape {list(p.shape)} is flattened (FullyShardedDataParallel, DeepSpeed ZeRO 3), so "
            "matrices cannot be told from vectors; shard with torch.distributed.fsdp.fully_shard"
        )


def _heads(layers: list[Layer]) -> list[nn.Module]:
    of_transformers: list[Any] = [m for _, m, _ in layers if hasattr(m, "get_output_embeddings")]
    heads = [m.get_output_embeddings() for m in of_transformers]
    embeddings = [m._parameters.get("weight") for _, m, _ in layers if isinstance(m, EMBEDDINGS)]
    shapes = {p.shape for p in embeddings if p is not None}
    outside = [m for _, m, stacked in layers if not stacked and (_is_linear(m) or isinstance(m, _ConvNd))]
    heads += [m for m in outside if _is_linear(m) and getattr(m._parameters.get("weight"), "shape", None) in shapes]
    return [head for head in heads + outside[-1:] if isinstance(head, nn.Module)]


def _input_layer(layers: list[Layer]) -> nn.Module | None:
    convolution = next((m for _, m, _ in layers if isinstance(m, _ConvNd) and m.groups == 1), None)
    embedded = {m.embedding_dim for _, m, _ in layers if isinstance(m, EMBEDDINGS)}
    return None if convolution is None or convolution.in_channels in embedded else convolution


def _is_linear(module: nn.Module) -> bool:
    # A model that has such a layer has imported its class.
    conv1d = getattr(imported.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    declared = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return isinstance(module, (nn.Linear, conv1d)) or declared


def _decide(
    p: nn.Parameter, names: dict[str, nn.Module], heads: set[int], first: nn.Module | None
) -> tuple[Geometry, str]:
    reasons = [_reason(module, p, first) for module in names.values()]
    reason = next((r for r in reasons if r != HIDDEN), "output head" if id(p) in heads else HIDDEN)
    tied = ", tied to " + ", ".join(list(names)[1:]) if len(names) > 1 else ""
    return "muon" if reason == HIDDEN else "adam", reason + tied


def _reason(module: nn.Module, p: Tensor, first: nn.Module | None) -> str:
    """What the parameter is to the module."""
    kind = type(module).__name__
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    if p.numel() <= max(p.shape, default=1):
        return f"vector of {kind}"
    if p.is_complex():
        return "complex"
    if isinstance(module, _ConvNd):
        return "grouped convolution" if module.groups > 1 else "input layer" if module is first else HIDDEN
    if p.ndim == 2 and (_is_linear(module) or isinstance(module, RECURRENT_OR_ATTENTION)):
        return HIDDEN
    return f"parameter of {kind}"


def _override(p: nn.Parameter, names: Iterable[str], asked: dict[str, list[str]]) -> tuple[Geometry, str] | None:
    name = next(iter(names))
    adam, muon = (_match(names, asked[geometry]) for geometry in ("adam", "muon"))
    if adam and muon:
        raise ValueError(f"{name} matches the adam pattern {adam!r} and the muon pattern {muon!r}")
    if muon and (p.ndim < 2 or p.is_complex()):
        what = f"{p.dtype} of shape {list(p.shape)}"
        raise ValueError(f"muon pattern {muon!r} matches {name}, {what}; it must be real, of 2 or more dimensions")
    if muon:
        return "muon", f"override {muon!r}"
    return ("adam", f"override {adam!r}") if adam else None


def _match(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first pattern that matches one of a parameter's names."""
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)
