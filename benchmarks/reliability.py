"""What a training survives: `python benchmarks/reliability.py FOLDER [--out TABLE]`.

Faults are made on purpose - processes killed, bad gradients, damaged files, a full disk, pickles that run code - and
what came of each is compared with a run that met none. The tests carry out the same, smaller.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import ademamix
from ademamix import AdEMAMix
from ademamix.lab.config import BadInputError, Job, Recipe
from ademamix.lab.reports.report import machine
from ademamix.lab.training import checkpoints
from ademamix.lab.training.checkpoints import MANIFEST, PARTIAL, Checkpoints, SaveError
from ademamix.lab.training.loop import train
from ademamix.lab.training.processes import Processes

Figures = dict[str, Any]  # what was looked at, and what came of it

RECIPE = dataclasses.replace(Recipe(), steps=3000, warmup=50, eval_every=500, eval_sequences=32)


# ------------------------------------------------------------------------------------- what a run is


def metrics(run: Path) -> list[dict[str, float]]:
    """What a run logged, without the times."""
    times = ("seconds", "optimizer_ms", "step_ms", "core_share")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def losses(run: Path) -> list[float]:
    """Its loss curve: of training in every step."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def saved(run: Path) -> list[Path]:
    """Its checkpoints, oldest first."""
    return checkpoints.complete(run / checkpoints.FOLDER)


def same(a: Path, b: Path) -> bool:
    """Whether two runs have the same metrics and weights, to the last bit."""
    left, right = (checkpoints.weights(saved(run)[-1]) for run in (a, b))
    equal = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return equal and metrics(a) == metrics(b)


# ------------------------------------------------------------------------- processes that are killed


@dataclasses.dataclass(frozen=True)
class Start:
    """What a process is to train, and under which conditions."""

    recipe: Recipe
    job: Job
    out: Path
    limit: int | None = None  # the size in bytes that no file may exceed
    said: Path | None = None  # a file for the reason, if the run cannot write
    rank: int = 0
    size: int = 1

    def begin(self) -> Any:
        """The process, its imports done already."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["ademamix.lab.training.loop", "ademamix.backends.cpu", "transformers.models.llama.modeling_llama"]
        )
        process = context.Process(target=self._train)
        process.start()
        return process

    def _train(self) -> None:
        torch.set_num_threads(1)
        if self.limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        if self.size > 1:
            store = f"file://{_store(self.out)}"
            dist.init_process_group("gloo", init_method=store, rank=self.rank, world_size=self.size)
        try:
            train("ademamix", self.recipe, self.job, self.out, quiet=True)
        except (SaveError, OSError) as error:
            if self.said is None:
                raise
            self.said.write_text(str(error))


def carry_out(recipe: Recipe, job: Job, out: Path, processes: int = 1) -> None:
    """Train to the end, on one process or on several."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _store(out).unlink(missing_ok=True)
    running = [Start(recipe, job, out, rank=rank, size=processes).begin() for rank in range(processes)]
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise RuntimeError(f"the run in {out} has failed")


def _store(out: Path) -> Path:
    """Where the processes of a run find each other."""
    return out.with_name(f"{out.name}.store")


def until(condition: Callable[[], Any], alive: Callable[[], bool], seconds: float = 300.0) -> bool:
    """Wait until something is so; False if the process has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not alive():
            return False
        if time.monotonic() > deadline:
            raise TimeoutError("nothing came of it")
        time.sleep(0.001)
    return True


def writing(run: Path, since: float) -> bool:
    """Whether a checkpoint that was begun after a time is half written."""
    with contextlib.suppress(FileNotFoundError):  # it has got its name meanwhile
        return any(path.stat().st_mtime > since for path in (run / checkpoints.FOLDER).glob(f"*{PARTIAL}"))
    return False


def killed_at_random(folder: Path, recipe: Recipe, kills: int) -> Figures:
    """Kill a run again and again, every third time while it writes a checkpoint, and resume each time."""
    job, chance = Job(log_every=1, save_every=10), random.Random(0)
    whole, broken = folder / "whole", folder / "broken"
    carry_out(recipe, job, whole)
    killed = in_writing = 0
    while not (broken / "result.json").exists():
        began = time.time()
        process = Start(recipe, job, broken).begin()
        if killed < kills:
            if killed % 3 == 0:
                until(functools.partial(writing, broken, began), process.is_alive)
                time.sleep(chance.uniform(0.0, 0.05))
            else:
                time.sleep(chance.uniform(0.0, 2.5))  # it begins to train after about one
            process.kill()
            killed += 1
        process.join()
        in_writing += writing(broken, began)
    return {
        "kills (SIGKILL)": killed,
        "of them with a checkpoint half written": in_writing,
        "steps": recipe.steps,
        "loss curve and weights are those of an unbroken run, bit for bit": same(whole, broken),
    }


def torchrun(out: Path, *arguments: str, processes: int = 2, restarts: int = 0) -> "subprocess.Popen[str]":
    """A training on several processes, by the command line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "-m", "ademamix", "train", *arguments, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def as_arguments(recipe: Recipe, **job: Any) -> list[str]:
    """The command line that gives these settings."""
    numbers = ("batch", "accumulate", "steps", "warmup", "layers", "width", "context", "eval_every", "eval_sequences")
    values = {name: getattr(recipe, name) for name in ("data", "clip", *numbers)} | job
    return list(itertools.chain.from_iterable((f"--{k.replace('_', '-')}", str(v)) for k, v in values.items()))


