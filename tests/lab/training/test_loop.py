import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reliability import metrics

from ademamix import RuleOptimizer
from ademamix.lab.config import PRESETS, AdEMAMixSettings, Job, Recipe
from ademamix.lab.training import checkpoints
from ademamix.lab.training.devices import Stopwatch
from ademamix.lab.training.loop import DivergedError, _Run, looked_at, train
from ademamix.lab.training.model import checksum, language_model
from ademamix.lab.training.tasks import Batch, task_of


@pytest.fixture
def recipe(tokens) -> Recipe:
    small = {"layers": 1, "width": 16, "context": 16, "batch": 4, "steps": 20, "warmup": 2}
    return dataclasses.replace(Recipe(), data=str(tokens), eval_every=5, eval_sequences=8, **small)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.weights(newest(run))


def newest(run: Path) -> Path:
    return checkpoints.complete(run / "checkpoints")[-1]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ademamix", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Wait until a run has logged a step."""
    for _ in range(6000):
        log = run / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise TimeoutError(f"{run} did not reach step {step}")


@pytest.mark.first
@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "ademamix"])
def test_stopped_killed_and_resumed_is_the_unbroken_run_bit_for_bit(optimizer, tiny, tmp_path):
    longer = (*tiny, "--steps", "1500", "--eval-every", "100", "--save-every", "40", "--optimizer", optimizer)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    unbroken = start("train", *longer, "--out", str(whole))

    process = start("train", *longer, "--out", str(broken))
    wait_for_step(broken, 60, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert f"resume with: python -m ademamix train --resume {broken}" in errors
    assert "Traceback" not in errors
    stopped_at = int(newest(broken).name.removeprefix("step-"))
    assert 60 <= stopped_at < 1500

    process = start("train", "--resume", str(broken))
    wait_for_step(broken, stopped_at + 150, process)
    process.kill()
    process.communicate()
    assert not (broken / "result.json").exists()

    process = start("train", "--resume", str(broken), *longer)  # the same settings again
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    _, errors = unbroken.communicate()
    assert unbroken.returncode == 0, errors
    assert_same_run(broken, whole)


def test_sigterm_saves_too(tiny, tmp_path):
    process = start("train", *tiny, "--steps", "100000", "--save-every", "100000", "--out", str(tmp_path / "run"))
    wait_for_step(tmp_path / "run", 30, process)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped and saved at step" in errors
    assert newest(tmp_path / "run").is_dir()


def test_points_that_the_curve_has_lost_are_said(recipe, tmp_path, capsys, monkeypatch):
    advance = _Run.advance
    monkeypatch.setattr(_Run, "advance", lambda run: 1 / 0 if run.step == 17 else advance(run))
    with pytest.raises(ZeroDivisionError):
        train("adamw", recipe, Job(save_every=15), tmp_path)
    monkeypatch.undo()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    for name, kept, lacking in (("whole", lines, ""), ("empty", [], "3 of 3"), ("cut", lines[:-2], "2 of 3")):
        out = shutil.copytree(tmp_path, tmp_path.with_name(name))
        (out / "metrics.jsonl").write_text("".join(kept))
        capsys.readouterr()
        result = train("adamw", recipe, Job(), out, quiet=True)
        said = capsys.readouterr().out
        if lacking:
            first = 5 if name == "empty" else 10
            lost = f"{lacking} validation losses up to step 15, the first of step {first}"
            assert said == f"{out}/metrics.jsonl lacks {lost}: the curve lacks these points\n"
        else:
            assert said == ""
        assert len(result.curve) == 4 - int(lacking[:1] or 0)


def test_a_finished_run_is_not_done_again(recipe, tmp_path):
    first = train("ademamix", recipe, Job(), tmp_path)
    before = os.stat(newest(tmp_path)).st_mtime_ns
    assert train("ademamix", recipe, Job(), tmp_path) == first
    assert os.stat(newest(tmp_path)).st_mtime_ns == before


def test_training_learns_and_its_result_says_what_the_metrics_say(recipe, tmp_path):
    result = train("ademamix", dataclasses.replace(recipe, steps=200, eval_every=50), Job(log_every=7), tmp_path)
    assert [point["step"] for point in result.curve] == [50, 100, 150, 200]
    assert result.curve[-1]["valid_loss"] == result.valid_loss < result.curve[0]["valid_loss"] - 0.1
    assert result.seen == 200 * 4 * 16
    assert 12.0 <= result.state_bytes_per_parameter < 12.1
    assert 0 < result.optimizer_ms < 1000 * result.seconds
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [*range(7, 200, 7), 200]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_the_validation_loss_is_the_mean_over_all_validation_tokens(recipe, tmp_path):
    uneven = dataclasses.replace(recipe, eval_sequences=6)  # batches of 4 and 2
    result = train("adamw", uneven, Job(), tmp_path)
    task = task_of(uneven)
    model = task.model()
    model.load_state_dict(weights(tmp_path))
    (batch,) = task.valid_batches(6)
    assert task.loss(model, batch).item() == pytest.approx(result.valid_loss, rel=1e-6)


def test_accumulation_gives_the_batch_of_one_piece(recipe, tmp_path):
    first, *others = [
        train("adamw", dataclasses.replace(recipe, accumulate=parts), Job(), tmp_path / str(parts)).valid_loss
        for parts in (1, 2, 4)
    ]
    assert others == pytest.approx([first] * 2, rel=1e-5)
    losses = [[line["loss"] for line in metrics(tmp_path / parts) if "loss" in line] for parts in ("1", "4")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_seed_decides_weights_and_the_optimizer_does_not(recipe, tmp_path):
    runs = [train(name, recipe, Job(), tmp_path / name) for name in ("adamw", "ademamix")]
    other = train("adamw", dataclasses.replace(recipe, seed=1), Job(), tmp_path / "other")
    assert runs[0].initial_weights == runs[1].initial_weights != other.initial_weights
    assert runs[0].initial_weights == checksum(language_model(recipe, 256))


def test_the_gradient_is_clipped(recipe, tmp_path):
    """AdamW hardly sees the gradient's length; its first step with eps far above it does."""
    big = dataclasses.replace(recipe.adamw, eps=1e6, lr=1e6, weight_decay=0.0)
    steps = {}
    for clip in (1e-3, 1e-4):
        settings = dataclasses.replace(recipe, adamw=big, clip=clip, steps=1, warmup=0, schedule="wsd", final_lr=1.0)
        train("adamw", settings, Job(), tmp_path / str(clip))
        name, new = next(iter(weights(tmp_path / str(clip)).items()))
        steps[clip] = (new - language_model(recipe, 256).state_dict()[name]).norm().item()
    assert steps[1e-3] == pytest.approx(10 * steps[1e-4], rel=1e-2)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(recipe, tmp_path):
    wild = dataclasses.replace(recipe, warmup=1, ademamix=AdEMAMixSettings(lr=3.402e38))  # float32 ends there
    with pytest.raises(DivergedError, match=r"the validation loss is (nan|inf) at step \d+ with ademamix at lr"):
        train("ademamix", wild, Job(log_every=1, save_every=1), tmp_path)
    assert newest(tmp_path).is_dir()  # of the first step, before the loss was seen
    assert not (tmp_path / "result.json").exists()


def test_the_presets_have_the_sizes_they_are_named_after():
    sizes = {"3m": 3e6, "10m": 10e6, "30m": 30e6, "110m": 110e6, "330m": 330e6, "1.3b": 1.3e9, "demo": 0.117e6}
    assert sizes.keys() == PRESETS.keys()
    for name, size in sizes.items():
        with torch.device("meta"):
            model = language_model(PRESETS[name], 256 if size < 1e8 else 32_000)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(size, rel=0.2)


def test_bad_gradients_are_skipped_counted_and_survived(recipe, tmp_path, monkeypatch):
    """Two steps have a NaN in their gradients: the run continues, says so, and says so after being resumed."""
    sound, poisoned = _Run._loss, []

    def poison(run: _Run, batch: Batch) -> torch.Tensor:
        bad = torch.is_grad_enabled() and run.step in (2, 9)
        poisoned.extend([run.step] * bad)
        return sound(run, batch) * (math.nan if bad else 1.0)

    monkeypatch.setattr(_Run, "_loss", poison)
    whole = train("ademamix", recipe, Job(log_every=1), tmp_path / "whole")
    assert set(poisoned) == {2, 9}
    assert whole.skipped_steps == 2
    assert math.isfinite(whole.valid_loss)
    assert [line["skipped_steps"] for line in metrics(tmp_path / "whole") if "loss" in line][7:10] == [1, 2, 2]
    monkeypatch.setattr(_Run, "evaluate", lambda run, loss: 1 / 0 if run.step == 10 else 0.0)
    with pytest.raises(ZeroDivisionError):
        train("ademamix", recipe, Job(save_every=8), tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(_Run, "_loss", poison)
    resumed = train("ademamix", recipe, Job(), tmp_path / "cut")
    assert (resumed.skipped_steps, resumed.valid_loss) == (2, whole.valid_loss)


@pytest.mark.parametrize(
    ("state", "dtype", "least", "most"), [("compact", "float32", 4.0, 13.0), ("bfloat16", "bfloat16", 6.0, 9.0)]
)
def test_low_precision_runs_learn(recipe, tmp_path, state, dtype, least, most):
    low = dataclasses.replace(recipe, dtype=dtype, ademamix=dataclasses.replace(recipe.ademamix, state=state))
    result = train("ademamix", low, Job(), tmp_path)
    assert least < result.state_bytes_per_parameter < most
    assert {t.dtype for t in weights(tmp_path).values()} == {getattr(torch, dtype)}
    assert result.valid_loss == pytest.approx(train("ademamix", recipe, Job(), tmp_path / "f32").valid_loss, rel=0.01)


def test_the_clock_stops_when_the_device_of_the_run_has_caught_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of `ademamix run` is on cuda:1, say, while its process has cuda:0 as the current device."""
    waited: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    device = torch.device("cuda:1")
    run = SimpleNamespace(device=device, seconds=0.0, began=0.0, step=3, sound=2)
    _Run._lap(run, torch.tensor(1.0))  # type: ignore[arg-type]
    assert waited == [device]
    assert run.seconds > 0.0
    assert run.sound == 3


def test_the_stopwatch_asks_the_stream_of_the_run_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: f"the stream of {device}")
    monkeypatch.setattr(
        torch, "Event", lambda *_, **__: SimpleNamespace(record=lambda stream=None: recorded.append(stream))
    )
    with Stopwatch(torch.device("cuda:1")):
        pass
    assert recorded == ["the stream of cuda:1"] * 2


def test_time_spent_waiting_is_time_without_a_core():
    watch = Stopwatch(torch.device("cpu"))
    with watch:
        time.sleep(0.1)
    assert watch.core_share() < 0.5
    watch.median_ms()
    with watch:
        began = time.thread_time()
        while time.thread_time() < began + 0.05:
            pass
    assert 49.9 <= watch.core_share() * watch.median_ms() < 100


# --------------------------------------------------------------------------------- clipping, and held-out batches


def norms_by_torch(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Train; what torch's own clipping says of the gradients of each step."""
    found: list[float] = []
    clip = RuleOptimizer.clip_grad_norm_

    def measured(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        copies = [torch.zeros_like(p, requires_grad=True) for p in params]
        for copy, p in zip(copies, params, strict=True):
            copy.grad = p.grad.clone()
        found.append(torch.nn.utils.clip_grad_norm_(copies, 1.0).item())
        return clip(optimizer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RuleOptimizer, "clip_grad_norm_", measured)
        train("adamw", dataclasses.replace(recipe, clip=math.inf), Job(), out)
    return found


def test_the_share_of_steps_clipped_is_that_of_larger_norms_also_after_a_resume(recipe, tmp_path, monkeypatch):
    free = norms_by_torch(recipe, tmp_path / "free", monkeypatch)
    assert len(free) == recipe.steps
    assert train("adamw", dataclasses.replace(recipe, clip=math.inf), Job(), tmp_path / "off").clipped_share == 0.0
    assert (
        train("adamw", dataclasses.replace(recipe, clip=2 * max(free)), Job(), tmp_path / "high").clipped_share == 0.0
    )
    # In the middle of what there is, so that clipping changes later norms: those that the run logs are counted.
    some = dataclasses.replace(recipe, clip=sorted(free)[recipe.steps // 2])
    whole = train("adamw", some, Job(log_every=1), tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert norms[0] == pytest.approx(free[0], rel=1e-5)  # summed in another order
    assert 0 < whole.clipped_share == sum(norm > some.clip for norm in norms) / recipe.steps < 1
    monkeypatch.setattr(_Run, "evaluate", lambda run, loss: 1 / 0 if run.step == 10 else 0.0)
    with pytest.raises(ZeroDivisionError):
        train("adamw", some, Job(save_every=8), tmp_path / "cut")
    monkeypatch.undo()
    assert train("adamw", some, Job(), tmp_path / "cut").clipped_share == whole.clipped_share


def test_a_step_that_was_skipped_was_not_clipped(recipe, tmp_path, monkeypatch):
    sound = _Run._loss
    monkeypatch.setattr(_Run, "_loss", lambda run, batch: sound(run, batch) * (math.inf if run.step % 2 else 1.0))
    monkeypatch.setattr(_Run, "evaluate", lambda run, loss: run._write(valid_loss=1.0) or 1.0)
    result = train("adamw", dataclasses.replace(recipe, clip=1e-6, steps=8), Job(), tmp_path)
    assert (result.skipped_steps, result.clipped_share) == (4, 0.5)


def test_no_clipping_can_be_asked_for(cli, tiny):
    assert cli("train", *tiny, "--optimizer", "adamw", "--clip", "inf", "--out", "out") == 0
    assert cli("train", "--resume", "out") == 0
    result = json.loads(Path("out/result.json").read_text())
    assert result["clipped_share"] == 0.0


def test_a_held_out_batch_is_looked_at_two_times_per_doubling() -> None:
    looks = [-1, 0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256]
    assert [n for n in range(-50, 300) if looked_at(n)] == looks
