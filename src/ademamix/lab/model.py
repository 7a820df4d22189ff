"""The language model: a Llama built from scratch by `transformers`."""

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ademamix.lab.config import Recipe


def build(recipe: Recipe, vocab_size: int) -> torch.nn.Module:
    """Return the recipe's model with initial weights that depend on the recipe's seed alone (float32, on the CPU)."""
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds of import time, which bad input need not wait for

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.width,
        intermediate_size=-(-recipe.width // 3) * 8,  # 8/3 of the width: as many weights as an MLP without a gate
        num_hidden_layers=recipe.layers,
        num_attention_heads=max(1, recipe.width // 64),
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by the base class
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of predicting every token from those before; tokens is [sequences, n]."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def checksum(model: torch.nn.Module) -> str:
    """Return a SHA-256 over the bits of all parameters, in order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
