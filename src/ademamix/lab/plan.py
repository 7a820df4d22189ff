"""What memory training needs and what an optimizer step moves, counted on tensors that have no memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ademamix import AdamW, AdEMAMix
from ademamix.engine.state import slot_formats, state_of
from ademamix.lab.config import PRESETS, BadInputError, PlanFor
from ademamix.lab.console import OUT, say
from ademamix.lab.training.model import language_model

BYTE_VALUES = 256  # the vocabulary of text as bytes
SIZES = ("B", "kB", "MB", "GB", "TB", "PB")  # of 1000 each, as bandwidths and checkpoints are told
TIMES = ("µs", "ms", "s")


def model_of(settings: PlanFor) -> nn.Module:
    """The model that the settings name, on the meta device.

    Raises:
        BadInputError: it is neither a preset nor a configuration that `transformers` can build a model from.
    """
    with torch.device("meta"):
        if settings.model in PRESETS:
            model = language_model(PRESETS[settings.model], settings.vocab_size or BYTE_VALUES)
        else:
            model = _configured(Path(settings.model))
    return model.to(getattr(torch, settings.dtype))


def _configured(path: Path) -> nn.Module:
    if not path.exists():
        raise BadInputError(f"{path} is neither a preset ({', '.join(PRESETS)}) nor a config.json of transformers")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        any_kind: Any = transformers.AutoModelForCausalLM
        kind = getattr(transformers, (config.architectures or [""])[0], any_kind.from_config)
        model: nn.Module = kind(config)
    except Exception as error:  # whatever a file with anything in it makes of the library
        reason = "\n".join((str(error).strip() or type(error).__name__).splitlines()[:2])
        raise BadInputError(f"transformers cannot build a model from {path} ({reason})") from error
    return model


def need(model: nn.Module, kind: type[AdEMAMix | AdamW], state: str, parts: int = 1) -> dict[str, int]:
    """Count what the process with the largest part of a model needs to train it, activations left aside.

    Args:
        model: any model, on any device; nothing is allocated.
        kind: the optimizer, with its default settings.
        state: the optimizer's state format.
        parts: the number of processes over which FSDP2 cuts dimension 0 of each parameter; the first has the most.

    Returns:
        Bytes, by what they are. Steps are counted on the host and left out, as are a checkpoint's headers.
    """
    optimizer = kind(model.parameters(), state=state)
    formats = optimizer.formats(optimizer.param_groups[0])
    held, grads, slots = [], [], []
    for p in model.parameters():
        part = p.detach().to("meta")
        part = part.chunk(parts)[0] if part.ndim else part
        held.append(part)
        if p.requires_grad:
            grads.append(part)
            # Small parameters keep full precision by the size of the whole.
            slots += [t for t in state_of(None, part, slot_formats(p, formats, flat=False)).values() if t.is_meta]
    buffers = [t for t in model.state_dict(keep_vars=True).values() if not isinstance(t, nn.Parameter)]
    parameters, gradients, stored = map(_bytes, (held, grads, slots))
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer state": stored,
        "all three": parameters + gradients + stored,
        "checkpoint": parameters + _bytes(buffers) + stored,
        # A gradient is read; its parameter, which is as large, and the state are read and written.
        "a step moves": 3 * gradients + 2 * stored,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def budget(
    model: nn.Module, kind: type[AdEMAMix | AdamW], state: str, gpus: int, *, sharded: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """What the GPU with the largest part needs, and what all need together; of replicas, one writes the checkpoint."""
    whole = need(model, kind, state)
    if sharded:
        return need(model, kind, state, gpus), whole
    return whole, {what: n if what == "checkpoint" else n * gpus for what, n in whole.items()}


def plan(settings: PlanFor) -> None:
    """Carry out `ademamix plan`."""
    model, gpus, sharded = model_of(settings), settings.gpus, settings.sharding == "fsdp"
    ours, adamw = (
        budget(model, AdEMAMix, settings.state, gpus, sharded=sharded),
        budget(model, AdamW, "float32", gpus, sharded=sharded),
    )
    where = "one GPU" if gpus == 1 else f"{gpus:,} GPUs, {'sharded by FSDP2' if sharded else 'a replica on each'}"
    three, theirs = ours[0]["all three"], adamw[0]["all three"]
    say(
        f"{settings.model}, {sum(p.numel() for p in model.parameters()):,} parameters in {settings.dtype} on {where}: "
        f"with AdEMAMix ({settings.state} state) parameters, gradients and state take {_told(three, SIZES)} per GPU, "
        f"{three / theirs:.2f} times what they take with AdamW (float32 state). Activations come on top."
    )
    table = Table("", "AdEMAMix,\nper GPU", "\nin all", "AdamW,\nper GPU", "\nin all", "AdEMAMix\n/ AdamW")
    for what, n in ours[0].items():
        sizes = (_told(each[what], SIZES) for each in (*ours, *adamw))
        table.add_row(what, *sizes, f"{n / adamw[0][what]:.2f}")
    # bytes over GB/s are nanoseconds
    times = [_told(1e-3 * each["a step moves"] / settings.bandwidth, TIMES) for each, _ in (ours, adamw)]
    table.add_row(f"at {settings.bandwidth:,g} GB/s", times[0], "", times[1])
    for column in table.columns[1:]:
        column.justify = "right"
    if gpus == 1:  # all is what the one has
        del table.columns[4], table.columns[2]
    OUT.print(table)


def _told(value: float, units: tuple[str, ...]) -> str:
    """Three digits and the unit, of 1000 of the one before it, that suits them."""
    *smaller, unit = units
    for one in smaller:
        if value < 999.5:
            unit = one
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
