"""The commands: `ademamix data`, `train`, `compare`, `plan`, `run` and `report`.

Torch is imported when a command has work to do, so that help and mistakes are answered at once.
"""

import argparse
import dataclasses
import inspect
import io
import itertools
import json
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ademamix import __version__
from ademamix.lab.signals import interrupted_by

if TYPE_CHECKING:  # at run time only once the packages of the [lab] extra are known to be there
    from ademamix.lab.config import Compare, Data, PlanFor, ReportOn, Train, Training
    from ademamix.lab.experiments.common import Settings
    from ademamix.lab.reports.report import Report

CONFIG = "config.json"
NO_MEMORY = ("out of memory", "DefaultCPUAllocator")  # in torch's errors, on an accelerator and on a CPU
PROGRAM = "python -m ademamix" if Path(sys.argv[0]).name == "__main__.py" else "ademamix"
ABOUT = "AdEMAMix on your own machine: make token files, train small models, and compare optimizers with AdamW."
WHAT = {
    "data": "turn text into token files",
    "train": "train one model with any optimizer",
    "compare": "train with AdamW and with another optimizer, and show the difference",
    "plan": "estimate memory per GPU and the time of an optimizer step, without training",
    "run": "run one of the paper's experiments, or one beyond them, and write a report",
    "report": "write an index of reports, claim by claim",
}
EXAMPLES = {
    "": (
        "ademamix compare               # a few minutes on two cores, no download",
        "ademamix run                   # list the experiments",
        "ademamix train --help          # the settings of a command",
    ),
    "data": (
        "ademamix data my_texts/ --out my_tokens",
        "ademamix data corpus.jsonl --tokenizer tokenizer.json --out my_tokens",
        "ademamix data hf:NAME --max-tokens 10_000_000 --out my_tokens",
    ),
    "train": (
        "ademamix train --steps 200",
        "ademamix train --data my_tokens --preset 10m --out runs/mine",
        "ademamix train --resume runs/mine",
        "ademamix train --optimizer adana --settings lr=2e-3",
        "torchrun --nproc-per-node 8 -m ademamix train --shard --preset 330m --data my_tokens",
    ),
    "compare": (
        "ademamix compare",
        "ademamix compare --match       # also how many more tokens AdamW needs",
        "ademamix compare --optimizer my_file.py:my_rule",
    ),
    "plan": (
        "ademamix plan 1.3b --vocab-size 32000",
        "ademamix plan llama-70b/config.json --gpus 64 --sharding fsdp",
    ),
    "run": (
        "ademamix run lm --dry-run      # what it would train, and how long that takes",
        "ademamix run lm --out runs/lm",
        "ademamix run lm --resume runs/lm",
    ),
    "report": ("ademamix report runs",),
}


