"""What goes where, written down by hand for each model."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ademamix import ADana, split_parameters
from ademamix.groups import ParameterGroups

TOKENS = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def names(groups: ParameterGroups, geometry: str) -> set[str]:
    return {name for group in groups if group["geometry"] == geometry for name, _ in group["params"]}


def reasons(groups: ParameterGroups) -> dict[str, str]:
    return {q.name: q.reason for q in groups.placements}


class GPT(nn.Module):
    """As in nanoGPT, with its names scrambled: they decide nothing."""

    def __init__(self, *, layers: int = 2, tied: bool = True, head_first: bool = False, width: int = 16) -> None:
        super().__init__()
        vocabulary = 4 * width  # the shape of the first matrix of every MLP, too
        if head_first:
            self.norm_bias = nn.Linear(width, vocabulary, bias=False)
        self.body = nn.ModuleDict({"fc": nn.Embedding(vocabulary, width), "c_proj": nn.Embedding(8, width)})
        self.body["head"] = nn.ModuleList(Block(width) for _ in range(layers))
        self.body["last"] = nn.LayerNorm(width)
        if not head_first:
            self.norm_bias = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.norm_bias.weight = self.body["fc"].weight


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.LayerNorm(width)
        self.lm_head = nn.MultiheadAttention(width, 2, add_bias_kv=True)
        self.wte = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    MATRICES = ("lm_head.in_proj_weight", "lm_head.out_proj.weight", "wte.0.weight", "wte.2.weight")


class Positions(nn.Module):
    """A ViT with everything at its root, as timm and torchvision build it."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 8))
        self.patch_embed = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.heads = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5))


class OwnLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 16  # declared by some: still no single matrix
        self.up = nn.Parameter(torch.zeros(4, 16, 8))
        self.router = nn.Linear(8, 4)


