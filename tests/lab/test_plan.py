import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ademamix import AdamW, AdEMAMix, RuleOptimizer
from ademamix.lab.config import PRESETS, PlanFor
from ademamix.lab.plan import budget, model_of, need
from ademamix.lab.training.model import language_model

STATES = ("float32", "bfloat16", "compact")
KINDS = (AdEMAMix, AdamW)
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def stepped(model: nn.Module, kind: type[RuleOptimizer], state: str) -> RuleOptimizer:
    """The model's optimizer, with gradients and state."""
    optimizer = kind(model.parameters(), state=state, backend="eager")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def allocated(model: nn.Module, optimizer: RuleOptimizer) -> dict[str, int]:
    """What is there, in bytes."""
    params = list(model.parameters())
    groups = {
        "parameters": params,
        "gradients": [p.grad for p in params],
        "optimizer state": [t for its in optimizer.state.values() for name, t in its.items() if name != "step"],
    }
    parts = {name: [t.to_local() if hasattr(t, "to_local") else t for t in ts] for name, ts in groups.items()}
    return {name: sum(t.numel() * t.element_size() for t in ts) for name, ts in parts.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["demo", "3m"])
def test_the_plan_is_what_training_allocates_and_saves(preset, kind, state, dtype, tmp_path):
    planned = need(model_of(PlanFor(preset, dtype=dtype)), kind, state)
    model = language_model(PRESETS[preset], 256).to(getattr(torch, dtype))
    optimizer = stepped(model, kind, state)
    there = allocated(model, optimizer)
    assert {name: planned[name] for name in there} == there
    assert planned["all three"] == sum(there.values())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    # A file adds about 300 bytes per tensor, names and alignment: below 2 % but for tensors as small as the demo's.
    tensors = len(model.state_dict()) + sum(map(len, optimizer.state.values()))
    size = (tmp_path / "checkpoint.pt").stat().st_size
    assert planned["checkpoint"] < size < planned["checkpoint"] + 400 * tensors
    assert size < 1.02 * planned["checkpoint"] or preset == "demo"


def test_buffers_are_saved_and_frozen_parameters_are_not_updated():
    model = nn.Sequential(nn.Linear(80, 80), nn.BatchNorm1d(80))
    model[0].bias.requires_grad_(False)
    planned = need(model, AdamW, "float32")
    trained = 80 * 80 + 2 * 80
    buffers = 4 * 2 * 80 + 8  # running mean and variance, and an int64 that counts batches
    assert planned["gradients"] == 4 * trained
    assert planned["optimizer state"] == 8 * trained
    assert planned["checkpoint"] == 4 * (trained + 80) + 8 * trained + buffers