def main() -> None:
    """Run the command line; the exit code is 2 for bad input, 1 for a failed run, 128 + n after signal n."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    if sys.argv[1:] == ["--version"]:
        print(f"ademamix {__version__}")
        return
    # A process of torchrun may wait for the others where no exception can end it.
    stopped_by = nullcontext() if "RANK" in os.environ else interrupted_by(SIGTERM)
    try:
        from ademamix.lab.own_code import only_named_by

        with only_named_by(sys.argv[1:]), stopped_by:
            _run(sys.argv[1:])
    except KeyboardInterrupt as error:  # before a run began, or in a command that has nothing to resume
        _fail("stopped", 128 + getattr(error, "signum", SIGINT))
    except ModuleNotFoundError as error:
        if (error.name or "ademamix").partition(".")[0] == "ademamix":
            raise
        _fail(f'the command needs more packages ({error.name} is missing): pip install "ademamix[lab]"', 2)


def _run(argv: list[str]) -> None:
    from ademamix.lab.config import BadInputError, shortened
    from ademamix.lab.experiments import WHAT as EXPERIMENTS
    from ademamix.lab.own_code import UnnamedCodeError

    try:
        command, *words = _choose(argv, WHAT, "ademamix", ABOUT, EXAMPLES[""])
        if command == "run":
            about = f"{WHAT['run'].capitalize()}. Each has settings of its own: ademamix run EXPERIMENT --help."
            name, *words = _choose(words, EXPERIMENTS, "ademamix run", about, EXAMPLES["run"])
            command = f"run {name}"
        settings = _parsed(command, words)
        if os.environ.get("RANK") and command != "train":
            from ademamix.lab.training.processes import launched

            if launched() > 1:
                raise BadInputError("torchrun is for `ademamix train`; the other commands run in one process")
        carry_out: dict[str, Callable[[Any], None]] = {
            "data": _data,
            "train": _train,
            "compare": _compare,
            "plan": _plan,
            "report": _report,
        }
        carry_out.get(command, _experiment)(settings)
    except UnnamedCodeError as error:
        _fail(str(error), 2, f"if you trust it: {PROGRAM} {shlex.join(argv)} {_naming(command, error.name)}")
    except BadInputError as error:
        _fail(str(error), 2)
    except OSError as error:
        where = f"{shortened(error.filename)}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in NO_MEMORY):
            raise
        _fail(f"memory ran out ({shortened(error)}); a smaller --batch, or a larger --accumulate, needs less", 1)


def _choose(words: list[str], what: Mapping[str, str], program: str, about: str, examples: Sequence[str]) -> list[str]:
    """Return the words if the first is one of the names; without any, or for help, show the names and exit."""
    from ademamix.lab.config import BadInputError, shortened

    kind = "command" if program == "ademamix" else "experiment"
    if words and words[0] in what:
        return words
    if words and words[0] not in ("-h", "--help"):
        raise BadInputError(f"unknown {kind} {shortened(words[0])}; there are {', '.join(what)}")
    options = {"-h, --help": "show this help"} | ({"--version": "show the version"} if kind == "command" else {})
    column = 4 + max(map(len, (*what, *options)))
    print(f"usage: {program} {kind.upper()} [options]\n\n{_wrapped(about)}")
    for title, lines in ((f"{kind}s", what), ("options", options)):
        print(f"\n{title}:")
        for name, text in lines.items():
            print(_wrapped(f"  {name:<{column - 2}}{text}", indent=column))
    _show(examples)
    sys.exit()


def _show(examples: Sequence[str]) -> None:
    print("\nexamples:", *(f"  {line}" for line in examples), sep="\n")


def _wrapped(text: str, indent: int = 0) -> str:
    """The text in lines as wide as the terminal; no word, as a path or an option, is cut."""
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _parsed(command: str, words: list[str]) -> Any:
    """Return the settings of a command as they were typed."""
    import tyro

    from ademamix.lab.config import Data, PlanFor, ReportOn
    from ademamix.lab.experiments import EXPERIMENTS

    kinds: dict[str, Any] = {"data": Data, "plan": PlanFor, "report": ReportOn}
    given: dict[str, Any] = {}
    if command not in kinds:
        module = EXPERIMENTS[command.removeprefix("run ")] if command.startswith("run ") else None
        given["default"] = _default(command, module, words)
        kinds[command] = type(given["default"])
    paragraphs = (inspect.getdoc(kinds[command]) or "").split("\n\n")
    given["description"] = "\n\n".join(" ".join(lines.split()) for lines in paragraphs)
    help_asked = bool({"-h", "--help"} & set(words))
    page = io.StringIO()
    try:
        with redirect_stdout(page) if help_asked else nullcontext():
            return tyro.cli(kinds[command], prog=f"ademamix {command}", args=words, **given)
    except SystemExit as end:
        if help_asked and not end.code:
            print(*map(_wrapped, page.getvalue().splitlines()), sep="\n")  # tyro wraps tables only
            name = command.removeprefix("run ")
            _show(EXAMPLES.get(command) or [line.replace("lm", name) for line in EXAMPLES["run"]])
        raise


def _default(command: str, module: ModuleType | None, words: list[str]) -> "Train | Compare | Settings":
    """Return the settings that the typed ones are changes of: those of --preset, or those of the run to --resume."""
    from ademamix.lab.config import PRESETS, BadInputError, Compare, Train, shortened

    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "resume", "steps", "warmup"):
        scan.add_argument(f"--{name}", nargs="?")
    seen, _ = scan.parse_known_args(words)
    presets: Mapping[str, Any] = PRESETS if module is None else module.PRESETS
    preset = seen.preset or next(iter(presets))
    if preset not in presets:
        raise BadInputError(f"unknown preset {shortened(preset)}; there are {', '.join(presets)}")
    if seen.resume is not None:
        return _resumed(command, module, Path(seen.resume))
    settings: Train | Compare | Settings
    if module is None:
        kind = Train if command == "train" else Compare
        settings = kind(preset=preset, recipe=presets[preset])
    else:
        settings = presets[preset]
    return settings if seen.warmup else _for_steps(settings, seen.steps)


def _for_steps(settings: "Train | Compare | Settings", typed: str | None) -> "Train | Compare | Settings":
    """Return the settings for as many steps as were typed; the warmup takes the same part of them."""
    recipe = getattr(settings, "recipe", None)
    try:
        steps = int(typed or "")
    except ValueError:  # none, or what the parser will complain of
        return settings
    if recipe is None:
        return settings
    recipe = dataclasses.replace(recipe, steps=steps, warmup=max(0, recipe.warmup * steps // recipe.steps))
    changes: Any = {"recipe": recipe}
    return dataclasses.replace(settings, **changes)


def _resumed(command: str, module: ModuleType | None, out: Path) -> "Train | Compare | Settings":
    """Return the settings that a run was started with."""
    from ademamix.lab.config import BadInputError, Compare, Train, restored, shortened

    stored = _stored(out, command)
    stored = {key: value for key, value in stored.items() if key not in ("command", "typed")}
    try:
        ours: dict[str, Any] = {"train": Train(), "compare": Compare()}
        like: Train | Compare | Settings = ours[command] if module is None else module.PRESETS[stored["preset"]]
        like = dataclasses.replace(like, job=type(like.job)())  # type: ignore[arg-type]
        # What earlier versions did not have.
        stored["job"] = dataclasses.asdict(like.job) | stored["job"]
        if isinstance(like, Compare):
            match = dataclasses.asdict(like.match) | stored.get("match", {})
            stored = {"optimizer": like.optimizer, **stored, "match": match}
        settings = restored(like, stored)
        return dataclasses.replace(settings, job=dataclasses.replace(settings.job, resume=out))  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError) as error:
        why = f"is damaged, or of another version of ademamix ({shortened(error)})"
        raise BadInputError(f"{out / CONFIG} {why}") from error


def _stored(out: Path, command: str) -> dict[str, Any]:
    """Return what a run's folder says of its command and settings.

    Raises:
        BadInputError: it is not a run of this command, or damaged.
    """
    from ademamix.lab.config import BadInputError, from_json, shortened
    from ademamix.lab.files import refuse_strange

    refuse_strange(out)
    try:
        stored = from_json(out / CONFIG)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInputError(f"nothing to resume in {out}: it holds no {CONFIG}") from error
    for key, kind in {"command": str, "typed": list, "preset": str, "job": dict}.items():
        if not (isinstance(stored.get(key), kind) and all(isinstance(name, str) for name in stored[key])):
            raise BadInputError(f"{out / CONFIG} is damaged, or of another version of ademamix ({key!r})")
    if stored["command"] != command:
        raise BadInputError(f"{out} was made by `ademamix {shortened(stored['command'])}`, not by `ademamix {command}`")
    return stored


def _data(settings: "Data") -> None:
    from ademamix.lab.console import say
    from ademamix.lab.data.corpus import write_data

    meta = write_data(settings)
    for split in ("train", "valid"):
        say(f"{split}: {meta[split]['tokens']:,} tokens of {meta[split]['documents']:,} documents")
    say(f"next: {PROGRAM} train --data {shlex.quote(str(settings.out))}")


def _train(settings: "Train") -> None:
    from ademamix.lab.training.processes import PeerError

    try:
        _train_with_others(settings)
    except PeerError:
        sys.exit(2)  # another process says why


def _train_with_others(settings: "Train") -> None:
    from ademamix.lab.console import say
    from ademamix.lab.training.devices import pick_device
    from ademamix.lab.training.loop import check, train
    from ademamix.lab.training.optimizers import title
    from ademamix.lab.training.processes import joined

    with ExitStack() as held, joined(pick_device(settings.job.device)) as processes:
        settings = processes.everywhere(lambda: _pinned(settings))[0]
        processes.everywhere(lambda: check((settings.optimizer,), settings.recipe, settings.job.device))
        out, _ = processes.on_first(lambda: _claim("train", settings, held))
        if processes.first:
            say(f"Trains with {title(settings.optimizer)}; everything is written to {out}")
        with _stoppable("train", settings, out):
            result = train(settings.optimizer, settings.recipe, settings.job, out)
        if processes.first:
            seen = f"{result.seen:,} {settings.recipe.unit}"
            say(f"validation loss {result.valid_loss:.4f} after {seen} in {result.seconds:,.0f} s; see {out}")


def _compare(settings: "Compare") -> None:
    from ademamix.lab.config import BadInputError
    from ademamix.lab.console import say
    from ademamix.lab.experiments.arms import side_by_side
    from ademamix.lab.experiments.compare import compare, report_of
    from ademamix.lab.training.loop import check
    from ademamix.lab.training.optimizers import title

    settings = _pinned(settings)
    recipe, optimizer = settings.recipe, settings.optimizer
    if optimizer == "adamw":
        raise BadInputError("optimizer must be another one than AdamW, which it is compared with")
    check(("adamw", optimizer), recipe, settings.job.device)
    text = "the Python standard library's own sources" if recipe.data == "stdlib" else recipe.data
    with ExitStack() as held:
        out, typed = _claim("compare", settings, held)
        order = "at the same time with {} and" if side_by_side(settings.job.device) else "first with {}, then"
        say(
            f"Trains one small language model twice on {text}, {order.format('AdamW')} with {title(optimizer)}: the "
            f"same initial weights, the same {recipe.steps:,} batches. Then it draws both and writes a report to {out}."
        )
        with _stoppable("compare", settings, out):
            _finish(out, typed, lambda: report_of(compare(optimizer, recipe, settings.job, settings.match, out)))


def _plan(settings: "PlanFor") -> None:
    from ademamix.lab.plan import plan

    plan(settings)


def _experiment(settings: "Settings") -> None:
    from ademamix.lab.console import say
    from ademamix.lab.experiments import EXPERIMENTS, WHAT
    from ademamix.lab.experiments.rehearsal import rehearsed
    from ademamix.lab.experiments.trials import Trials
    from ademamix.lab.reports.report import sentence, show
    from ademamix.lab.training.devices import pick_device
    from ademamix.lab.training.loop import check

    name = type(settings).__module__.rpartition(".")[2]
    pick_device(settings.job.device)
    recipe = getattr(settings, "recipe", None)
    if recipe is not None:
        _refuse_unused(recipe, "ademamix")
        check(("adamw", "ademamix"), recipe, settings.job.device)
    job, per_gpu = settings.job, 1 if settings.preset == "paper" else 4
    if job.dry_run:
        _place(f"run {name}", settings)
        if recipe is None:
            say(f"{name} has no runs: it trains no model")
        else:
            show(rehearsed(EXPERIMENTS[name].run, settings, per_gpu))
        return
    with ExitStack() as held:
        out, typed = _claim(f"run {name}", settings, held)
        say(f"{sentence(WHAT[name])}; everything is written to {out}")
        with _stoppable(f"run {name}", settings, out), Trials(out, job.device, job.workers, per_gpu) as trials:
            _finish(out, typed, lambda: EXPERIMENTS[name].run(settings, trials))


def _finish(out: Path, typed: list[str], make: "Callable[[], Report]") -> None:
    """Make a report, write it and show it; the time that went into it grows from call to call."""
    from ademamix.lab.config import BadInputError, from_json, is_duration, shortened, to_json
    from ademamix.lab.console import say
    from ademamix.lab.reports.report import PAGE, show, write

    clock = out / "seconds.json"
    before = from_json(clock).get("seconds") if clock.exists() else 0.0
    if not is_duration(before):
        raise BadInputError(f'{clock} is damaged: "seconds" must be a number from 0 on, got {shortened(repr(before))}')
    began = time.perf_counter()
    try:
        report = make()
    finally:
        seconds = before + time.perf_counter() - began
        if out.is_dir():
            to_json(clock, {"seconds": seconds})
    write(report, out, list(dict.fromkeys(typed)), seconds)
    show(report)
    say(f"report: {out / PAGE}")


def _report(settings: "ReportOn") -> None:
    from ademamix.lab.console import say
    from ademamix.lab.reports.report import write_index

    say(f"report: {write_index(settings.folder)}")


P = TypeVar("P", "Train", "Compare")


def _pinned(settings: P) -> P:
    """The settings with the optimizer named as it is recorded, so that it does not change when a run is resumed."""
    from ademamix.lab.training.optimizers import pinned

    name = pinned(settings.optimizer)
    _refuse_unused(settings.recipe, name)
    return dataclasses.replace(settings, optimizer=name)


def _refuse_unused(recipe: "Training", optimizer: str) -> None:
    """Raise BadInputError for settings that are not this optimizer's."""
    from ademamix.lab.config import BadInputError
    from ademamix.lab.training.optimizers import REST_LR, SECTIONS, of_geometry
    from ademamix.lab.values import typed

    others = {key: value for key, value in recipe.settings.items() if key not in of_geometry(recipe)}
    if recipe.settings.get("geometry") != "muon" and REST_LR in recipe.settings:
        others[REST_LR] = recipe.settings[REST_LR]
    if others and optimizer in SECTIONS:
        given = typed(others)
        raise BadInputError(f"AdamW and AdEMAMix have sections of their own: {given} is for other optimizers")
    if recipe.switch_at and optimizer != "ademamix":
        raise BadInputError(f"switch_at is for AdEMAMix, which takes over from AdamW: {optimizer} does not")