def finish(process: "subprocess.Popen[str]") -> str:
    """What a command printed, once it has ended well."""
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(printed)
    return printed


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that a process has started (Linux)."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def rank_killed(folder: Path, recipe: Recipe, processes: int) -> Figures:
    """Kill one of several processes under torchrun, which starts all of them again."""
    job, whole, broken = Job(log_every=1, save_every=10), folder / "whole", folder / "broken"
    carry_out(recipe, job, whole, processes)
    settings = as_arguments(recipe, log_every=job.log_every, save_every=job.save_every)
    process = torchrun(broken, *settings, processes=processes, restarts=3)
    until(lambda: len(saved(broken)) > 1, lambda: process.poll() is None)
    os.kill(children(process)[1], signal.SIGKILL)
    finish(process)
    starts = len(json.loads((broken / "config.json").read_text())["typed"])
    return {
        "times that torchrun started the processes": starts,
        "loss curve and weights are those of an unbroken run on as many, bit for bit": same(whole, broken),
    }


# ------------------------------------------------------------------------------------ bad gradients


def bad_gradients(steps: int, state: str) -> Figures:
    """Steps whose gradients have a NaN or an infinity somewhere in one of twenty, against those without them."""

    def optimizer() -> AdEMAMix:
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 80), (7,))]
        return AdEMAMix(params, alpha_warmup=steps, beta3_warmup=steps, skip_nonfinite=True, state=state)

    def step(of: AdEMAMix, gradients: list[torch.Tensor]) -> None:
        for p, g in zip(of.param_groups[0]["params"], gradients, strict=True):
            p.grad = g.clone()
        of.step()

    with_bad, without = optimizer(), optimizer()
    chance, noise, bad = random.Random(0), torch.Generator().manual_seed(0), 0
    for _ in range(steps):
        gradients = [torch.randn(p.shape, generator=noise) for p in with_bad.param_groups[0]["params"]]
        if chance.random() < 0.05:
            bad += 1
            chance.choice(gradients).view(-1)[chance.randrange(7)] = chance.choice((torch.nan, torch.inf, -torch.inf))
        else:
            step(without, gradients)
        step(with_bad, gradients)
    tensors = [[p.detach(), *of.state[p].values()] for of in (with_bad, without) for p in of.param_groups[0]["params"]]
    left, right = (list(itertools.chain(*half)) for half in (tensors[:2], tensors[2:]))
    return {
        "steps": steps,
        "of them with a NaN or an infinity": bad,
        "counted as skipped": with_bad.skipped_steps,
        "parameters and state are finite": all(t.isfinite().all().item() for t in left),
        "and those of a run without the bad steps, bit for bit": all(map(torch.equal, left, right)),
    }


# ------------------------------------------------------------------------------------ damaged files


