import numpy as np
import pytest
import torch
from PIL import Image

from ademamix.lab.config import BadInputError, ImageRecipe
from ademamix.lab.data.images import DIGITS, META, Images, open_images
from ademamix.lab.training.tasks import task_of


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADEMAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ademamix.lab.data.images.VALID_GLYPHS", 300)
    return tmp_path / "cache"


def test_glyphs_are_the_same_every_time_and_more_of_them_begin_with_the_same_ones(cache):
    few = open_images(ImageRecipe(examples=100))
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")}
    again = open_images(ImageRecipe(examples=100))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")} == made
    assert again.sha256 == few.sha256
    many = open_images(ImageRecipe(examples=1500))
    assert len(few.labels["train"]) == 1024
    assert len(many.labels["train"]) == 2048
    assert np.array_equal(many.pixels["train"][:1024], few.pixels["train"])
    assert (few.channels, few.classes) == (1, len(DIGITS))


def test_glyphs_show_something_and_classes_are_even(cache):
    images = open_images(ImageRecipe(examples=1000))
    counts = np.bincount(images.labels["train"], minlength=len(DIGITS))
    # 1024 draws of 10 classes: 102 on average, with a standard deviation of 9.6.
    assert counts.min() > 102 - 6 * 9.6
    assert counts.max() < 102 + 6 * 9.6
    assert not np.array_equal(images.pixels["train"][0], images.pixels["valid"][0])
    means = [images.pixels["train"][images.labels["train"] == label].std(axis=0).mean() for label in range(10)]
    assert min(means) > 20  # paper, ink, places and noise differ


def test_batches_are_drawn_from_the_first_examples_alone(cache):
    recipe = ImageRecipe(examples=10, batch=64)
    task = task_of(recipe)
    pixels, labels = task.batch(3)
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((64, 1, 20, 20), torch.float32, torch.int64)
    first = {image.tobytes() for image in open_images(recipe).pixels["train"][:10]}
    assert {image.numpy().astype(np.uint8).tobytes() for image in pixels} <= first
    assert all(torch.equal(a, b) for a, b in zip(task.batch(3), task_of(recipe).batch(3), strict=True))
    assert not torch.equal(pixels, task.batch(4)[0])


def test_validation_images_are_the_first_ones_whatever_the_batch(cache):
    task = task_of(ImageRecipe(examples=10, eval_images=50))
    whole = torch.cat([pixels for pixels, _ in task.valid_batches(16)])
    assert torch.equal(whole, torch.cat([pixels for pixels, _ in task.valid_batches(7)]))
    assert len(whole) == 50


@pytest.fixture
def folder(tmp_path):
    """Red and blue pictures of two sizes, 20 of each colour."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            size = (30, 40) if i % 2 else (64, 24)
            Image.new("RGB", size, colour).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("source", ["", "hf:"])  # what loads a dataset of the hub loads a local one too
def test_a_folder_of_images_with_a_folder_for_each_class(source, cache, folder):
    images = open_images(ImageRecipe(data=f"{source}{folder}", examples=30))
    assert (images.channels, images.classes) == (3, 2)
    assert {split: len(labels) for split, labels in images.labels.items()} == {"train": 36, "valid": 4}
    for pixels, label in zip(images.pixels["train"], images.labels["train"], strict=True):
        blue, red = (pixels[2], pixels[0]) if label == 0 else (pixels[0], pixels[2])  # classes in alphabetical order
        assert (int(blue.min()), int(red.max())) == (255, 0)


def test_bad_images_are_named(cache, folder, tmp_path):
    with pytest.raises(BadInputError, match=r"no such folder of images: nowhere \(a dataset .* is hf:NAME\)"):
        open_images(ImageRecipe(data="nowhere"))
    with pytest.raises(BadInputError, match=r"has 36 training images, 37 are wanted"):
        open_images(ImageRecipe(data=str(folder), examples=37))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match=r"cannot read images with classes from .*empty"):
        open_images(ImageRecipe(data=str(tmp_path / "empty")))
    assert not list(cache.glob("*.partial"))


def test_a_damaged_folder_is_named(cache):
    open_images(ImageRecipe(examples=10))
    (store,) = (path.parent for path in cache.rglob(META))
    labels = (store / "train-labels.bin").read_bytes()
    (store / "train-labels.bin").write_bytes(labels[:-4])
    with pytest.raises(BadInputError, match=r"is damaged: its files are not as long as images\.json says; remove it"):
        Images.open(store)