@pytest.fixture
def fsdp() -> Iterator[Callable[[nn.Module, int, int], nn.Module]]:
    """Shard a model by FSDP2 as one process of many sees it; the others are torch's fakes, which answer at once."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def shard(model: nn.Module, rank: int, processes: int) -> nn.Module:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        distributed.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
        return fully_shard(model, mesh=init_device_mesh("cpu", (processes,)))

    yield shard
    distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("processes", [3, 200])  # cuts of 128 rows into 43, 43 and 42, and into 128 times 1
@pytest.mark.parametrize("state", ["float32", "compact"])
def test_uneven_shards_are_those_of_fsdp(state, processes, fsdp):
    each, together = budget(model_of(PlanFor()), AdEMAMix, state, processes, sharded=True)
    there = []
    for rank in range(processes) if processes < 10 else (0, 1, processes - 1):
        model = fsdp(language_model(PRESETS["demo"], 256), rank, processes)
        there.append(allocated(model, stepped(model, AdEMAMix, state)))
    for name in there[0]:
        assert each[name] == max(rank[name] for rank in there) == there[0][name]
        if processes == 3:
            assert together[name] == sum(rank[name] for rank in there)
    assert math.ceil(together["parameters"] / processes) < each["parameters"]


def test_replicas_need_all_of_it_each_and_save_it_once():
    model = model_of(PlanFor())
    each, together = budget(model, AdEMAMix, "compact", 5, sharded=False)
    assert each == need(model, AdEMAMix, "compact")
    assert together == {name: n * (1 if name == "checkpoint" else 5) for name, n in each.items()}


@pytest.mark.parametrize(
    ("kind", "state", "dtype", "bytes_"),
    [
        (AdamW, "float32", "float32", 4 * 7),  # streams: parameter, m and v, each read and written, and the gradient
        (AdEMAMix, "float32", "float32", 4 * 9),
        (AdamW, "float32", "bfloat16", 2 * 3 + 4 * 4),
        (AdEMAMix, "bfloat16", "bfloat16", 2 * 9),
        (AdEMAMix, "compact", "bfloat16", 2 * 3 + 2 * (1 + 2 + 1 + 3 * 4 / 256)),  # a float32 scale for 256 elements
    ],
)
def test_a_step_reads_and_writes_each_stream_once(kind, state, dtype, bytes_):
    model = nn.Linear(1024, 1024, bias=False, device="meta", dtype=getattr(torch, dtype))
    assert need(model, kind, state)["a step moves"] == bytes_ * 1024 * 1024


def test_70_billion_parameters_take_no_memory(cli, capsys):
    Path("config.json").write_text(json.dumps(LLAMA_70B))
    settings = ("--gpus", "64", "--sharding", "fsdp", "--state", "compact", "--dtype", "bfloat16")
    assert cli("plan", "config.json", *settings, "--bandwidth", "2000") == 0
    sentence, *lines = capsys.readouterr().out.splitlines()
    # Llama 3's 70B: 70,553,706,496 parameters, as its model card counts; 2 bytes each, and 4 of state with scales.
    assert "70,553,706,496 parameters in bfloat16 on 64 GPUs, sharded by FSDP2" in sentence
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (x.split("│") for x in lines) if cells[1:]}
    assert rows["parameters"] == ["2.2 GB", "141 GB", "2.2 GB", "141 GB", "1.00"]
    assert rows["optimizer state"] == ["4.46 GB", "286 GB", "8.82 GB", "564 GB", "0.51"]
    assert rows["a step moves"][0] == "15.5 GB"
    assert rows["at 2,000 GB/s"] == ["7.77 ms", "", "12.1 ms", "", ""]


def test_one_gpu_has_no_column_for_all(cli, capsys):
    assert cli("plan", "3m") == 0
    out = capsys.readouterr().out
    assert "in float32 on one GPU" in out
    assert "1.25 times what they take with AdamW" in out  # 20 bytes per parameter instead of 16
    assert "in all" not in out


BAD_PLAN = {
    "huge is neither a preset (demo, 3m, 10m, 30m, 110m, 330m, 1.3b) nor a config.json": ("huge",),
    "transformers cannot build a model from broken.json": ("broken.json",),
    "transformers cannot build a model from list.json": ("list.json",),
    "transformers cannot build a model from untyped.json": ("untyped.json",),
    "transformers cannot build a model from wrong.json": ("wrong.json",),
    "transformers cannot build a model from remote.json": ("remote.json",),
    "transformers cannot build a model from empty": ("empty",),
    "gpus must be at least 1, got 0": ("--gpus", "0"),
    "bandwidth must be a positive number of GB/s, got 0": ("--bandwidth", "0"),
    "bandwidth must be a positive number of GB/s, got nan": ("--bandwidth", "nan"),
    "vocab_size must be in [1, 2**32], got 0": ("--vocab-size", "0"),
    "vocab_size must be in [1, 2**32], got 9999999999999999999": ("--vocab-size", "9" * 19),
    "vocab_size goes with a preset; a configuration such as wrong.json has its own": (
        "wrong.json",
        "--vocab-size",
        "9",
    ),
}


@pytest.mark.parametrize("message", BAD_PLAN)
def test_bad_input_gives_one_line(message, cli, capsys):
    Path("empty").mkdir()
    Path("broken.json").write_text('{"model_type": ')
    Path("list.json").write_text("[]")
    Path("untyped.json").write_text('{"hidden_size": 64}')
    Path("wrong.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    Path("remote.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    assert cli("plan", *BAD_PLAN[message]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ademamix: {message}")
