"""The state of a parameter: which tensors there are, how they are stored, and what others have saved as such."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ademamix import backends
from ademamix.backends import eager, in_rows
from ademamix.engine.coefficients import EXACT
from ademamix.engine.sharding import blocks_are_whole, is_sharded, joined, local, local_part
from ademamix.formats import BLOCK, FORMATS, ONCE_LINEAR, SMALLEST, Format, as_saved

CPU = torch.device("cpu")
MASTER = "master"  # the key of float32 master weights, which a parameter with its state on the host may have


def scalar(value: float) -> Tensor:
    """On the CPU, whatever the user has made torch's default device and dtype."""
    return torch.tensor(value, dtype=torch.float32, device=CPU)


def counter(steps: float) -> Tensor:
    """A number of steps as a state on the host has it: as torch's, in float32, while that is exact; then in float64."""
    return torch.tensor(steps, dtype=torch.float64 if steps >= EXACT else torch.float32, device=CPU)


def counted(step: Any, device: torch.device | None) -> Tensor:
    """A state's number of steps as it is to be; the same tensor where it is that already.

    Args:
        step: a number, or a tensor of one element.
        device: what counts steps; None for the host. It does so in float64 from the start, as nobody sees when that
            becomes necessary; MPS has no float64.
    """
    if device is not None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
    else:
        dtype = torch.float32 if backends.is_fake(step) or float(step) < EXACT else torch.float64
    there = device or CPU
    if isinstance(step, Tensor) and (step.shape, step.dtype, step.device) == ((), dtype, there):
        return step
    return torch.as_tensor(step, dtype=dtype, device=there).reshape(())


def slot_formats(p: Tensor, formats: dict[str, Format], flat: bool) -> dict[str, Format]:
    """The formats of the parameter's own slots: its group's, or full precision where those would not serve.

    With ``flat``, one of one dimension is a part of flattened ones, unless it is a DTensor, whose parts may cut blocks.
    """
    vector = p.ndim < 2 and (not flat or is_sharded(p))
    if p.dtype == torch.float64 or p.is_complex() or vector or p.numel() < SMALLEST:
        full = FORMATS["float64" if p.dtype.to_real() == torch.float64 else "float32"]
        return dict.fromkeys(formats, full)
    return formats


def are_low(formats: Mapping[str, Format]) -> bool:
    """Whether any slot is stored in less than full precision."""
    return any(not format.storage.startswith("float") for format in formats.values())


def tensor_names(slot: str, formats: Mapping[str, Format]) -> tuple[str, ...]:
    return (slot, f"{slot}_scale") if formats[slot].scale is not None else (slot,)


def is_dense(p: Tensor) -> bool:
    """Whether p fills its memory without gaps or overlaps: then empty_like keeps its strides."""
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()


def fits(p: Tensor, formats: Mapping[str, Format]) -> bool:
    """Whether a backend can work on p itself: blocks, and a part's noise, lie along rows of a contiguous tensor.

    A lazily negated tensor (``z.conj().imag``) is the negative of what lies in its memory.
    """
    ordered = is_sharded(p) or any(f.scale is not None for f in formats.values())
    return not p.is_neg() and (local(p).is_contiguous() if ordered else is_dense(p))


def _layout(p: Tensor, format: Format, formats: Mapping[str, Format]) -> Tensor:
    """A tensor without memory that has the shape, dtype and strides of this process's part of p's slot."""
    dtype = backends.storage_dtype(format)
    memory = torch.preserve_format if fits(p, formats) else torch.contiguous_format
    kind = dtype.to_complex() if p.is_complex() else dtype
    # By zeros_like, as in torch.optim: of it, quantized weights make a plain tensor.
    return torch.zeros_like(local(p), dtype=kind, device="meta", requires_grad=False, memory_format=memory)