def _claim(command: str, settings: "Train | Compare | Settings", held: ExitStack) -> tuple[Path, list[str]]:
    """Return the folder to write to and all commands that wrote to it: a new folder, or the one to resume.

    No other process gets the folder before `held` is closed.
    """
    from ademamix.lab.config import to_json
    from ademamix.lab.files import alone_in, written_aside

    out, now, stored = _place(command, settings)
    typed = [f"{PROGRAM} {shlex.join(sys.argv[1:])}"]
    if stored is not None:
        held.enter_context(alone_in(out))
        typed = stored["typed"] + typed
        to_json(out / CONFIG, {"command": command, "typed": typed} | now)
        return out, typed
    try:
        with written_aside(out) as aside:
            to_json(aside / CONFIG, {"command": command, "typed": typed} | now)
    except OSError:
        if settings.job.out is not None or "RANK" in os.environ or not out.exists():
            raise
        return _claim(command, settings, held)  # another command took the name meanwhile
    held.enter_context(alone_in(out))
    return out, typed


def _place(command: str, settings: "Train | Compare | Settings") -> tuple[Path, dict[str, Any], dict[str, Any] | None]:
    """Return the folder to write to, what to keep there of the settings, and what it holds of them if it is resumed.

    Raises:
        BadInputError: it cannot be such a folder. Nothing was written.
    """
    from ademamix.lab.config import BadInputError, ImageRecipe
    from ademamix.lab.data.sources import local_path, refuse_inside
    from ademamix.lab.training.loop import differing, refuse_other
    from ademamix.lab.training.processes import agreed_name, restarted

    now = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    given, resume = settings.job.out, settings.job.resume
    now["job"] = {key: value for key, value in now["job"].items() if key not in ("out", "resume", "dry_run")}
    if resume is not None and given is not None:
        raise BadInputError("give --out for a new run or --resume for an old one, not both")
    name = f"{command.replace(' ', '-')}-{settings.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = next(name for name in names if not Path("runs", name).exists())
    out = resume or given or Path("runs") / agreed_name(free)
    started_before = restarted() or getattr(settings.job, "go_on", False)
    if resume is not None or (started_before and out.exists()):
        stored = _stored(out, command)
        refuse_other(out, differing(_settled(stored), _settled(now)))
        return out, now, stored
    if out.exists():
        raise BadInputError(f"{out} already exists; choose another --out, or --resume it if it is such a run")
    recipe = getattr(settings, "recipe", None)
    if isinstance(recipe, ImageRecipe):  # pictures of the run would be images of a class of their own
        refuse_inside(out, local_path(recipe.data))
    return out, now, None


