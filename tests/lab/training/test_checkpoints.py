"""Checkpoints of one process: whole or absent, checked, refused where they are not what they should be.

What is done to whole runs - kills, full disks, several processes - is in test_reliability.py.
"""

import dataclasses
import errno
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import reliability
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict

from ademamix import KEMA, AdEMAMix, SimplifiedAdEMAMix
from ademamix.lab.config import BadInputError, Job, Recipe
from ademamix.lab.training import checkpoints
from ademamix.lab.training.checkpoints import Checkpoints, SaveError, complete, load, weights
from ademamix.lab.training.description import described
from ademamix.lab.training.loop import _Run, check, train
from ademamix.lab.training.processes import Processes
from ademamix.lab.training.tasks import task_of


@pytest.fixture(scope="module")
def recipe(tokens) -> Recipe:
    small = {"layers": 1, "width": 16, "context": 16, "batch": 4, "steps": 20, "warmup": 2}
    return dataclasses.replace(Recipe(), data=str(tokens), eval_every=5, eval_sequences=8, **small)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """A run with checkpoints of the steps 15 and 20."""
    out = tmp_path_factory.mktemp("finished")
    train("ademamix", recipe, Job(log_every=1, save_every=5), out)
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it that has not come to its end."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


def test_the_last_ones_are_kept(finished, recipe, tmp_path):
    assert [path.name for path in complete(finished / "checkpoints")] == ["step-00000015", "step-00000020"]
    train("ademamix", recipe, Job(save_every=5, keep=3), tmp_path)
    assert [int(path.name[5:]) for path in complete(tmp_path / "checkpoints")] == [10, 15, 20]
    assert sorted((tmp_path / "checkpoints").iterdir()) == complete(tmp_path / "checkpoints")


def test_what_was_being_written_or_removed_is_swept_away(run, recipe, finished):
    for name in ("step-00000005.partial", "step-00000025.partial"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "__0_0.distcp").write_bytes(b"half")
    result = train("ademamix", recipe, Job(), run)
    assert not list(run.glob("checkpoints/*.partial"))
    assert result.curve[-1]["valid_loss"] == json.loads((finished / "result.json").read_text())["valid_loss"]


@pytest.mark.parametrize("damage", reliability.DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_offered(name, damage, run, recipe):
    before, newest = complete(run / "checkpoints")
    file = newest / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BadInputError) as caught:
        train("ademamix", recipe, Job(), run)
    assert str(caught.value).startswith(f"{file} is damaged")
    assert str(caught.value).endswith(f"; {before} is whole: to resume from there, delete {newest}")
    shutil.rmtree(newest)
    train("ademamix", recipe, Job(log_every=1), run)
    assert complete(run / "checkpoints") == [before, newest]


def test_a_missing_file_is_named_and_no_damaged_checkpoint_is_offered(run, recipe):
    before, newest = complete(run / "checkpoints")
    (before / "__0_0.distcp").write_bytes(b"")
    (newest / "__0_0.distcp").unlink()
    with pytest.raises(BadInputError, match=r"step-00000020/__0_0.distcp is missing; no other one is whole"):
        train("ademamix", recipe, Job(), run)


def test_a_file_with_a_name_that_no_disk_takes_is_missing(run, recipe):
    manifest = complete(run / "checkpoints")[-1] / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"] |= {"x" * 100_000: [1, ""]}
    del content["sha256"]
    manifest.write_text(json.dumps({"sha256": checkpoints._sum_of(content), **content}))
    with pytest.raises(BadInputError, match=r"xxx\.\.\.xxx.* is missing") as caught:
        train("ademamix", recipe, Job(), run)
    assert len(str(caught.value)) < 500 + 3 * len(str(run))


def test_a_pipe_in_the_place_of_a_description_is_refused(run):
    description = complete(run / "checkpoints")[-1] / ".metadata"
    description.unlink()
    os.mkfifo(description)
    with pytest.raises(BadInputError, match=r"\.metadata must be a file, but is a folder, a pipe or a device"):
        described(description.parent)


def test_a_pipe_in_the_place_of_metrics_is_refused(run, recipe):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(BadInputError, match=r"metrics\.jsonl must be a file"):
        train("ademamix", recipe, Job(), run)


