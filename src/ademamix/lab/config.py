"""What a run is: typed settings with their meaning, and presets of them. Imports nothing heavy: `--help` reads it."""

import dataclasses
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

import tyro

from ademamix.lab.values import OR_NONE, Values

Optimizer = str  # a class of the library's, in lower case, or FILE.py:NAME (optimizers.py)
State = Literal["float32", "bfloat16", "compact"]
Dtype = Literal["float32", "bfloat16"]
Shape = Literal["cosine", "linear", "wsd"]  # of the learning rate over a run
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
NewFolder = Annotated[  # of a run
    Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: a new folder in runs/)")
]
RunFolder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: start a new run)")]
SEEDS = LARGEST_INT = 2**63  # torch takes no larger ones
LARGEST_VOCAB = 2**32  # tokens have 32 bits or fewer
LARGEST = 1 << 28  # bytes of a JSON file; a result has some hundred for each evaluation


class BadInputError(Exception):
    """Something the user gave cannot be used; the message is one sentence for the terminal."""


def shortened(text: object) -> str:
    """What a message shows of a value that may be of any length."""
    whole = str(text)
    return whole if len(whole) <= 100 else f"{whole[:60]}...{whole[-20:]}"


def _at_least_1(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise BadInputError(f"{name} must be at least 1, got {shortened(value)}")
        if value >= LARGEST_INT:
            raise BadInputError(f"{name} must be below 2**63, got {shortened(value)}")


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of AdamW."""

    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the gradient's average, per step."""
    beta2: float = 0.999
    """Decay of the squared gradient's average, per step."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's average."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    state: State = "float32"
    """How the optimizer stores its state."""


@dataclass(frozen=True)
class AdEMAMixSettings(AdamWSettings):
    """Settings of AdEMAMix."""

    beta3: float = 0.999
    """Decay of the slow EMA at the end of its warmup; its half-life should be well below the run's length."""
    alpha: float = 8.0
    """Weight of the slow EMA at the end of its warmup."""
    warmup: float = 1.0
    """The part of the run over which alpha and beta3 grow to their values; 0 for both from the first step on."""
    beta3_schedule: Literal["half-life", "log-time"] = "half-life"
    """log-time: the slow EMA's horizon is a share of the steps so far; neither beta3 nor warmup is used."""
    delta: float = 8.0
    """Of log-time: the horizon is about 1 / delta of the steps so far."""
    kappa: float = 0.85
    """Of log-time: alpha is multiplied by (1 + step) to the power 1 - kappa."""

    @property
    def unused(self) -> tuple[str, ...]:
        """The settings that have no effect, given the others."""
        return ("beta3", "warmup") if self.beta3_schedule == "log-time" else ("delta", "kappa")


@dataclass(frozen=True)
class Training:
    """What decides the numbers of a run, whatever is learned. A run can only be resumed with the same."""

    unit: ClassVar[str]  # what an example is made of: the budget is counted in it

    batch: int = 4
    """Examples (sequences, images) per step."""
    accumulate: int = 1
    """Parts into which a batch is cut to save memory; their gradients are added up."""
    steps: int = 5000
    """Optimizer steps."""
    warmup: int = 250
    """Steps of linear learning-rate warmup."""
    schedule: Shape = "cosine"
    """Learning rate after the warmup: down along a cosine or a line, or constant with a linear last fifth (wsd)."""
    final_lr: float = 0.0
    """Learning rate of the last step, as a fraction of the peak."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down, and a step is skipped if it is not finite."""
    dtype: Dtype = "float32"
    """Of the parameters; bfloat16 ones are rounded stochastically and have no float32 copies."""
    seed: int = 0
    """Random seed for the initial weights and the order of the batches."""
    eval_every: int = 250
    """Steps between two looks at the validation loss; the last step always has one."""
    switch_at: int = 0
    """Train with AdamW for so many steps before AdEMAMix, its slow EMA zero, takes over; 0: only AdEMAMix."""
    planned: int = 0
    """Run length for which the optimizer's own schedules are computed, if it differs from --steps; 0: the same."""
    held_out: Annotated[tuple[int, ...], OR_NONE] = ()
    """Steps at each of which a batch of validation text takes the place of the step's own; its loss is followed."""
    insert: bool = True
    """Train on the batches of held_out; without, their losses are only followed, for comparison."""
    adamw: AdamWSettings = AdamWSettings(lr=4e-3, beta2=0.99)
    """Settings of AdamW; those of the demo were tuned by `ademamix run lm`, as were AdEMAMix's."""
    ademamix: AdEMAMixSettings = AdEMAMixSettings(lr=2e-3, beta2=0.99, beta3=0.998)
    """Settings of AdEMAMix."""
    settings: Values = field(default_factory=dict)
    """Another optimizer's arguments (lr=2e-3 kappa=0.85; 0.5T: half the planned steps), or geometry=muon."""

    def __post_init__(self) -> None:
        _at_least_1(self, "batch", "accumulate", "steps", "eval_every")
        if not 0 <= self.warmup < self.steps:
            raise BadInputError(f"warmup must be in [0, steps), got {self.warmup} with {self.steps} steps")
        if self.batch % self.accumulate:
            raise BadInputError(f"accumulate must divide batch, got {self.accumulate} with a batch of {self.batch}")
        if not 0 <= self.final_lr <= 1:
            raise BadInputError(f"final_lr must be in [0, 1], got {self.final_lr}")
        if not self.clip > 0:
            raise BadInputError(f"clip must be positive, got {self.clip}")
        if not 0 <= self.seed < SEEDS:
            raise BadInputError(f"seed must be in [0, 2**63), got {shortened(self.seed)}")
        if self.planned < 0:
            raise BadInputError(f"planned must not be negative, got {shortened(self.planned)}")
        if self.planned >= LARGEST_INT:
            raise BadInputError(f"planned must be below 2**63, got {shortened(self.planned)}")
        if not 0 <= self.switch_at < self.steps:
            raise BadInputError(f"switch_at must be in [0, steps), got {self.switch_at} with {self.steps} steps")
        if not 0 <= self.ademamix.warmup <= 1:
            raise BadInputError(f"ademamix.warmup must be in [0, 1], got {self.ademamix.warmup}")
        bad = [step for step in self.held_out if not 0 < step <= self.steps]
        if bad or len(set(self.held_out)) < len(self.held_out):
            raise BadInputError(f"held_out must be different steps in [1, steps], got {self.held_out}")

    @property
    def unused(self) -> tuple[str, ...]:
        """The settings that have no effect, given the others."""
        off = tuple(name for name in ("switch_at", "planned", "held_out", "settings") if not getattr(self, name))
        return off if self.held_out else (*off, "insert")

    @property
    def units_per_step(self) -> int:
        return self.batch

    @property
    def horizon(self) -> int:
        """The steps that an optimizer's own schedules are made for."""
        return self.planned or self.steps


@dataclass(frozen=True)
class Recipe(Training):
    """A language model and its text."""

    unit: ClassVar[str] = "tokens"

    data: str = "stdlib"
    """Folder written by `ademamix data`, or "stdlib": the Python standard library's own source files, as bytes."""
    architecture: Literal["llama", "mamba"] = "llama"
    """The model, with tied embeddings."""
    layers: int = 2
    """Layers of the model."""
    width: int = 64
    """Width of the residual stream; heads are 64 wide."""
    context: int = 64
    """Tokens per sequence."""
    eval_sequences: int = 256
    """Validation sequences, always the same ones, spread evenly over the validation text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_1(self, "layers", "width", "context", "eval_sequences")
        if self.width % 64 and (self.width > 64 or self.width % 2):
            raise BadInputError(f"width must be a multiple of 64, or an even number below it, got {self.width}")

    @property
    def units_per_step(self) -> int:
        return self.batch * self.context


@dataclass(frozen=True)
class ImageRecipe(Training):
    """A vision transformer and its images."""

    unit: ClassVar[str] = "images"

    data: str = "glyphs"
    """Folder with a folder per class, "hf:NAME" of the Hugging Face hub, or "glyphs": noisy digits drawn here."""
    examples: int = 20_000
    """Training images: the first so many of the data."""
    size: int = 20
    """Pixels along each side of an image; others are scaled and cut to it."""
    patch: int = 4
    """Pixels along each side of a patch."""
    layers: int = 2
    """Layers of the model."""
    width: int = 64
    """Width of the residual stream; heads are 32 wide."""
    eval_images: int = 2000
    """Validation images, the first so many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_1(self, "examples", "size", "patch", "layers", "width", "eval_images")
        if self.size % self.patch:
            raise BadInputError(f"patch must divide size, got {self.patch} with images of {self.size}")
        if self.width % 32:
            raise BadInputError(f"width must be a multiple of 32, got {self.width}")


@dataclass(frozen=True)
class Job:
    """How a run is carried out; nothing here changes its numbers (but another device rounds differently)."""

    out: NewFolder = None
    """Folder for everything the run writes; must not exist yet."""
    resume: RunFolder = None
    """Resume the run in this folder, with the settings that it was started with."""
    device: str = "auto"
    """Device to train on: auto takes the accelerator that is there (cuda, mps, xpu), else the cpu."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    save_every: int = 1000
    """Steps between two checkpoints; the end and Ctrl-C always write one."""
    keep: int = 2
    """Checkpoints to keep: the last so many."""
    shard: bool = False
    """Give each process of torchrun a part of parameters, gradients and optimizer state (FSDP2), not all (DDP)."""
    go_on: bool = False
    """Resume the run if --out holds it already: for queues that start the same command again."""

    def __post_init__(self) -> None:
        _at_least_1(self, "log_every", "save_every", "keep")


@dataclass(frozen=True)
class Match:
    """How long AdamW may try to reach the other's loss."""

    match: bool = False
    """Also train AdamW with growing budgets, each with a full schedule of its own, until it has the other's loss."""
    match_step: float = 0.25
    """By how much the budget grows each time, in budgets of the comparison."""
    match_cap: float = 3.0
    """The largest budget that is tried."""

    def __post_init__(self) -> None:
        if not self.match_step > 0:
            raise BadInputError(f"match_step must be positive, got {self.match_step}")
        if not 1 <= self.match_cap < math.inf:
            raise BadInputError(f"match_cap must be a number from 1 on, got {self.match_cap}")


@dataclass(frozen=True)
class Train:
    """Train a small language model with any optimizer.

    AdamW and AdEMAMix have sections of settings below; all other optimizers take theirs from `--settings`. With
    `--settings geometry=muon` any optimizer updates hidden matrices in Muon's geometry; `adjust_lr_fn`,
    `ns_coefficients` and `ns_steps` configure that, and `rest_lr` is the learning rate of all other parameters.

    Writes metrics.jsonl, TensorBoard events and checkpoints to a folder. Ctrl-C saves and says how to resume.
    """

    optimizer: Optimizer = "ademamix"
    """adamw, ademamix, another class of the library, or FILE.py:NAME for a rule or class of your own."""
    preset: str = "demo"
    """Where the other defaults come from: demo (0.1M parameters), 3m, 10m, 30m, and the paper's 110m, 330m, 1.3b."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    job: Annotated[Job, tyro.conf.arg(name="")] = field(default_factory=Job)


@dataclass(frozen=True)
class Compare:
    """Train with AdamW and with AdEMAMix (or another) on the same text from the same weights; show the difference.

    On a CPU both train at the same time, with one thread each, elsewhere one after the other. Writes report.html (one
    file, opens without a network), its pictures (SVG), results.json and both runs to a folder.
    """

    optimizer: Optimizer = "ademamix"
    """What AdamW is compared with, as in `ademamix train`."""
    preset: str = "demo"
    """Where the other defaults come from: demo (0.1M parameters), 3m, 10m, 30m, and the paper's 110m, 330m, 1.3b."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    job: Annotated[Job, tyro.conf.arg(name="")] = field(default_factory=Job)
    match: Annotated[Match, tyro.conf.arg(name="")] = field(default_factory=Match)


@dataclass(frozen=True)
class ReportOn:
    """Write an index of all experiments in a folder: the paper's figure next to ours, claim by claim."""

    folder: Annotated[Path, tyro.conf.arg(metavar="[FOLDER]"), tyro.conf.Positional] = Path("runs")
    """The folder that holds the experiments' folders (`ademamix run lm --out FOLDER/lm`, and so on)."""


@dataclass(frozen=True)
class PlanFor:
    """Estimate the memory that training needs on each GPU and the time of an optimizer step, compared with AdamW.

    Nothing is trained or allocated: a model of 70 billion parameters takes seconds, on any machine.
    """

    model: Annotated[str, tyro.conf.arg(metavar="[MODEL]"), tyro.conf.Positional] = "demo"
    """A preset (demo, 3m, 10m, 30m, 110m, 330m, 1.3b), or a config.json of the transformers library."""
    vocab_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 256)")] = None
    """Tokens in a preset's vocabulary: 256 for text as bytes; the paper's sizes are meant for 32,000."""
    gpus: int = 1
    """GPUs, on however many machines."""
    sharding: Literal["none", "fsdp"] = "none"
    """none: each GPU has all of the model (DDP). fsdp: each has a part of every parameter and its state (FSDP2)."""
    state: State = "float32"
    """How AdEMAMix stores its state."""
    dtype: Dtype = "float32"
    """Of parameters and gradients."""
    bandwidth: float = 3350.0
    """GB/s of a GPU's memory. The default is that of an H100 SXM; an A100 with 80 GB has 2039, an H200 4800."""

    def __post_init__(self) -> None:
        _at_least_1(self, "gpus")
        if not 0 < self.bandwidth < math.inf:
            raise BadInputError(f"bandwidth must be a positive number of GB/s, got {self.bandwidth}")
        if self.vocab_size is not None and not 1 <= self.vocab_size <= LARGEST_VOCAB:
            raise BadInputError(f"vocab_size must be in [1, 2**32], got {shortened(self.vocab_size)}")
        if self.vocab_size is not None and self.model not in PRESETS:
            raise BadInputError(f"vocab_size goes with a preset; a configuration such as {self.model} has its own")