def mlp(*, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


BLOCKS = {f"body.head.{i}.{name}" for i in range(2) for name in Block.MATRICES}
CLASSIFIER = nn.Linear(8, 3)
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "nanoGPT": (GPT, BLOCKS),
    "untied": (lambda: GPT(tied=False), BLOCKS),
    "head first": (lambda: GPT(tied=False, head_first=True), BLOCKS),
    "one layer, head first": (
        lambda: GPT(layers=1, tied=False, head_first=True),
        {n for n in BLOCKS if ".0." in n.replace("wte.0", "")},
    ),
    "blocks alone": (lambda: GPT().body["head"], {n.removeprefix("body.head.") for n in BLOCKS}),
    "timm's ViT": (Positions, {f"blocks.{i}.{name}" for i in range(2) for name in Block.MATRICES}),
    "stage of a pipeline": (
        lambda: nn.ModuleDict({"layers": nn.ModuleDict({"4": Block(8), "5": Block(8)})}),
        {f"layers.{i}.{name}" for i in (4, 5) for name in Block.MATRICES},
    ),
    "two heads": (
        lambda: nn.ModuleDict({"body": GPT(tied=False), "value": nn.Linear(16, 4)}),
        {f"body.{name}" for name in BLOCKS},
    ),
    "MLP": (mlp, {"0.weight", "2.weight"}),
    "nested MLP": (
        lambda: nn.Sequential(
            *(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)), nn.Sequential(CLASSIFIER)
        ),
        {"0.0.weight", "1.0.weight"},
    ),
    "list of layers": (lambda: nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), CLASSIFIER]), {"0.weight", "1.weight"}),
    "CNN": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 3)),
        {"2.weight"},
    ),
    "convolutions only": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 3, 3)),
        {"1.weight"},
    ),
    "convolutions of embeddings": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=8), nn.Linear(8, 3)),
        {"1.weight"},
    ),
    "LSTM": (
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.LSTM(4, 8, proj_size=4), nn.GRUCell(4, 8), nn.Linear(8, 9)),
        {"1.weight_ih_l0", "1.weight_hh_l0", "1.weight_hr_l0", "2.weight_ih", "2.weight_hh"},
    ),
    "torch's Transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False),
        {f"layers.0.{n}.weight" for n in ("self_attn.out_proj", "linear1", "linear2")}
        | {"layers.0.self_attn.in_proj_weight"},
    ),
    "linear layers by what they declare": (
        lambda: nn.Sequential(OwnLinear(8, 16), OwnLinear(16, 8), OwnLinear(8, 3)),
        {"0.weight", "1.weight"},
    ),
    "experts": (lambda: nn.Sequential(Experts(), nn.Linear(8, 3)), {"0.router.weight"}),
    "one row or column": (
        lambda: nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(1, 3)),
        {"1.weight"},
    ),
    "a layer used twice": (
        lambda: (lambda shared: nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(8, 3)))(nn.Linear(8, 8)),
        {"0.weight"},
    ),
    "complex": (lambda: nn.Sequential(nn.Linear(8, 8, dtype=torch.cfloat), nn.Linear(8, 8), CLASSIFIER), {"1.weight"}),
    "LayerNorm of pictures": (
        lambda: nn.Sequential(nn.LayerNorm((4, 4)), nn.Linear(4, 4), nn.Linear(4, 2)),
        {"1.weight"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_hidden_matrices_go_to_muon_and_all_else_to_adam(name: str, device: str) -> None:
    build, hidden = MODELS[name]
    model = build().to(device)
    groups = split_parameters(model)
    assert names(groups, "muon") == hidden
    every = dict(model.named_parameters())
    assert names(groups, "adam") == every.keys() - hidden
    placed = [pair for group in groups for pair in group["params"]]
    assert len(placed) == len(every)
    assert all(every[name] is p for name, p in placed)
    assert [q.name for q in groups.placements] == list(every)
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == [
        {"geometry": "muon"},
        {"geometry": "adam", "weight_decay": 0.0},
    ]


def hidden_by_hand(model: nn.Module, *parts: str) -> set[str]:
    return {name for name, p in model.named_parameters() if p.ndim == 2 and any(part in name for part in parts)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("model", "config", "settings", "stack"),
    [
        ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}, ".h."),
        ("LlamaForCausalLM", "LlamaConfig", LAYERS, ".layers."),
        ("Qwen3ForCausalLM", "Qwen3Config", {**LAYERS, "head_dim": 16}, ".layers."),
    ],
)
def test_language_models_of_transformers(
    model: str, config: str, settings: dict[str, Any], stack: str, tied: bool
) -> None:
    described = getattr(transformers, config)(**TOKENS, **settings, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = getattr(transformers, model)(described)
    groups = split_parameters(model)
    hidden = hidden_by_hand(model, stack)
    assert len(hidden) in (8, 14)
    assert names(groups, "muon") == hidden
    embedding, *head = [n for n, p in model.named_parameters() if p.shape[0] == 97 and p.ndim == 2]
    assert reasons(groups)[embedding] == ("embedding, tied to lm_head.weight" if tied else "embedding")
    assert [reasons(groups)[n] for n in head] == ([] if tied else ["output head"])


def test_other_models_of_transformers() -> None:
    with torch.device("meta"):
        vit = transformers.ViTForImageClassification(
            transformers.ViTConfig(**LAYERS, image_size=32, patch_size=8, num_labels=10)
        )
        mixtral = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**TOKENS, **LAYERS, num_key_value_heads=1, num_local_experts=4)
        )
        backbone = transformers.LlamaModel(transformers.LlamaConfig(**TOKENS, **LAYERS))
        masked = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=97, **LAYERS))
        music = transformers.MusicgenForCausalLM(
            transformers.MusicgenDecoderConfig(**TOKENS, **LAYERS, num_codebooks=4)
        )
    heads = {name for name, reason in reasons(split_parameters(music)).items() if reason == "output head"}
    assert heads == {f"lm_heads.{i}.weight" for i in range(4)}
    assert names(split_parameters(vit), "muon") == hidden_by_hand(vit, "layer")
    assert {"input layer", "output head"} <= set(reasons(split_parameters(vit)).values())
    assert names(split_parameters(mixtral), "muon") == hidden_by_hand(mixtral, "self_attn")
    assert names(split_parameters(backbone), "muon") == hidden_by_hand(backbone, "layers.")
    assert names(split_parameters(masked), "muon") == hidden_by_hand(masked, ".layer.", "transform.dense")


