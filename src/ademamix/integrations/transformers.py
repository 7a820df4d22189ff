"""``optim="ademamix"`` in the Trainer of Hugging Face transformers, and in what is built on it (TRL, LLaMA-Factory)."""

import inspect
from ast import literal_eval
from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments

from ademamix.convert import from_adamw, from_bitsandbytes
from ademamix.optimizers.adam import AdEMAMix
from ademamix.optimizers.settings import suggest

STATES = {"ademamix": "float32", "ademamix_8bit": "compact"}  # by TrainingArguments.optim
SCHEDULES = ("betas", "alpha", "alpha_warmup", "beta3_warmup", "beta3_schedule")
SHORTEST = 100  # steps that suggest accepts
UNKNOWN = 100_000  # steps, if no scheduler is created that tells how many: settings that last for any length

# What optim_args may set: AdEMAMix's arguments, except those that TrainingArguments has.
OPTIM_ARGS = (
    *(name for name in inspect.signature(AdEMAMix).parameters if name not in ("params", "lr", "betas", "weight_decay")),
    *("beta1", "beta2", "beta3", "convert"),
)
ALIASES = {"t_alpha": "alpha_warmup", "t_beta3": "beta3_warmup"}  # as transformers calls them for bitsandbytes

_optimizer_cls_and_kwargs = Trainer.get_optimizer_cls_and_kwargs
_create_scheduler = Trainer.create_scheduler


def register() -> None:
    """Let ``optim="ademamix"`` and ``"ademamix_8bit"`` mean our AdEMAMix in every Trainer of this Python process.

    It replaces two public methods of ``transformers.Trainer``: ``get_optimizer_cls_and_kwargs``, and
    ``create_scheduler``, which gets the number of steps. All other values of ``optim``, including the paged ones, keep
    their meaning. Call it in each process before ``train()``; calling it again changes nothing.

    :func:`settings` says how TrainingArguments are used; docs/tools/transformers.md has examples.
    """
    trainer: Any = Trainer
    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    trainer.create_scheduler = create_scheduler


def settings(args: TrainingArguments, total_steps: int) -> dict[str, Any]:
    """Keyword arguments of AdEMAMix for a Trainer's arguments.

    ``learning_rate``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are used, and alpha, beta3 and both warmups
    are :func:`ademamix.suggest`'s; runs shorter than 100 steps take those of 100. ``skip_nonfinite`` is True. With
    ``deepspeed``, ``flat_parameters`` is True and each process has its own ``seed``. Whatever ``optim_args`` sets
    ("beta3=0.999,alpha=4") replaces these values.

    Args:
        args: those of the Trainer; ``optim`` is "ademamix", or "ademamix_8bit" for ``state="compact"``.
        total_steps: optimizer steps of the whole run.

    Raises:
        ValueError: ``optim_args`` has something unknown; it is named, with what is allowed.
    """
    given = _optim_args(args.optim_args)
    given.pop("convert", None)
    betas = {"beta1": given.pop("beta1", args.adam_beta1), "beta2": given.pop("beta2", args.adam_beta2)}
    log_time = given.get("beta3_schedule") == "log-time"
    advice = suggest(None if log_time else max(total_steps, SHORTEST), **betas)
    beta3 = given.pop("beta3", advice["betas"][2])
    # ZeRO's parameters are flat, and each process has other parts of them.
    flat = {"flat_parameters": True, "seed": args.process_index} if args.deepspeed else {}
    return {
        "lr": args.learning_rate,
        "eps": args.adam_epsilon,
        "state": STATES[_optim(args)],
        "skip_nonfinite": True,
        "alpha_warmup": None,
        "beta3_warmup": None,
        "beta3_schedule": "half-life",
        **flat,
        **advice,
        "betas": (*advice["betas"][:2], beta3),
        **given,
    }