VALID_FRACTION = 0.05


@dataclass(frozen=True)
class Data:
    """Turn text into a folder of token files for `ademamix train --data FOLDER`.

    Every document goes to training or to validation by a hash of its text, so that no document is in both, however
    often it occurs. A document is a record of a JSON Lines file (.jsonl, .ndjson, .json), of a Parquet file or of a
    dataset; every other file is text in UTF-8. A text file in a folder is one document; one above 1 MiB, or given by
    name, is cut at line ends into documents of about 16,000 characters. All rules: docs/how-to/data.md.
    """

    sources: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="SOURCE [SOURCE ...]", help_behavior_hint=""), tyro.conf.Positional
    ]
    """Files or folders; "hf:NAME" for a dataset of the Hugging Face hub, "hf:NAME:SUBSET" for a part of it."""
    out: Folder
    """Folder to write; must not exist yet."""
    tokenizer: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: bytes of UTF-8, 0 ends a document)")
    ] = None
    """A tokenizer.json of the `tokenizers` library."""
    end_token: Annotated[
        str | None,
        tyro.conf.arg(metavar="STR", help_behavior_hint="(default: the tokenizer's usual one, if it has one)"),
    ] = None
    """The token that ends a document."""
    text_key: str = "text"
    """The field of a record that holds the text."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    valid_fraction: float = VALID_FRACTION
    """Share of the documents that goes to validation."""
    max_tokens: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """Write at most this many tokens, the first ones of each split; documents may be cut."""


def _paper(layers: int, width: int, batch: int, steps: int, alpha: float, eval_every: int = 1000) -> Recipe:
    """What the paper states: context, batch, steps, betas, alpha, warmups, schedule and weight decay.

    Not confirmed: layers and width (these give the stated sizes with tied embeddings and 32,000 tokens), the peak
    learning rate (that of arXiv 2509.01440 for 124M parameters), clipping, and the end of the cosine.
    """
    return Recipe(
        layers=layers,
        width=width,
        context=1024,
        batch=batch,
        steps=steps,
        warmup=3000,
        eval_every=eval_every,
        eval_sequences=1024,
        adamw=AdamWSettings(lr=1e-3),
        ademamix=AdEMAMixSettings(lr=1e-3, beta3=0.9999, alpha=alpha),
    )


def _between(layers: int, width: int, context: int, batch: int, steps: int, lr: float) -> Recipe:
    """Sizes between the demo and the paper's; learning rates fall with the width and were not tuned."""
    return Recipe(
        layers=layers,
        width=width,
        context=context,
        batch=batch,
        steps=steps,
        eval_every=steps // 20,
        adamw=AdamWSettings(lr=lr),
        ademamix=AdEMAMixSettings(lr=lr, beta3=0.9995 if steps >= 10_000 else 0.999),
    )