def _scale_shape(p: Tensor) -> tuple[int, int]:
    rows, rest = in_rows(p.shape)
    return rows, -(-rest // BLOCK)


STORED_AS = {
    dtype: as_saved(FORMATS[name])
    for dtype, name in (
        (torch.bfloat16, "bfloat16"),
        (torch.int8, "int8"),
        (torch.int16, "int16"),
        (torch.uint8, "float8"),
    )
}


def decoded(value: Tensor, scale: Tensor | None) -> Tensor:
    """The numbers that a state tensor stands for: itself, or float32 where it holds codes."""
    if value.dtype not in STORED_AS:
        return value
    codes = local(value)
    rows = codes.contiguous().view(in_rows(codes.shape))
    numbers = eager.decode(STORED_AS[value.dtype], rows, None if scale is None else local(scale))
    return joined(numbers.view(codes.shape), value, value.shape)


def new_slot(name: str, p: Tensor, formats: Mapping[str, Format]) -> dict[str, Tensor]:
    """Zeros as p's slot ``name``, with its scales."""
    codes = torch.zeros_like(_layout(p, formats[name], formats), device=p.device)
    slot = {name: joined(codes, p, p.shape)}
    if formats[name].scale is not None:
        scale = codes.new_zeros(_scale_shape(codes), dtype=torch.float32)
        slot[f"{name}_scale"] = joined(scale, p, _scale_shape(p))
    return slot


def stored_slot(
    name: str, value: Tensor, scale: Tensor | None, p: Tensor, formats: Mapping[str, Format]
) -> dict[str, Tensor]:
    """A state tensor, with its scales, as p's slot ``name`` is to be stored; the same tensors where they already fit.

    Other formats are decoded and encoded, rounded to nearest.
    """
    format = formats[name]
    wanted = _layout(p, format, formats)
    if value.dtype == wanted.dtype:
        part, part_scale = local_part(value, p), None if scale is None else local_part(scale, p)
    else:
        part, part_scale = _converted(format, wanted, local_part(decoded(value, scale), p))
    if part.stride() != wanted.stride():
        part = torch.empty_like(wanted, device=part.device).copy_(part)
    slot = {name: _placed(part, value, p, p.shape)}
    if format.scale is not None:
        assert part_scale is not None
        slot[f"{name}_scale"] = _placed(part_scale, scale, p, _scale_shape(p))
    return slot


def renewed(state: Mapping[str, Any], p: Tensor, formats: Mapping[str, Format]) -> dict[str, Any]:
    """A state from a file as ``state_of`` gives it, with linear codes of version 0.1.0 encoded anew."""
    new = dict(state)
    for name in (name for name, format in formats.items() if format.name in ONCE_LINEAR):
        scale = state[f"{name}_scale"]
        if _is_positive(local(scale)):
            new.update(stored_slot(name, decoded(state[name], scale), None, p, formats))
    return new


def _is_positive(scale: Tensor) -> bool:
    """Whether the sign bit of the first scale, which is that of all, is not set; without a copy on the CPU."""
    if scale.numel() == 0 or scale.is_meta or backends.is_fake(scale):
        return False
    on_host = scale.device.type == "cpu"
    first = ctypes.c_float.from_address(scale.data_ptr()).value if on_host else scale[0, 0].item()
    return math.copysign(1.0, first) > 0.0


def _converted(format: Format, wanted: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
    """Numbers in the format of ``wanted``, with their scales."""
    if wanted.dtype.to_real().is_floating_point and wanted.dtype != torch.bfloat16:
        return numbers.to(wanted.dtype), None
    rows = numbers.float().contiguous().view(in_rows(numbers.shape))
    middle = torch.full_like(rows, -(1 << 31), dtype=torch.int32)  # the noise that rounds to nearest
    codes, scale = eager.encode(format, rows, middle)
    value = torch.empty_like(wanted, device=numbers.device, memory_format=torch.contiguous_format)
    eager.write(format, value.view(in_rows(value.shape)), codes)
    return value, scale


def _placed(part: Tensor, given: Any, p: Any, shape: Sequence[int]) -> Tensor:
    """The state tensor of which ``part`` is this process's: the given one if that is it already."""
    placed_alike = not is_sharded(p) or (is_sharded(given) and given.placements == p.placements)
    if part is local(given) and placed_alike and part.device == p.device and not part.requires_grad:
        return given  # type: ignore[no-any-return]
    return joined(part.detach().to(p.device), p, shape)


def check_state(saved: Mapping[str, Any], p: Any, formats: Mapping[str, Format]) -> None:
    """Raise ValueError for a slot that has not p's shape, for scales that are missing or have not theirs, and where the
    parts of a DTensor would cut blocks; RuntimeError for tensors whose memory was freed."""
    blocked = {f.name for f in formats.values() if f.scale is not None}
    if blocked and not blocks_are_whole(p):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} with placements {p.placements} on {tuple(p.device_mesh.shape)} "
            f"processes cannot have state in the formats {sorted(blocked)}: it would cut blocks of {BLOCK} elements; "
            f"allowed: cuts of dimension 0, cuts of dimension 1 at multiples of {BLOCK} elements, and for all others "
            "state='float32' or 'bfloat16'"
        )
    for name in (*formats, MASTER):
        value = saved.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"state tensor {name!r} must be a tensor, got a {type(value).__name__}")
        tensors: list[tuple[str, Any, tuple[int, ...]]] = [(name, value, tuple(p.shape))]
        stored_as = STORED_AS.get(value.dtype)
        if stored_as is not None and stored_as.scale is not None:
            tensors.append((f"{name}_scale", saved.get(f"{name}_scale"), _scale_shape(p)))
        for what, t, shape in tensors:
            if t is None or tuple(t.shape) != shape:
                found = "is missing" if t is None else f"has shape {tuple(t.shape)}"
                raise ValueError(f"state tensor {what!r} {found}; a parameter of shape {tuple(p.shape)} needs {shape}")
            if backends.is_freed(local(t)):
                raise RuntimeError(f"state tensor {what!r} of shape {shape} has no memory: its storage was freed")
            if is_sharded(t) and not (is_sharded(p) and p.device_mesh == t.device_mesh):
                raise ValueError(f"state tensor {what!r} is a DTensor on {t.device_mesh}, where its parameter is not")


def state_of(
    saved: Mapping[str, Any] | None, p: Tensor, formats: Mapping[str, Format], counts: torch.device | None = None
) -> dict[str, Any]:
    """The parameter's state with all its slots: ``saved`` itself where nothing had to be added or changed.

    ``counts`` is the device that counts steps, None for the host.
    """
    state: dict[str, Any] = {"step": counter(0.0), **(saved or {})}
    check_state(state, p, formats)
    state["step"] = counted(state["step"], counts)
    for name in formats:
        value, scale = state.get(name), state.pop(f"{name}_scale", None)
        if value is not None:
            state.update(stored_slot(name, value, scale, p, formats))
            continue
        state.update(new_slot(name, p, formats))
    if saved is not None and state.keys() == saved.keys() and all(state[k] is saved[k] for k in state):
        return saved  # type: ignore[return-value]
    return state