class TrainerAdEMAMix(AdEMAMix):
    """The AdEMAMix of a Trainer, which knows its number of steps only after it has made the optimizer."""

    args: TrainingArguments | None = None
    total_steps = 0

    def schedule(self, args: TrainingArguments, total_steps: int) -> None:
        """Set alpha, the betas and both warmups of all groups for a run of so many steps.

        Args:
            args: those of the Trainer.
            total_steps: optimizer steps of the whole run.

        Raises:
            ValueError: ``optim_args`` has something unknown.
        """
        self.args, self.total_steps = args, total_steps
        scheduled = settings(args, total_steps)
        for group in self.param_groups:
            group.update({name: scheduled[name] for name in SCHEDULES})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as :class:`AdEMAMix` does; with ``optim_args="convert=True"``, also another optimizer's.

        :mod:`ademamix.convert` converts those of torch's AdamW and of bitsandbytes' AdamW and AdEMAMix. After an AdamW,
        alpha, beta3 and both warmups are set for the steps that are left.

        Args:
            state_dict: of this optimizer, or of one of those. It is not changed.

        Raises:
            ValueError: it is another optimizer's, and ``optim_args`` does not say "convert=True".
        """
        source = _source(state_dict)
        if source is not None:
            if self.args is None or not _optim_args(self.args.optim_args).get("convert"):
                raise ValueError(
                    f"the checkpoint's optimizer state is of {source}: set optim_args='convert=True' to convert it, "
                    "or resume with the optimizer that saved it"
                )
            if source.startswith("bitsandbytes"):
                state_dict = from_bitsandbytes(state_dict)
            if source.endswith("AdamW"):
                state_dict = self._switched(from_adamw(state_dict, self), self.args)
        super().load_state_dict(state_dict)

    def _switched(self, state_dict: dict[str, Any], args: TrainingArguments) -> dict[str, Any]:
        """A converted state dict with the schedules for the steps that are left."""
        groups = state_dict["param_groups"]
        left = settings(args, self.total_steps - max(group["schedule_start"] for group in groups))
        schedules = {name: left[name] for name in SCHEDULES}
        beta3 = left["betas"][2]
        return {
            **state_dict,
            "param_groups": [{**group, **schedules, "betas": (*group["betas"][:2], beta3)} for group in groups],
        }


def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
    """The Trainer's static method of this name, after :func:`register`.

    Args:
        args: those of the Trainer.
        model: passed on to the Trainer's own method.

    Returns:
        :class:`TrainerAdEMAMix` and :func:`settings` for our two values of ``optim``. All others: the Trainer's own
        result.

    Raises:
        ValueError: ``optim_args`` has something unknown.
    """
    if _optim(args) not in STATES:
        return _optimizer_cls_and_kwargs(args, model)
    return TrainerAdEMAMix, settings(args, args.max_steps if args.max_steps > 0 else UNKNOWN)


def create_scheduler(trainer: Trainer, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
    """The Trainer's method of this name, after :func:`register`: it also sets the schedules of our AdEMAMix.

    Args:
        trainer: ``self`` of the method.
        num_training_steps: optimizer steps of the whole run.
        optimizer: the one to schedule, perhaps in a wrapper; None for ``trainer.optimizer``.

    Returns:
        The learning-rate scheduler, which the Trainer's own method creates.

    Raises:
        ValueError: ``optim_args`` has something unknown.
    """
    own: Any = trainer.optimizer if optimizer is None else optimizer
    while not isinstance(own, TrainerAdEMAMix) and hasattr(own, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        own = own.optimizer
    if isinstance(own, TrainerAdEMAMix):
        own.schedule(trainer.args, num_training_steps)
    return _create_scheduler(trainer, num_training_steps, optimizer)


def _optim(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _optim_args(text: str | None) -> dict[str, Any]:
    """``"beta3=0.999,alpha=4"`` as a dict."""
    given = {}
    for item in filter(None, (text or "").replace(" ", "").split(",")):
        name, _, value = item.partition("=")
        name = ALIASES.get(name, name)
        if name not in OPTIM_ARGS or not value:
            raise ValueError(f"optim_args must be NAME=VALUE,..., got {item!r}; names: {', '.join(OPTIM_ARGS)}")
        try:
            given[name] = literal_eval(value)
        except (ValueError, SyntaxError):
            given[name] = value
    return given


def _source(state_dict: Mapping[str, Any]) -> str | None:
    """Which other optimizer saved it; None if that was ours."""
    group: Mapping[str, Any] = next(iter(state_dict.get("param_groups", ())), {})
    program = "bitsandbytes' " if "t_alpha" in group else ""
    if len(group.get("betas", ())) == 2:
        return f"{program}AdamW"
    return f"{program}AdEMAMix" if program else None
