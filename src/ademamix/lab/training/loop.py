"""The one training loop: data, model and optimizer in, metrics and checkpoints out, exact to the bit across stops."""

import dataclasses
import json
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ademamix import RuleOptimizer
from ademamix.backends import sent_to
from ademamix.convert import from_adamw
from ademamix.lab.config import (
    BadInputError,
    Job,
    Optimizer,
    Training,
    expect_folder,
    fits,
    from_json,
    is_duration,
    read_file,
    shortened,
    to_json,
    write_whole,
)
from ademamix.lab.console import Show, say
from ademamix.lab.training.devices import Stopwatch, device_name, pick_device
from ademamix.lab.training.model import checksum
from ademamix.lab.training.optimizers import arguments_of, optimizer_of, pinned, title
from ademamix.lab.training.processes import Processes, backward_of, launched, put_away, spread
from ademamix.lab.training.schedule import lr_factor
from ademamix.lab.training.tasks import Batch, task_of

METRICS, RESULT, BOARD = "metrics.jsonl", "result.json", "tensorboard"
HELD_OUT = "held_out_loss/"  # names the metric of a held-out batch, before its number
PATIENCE = 100  # steps: a few bad gradients are skipped, but a loss that stays bad has diverged


class StoppedError(Exception):
    """A signal asked the run to stop; it was saved first."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(step, signum)  # as it must be to come out of a worker process
        self.step, self.signum = step, signum

    def __str__(self) -> str:
        return f"stopped and saved at step {self.step:,}"


class DivergedError(Exception):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    optimizer: Optimizer
    steps: int
    seen: int  # tokens, images: the recipe's unit
    seconds: float  # in training steps; evaluation, logging and saving are not counted
    valid_loss: float
    optimizer_ms: float  # median milliseconds of optimizer.step()
    state_bytes_per_parameter: float
    skipped_steps: int  # their gradients were not finite
    clipped_share: float  # of all steps: the gradient's norm was above `clip`
    parameters: int
    initial_weights: str  # checksum
    device: str
    curve: list[dict[str, float]]  # step, what was seen, seconds, valid_loss of every evaluation
    held_out: list[dict[int, float]]  # of each held-out batch its loss, by the step after which it was taken
    step_ms: float = 0.0  # median milliseconds of a whole step: forward, backward, optimizer
    core_share: float | None = None  # mean share of the steps' time in which the run had a core; None: not on a CPU

    @staticmethod
    def read(out: Path) -> "Result":
        """The result of the run in the folder `out`.

        Raises:
            BadInputError: its file is damaged, or of another version.
        """
        stored = from_json(out / RESULT)
        try:
            wrong = [name for name, kind in get_type_hints(Result).items() if not fits(stored[name], kind)]
            if wrong:
                raise TypeError(f"{wrong[0]} is {shortened(repr(stored[wrong[0]]))}")
            held_out = [{int(step): loss for step, loss in losses.items()} for losses in stored["held_out"]]
            return Result(**{**stored, "held_out": held_out})
        except (KeyError, TypeError, ValueError) as error:
            why = f"damaged, or of another version of ademamix ({shortened(error)})"
            raise BadInputError(f"{out / RESULT} is {why}") from error


def check(names: Sequence[Optimizer], recipe: Training, device: str) -> None:
    """Raise BadInputError for whatever would end such runs at once, before anything is written."""
    pick_device(device)
    task_of(recipe)
    for name in (*names, *(["adamw"] if recipe.switch_at else [])):
        arguments_of(name, recipe)
    _check_parts(recipe, Processes())


def _check_parts(recipe: Training, processes: Processes) -> None:
    """Raise BadInputError if the processes, or the parts of a batch, would not all get as many examples."""
    if recipe.batch % (recipe.accumulate * processes.size):
        got = f"{recipe.accumulate} x {processes.size} with a batch of {recipe.batch}"
        raise BadInputError(f"accumulate x processes must divide batch, got {got}")


def train(
    name: Optimizer, recipe: Training, job: Job, out: Path, *, label: str | None = None, quiet: bool = False
) -> Result:
    """Train in the folder `out`: start there, resume from its checkpoint, or return the result that it already holds.

    Args:
        name: the optimizer.
        recipe: what to train; a checkpoint in `out` must come from the same one.
        job: how; its `out` and `resume` are not looked at.
        out: the run's own folder, made if need be.
        label: the name to show, by default the optimizer's.
        quiet: show nothing.

    Raises:
        BadInputError: data or settings cannot be used.
        StoppedError: SIGINT or SIGTERM came; a checkpoint was written.
        DivergedError: the loss is not finite.
        SaveError: a checkpoint could not be written.
    """
    processes = Processes()
    expect_folder(out)
    done = processes.on_first(lambda: Result.read(out) if (out / RESULT).exists() else None)
    if done:
        return done
    with (
        closing(_Run(name, recipe, job, out, processes)) as run,
        _stop_on_signals() as came,
        Show(label or title(name), recipe, run.step, quiet=quiet or not processes.first) as show,
    ):
        if run.step and processes.first and not quiet:
            say(f"{label or title(name)} resumes from step {run.step:,}")
        for step in range(run.step + 1, recipe.steps + 1):
            loss = run.advance()
            last = step == recipe.steps
            stop = processes.largest(came[0] if came else 0)
            if step % job.log_every == 0 or last:
                run.log(loss)
                show.update(step, loss.item())
            if step % recipe.eval_every == 0 or last:
                show.update(step, loss.item(), run.evaluate(loss))
            if recipe.held_out:
                run.follow(loss)
            if step % job.save_every == 0 or last or stop:
                run.save(loss)
            if stop and not last:
                run.checkpoints.wait()
                raise StoppedError(step, stop)
        run.checkpoints.wait()
        return processes.on_first(run.finish)


class _Run:
    """The state of a run between two steps, on disk and in memory."""

    def __init__(self, name: Optimizer, recipe: Training, job: Job, out: Path, processes: Processes) -> None:
        self.name, self.recipe, self.out, self.processes = pinned(name), recipe, out, processes
        self.device = pick_device(job.device)
        _check_parts(recipe, processes)
        self.task = task_of(recipe)
        if len(set(processes.everywhere(lambda: self.task.sha256))) > 1:
            raise BadInputError("the processes have different data")
        self.part = processes.part(recipe.batch)
        self.valid, self.valid_size = self._valid_share()
        self.held_out = [self.task.held_out(number, self.part) for number in range(len(recipe.held_out))]
        self.model = self.task.model()
        self.initial_weights = checksum(self.model)
        self.model.to(self.device, getattr(torch, recipe.dtype))
        self.spread = spread(self.model, processes, self.device, shard=job.shard)
        self.step, self.seconds = 0, 0.0
        self.switch_at = recipe.switch_at if self.name == "ademamix" else 0
        self.optimizer = self._optimizer_of(1)
        self.skipped_before = 0  # the run was resumed, or another optimizer took over
        self.clipped = torch.zeros((), dtype=torch.int64, device=self.device)  # steps
        self.sound = 0  # the last step whose loss was seen to be finite
        self.stopwatch, self.whole_steps = Stopwatch(self.device), Stopwatch(self.device)
        out.mkdir(parents=True, exist_ok=True)
        from ademamix.lab.training.checkpoints import Checkpoints  # nearly a second of import time

        self.checkpoints = Checkpoints(out, job.keep, processes)
        saved = self.checkpoints.newest()
        if saved is not None:
            self._load(*saved)
        if self.spread is not self.model:
            self._order_sums()
        if processes.first:
            self._open_metrics()
        self.began = time.perf_counter()

    def _valid_share(self) -> tuple[list[tuple[Batch, int]], int]:
        """The validation batches of this process, as many as every other's, and what each counts; what all count."""
        size = self.processes.size
        batches = self.task.valid_batches(max(1, self.recipe.batch // self.recipe.accumulate // size))
        counted = [(batch, len(batch[0])) for batch in batches]
        filled = counted + [(batches[0], 0)] * (-len(batches) % size)
        return filled[self.processes.rank :: size], sum(count for _, count in counted)

    def _order_sums(self) -> None:
        """Take a backward pass for nothing: DDP orders its buckets after the first, and sums are rounded by that order.

        So a resumed run sums in the same order as one that was never stopped.
        """
        batch, _ = self.valid[0]
        torch.autograd.backward(self._loss(batch))
        self.optimizer.zero_grad()

    def _open_metrics(self) -> None:
        kept = _keep_until(self.out / METRICS, self.step)
        looks = range(self.recipe.eval_every, self.step + 1, self.recipe.eval_every)
        if lost := [step for step in looks if step not in kept]:
            said = (
                f"{len(lost)} of {len(looks)} validation losses up to step {self.step:,}, the first of step {lost[0]:,}"
            )
            say(f"{self.out / METRICS} lacks {said}: the curve lacks these points")
        expect_folder(self.out / BOARD)
        self.metrics = (self.out / METRICS).open("a")
        from torch.utils.tensorboard import SummaryWriter  # a second of import time

        self.board = SummaryWriter(self.out / BOARD, purge_step=self.step + 1)

    def _optimizer_of(self, step: int) -> RuleOptimizer:
        """A new optimizer of the kind that takes this step."""
        optimizer = optimizer_of("adamw" if step <= self.switch_at else self.name, self.recipe, self.model)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def advance(self) -> Tensor:
        """Take one training step; return its loss over all processes, still on the device."""
        with self.whole_steps:
            return self._advance()

    def _advance(self) -> Tensor:
        recipe = self.recipe
        self.step += 1
        if self.switch_at and self.step == self.switch_at + 1:
            self.skipped_before = self.skipped_steps
            before, self.optimizer = self.optimizer, self._optimizer_of(self.step)
            self.optimizer.load_state_dict(from_adamw(before.state_dict(), self.optimizer))
        factor = lr_factor(self.step, recipe.steps, recipe.warmup, recipe.schedule, recipe.final_lr)
        self.lr = self.optimizer.defaults["lr"] * factor
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        if recipe.insert and self.step in recipe.held_out:
            batch = self.held_out[recipe.held_out.index(self.step)]
        else:
            batch = self.task.batch(self.step, self.part)
        if recipe.accumulate == 1:
            total = self._loss(batch)
            torch.autograd.backward(total)
        else:
            total = torch.zeros((), device=self.device)
            parts = list(zip(*(t.chunk(recipe.accumulate) for t in batch), strict=True))
            for part in parts:
                with backward_of(self.spread, last=part is parts[-1]):
                    loss = self._loss(part) / recipe.accumulate
                    torch.autograd.backward(loss)
                total += loss.detach()
        self.norm = self.optimizer.clip_grad_norm_(recipe.clip)
        self.clipped += (self.norm > recipe.clip) & (self.norm < math.inf)  # others are skipped
        with self.stopwatch:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return self.processes.mean(total.detach())

    def _loss(self, batch: Batch) -> Tensor:
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
            return self.task.loss(self.spread, tuple(sent_to(self.device, t) for t in batch))

    def log(self, loss: Tensor) -> None:
        """Write the step's metrics."""
        self._lap(loss)
        on_cpu = {"core_share": self.whole_steps.core_share()} if self.device.type == "cpu" else {}
        self._write(
            loss=loss.item(),
            lr=self.lr,
            grad_norm=self.norm.item(),
            skipped_steps=self.skipped_steps,
            optimizer_ms=self.stopwatch.median_ms(),
            step_ms=self.whole_steps.median_ms(),
            **on_cpu,
        )
        self.began = time.perf_counter()

    def evaluate(self, loss: Tensor) -> float:
        """Return and write the validation loss; `loss` is the step's own."""
        self._lap(loss)
        # Examples are alike, batches are not equally large: weight each by its size.
        counts = torch.tensor([count for _, count in self.valid], device=self.device)
        losses = self._losses([batch for batch, _ in self.valid]) * counts
        value = self.processes.total(losses.sum()).item() / self.valid_size
        if not math.isfinite(value):
            raise DivergedError(self._diverged("validation loss", value))
        self._write(valid_loss=value)
        self.began = time.perf_counter()
        return value

    def follow(self, loss: Tensor) -> None:
        """Write the losses of held-out batches: before and after their steps, then ever more seldom."""
        since = [(number, self.step - at) for number, at in enumerate(self.recipe.held_out)]
        due = [number for number, n in since if looked_at(n)]
        if due:
            self._lap(loss)
            losses = self.processes.mean(self._losses([self.held_out[number] for number in due]))
            self._write(**{f"{HELD_OUT}{number}": loss for number, loss in zip(due, losses.tolist(), strict=True)})
            self.began = time.perf_counter()

    def _losses(self, batches: list[Batch]) -> Tensor:
        """The losses of batches that are not trained on."""
        with torch.no_grad():
            losses = torch.stack([self._loss(batch) for batch in batches])
        put_away(self.spread)
        return losses

    def _lap(self, loss: Tensor) -> None:
        """Stop the clock, once the device has caught up; raise DivergedError if the loss stays not finite."""
        value = loss.item()  # waits for the forward pass ...
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # ... and this for the rest of the step
        self.seconds += time.perf_counter() - self.began
        if math.isfinite(value):
            self.sound = self.step
        elif self.step - self.sound >= PATIENCE:
            raise DivergedError(self._diverged("loss", value))

    def _diverged(self, what: str, value: float) -> str:
        return f"the {what} is {value} at step {self.step:,} with {self.name} at lr {self.lr:g}"

    @property
    def skipped_steps(self) -> int:
        return self.skipped_before + self.optimizer.skipped_steps

    def _write(self, **values: float) -> None:
        if not self.processes.first:
            return
        self._refuse_gone()
        where = {"step": self.step, self.recipe.unit: self.step * self.recipe.units_per_step, "seconds": self.seconds}
        self.metrics.write(json.dumps(where | values) + "\n")
        self.metrics.flush()
        for key, value in values.items():
            self.board.add_scalar(key, value, self.step)

    def _refuse_gone(self) -> None:
        """Raise an error if the run's folder is gone: a checkpoint would make it anew, without what else it held."""
        if not self.out.is_dir():
            raise FileNotFoundError(f"{self.out} was removed while the run was under way")

    def save(self, loss: Tensor) -> None:
        """Begin to write a checkpoint; what was logged before is on the disk by then."""
        self._lap(loss)
        if self.processes.first:
            self._refuse_gone()
            os.fsync(self.metrics.fileno())
        counts = {"step": self.step, "skipped_steps": self.skipped_steps, "clipped_steps": int(self.clipped)}
        about = {**self._identity(), **counts, "seconds": self.seconds}
        self.checkpoints.save(self.step, about, self.model, self.optimizer)
        self.began = time.perf_counter()

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that resumes from it, as JSON gives it back."""
        recipe = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        return {"optimizer": self.name, "recipe": recipe, "data": self.task.sha256}

    def _load(self, path: Path, about: dict[str, Any]) -> None:
        from ademamix.lab.training.checkpoints import MANIFEST, load

        own, about = self._identity(), {"clipped_steps": 0, **about}  # earlier versions did not count these
        kinds: dict[str, Any] = {"recipe": dict[str, Any], "optimizer": str, "seconds": float}
        kinds |= dict.fromkeys(("step", "skipped_steps", "clipped_steps"), int)
        wrong = [name for name, kind in kinds.items() if not fits(about.get(name), kind)]
        wrong += [] if is_duration(about.get("seconds")) else ["seconds"]
        if wrong:
            raise BadInputError(f"{path / MANIFEST} is damaged: {wrong[0]} is {shortened(repr(about.get(wrong[0])))}")
        differ = differing(about["recipe"], own["recipe"])
        differ += ["optimizer"] * (about["optimizer"] != own["optimizer"])
        differ += ["the data"] * (about.get("data") != own["data"])
        refuse_other(self.out, differ)
        self.step, self.seconds = about["step"], about["seconds"]
        self.optimizer = self._optimizer_of(self.step)
        load(path, self.model, self.optimizer)
        self.skipped_before, self.sound = about["skipped_steps"], about["step"]
        self.clipped.fill_(about["clipped_steps"])

    def close(self) -> None:
        self.checkpoints.close()
        if self.processes.first:
            self.metrics.close()
            if self.out.is_dir():
                self.board.close()

    def finish(self) -> Result:
        """Write and return what the run came to."""
        result = self.result()
        to_json(self.out / RESULT, dataclasses.asdict(result))
        return result

    def result(self) -> Result:
        lines = [json.loads(line) for line in (self.out / METRICS).read_text().splitlines()]
        parameters = sum(p.numel() for p in self.model.parameters())
        slots = (slot for state in self.optimizer.state.values() for slot in state.values() if isinstance(slot, Tensor))
        curve = [line for line in lines if "valid_loss" in line]
        times, whole, shares = (
            [line[key] for line in lines if key in line] for key in ("optimizer_ms", "step_ms", "core_share")
        )
        if not (curve and times and whole):
            raise BadInputError(f"{self.out / METRICS} is damaged: it has no validation loss, optimizer_ms or step_ms")
        return Result(
            optimizer=self.name,
            steps=self.step,
            seen=self.step * self.recipe.units_per_step,
            seconds=self.seconds,
            valid_loss=curve[-1]["valid_loss"],
            optimizer_ms=statistics.median(times),
            state_bytes_per_parameter=sum(slot.numel() * slot.element_size() for slot in slots) / parameters,
            skipped_steps=self.skipped_steps,
            clipped_share=self.clipped.item() / self.step,
            parameters=parameters,
            initial_weights=self.initial_weights,
            device=device_name(self.device),
            curve=curve,
            held_out=[
                {line["step"]: line[f"{HELD_OUT}{number}"] for line in lines if f"{HELD_OUT}{number}" in line}
                for number in range(len(self.recipe.held_out))
            ],
            step_ms=statistics.median(whole),
            core_share=statistics.fmean(shares) if shares else None,
        )


def looked_at(since: int) -> bool:
    """Whether the loss of a held-out batch is taken so many steps after its own: -1, 0, 1, 2, 3, 4, 6, 8, 11, 16 ..."""
    octave = max(0, since.bit_length() - 1)  # two looks per doubling
    return -1 <= since < 1 or since in (1 << octave, round(2 ** (octave + 0.5)))


def differing(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the names of the settings in which two recipes (as dictionaries) differ."""
    names: list[str] = []
    for key in a | b:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            names += differing(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key} ({shortened(left)} there, {shortened(right)} here)")
    return names


def refuse_other(out: Path, differ: list[str]) -> None:
    """Raise BadInputError if the run in `out` was started with other settings, naming them."""
    if differ:
        raise BadInputError(f"{out} is a run with other settings: {', '.join(differ)}")


def _keep_until(path: Path, step: int) -> set[int]:
    """Drop the metrics of steps that a killed run took after its last checkpoint; they will be taken again.

    Returns:
        The steps whose validation loss is kept.
    """
    if not path.exists():
        return set()
    whole = [line for line in read_file(path).splitlines(keepends=True) if line.endswith(b"\n")]
    values = [_metrics_of(path, number, line) for number, line in enumerate(whole, 1)]
    write_whole(path, b"".join(line for line, found in zip(whole, values, strict=True) if found["step"] <= step))
    return {int(found["step"]) for found in values if "valid_loss" in found and found["step"] <= step}


def _metrics_of(path: Path, number: int, line: bytes) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads(line)
        if fits(found, dict[str, float]) and fits(found.get("step"), int):
            return found
    except (ValueError, RecursionError):
        pass
    raise BadInputError(f"{path}, line {number} is damaged; the run can be resumed without that line")


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Yield a list that holds the signal once SIGINT or SIGTERM came; a second one ends the program at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread can catch signals
        return

    def note(signum: int, _: object) -> None:
        came.append(signum)
        if not launched():  # torchrun passes on what the machine's own program has sent already
            signal.signal(signum, before[signal.Signals(signum)])

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
