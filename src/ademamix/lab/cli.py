"""The commands `ademamix data`, `ademamix train` and `ademamix compare`."""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # at run time only once the packages of the [lab] extra are known to be there
    from ademamix.lab.config import Compare, Data, Train

CONFIG = "config.json"
PROGRAM = "python -m ademamix" if Path(sys.argv[0]).name == "__main__.py" else "ademamix"
ABOUT = """AdEMAMix on your own machine: make token files, train small language models, compare it with AdamW.

Start with `ademamix compare`: about four minutes on two cores, no download."""

WHAT = {
    "data": "turn text into token files",
    "train": "train one model with AdEMAMix or AdamW",
    "compare": "train with both and show the difference",
}


def main() -> None:
    """Run the command line; the exit code is 2 for bad input, 1 for a diverged run, 128 + n after signal n."""
    try:
        _run(sys.argv[1:])
    except ModuleNotFoundError as error:
        if (error.name or "ademamix").partition(".")[0] == "ademamix":
            raise
        _fail(f'the lab needs more packages ({error.name} is missing): pip install "ademamix[lab]"', 2)


def _run(argv: list[str]) -> None:
    import tyro

    from ademamix.lab.config import BadInputError, Compare, Data, Train

    try:
        train, compare = _defaults(argv)
        defaults = {"data": Data((), Path()), "train": train, "compare": compare}
        commands: Any = tyro.extras.subcommand_type_from_defaults(defaults, WHAT)
        chosen: Data | Train | Compare = tyro.cli(commands, prog="ademamix", description=ABOUT, args=argv)
        if isinstance(chosen, Data):
            _data(chosen)
        elif isinstance(chosen, Train):
            _train(chosen)
        else:
            _compare(chosen)
    except BadInputError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)


def _defaults(argv: list[str]) -> "tuple[Train, Compare]":
    """Return the settings that the others are changes of: those of --preset, or those of the run to --resume."""
    from ademamix.lab.config import PRESETS, BadInputError, Compare, Job, Match, Train, recipe_from

    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--preset", nargs="?", default="demo")
    scan.add_argument("--resume", nargs="?", type=Path)
    seen, _ = scan.parse_known_args(argv)
    if seen.resume is not None:
        stored = _stored(seen.resume)
        recipe, job = recipe_from(stored["recipe"]), Job(resume=seen.resume, **stored["job"])
        optimizer, match = stored.get("optimizer", "ademamix"), Match(**stored.get("match", {}))
        return Train(optimizer, recipe, job), Compare(recipe, job, match)
    if seen.preset not in PRESETS:
        raise BadInputError(f"unknown preset {seen.preset}; there are {', '.join(PRESETS)}")
    return Train(recipe=PRESETS[seen.preset]), Compare(recipe=PRESETS[seen.preset])


def _stored(out: Path) -> dict[str, Any]:
    from ademamix.lab.config import BadInputError

    try:
        stored: dict[str, Any] = json.loads((out / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInputError(f"nothing to resume in {out}: it holds no {CONFIG}") from error
    except ValueError as error:
        raise BadInputError(f"{out / CONFIG} is damaged ({error})") from error
    return stored


def _data(settings: "Data") -> None:
    from ademamix.lab.console import say
    from ademamix.lab.corpus import write_data

    meta = write_data(settings)
    for split in ("train", "valid"):
        say(f"{split}: {meta[split]['tokens']:,} tokens of {meta[split]['documents']:,} documents")
    say(f"go on with: {PROGRAM} train --data {shlex.quote(str(settings.out))}")


def _train(settings: "Train") -> None:
    from ademamix.lab.console import say
    from ademamix.lab.train import check, train

    check((settings.optimizer,), settings.recipe, settings.job)
    out, _ = _claim("train", settings)
    say(f"Trains with {settings.optimizer}; everything is written to {out}")
    with _stoppable("train", out):
        result = train(settings.optimizer, settings.recipe, settings.job, out)
    say(f"validation loss {result.valid_loss:.4f} after {result.tokens:,} tokens in {result.seconds:,.0f} s; see {out}")


def _compare(settings: "Compare") -> None:
    from ademamix.lab.compare import compare
    from ademamix.lab.console import say
    from ademamix.lab.report import print_tables, write_page, write_png
    from ademamix.lab.train import check

    recipe = settings.recipe
    check(("adamw", "ademamix"), recipe, settings.job)
    out, typed = _claim("compare", settings)
    text = "the Python standard library's own sources" if recipe.data == "stdlib" else recipe.data
    say(
        f"Trains one small language model twice on {text}, first with AdamW, then with AdEMAMix: the same "
        f"initial weights, the same {recipe.steps:,} batches. Then it draws both and writes a report to {out}."
    )
    with _stoppable("compare", out):
        comparison = compare(recipe, settings.job, settings.match, out, typed)
        write_png(comparison, out / "curves.png")
        write_page(comparison, out / "report.html")
    print_tables(comparison)
    say(f"report: {out / 'report.html'}")


def _claim(command: str, settings: "Train | Compare") -> tuple[Path, list[str]]:
    """Return the folder to write to and all commands that wrote to it: a new folder, or the one to resume."""
    from ademamix.lab.config import BadInputError, to_json
    from ademamix.lab.train import differing, refuse_other

    now = dataclasses.asdict(settings)
    out, resume = now["job"].pop("out"), now["job"].pop("resume")
    if resume is None:
        out = out or Path("runs") / f"{command}-{settings.recipe.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        if out.exists():
            raise BadInputError(f"{out} already exists; choose another --out, or --resume it if it is such a run")
        out.mkdir(parents=True)
        earlier = []
    else:
        if out is not None:
            raise BadInputError("give --out for a new run or --resume for an old one, not both")
        out, stored = resume, _stored(resume)
        if stored["command"] != command:
            raise BadInputError(f"{out} was made by `ademamix {stored['command']}`, not by `ademamix {command}`")
        refuse_other(out, differing(_settled(stored), _settled(now)))
        earlier = stored["typed"]
    typed = [*earlier, f"{PROGRAM} {shlex.join(sys.argv[1:])}"]
    to_json(out / CONFIG, {"command": command, "typed": typed} | now)
    return out, typed


def _settled(config: dict[str, Any]) -> dict[str, Any]:
    """Return what may not change when a run is resumed."""
    return {**config["recipe"], "optimizer": config.get("optimizer")}


@contextmanager
def _stoppable(command: str, out: Path) -> Iterator[None]:
    """Say how to go on when the run is stopped, and what happened when it diverged."""
    from ademamix.lab.train import DivergedError, StoppedError

    try:
        yield
    except (StoppedError, KeyboardInterrupt) as error:
        how = f"go on with: {PROGRAM} {command} --resume {shlex.quote(str(out))}"
        _fail(f"{str(error) or 'stopped'}; {how}", 128 + getattr(error, "signum", SIGINT))
    except DivergedError as error:
        _fail(f"{error}; a smaller learning rate may help", 1)


def _fail(line: str, code: int) -> NoReturn:
    print(f"ademamix: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)