def cut(data: bytes) -> bytes:
    """The first half of a file."""
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """A file with one bit turned, in its middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def emptied(_: bytes) -> bytes:
    """Nothing."""
    return b""


DAMAGES = (cut, flipped, emptied)


def refusal(run: Path) -> str:
    """Why the newest checkpoint of a run is refused; nothing if it is not."""
    try:
        Checkpoints(run, 2, Processes()).newest()
    except BadInputError as error:
        return str(error)
    return ""


def damaged(folder: Path, recipe: Recipe) -> Figures:
    """Damage each file of a run's newest checkpoint in each way."""
    run, again = folder / "run", folder / "again"
    train("ademamix", recipe, Job(log_every=1, save_every=recipe.steps // 2), run, quiet=True)
    before, newest = saved(run)
    cases = named = offered = 0
    for file, damage in itertools.product(sorted(newest.iterdir()), DAMAGES):
        content = file.read_bytes()
        file.write_bytes(damage(content))
        why = refusal(run)
        file.write_bytes(content)
        cases += 1
        named += why.startswith(str(file))
        offered += f"{before} is whole: to resume from there, delete {newest}" in why
    shutil.copytree(run, again)
    (again / "result.json").unlink()
    shutil.rmtree(saved(again)[-1])
    train("ademamix", recipe, Job(log_every=1), again, quiet=True)
    return {
        "files, each cut, emptied, and with one bit turned": cases,
        "refused, and the file named": named,
        "and the checkpoint before it offered": offered,
        "from which the run ends as before, bit for bit": same(run, again),
    }


# ---------------------------------------------------------------------------------------- full disks


def full_disk(folder: Path, recipe: Recipe, disk: str) -> Figures:
    """Let the disk be full when a checkpoint is written, then make room and resume.

    Args:
        folder: for the runs.
        recipe: a run of some seconds.
        disk: "tmpfs", a small one (needs root), or "limit": a file may not grow beyond a size, and is cut there.
    """
    job, whole = Job(log_every=1, save_every=20), folder / "whole"
    carry_out(recipe, job, whole)
    size = sum(file.stat().st_size for file in saved(whole)[-1].iterdir())
    space = folder / "space"
    space.mkdir()
    broken, limit = space / "run", None
    with small_disk(space, int(2.5 * size)) if disk == "tmpfs" else contextlib.nullcontext():
        if disk == "limit":
            first = Start(recipe, job, broken).begin()
            until(lambda: saved(broken), first.is_alive)
            first.kill()
            first.join()
            limit = size // 2
        Start(recipe, job, broken, limit, folder / "said").begin().join()
        before = saved(broken)
        kept = len(before) > 0 and refusal(broken) == ""
        if disk == "tmpfs":
            subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(space)], check=True)
        carry_out(recipe, job, broken)
        return {
            "the run ended and said": (folder / "said").read_text().replace(str(folder), "FOLDER"),
            "the checkpoint before is whole": kept,
            "once there is room it ends as one that had room, bit for bit": same(whole, broken),
        }


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system in memory of so many bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def may_mount() -> bool:
    """Whether this process may mount a file system."""
    try:
        with tempfile.TemporaryDirectory() as place, small_disk(Path(place), 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# ------------------------------------------------------------------------------------ planted pickles


class Planted:
    """A pickle that makes a folder when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def planted_description(path: Path, marker: Path) -> None:
    """Put the pickle in place of a checkpoint's description."""
    (path / ".metadata").write_bytes(pickle.dumps(Planted(marker)))


def planted_entry(path: Path, marker: Path, name: str, entry: Any) -> None:
    """Put the pickle in place of something stored in a checkpoint, as a pickle file of torch.save."""
    file = next(path.glob("*.distcp"))
    offset = file.stat().st_size
    with open(file, "ab") as stream:
        torch.save(Planted(marker), stream)
    found = pickle.loads((path / ".metadata").read_bytes())
    found.state_dict_metadata[name] = entry or found.state_dict_metadata[name]
    old = next(index for index in found.storage_data if index.fqn == name)
    del found.storage_data[old]
    index = MetadataIndex(name) if isinstance(entry, BytesStorageMetadata) else old
    found.storage_data[index] = _StorageInfo(file.name, offset, file.stat().st_size - offset)
    (path / ".metadata").write_bytes(pickle.dumps(found))


A_SETTING, A_TENSOR = "optimizer.param_groups.0.lr", "model.model.norm.weight"
PLANTS: dict[str, Callable[[Path, Path], None]] = {
    "its description (.metadata)": planted_description,
    "a setting": lambda path, marker: planted_entry(path, marker, A_SETTING, None),
    "a tensor": lambda path, marker: planted_entry(path, marker, A_TENSOR, None),
    "a tensor, described as no tensor": lambda path, marker: planted_entry(
        path, marker, A_TENSOR, BytesStorageMetadata()
    ),
}


def sealed(path: Path) -> None:
    """Write the manifest anew, as somebody would who wants the changed files to be taken."""
    content = json.loads((path / MANIFEST).read_text())
    del content["sha256"]
    content["files"] = {name: checkpoints._size_and_sum(path / name) for name in content["files"]}
    (path / MANIFEST).write_text(json.dumps({"sha256": checkpoints._sum_of(content), **content}))


def planted(folder: Path, recipe: Recipe) -> Figures:
    """Plant a pickle that runs code in each place of a checkpoint where there is a pickle, and resume from there."""
    train("ademamix", recipe, Job(), folder / "run", quiet=True)
    ran = refused = 0
    for number, plant in enumerate(PLANTS.values()):
        run, marker = folder / f"{number}", folder / f"ran-{number}"
        shutil.copytree(folder / "run", run)
        (run / "result.json").unlink()
        plant(saved(run)[-1], marker)
        sealed(saved(run)[-1])
        try:
            train("ademamix", recipe, Job(), run, quiet=True)
        except BadInputError:
            refused += 1
        ran += marker.exists()
    return {"places": ", ".join(PLANTS), "refused": f"{refused} of {len(PLANTS)}", "code that ran": ran}


# -------------------------------------------------------------------------------- numbers of processes


def any_number(folder: Path, recipe: Recipe) -> Figures:
    """Train on one process, and on two with DDP and with FSDP2; on one also with the batch cut as it is for two.

    No step is clipped: two processes with FSDP2 add up the norm of the gradients in another order.
    """
    recipe = dataclasses.replace(recipe, clip=1e9)
    job = Job(log_every=1)
    one, cut_in_two, ddp, fsdp = (folder / name for name in ("one", "cut", "ddp", "fsdp"))
    carry_out(recipe, job, one)
    carry_out(dataclasses.replace(recipe, accumulate=2), job, cut_in_two)
    carry_out(recipe, job, ddp, 2)
    carry_out(recipe, dataclasses.replace(job, shard=True), fsdp, 2)
    away = [abs(a - b) / b for a, b in zip(losses(ddp), losses(one), strict=True)]
    weights = [checkpoints.weights(saved(run)[-1]) for run in (cut_in_two, ddp, fsdp)]
    return {
        "steps": recipe.steps,
        "loss curve, 2 processes (DDP) and 1 with the batch cut in two, bit for bit": losses(ddp) == losses(cut_in_two),
        "loss curve, 2 processes (--shard) and the same": losses(fsdp) == losses(cut_in_two),
        "weights at the end, all three": all(
            torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in weights[0]
        ),
        "2 processes and 1 with an uncut batch: the first loss is away by, relative": away[0],
        "any of the losses, at most: training amplifies the rounding of sums in another order": max(away),
    }


# ------------------------------------------------------------------------------------------- the report


def short(steps: int) -> Recipe:
    return dataclasses.replace(RECIPE, steps=steps)


def parts(folder: Path) -> Iterator[tuple[str, Figures]]:
    """Carry everything out."""
    yield "Killed at random", killed_at_random(folder / "killed", short(3000), 20)
    for number, batch in ((2, 4), (3, 6)):
        recipe = dataclasses.replace(short(1000), batch=batch)
        title = f"One of {number} processes killed under torchrun"
        yield title, rank_killed(folder / f"rank-{number}", recipe, number)
    for state in ("float32", "compact"):
        yield f"Bad gradients, {state} state", bad_gradients(10_000, state)
    yield "Damaged checkpoints", damaged(folder / "damaged", short(200))
    if may_mount():
        yield "A full disk (a small tmpfs)", full_disk(folder / "disk", short(200), "tmpfs")
    yield "A file that cannot grow (RLIMIT_FSIZE)", full_disk(folder / "limit", short(200), "limit")
    yield "Pickles that run code", planted(folder / "planted", short(60))
    yield "1 and 2 processes", any_number(folder / "number", short(100))


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.1e}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the runs; must not exist yet")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    lines = [
        "## What a training survives",
        "",
        "- command: `python benchmarks/reliability.py FOLDER`",
        f"- machine: {machine()}",
        f"- versions: ademamix {ademamix.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"- date: {time.strftime('%Y-%m-%d')}",
    ]
    print("\n".join(lines))
    for title, figures in parts(options.folder.resolve()):
        table = ["", f"### {title}", "", "| | |", "| --- | --- |"]
        table += [f"| {what} | {shown(value)} |" for what, value in figures.items()]
        print("\n".join(table), flush=True)
        lines += table
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
