"""The commands: `ademamix data`, `train`, `compare`, `plan`, `run` and `report`."""

import argparse
import dataclasses
import io
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

from ademamix.lab.signals import interrupted_by

if TYPE_CHECKING:  # at run time only once the packages of the [lab] extra are known to be there
    from ademamix.lab.config import Compare, Data, Job, PlanFor, ReportOn, Train, Training
    from ademamix.lab.experiments.common import Settings, Workplace
    from ademamix.lab.reports.report import Report

CONFIG = "config.json"
PROGRAM = "python -m ademamix" if Path(sys.argv[0]).name == "__main__.py" else "ademamix"
ABOUT = """AdEMAMix on your own machine: make token files, train small language models, compare optimizers with AdamW.

Start with `ademamix compare`: a few minutes on two cores, no download."""

WHAT = {
    "data": "turn text into token files",
    "train": "train one model with any optimizer",
    "compare": "train with AdamW and with another optimizer, and show the difference",
    "plan": "the memory that a training needs, a GPU, and the time of an optimizer step",
    "run": "one of the paper's experiments, or one beyond them, with a report of what came out",
    "report": "an index of reports, claim by claim",
}


def main() -> None:
    """Run the command line; the exit code is 2 for bad input, 1 for a failed run, 128 + n after signal n."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    # A process of torchrun may wait for the others where no exception can end it.
    stopped_by = nullcontext() if "RANK" in os.environ else interrupted_by(SIGTERM)
    try:
        from ademamix.lab.own_code import only_named_by

        with only_named_by(sys.argv[1:]), stopped_by:
            _run(sys.argv[1:])
    except KeyboardInterrupt as error:  # before a run began, or in a command that has nothing to go on with
        _fail("stopped", 128 + getattr(error, "signum", SIGINT))
    except ModuleNotFoundError as error:
        if (error.name or "ademamix").partition(".")[0] == "ademamix":
            raise
        _fail(f'the lab needs more packages ({error.name} is missing): pip install "ademamix[lab]"', 2)


def _run(argv: list[str]) -> None:
    import tyro

    from ademamix.lab.config import BadInputError, Compare, Data, PlanFor, ReportOn, Train, shortened
    from ademamix.lab.experiments import EXPERIMENTS
    from ademamix.lab.own_code import UnnamedCodeError
    from ademamix.lab.training.processes import PeerError, launched

    try:
        train, compare, experiments = _defaults(argv)
        about = {name: module.WHAT for name, module in EXPERIMENTS.items()}
        of_run: Any = tyro.extras.subcommand_type_from_defaults(experiments, about)
        run_kind: Any = dataclasses.make_dataclass("Run", [("experiment", Annotated[of_run, tyro.conf.arg(name="")])])
        run = run_kind(next(iter(experiments.values())))
        run_kind.__doc__ = "Carry out an experiment and write a report."
        defaults = {"data": Data((), Path()), "train": train, "compare": compare, "plan": PlanFor()}
        defaults |= {"run": run, "report": ReportOn(Path())}
        commands: Any = tyro.extras.subcommand_type_from_defaults(defaults, WHAT)
        chosen: Any = tyro.cli(commands, prog="ademamix", description=ABOUT, args=argv)
        carry_out: dict[type, Callable[[Any], None]] = {
            Data: _data,
            Train: _train,
            Compare: _compare,
            PlanFor: _plan,
            ReportOn: _report,
        }
        if launched() > 1 and not isinstance(chosen, Train):
            raise BadInputError("torchrun is for `ademamix train`; the other commands run in one process")
        if isinstance(chosen, run_kind):
            _experiment(chosen.experiment)
        else:
            carry_out[type(chosen)](chosen)
    except UnnamedCodeError as error:
        _fail(f"{error}: {PROGRAM} {shlex.join(argv)} {_naming(argv[0], error.name)}", 2)
    except BadInputError as error:
        _fail(str(error), 2)
    except PeerError:
        sys.exit(2)  # another process says why
    except OSError as error:
        _fail(f"{shortened(error.filename)}: {error.strerror}" if error.filename else str(error), 2)


def _defaults(argv: list[str]) -> "tuple[Train, Compare, dict[str, Settings]]":
    """Return the settings that the others are changes of: those of --preset, or those of the run to --resume."""
    from ademamix.lab.config import PRESETS, BadInputError, Compare, Job, Match, Recipe, Train, restored, shortened
    from ademamix.lab.experiments import EXPERIMENTS
    from ademamix.lab.experiments.common import Workplace

    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--preset", nargs="?")
    scan.add_argument("--resume", nargs="?", type=Path)
    seen, _ = scan.parse_known_args(argv)
    running = argv[:1] == ["run"]
    name = argv[1] if running and len(argv) > 1 else ""
    presets = EXPERIMENTS.get(name, next(iter(EXPERIMENTS.values()))).PRESETS if running else PRESETS
    preset = seen.preset or next(iter(presets))
    if preset not in presets:
        raise BadInputError(f"unknown preset {preset}; there are {', '.join(presets)}")
    recipe = Recipe() if running else PRESETS[preset]
    own = "demo" if running else preset
    train, compare = Train(preset=own, recipe=recipe), Compare(preset=own, recipe=recipe)
    experiments = {
        key: module.PRESETS.get(preset, next(iter(module.PRESETS.values()))) for key, module in EXPERIMENTS.items()
    }
    if seen.resume is not None:
        stored = _stored(seen.resume)
        try:
            command = stored.pop("command")
            stored.pop("typed")
            job = stored.pop("job")

            def of(workplace: W) -> W:
                kept = restored(workplace, dataclasses.asdict(workplace) | job)
                return dataclasses.replace(kept, resume=seen.resume)

            if command == f"run {name}":
                like = dataclasses.replace(EXPERIMENTS[name].PRESETS[stored["preset"]], job=Workplace())
                stored["job"] = dataclasses.asdict(like.job)
                experiments[name] = dataclasses.replace(restored(like, stored), job=of(Workplace()))
            elif command in ("train", "compare"):
                recipe = restored(Recipe(), stored["recipe"])
                optimizer, match = str(stored.get("optimizer", "ademamix")), stored.get("match", {})
                own = stored["preset"]
                train = Train(optimizer, own, recipe, of(Job()))
                compare = Compare(
                    optimizer, own, recipe, of(Job()), restored(Match(), dataclasses.asdict(Match()) | match)
                )
        except (KeyError, TypeError, AttributeError) as error:
            kept = seen.resume / CONFIG
            raise BadInputError(f"{kept} is damaged, or of another version of ademamix ({shortened(error)})") from error
    return train, compare, experiments


def _stored(out: Path) -> dict[str, Any]:
    from ademamix.lab.config import BadInputError, from_json
    from ademamix.lab.files import refuse_strange

    refuse_strange(out)
    try:
        stored = from_json(out / CONFIG)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInputError(f"nothing to resume in {out}: it holds no {CONFIG}") from error
    for key, kind in {"command": str, "typed": list, "preset": str, "job": dict}.items():
        if not (isinstance(stored.get(key), kind) and all(isinstance(name, str) for name in stored[key])):
            raise BadInputError(f"{out / CONFIG} is damaged, or of another version of ademamix ({key!r})")
    return stored


def _data(settings: "Data") -> None:
    from ademamix.lab.console import say
    from ademamix.lab.data.corpus import write_data

    meta = write_data(settings)
    for split in ("train", "valid"):
        say(f"{split}: {meta[split]['tokens']:,} tokens of {meta[split]['documents']:,} documents")
    say(f"go on with: {PROGRAM} train --data {shlex.quote(str(settings.out))}")


def _train(settings: "Train") -> None:
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
    from ademamix.lab.experiments import EXPERIMENTS
    from ademamix.lab.experiments.rehearsal import rehearsed
    from ademamix.lab.experiments.trials import Trials
    from ademamix.lab.reports.report import sentence, show
    from ademamix.lab.training.devices import pick_device
    from ademamix.lab.training.loop import check

    module = type(settings).__module__
    name = next(name for name, experiment in EXPERIMENTS.items() if experiment.__name__ == module)
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
        say(f"{sentence(EXPERIMENTS[name].WHAT)}; everything is written to {out}")
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
W = TypeVar("W", "Job", "Workplace")


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
    from ademamix.lab.config import BadInputError, ImageRecipe, shortened
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
        stored = _stored(out)
        if stored["command"] != command:
            raise BadInputError(
                f"{out} was made by `ademamix {shortened(stored['command'])}`, not by `ademamix {command}`"
            )
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


def _how_to_go_on(command: str, settings: "Train | Compare | Settings", out: Path) -> str:
    from ademamix.lab.own_code import split

    if not (out / CONFIG).is_file():
        return f"{out} has nothing left to go on with"
    again = f"{PROGRAM} {command} --resume {shlex.quote(str(out))}"
    name = str(getattr(settings, "own", None) or getattr(settings, "optimizer", ""))
    return f"go on with: {again} {_naming(command, name)}" if split(name)[0] else f"go on with: {again}"


@contextmanager
def _stoppable(command: str, settings: "Train | Compare | Settings", out: Path) -> Iterator[None]:
    """Say how to go on when the run is stopped or cannot write, and what happened when it diverged: once for all
    processes."""
    from concurrent.futures.process import BrokenProcessPool

    from ademamix.lab.training.checkpoints import SaveError
    from ademamix.lab.training.loop import DivergedError, StoppedError

    how = ""
    try:
        yield
    except (StoppedError, KeyboardInterrupt) as error:
        line, code = str(error) or "stopped", 128 + getattr(error, "signum", SIGINT)
    except DivergedError as error:
        line, code, how = str(error), 1, "a smaller learning rate may help"
    except (SaveError, OSError) as error:
        line, code = str(error), 1
    except BrokenProcessPool:
        line, code = "a process that trains was killed, perhaps because memory ran out", 1
    else:
        return
    if os.environ.get("RANK", "0") != "0":
        sys.exit(code)
    _fail(f"{line}; {how or _how_to_go_on(command, settings, out)}", code)


def _fail(line: str, code: int) -> NoReturn:
    print(f"ademamix: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)