def test_an_optimizer_takes_the_groups_with_their_names() -> None:
    model = mlp()
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = kind(split_parameters(model), lr=0.5, weight_decay=0.1)
        assert [group["param_names"] for group in optimizer.param_groups] == [
            ["0.weight", "2.weight"],
            ["0.bias", "2.bias", "4.weight", "4.bias"],
        ]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_one_optimizer_steps_in_both_geometries() -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ADana(split_parameters(model), lr=1e-2, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.eye(*p.shape) if p.ndim == 2 else torch.ones_like(p)
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        hidden = name in {"0.weight", "2.weight"}
        assert ("exp_avg_sq" in optimizer.state[p]) is not hidden
        if hidden:  # of equal singular values s: the iteration maps them to within [0.68, 1.14]
            sizes = torch.linalg.svdvals(old - p.detach()) / (1e-2 * 0.2 * max(p.shape) ** 0.5)
            assert 0.67 < sizes.min() <= sizes.max() < 1.15


def test_frozen_parameters_are_left_out_but_still_tell_what_others_are() -> None:
    model = GPT()
    model.requires_grad_(False)
    for p in model.body["head"].parameters():
        p.requires_grad_(True)
    groups = split_parameters(model)
    assert names(groups, "muon") == BLOCKS
    assert reasons(groups)["body.fc.weight"] == "frozen"
    assert not any(name.startswith(("body.fc", "norm_bias")) for name in names(groups, "adam"))

    net = mlp()
    net[4].weight.requires_grad_(False)
    assert names(split_parameters(net), "muon") == {"0.weight", "2.weight"}  # the head is still the frozen one


def test_low_rank_adapters_are_linear_layers() -> None:
    net = mlp()
    net.requires_grad_(False)
    net[2].add_module("lora_A", nn.Linear(8, 2, bias=False))
    net[2].add_module("lora_B", nn.Linear(2, 8, bias=False))
    (group,) = split_parameters(net)
    assert group["geometry"] == "muon"
    assert [name for name, _ in group["params"]] == ["2.lora_A.weight", "2.lora_B.weight"]


def test_patterns_override() -> None:
    model = GPT(tied=False)
    groups = split_parameters(model, adam=["*.1.wte.*", "*in_proj*"], muon="norm_bias.weight")
    moved = {n for n in BLOCKS if ".1.wte." in n or "in_proj" in n}
    assert names(groups, "muon") == BLOCKS - moved | {"norm_bias.weight"}
    assert reasons(groups)["norm_bias.weight"] == "override 'norm_bias.weight'"
    # Any of the names of a tied parameter counts.
    assert "body.fc.weight" in names(split_parameters(GPT(), muon="norm_bias.*"), "muon")
    # Patterns have the case of names, and one that matches only what is frozen is not a mistake.
    model.norm_bias.requires_grad_(False)
    assert names(split_parameters(model, muon="norm_bias.weight"), "muon") == BLOCKS
    with pytest.raises(ValueError, match="'NORM_BIAS"):
        split_parameters(model, muon="NORM_BIAS.weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adam": ["0.*", "heads.*"]}, r"adam pattern 'heads\.\*' matches no parameter .*'0\.weight'"),
        ({"muon": "weight"}, "muon pattern 'weight' matches no parameter"),
        ({"muon": "0.*"}, r"muon pattern '0\.\*' matches 0\.bias, torch.float32 of shape \[8\]"),
        (
            {"muon": "4.weight", "adam": "4.*"},
            r"4\.weight matches the adam pattern '4\.\*' and the muon .* '4\.weight'",
        ),
    ],
)
def test_bad_patterns_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_parameters(mlp(), **arguments)


def test_models_that_cannot_be_split() -> None:
    with pytest.raises(TypeError, match="got generator"):
        split_parameters(mlp().parameters())
    for empty in (nn.Tanh(), mlp().requires_grad_(False)):
        with pytest.raises(ValueError, match="no trainable parameters"):
            split_parameters(empty)
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet"):
        split_parameters(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"torch\.complex64 of shape .* must be real"):
        split_parameters(nn.Linear(2, 2, dtype=torch.cfloat), muon="weight")
    flat = mlp()
    flat[2].weight = nn.Parameter(flat[2].weight.detach().flatten())
    with pytest.raises(ValueError, match=r"2\.weight of shape \[64\] is flattened"):
        split_parameters(flat)