@pytest.mark.parametrize("kind", [AdEMAMix, SimplifiedAdEMAMix, KEMA])
def test_a_checkpoint_from_before_a_hyperparameter_goes_on_as_a_state_dict_does(kind, tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    before, after = kind(model.parameters(), lr=0.5), kind(model.parameters(), lr=0.25)
    state = checkpoints._state(model, before)
    for group in state["optimizer"]["param_groups"]:
        del group["slow_limit"]
        del group["weight_decay"]
    checkpoints._expect_one_process()
    dcp.save(state, checkpoint_id=tmp_path)
    load(tmp_path, model, after)
    (group,) = after.param_groups
    assert (group["slow_limit"], group["weight_decay"], group["lr"]) == (None, after.defaults["weight_decay"], 0.5)


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    state = checkpoints._state(model, AdEMAMix(model.parameters()))
    del state["optimizer"]["state"]["weight"]["exp_avg_slow"]
    checkpoints._expect_one_process()
    dcp.save(state, checkpoint_id=tmp_path)
    with pytest.raises(BadInputError, match="exp_avg_slow"):
        load(tmp_path, model, AdEMAMix(model.parameters()))


@pytest.mark.parametrize("field", ["step", "seconds", "skipped_steps", "clipped_steps"])
def test_a_changed_number_in_the_manifest_is_noticed(field, run, recipe):
    manifest = complete(run / "checkpoints")[-1] / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {field: content[field] + 1}))
    with pytest.raises(BadInputError, match=r"manifest\.json is damaged"):
        train("ademamix", recipe, Job(), run)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "many"},
        {"step": 10**400},
        {"seconds": math.nan},
        {"seconds": -math.inf},
        {"seconds": None},
        {"recipe": []},
        {"optimizer": 3},
        {"skipped_steps": {}},
        {"clipped_steps": 0.5},
    ],
)
def test_a_manifest_with_other_kinds_of_values_is_refused_though_its_sum_is_right(change, run, recipe):
    newest = complete(run / "checkpoints")[-1]
    manifest = newest / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    reliability.sealed(newest)
    with pytest.raises(BadInputError, match=rf"manifest\.json is damaged: {next(iter(change))} is "):
        train("ademamix", recipe, Job(), run)


@pytest.mark.parametrize(
    "files", [[], {"../../result.json": [1, ""]}, {"__0_0.distcp": 3}, {"__0_0.distcp": ["1", ""]}]
)
def test_a_manifest_with_other_files_is_damaged(files, run, recipe):
    newest = complete(run / "checkpoints")[-1]
    content = json.loads((newest / "manifest.json").read_text()) | {"files": files}
    del content["sha256"]
    (newest / "manifest.json").write_text(json.dumps({"sha256": checkpoints._sum_of(content), **content}))
    with pytest.raises(BadInputError, match=r"manifest\.json is damaged; "):
        train("ademamix", recipe, Job(), run)


@pytest.mark.parametrize("name", ["..", ".", "", "/etc/passwd", "sub/../file"])
def test_a_description_or_a_manifest_names_only_files_of_the_checkpoint(name, run, recipe):
    newest = complete(run / "checkpoints")[-1]
    found = pickle.loads((newest / ".metadata").read_bytes())
    for index, place in found.storage_data.items():
        found.storage_data[index] = dataclasses.replace(place, relative_path=name)
    (newest / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(BadInputError, match="is not a description of tensors"):
        described(newest)
    content = json.loads((newest / "manifest.json").read_text())
    content["files"][name] = content["files"].pop("__0_0.distcp")
    (newest / "manifest.json").write_text(json.dumps(content))
    del content["sha256"]
    (newest / "manifest.json").write_text(json.dumps({"sha256": checkpoints._sum_of(content), **content}))
    with pytest.raises(BadInputError, match=r"manifest\.json is damaged|is missing"):
        weights(newest)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_no_tensor_is_read_through_a_link(name, run, tmp_path):
    """Not even one that leads to the very bytes: whose they are is not known."""
    newest = complete(run / "checkpoints")[-1]
    (newest / name).rename(tmp_path / "outside")
    (newest / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BadInputError, match=f"{newest / name} is a link"):
        weights(newest)
    if name != ".metadata":
        with pytest.raises(BadInputError, match=f"is not a description of tensors .{name} is a link"):
            described(newest)


@pytest.mark.parametrize("where", reliability.PLANTS)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(where, run, recipe, tmp_path):
    path, marker = complete(run / "checkpoints")[-1], tmp_path / "ran"
    reliability.PLANTS[where](path, marker)
    with pytest.raises(BadInputError, match=f"{path}/.* is damaged"):  # already by its sum, unless that is made anew
        train("ademamix", recipe, Job(), run)
    reliability.sealed(path)
    with pytest.raises(BadInputError, match="refused") as caught:
        train("ademamix", recipe, Job(), run)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)  # torch's own message says how to run the code


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable")
def test_where_nothing_refuses_them_the_planted_pickles_run_code(run, tmp_path):
    first, second = complete(run / "checkpoints")
    reliability.planted_description(first, tmp_path / "described")
    pickle.loads((first / ".metadata").read_bytes())
    assert (tmp_path / "described").is_dir()
    reliability.planted_entry(second, tmp_path / "loaded", reliability.A_SETTING, None)
    dcp.load({"optimizer": {"param_groups": [{"lr": 0.0}]}}, checkpoint_id=second)
    assert (tmp_path / "loaded").is_dir()


def test_a_checkpoint_of_an_earlier_version_is_not_passed_over(run, recipe):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoint.pt").write_bytes(b"of 0.1.0")
    logged = (run / "metrics.jsonl").read_text()
    with pytest.raises(BadInputError, match=r"checkpoint.pt was written by ademamix 0.1.0"):
        train("ademamix", recipe, Job(), run)
    assert (run / "metrics.jsonl").read_text() == logged


