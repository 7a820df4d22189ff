"""The models, built from scratch by `transformers`."""

import hashlib

import torch

from ademamix.lab.config import ImageRecipe, Recipe

# transformers takes seconds to import, which bad input need not wait for: hence within the functions.


def language_model(recipe: Recipe, vocab_size: int) -> torch.nn.Module:
    """Return the recipe's Llama or Mamba; only its seed decides the weights (float32, on the CPU)."""
    torch.manual_seed(recipe.seed)
    if recipe.architecture == "mamba":
        from transformers import MambaConfig, MambaForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # each run would advise to install CUDA kernels
        return MambaForCausalLM(
            MambaConfig(
                vocab_size=vocab_size,
                hidden_size=recipe.width,
                num_hidden_layers=recipe.layers,
                tie_word_embeddings=True,
                use_cache=False,
                use_mambapy=True,  # a parallel scan where neither its CUDA kernels nor those of mamba-ssm can be used
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
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
    )


def vision_model(recipe: ImageRecipe, channels: int, classes: int) -> torch.nn.Module:
    """Return the recipe's ViT; only its seed decides the weights (float32, on the CPU)."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(recipe.seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=recipe.size,
            patch_size=recipe.patch,
            num_channels=channels,
            num_labels=classes,
            hidden_size=recipe.width,
            intermediate_size=4 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.width // 32,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by the base class
        )
    )


def checksum(model: torch.nn.Module) -> str:
    """Return a SHA-256 over the bits of all parameters, in order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
