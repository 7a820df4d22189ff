"""What a training survives: benchmarks/reliability.py, smaller; and several processes under torchrun."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import reliability
from reliability import as_arguments, children, finish, losses, metrics, saved, torchrun, until

from ademamix.lab.config import Job, Recipe

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes of torchrun in /proc")


@pytest.fixture(scope="module")
def recipe(tokens) -> Recipe:
    small = {"layers": 1, "width": 32, "context": 16, "batch": 4, "steps": 60, "warmup": 2}
    return dataclasses.replace(Recipe(), data=str(tokens), eval_every=20, eval_sequences=8, **small)


@pytest.mark.slow
def test_a_training_killed_at_random_moments_ends_as_one_never_killed_bit_for_bit(recipe, tmp_path):
    kills = 4
    figures = reliability.killed_at_random(tmp_path, dataclasses.replace(recipe, steps=1000, eval_every=100), kills)
    killed, in_writing, steps, same = figures.values()
    assert (killed, steps, same) == (kills, 1000, True)
    assert in_writing >= 1


@linux
@pytest.mark.slow
def test_when_torchrun_starts_a_killed_rank_again_the_run_ends_as_an_unbroken_one_bit_for_bit(recipe, tmp_path):
    """On three: the sum of two numbers has one order, and would not show another one after the restart."""
    three = dataclasses.replace(recipe, steps=200, batch=6)
    starts, same = reliability.rank_killed(tmp_path, three, 3).values()
    assert (starts, same) == (2, True)


@pytest.mark.parametrize("state", ["float32", "compact"])
def test_bad_gradients_leave_no_trace(state):
    steps, bad, skipped, finite, same = reliability.bad_gradients(2000, state).values()
    # 0.05 of 2,000 steps, and six standard deviations of a binomial around it.
    assert abs(bad - 0.05 * steps) < 6 * (0.05 * 0.95 * steps) ** 0.5
    assert (skipped, finite, same) == (bad, True, True)


def test_the_report_on_damaged_files_has_no_exceptions(recipe, tmp_path):
    cases, named, offered, same = reliability.damaged(tmp_path, recipe).values()
    assert cases == named == offered == 3 * 3
    assert same


def test_the_report_on_planted_pickles_has_no_exceptions(recipe, tmp_path):
    _, refused, ran = reliability.planted(tmp_path, recipe).values()
    assert (refused, ran) == ("4 of 4", 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_run_that_cannot_write_says_so_keeps_the_last_checkpoint_and_goes_on_later(recipe, tmp_path):
    said, kept, same = reliability.full_disk(tmp_path, recipe, "limit").values()
    assert "could not be written (File too large); the one before it is FOLDER" in said
    assert kept
    assert same


def test_one_and_two_processes_have_the_same_loss_curve(recipe, tmp_path):
    """Two processes compute what one does with its batch cut in two, to the bit: halving is exact, and so the sums are
    the same. The batch uncut is summed in another order: by so much the curve of one process is another one."""
    steps, ddp, fsdp, weights, first, _ = reliability.any_number(tmp_path, recipe).values()
    assert (steps, ddp, fsdp, weights) == (recipe.steps, True, True, True)
    # The first loss is a mean over 64 tokens: 63 additions, each rounded by at most 2^-24 of the sum, in either order.
    assert first <= 2 * 63 * 2**-24
    assert [line["step"] for line in metrics(tmp_path / "fsdp") if "loss" in line] == list(range(1, steps + 1))


@pytest.mark.parametrize("state", [pytest.param("float32", marks=pytest.mark.slow), "compact"])
def test_parts_and_copies_are_switched_to_another_optimizer_alike(state, recipe, tmp_path):
    """Right after an evaluation, which has put some parameters together; and with batches cut in two."""
    settings = dataclasses.replace(recipe.ademamix, state=state)
    switched = dataclasses.replace(recipe, ademamix=settings, width=64, switch_at=20, held_out=(30,), clip=1e9)
    for shard in (False, True):
        run = tmp_path / f"{shard}"
        reliability.carry_out(dataclasses.replace(switched, accumulate=2), Job(log_every=1, shard=shard), run, 2)
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


@linux
@pytest.mark.slow
def test_a_stop_reaches_all_processes_at_one_step_and_another_number_of_them_goes_on(recipe, tmp_path):
    longer = dataclasses.replace(recipe, steps=400, eval_every=400)
    run, settings = tmp_path / "run", as_arguments(longer, log_every=1, save_every=1000)
    process = torchrun(run, *settings, "--shard")
    until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 10, lambda: process.poll() is None)
    os.kill(children(process)[1], signal.SIGTERM)
    printed, _ = process.communicate()
    (step,) = (int(path.name.removeprefix("step-")) for path in saved(run))
    assert f"stopped and saved at step {step}\nresume with: python -m ademamix train --resume {run}" in printed
    stopped = losses(run)
    assert len(stopped) == step

    command = [sys.executable, "-m", "ademamix", "train", "--resume", str(run)]
    going_on = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: len(metrics(run)) > step + 10, lambda: going_on.poll() is None)
    going_on.terminate()
    going_on.communicate()
    assert going_on.returncode == 128 + signal.SIGTERM
    assert losses(run)[:step] == stopped
    alone = losses(run)
    assert len(alone) > step

    finish(torchrun(run, *settings, "--go-on"))
    assert losses(run)[: len(alone)] == alone
    assert len(losses(run)) == longer.steps
    assert len(json.loads((run / "config.json").read_text())["typed"]) == 3