def test_parametrized_layers_go_to_adam() -> None:
    net = mlp()
    torch.nn.utils.parametrizations.weight_norm(net[2])
    torch.nn.utils.parametrizations.weight_norm(net[4])
    assert names(split_parameters(net), "muon") == {"0.weight"}


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_names_have_no_prefixes_of_wrappers() -> None:
    plain = names(split_parameters(GPT()), "muon")
    compiled = GPT()
    compiled.body["head"][1] = torch.compile(compiled.body["head"][1], backend="eager")
    parallel = nn.parallel.DistributedDataParallel(torch.compile(compiled, backend="eager"))
    groups = split_parameters(parallel)
    assert names(groups, "muon") == plain
    assert names(split_parameters(nn.DataParallel(GPT())), "muon") == plain
    # A module of the user's may have the name that a wrapper gives.
    assert names(split_parameters(nn.ModuleDict({"module": mlp()})), "muon") == {"module.0.weight", "module.2.weight"}


@pytest.mark.usefixtures("process_group")
def test_sharded_models() -> None:
    model = GPT()
    mesh = distributed.init_device_mesh("cpu", (1,))
    for part in (*model.body["head"], model):
        fully_shard(part, mesh=mesh)
    groups = split_parameters(model)
    assert names(groups, "muon") == BLOCKS
    assert all(isinstance(p, DTensor) for _, p in groups[0]["params"])


@pytest.mark.parametrize("original", [True, False])
def test_flattened_models_are_refused(original: bool) -> None:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = FullyShardedDataParallel(mlp(), use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"of shape \[\d+\] is flattened"):
            split_parameters(model)
    finally:
        distributed.destroy_process_group()


TABLE = """\
muon: 6 tensors, 4,096 parameters
  body.head.*.lm_head.in_proj_weight   2 x [48, 16]  hidden matrix
  body.head.*.lm_head.out_proj.weight  2 x [16, 16]  hidden matrix
  body.head.*.wte.*.weight             2 x [16, 64]  hidden matrix
adam: 21 tensors, 3,520 parameters
  body.fc.weight                     1 x [64, 16]    embedding, tied to norm_bias.weight
  body.head.*.embedding.weight       2 x [16]        vector of LayerNorm
  body.head.*.embedding.bias         2 x [16]        vector of LayerNorm
  body.head.*.lm_head.in_proj_bias   2 x [48]        vector of MultiheadAttention
  body.head.*.lm_head.bias_k         2 x [1, 1, 16]  vector of MultiheadAttention
  body.head.*.lm_head.bias_v         2 x [1, 1, 16]  vector of MultiheadAttention
  body.head.*.lm_head.out_proj.bias  2 x [16]        vector of NonDynamicallyQuantizableLinear
  body.head.*.wte.*.weight           2 x [64, 16]    override '*wte.0.weight'
  body.head.*.wte.*.bias             2 x [64]        vector of Linear
  body.head.*.wte.*.bias             2 x [16]        vector of Linear
  body.last.weight                   1 x [16]        vector of LayerNorm
  body.last.bias                     1 x [16]        vector of LayerNorm
left out: 1 tensor, 128 parameters
  body.c_proj.weight  1 x [8, 16]  frozen"""


def test_the_table_shows_what_went_where_and_why() -> None:
    model = GPT()
    model.body["c_proj"].weight.requires_grad_(False)
    groups = split_parameters(model, adam="*wte.0.weight")
    assert str(groups) == TABLE
    torch.optim.SGD(groups)  # which changes the groups
    assert str(groups) == TABLE


def test_groups_can_be_copied_and_pickled() -> None:
    groups = split_parameters(mlp())
    for other in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert str(other) == str(groups)
        assert [g["geometry"] for g in other] == ["muon", "adam"]