def _settled(config: dict[str, Any]) -> dict[str, Any]:
    """Return what may not change when a run is resumed."""
    return {key: value for key, value in config.items() if key not in ("command", "typed", "job", "match")}


def _naming(command: str, name: str) -> str:
    """The words of a command that name the user's own code."""
    from ademamix.lab.own_code import split

    path, attribute, _ = split(name)
    return f"--{'own' if command.startswith('run') else 'optimizer'} {shlex.quote(f'{path}:{attribute}')}"


def _how_to_resume(command: str, settings: "Train | Compare | Settings", out: Path) -> str:
    from ademamix.lab.own_code import split

    name = str(getattr(settings, "own", None) or getattr(settings, "optimizer", ""))
    naming = [_naming(command, name)] if split(name)[0] else []
    return " ".join([f"resume with: {PROGRAM} {command} --resume {shlex.quote(str(out))}", *naming])


@contextmanager
def _stoppable(command: str, settings: "Train | Compare | Settings", out: Path) -> Iterator[None]:
    """Say how to resume when the run is stopped or cannot write, and what happened when it diverged; rank 0 says it."""
    from concurrent.futures.process import BrokenProcessPool

    from ademamix.lab.training.checkpoints import SaveError
    from ademamix.lab.training.loop import DivergedError, StoppedError

    how = None
    try:
        yield
    except (StoppedError, KeyboardInterrupt) as error:
        line, code = str(error) or "stopped", 128 + getattr(error, "signum", SIGINT)
    except DivergedError as error:
        line, code, how = f"{error}; a smaller learning rate may help", 1, ""
    except (SaveError, OSError) as error:
        line, code = str(error), 1
    except BrokenProcessPool:
        line, code = "a process that trains was killed, perhaps because memory ran out", 1
    else:
        return
    if os.environ.get("RANK", "0") != "0":
        sys.exit(code)
    if how is None and not (out / CONFIG).is_file():
        line, how = f"{line}; {out} has nothing left to resume", ""
    _fail(line, code, _how_to_resume(command, settings, out) if how is None else how)


def _fail(line: str, code: int, how: str = "") -> NoReturn:
    """Exit with a line that says why and, on a line of its own to be copied, a command that helps."""
    told = f"ademamix: {' '.join(line.split())}"
    print(_wrapped(told) if sys.stderr.isatty() else told, *filter(None, (how,)), sep="\n", file=sys.stderr)
    sys.exit(code)
