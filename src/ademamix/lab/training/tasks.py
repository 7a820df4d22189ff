"""What is learned: a task gives the training loop its model, its batches and their loss."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ademamix.lab.config import ImageRecipe, Recipe, Training
from ademamix.lab.data import images
from ademamix.lab.data.corpus import stdlib_tokens
from ademamix.lab.data.tokens import WHOLE, Tokens
from ademamix.lab.training import model

Batch = tuple[Tensor, ...]  # the first dimension of each is the batch's


class Task(Protocol):
    """What a recipe trains on. Batches are pure functions of the recipe and the step, and lie on the CPU."""

    sha256: str  # of the data

    def model(self) -> torch.nn.Module:
        """A new model, whose weights depend only on the recipe's seed (float32, on the CPU)."""

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        """The training batch of a step, or a part of it."""

    def held_out(self, number: int, part: slice = WHOLE) -> Batch:
        """A batch that is never drawn for training, or a part of it."""

    def valid_batches(self, size: int) -> list[Batch]:
        """The validation set, always the same, `size` examples at a time."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The mean loss over a batch, in nats."""


class Text:
    """Predict every token of a text from those before."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokens = Tokens.open(stdlib_tokens() if recipe.data == "stdlib" else Path(recipe.data))
        self.tokens.check(recipe.context)
        self.sha256 = self.tokens.sha256

    def model(self) -> torch.nn.Module:
        return model.language_model(self.recipe, self.tokens.vocab_size)

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        return (self.tokens.batch(self.recipe.seed, step, self.recipe.batch, self.recipe.context, part),)

    def held_out(self, number: int, part: slice = WHOLE) -> Batch:
        return (self.tokens.held_out(self.recipe.seed, number, self.recipe.batch, self.recipe.context, part),)

    def valid_batches(self, size: int) -> list[Batch]:
        return [(batch,) for batch in self.tokens.valid_batches(self.recipe.eval_sequences, size, self.recipe.context)]

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        (tokens,) = batch
        logits = model(input_ids=tokens[:, :-1]).logits
        return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


class Pictures:
    """Tell the class of an image."""

    def __init__(self, recipe: ImageRecipe) -> None:
        self.recipe = recipe
        self.images = images.open_images(recipe)
        self.sha256 = self.images.sha256

    def model(self) -> torch.nn.Module:
        return model.vision_model(self.recipe, self.images.channels, self.images.classes)

    def batch(self, step: int, part: slice = WHOLE) -> Batch:
        pixels, labels = self.images.batch("train", self.recipe.seed, step, self.recipe.batch, self.recipe.examples)
        return pixels[part], labels[part]

    def held_out(self, number: int, part: slice = WHOLE) -> Batch:
        pixels, labels = self.images.batch("valid", self.recipe.seed, number, self.recipe.batch)
        return pixels[part], labels[part]

    def valid_batches(self, size: int) -> list[Batch]:
        return [*self.images.first("valid", self.recipe.eval_images, size)]

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        pixels, labels = batch
        return cross_entropy(model(pixel_values=pixels / 127.5 - 1.0).logits.float(), labels)


def task_of(recipe: Training) -> Task:
    """Open the recipe's data.

    Raises:
        BadInputError: it is missing, damaged or too small.
    """
    return Text(recipe) if isinstance(recipe, Recipe) else Pictures(recipe)  # type: ignore[arg-type]