PRESETS = {
    "demo": Recipe(),
    "3m": _between(layers=4, width=256, context=256, batch=16, steps=6_000, lr=3e-3),
    "10m": _between(layers=6, width=384, context=512, batch=16, steps=10_000, lr=2e-3),
    "30m": _between(layers=8, width=512, context=512, batch=32, steps=20_000, lr=1.5e-3),
    "110m": _paper(layers=12, width=768, batch=64, steps=256_000, alpha=8.0),
    "330m": _paper(layers=24, width=1024, batch=96, steps=256_000, alpha=8.0),
    # 770,000 steps are AdEMAMix's run; AdamW's took 1,500,000.
    "1.3b": _paper(layers=24, width=2048, batch=128, steps=770_000, alpha=5.0),
}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. A link in its place is replaced, never written through.

    Raises:
        BadInputError: a folder is where the file is to be, or where it is first written (its name with .partial).
    """
    aside = path.with_name(path.name + ".partial")
    for there in (path, aside):
        if there.is_dir() and not there.is_symlink():
            raise BadInputError(f"{there} is a folder, where a file is to be written; move it away")
    aside.unlink(missing_ok=True)  # a killed process left it
    with open(aside, "xb") as file:
        file.write(content)
    aside.replace(path)


def to_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def read_file(path: Path) -> bytes:
    """What a file holds.

    Raises:
        BadInputError: it is not a regular file: a pipe has no end, and reading it would wait for one.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise BadInputError(f"{path} must be a file, but is a folder, a pipe or a device")
    return path.read_bytes()