def tensors(model: torch.nn.Module, optimizer: AdEMAMix) -> dict[str, torch.Tensor]:
    flat, _ = flatten_state_dict(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    return {name: value.clone() for name, value in flat.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("state", ["float32", "compact"])
def test_what_is_loaded_is_what_was_saved_when_it_was_saved(state, recipe, tmp_path):
    """Also what a run that continues at once has changed by the time it is written."""
    task = task_of(dataclasses.replace(recipe, width=64))
    checkpoints, model = Checkpoints(tmp_path, 2, Processes()), task.model()
    optimizer = AdEMAMix(model.parameters(), lr=0.1, state=state)

    def step() -> None:
        task.loss(model, task.batch(1)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    saved = tensors(model, optimizer)
    checkpoints.save(1, {"by": "hand"}, model, optimizer)
    step()
    checkpoints.wait()
    path, about = checkpoints.newest()
    assert about["by"] == "hand"
    other = task.model()
    fresh = AdEMAMix(other.parameters(), lr=0.5, state=state)
    load(path, other, fresh)
    assert fresh.param_groups[0]["lr"] == 0.1
    loaded = tensors(other, fresh)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    whole = weights(path)
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in whole.items())
    checkpoints.close()


def test_what_became_of_a_checkpoint_is_told_at_the_latest_when_the_next_is_due(recipe, tmp_path, monkeypatch):
    checkpoints, model = Checkpoints(tmp_path, 2, Processes()), task_of(recipe).model()
    optimizer = AdEMAMix(model.parameters())
    checkpoints.save(1, {}, model, optimizer)
    checkpoints.wait()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("ademamix.lab.training.checkpoints._size_and_sum", full)
    checkpoints.save(2, {}, model, optimizer)
    kept = tmp_path / "checkpoints" / "step-00000001"
    why = f"the checkpoint step-00000002 could not be written (No space left on device); the one before it is {kept}"
    with pytest.raises(SaveError, match=re.escape(why)):
        checkpoints.save(3, {}, model, optimizer)
    assert list(kept.parent.iterdir()) == [kept]
    checkpoints.close()


def test_a_run_that_has_skipped_every_step_so_far_resumes_exactly(recipe, tmp_path, monkeypatch):
    """There is no state to save then, and making some must not count as a step."""
    sound = _Run._loss

    def poisoned(run: _Run, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return sound(run, batch) * (float("nan") if torch.is_grad_enabled() and run.step <= 2 else 1.0)

    monkeypatch.setattr(_Run, "_loss", poisoned)
    whole = train("ademamix", recipe, Job(log_every=1), tmp_path / "whole")
    saving = train("ademamix", recipe, Job(log_every=1, save_every=1, keep=20), tmp_path / "saving")
    assert (whole.skipped_steps, saving.valid_loss) == (2, whole.valid_loss)
    assert reliability.metrics(tmp_path / "saving") == reliability.metrics(tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_shares_of_all_processes_are_the_batch_of_one(processes, held_out, recipe):
    task = task_of(dataclasses.replace(recipe, batch=8))
    batch = task.held_out if held_out else task.batch
    for step in range(1, 6):
        shares = [batch(step, _of(rank, processes).part(8))[0] for rank in range(processes)]
        assert {len(share) for share in shares} == {8 // processes}
        assert torch.equal(torch.cat(shares), batch(step)[0])


def _of(rank: int, size: int) -> Processes:
    processes = Processes()
    processes.rank, processes.size = rank, size
    return processes


def test_a_batch_that_the_processes_cannot_share_is_refused(recipe, monkeypatch):
    monkeypatch.setattr("ademamix.lab.training.loop.Processes", lambda: _of(0, 4))
    check(("adamw",), recipe, "cpu")
    message = r"accumulate x processes must divide batch, got 2 x 4 with a batch of 4"
    with pytest.raises(BadInputError, match=message):
        check(("adamw",), dataclasses.replace(recipe, accumulate=2), "cpu")


@pytest.mark.parametrize("command", [("compare",), ("run", "valley")])
def test_torchrun_is_for_train_alone(command, cli, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli(*command) == 2
    assert "torchrun is for `ademamix train`" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_go_on_starts_a_run_and_goes_on_with_it_but_not_with_another(cli, tiny, capsys):
    assert cli("train", *tiny, "--out", "run", "--go-on") == 0
    Path("run", "result.json").unlink()
    assert cli("train", *tiny, "--out", "run", "--go-on", "--keep", "5") == 0
    assert len(json.loads(Path("run", "config.json").read_text())["typed"]) == 2
    capsys.readouterr()
    assert cli("train", *tiny, "--out", "run") == 2
    assert "run already exists" in capsys.readouterr().err
    assert cli("train", *tiny, "--seed", "3", "--out", "run", "--go-on") == 2
    assert "seed (0 there, 3 here)" in capsys.readouterr().err
    Path("mine").mkdir()
    assert cli("train", *tiny, "--out", "mine", "--go-on") == 2
    assert "mine: it holds no config.json" in capsys.readouterr().err