def expect_folder(path: Path) -> None:
    """Raise BadInputError if something else is where a folder is to be."""
    if os.path.lexists(path) and not path.is_dir():
        raise BadInputError(f"{path} must be a folder, but is a file; move it away")


def from_json(path: Path) -> dict[str, Any]:
    """Read what `to_json` wrote.

    Raises:
        BadInputError: the file is damaged, not a regular file, or larger than any that `to_json` writes.
        OSError: it cannot be read.
    """
    about = path.stat()
    if stat.S_ISREG(about.st_mode) and about.st_size > LARGEST:
        raise BadInputError(f"{path} is damaged: it has {about.st_size:,} bytes, and may have {LARGEST:,}")
    try:
        value = json.loads(read_file(path).decode())
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise BadInputError(f"{path} is damaged: it holds no settings or results by name")
    return value


T = TypeVar("T")


def restored(like: T, value: Mapping[str, Any], name: str = "") -> T:
    """Build settings from what `dataclasses.asdict` and JSON made of some, of the same class as `like`.

    Raises:
        BadInputError: the fields are not those of this version's class, or a value is not of its field's type.
    """
    if not isinstance(value, Mapping):
        raise BadInputError(
            f"{name.rstrip('.') or 'the settings'} must be settings by name, got {shortened(repr(value))}"
        )
    parts = isinstance(like, Mapping)  # settings by name
    known: Any = like if parts else {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}  # type: ignore[arg-type]
    if known.keys() != value.keys():
        names = ", ".join(f"{name}{key}" for key in sorted(known.keys() ^ value.keys()))
        raise BadInputError(
            f"the settings were written by another version of ademamix: it differs in {shortened(names)}"
        )
    types: Any = {} if parts else get_type_hints(type(like), include_extras=True)
    for key, given in value.items():
        if not (is_settings(known[key]) or fits(given, types.get(key, Any))):
            raise BadInputError(f"{name}{key} is damaged: it must be {_name(types[key])}, got {shortened(repr(given))}")
    changes = {
        key: restored(known[key], given, f"{name}{key}.") if is_settings(known[key]) else _frozen(given)
        for key, given in value.items()
    }
    return changes if parts else dataclasses.replace(like, **changes)  # type: ignore


def fits(value: Any, kind: Any) -> bool:
    """Whether JSON made the value of one that has this type. Numbers are such that they can be computed with."""
    if type(value) is int and not -LARGEST_INT <= value < LARGEST_INT:
        return False
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, inside[0])
    if origin is Literal:
        return value in inside
    if origin in (tuple, list):
        return isinstance(value, list) and all(fits(entry, inside[0]) for entry in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(entry, inside[1]) for entry in value.values())
    if inside:
        return any(fits(value, one) for one in inside)
    if kind is float:
        return type(value) in (int, float)
    return kind is Any or type(value) is (str if kind is Path else kind)


def is_duration(value: Any) -> TypeGuard[float]:
    """Whether JSON made the value of a number of seconds."""
    return fits(value, float) and 0 <= value < math.inf


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind).replace("typing.", "")


def used(settings: Any) -> dict[str, Any]:
    """The settings that have an effect, for people, by name."""
    unused = getattr(settings, "unused", ())
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in unused}


def is_settings(value: Any) -> bool:
    """Whether a value is settings of their own, or several of them by name."""
    several = isinstance(value, Mapping) and all(map(dataclasses.is_dataclass, value.values()))
    return dataclasses.is_dataclass(value) or (several and len(value) > 0)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(given) for key, given in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
