import json
import os
from pathlib import Path

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
    """Red and blue pictures of two sizes, 20 of each color."""
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            size = (30, 40) if i % 2 else (64, 24)
            Image.new("RGB", size, color).save(tmp_path / "pictures" / name / f"{i}.png")
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


def test_what_a_folder_of_images_leaves_out_is_said(cache, folder, tmp_path, capsys):
    (tmp_path / "green").mkdir()
    (folder / "green").symlink_to("../green")
    (folder / "red" / "gone.png").symlink_to("nothing.png")
    (folder / "red" / ".hidden.png").write_bytes(b"")
    (folder / "red" / "notes.txt").write_text("no image")
    os.mkfifo(folder / "blue" / "pipe.png")
    (folder / "blue" / "more.png").symlink_to("../red/1.png")
    images = open_images(ImageRecipe(data=str(folder), examples=30))
    assert {split: len(labels) for split, labels in images.labels.items()} == {"train": 36, "valid": 5}
    line = capsys.readouterr().out
    link = f"{folder}/blue/more.png -> {folder}/red/1.png"
    assert f"{folder}: 41 files, 1 link among them (first: {link}); skipped " in line
    for part in (
        "linked folder",
        "broken link",
        "hidden path",
        "other file",
        "special file",
    ):
        assert f"1 {part} (first: " in line


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def deep_pixels(path: Path) -> None:
    Image.fromarray(np.full((30, 30), 30_000, np.uint16)).save(path)


@pytest.mark.parametrize("damage", [truncated, deep_pixels, lambda path: path.write_bytes(b"")])
def test_an_image_that_cannot_be_read_is_named(damage, cache, folder):
    damage(folder / "blue" / "7.png")
    with pytest.raises(BadInputError, match=r"cannot read .*/blue/7\.png \("):
        open_images(ImageRecipe(data=str(folder), examples=30))
    assert not list(cache.iterdir())


@pytest.mark.parametrize("place", ["red/deeper/a.png", "a.png"])
def test_an_image_that_is_not_in_the_folder_of_its_class_is_an_error(place, cache, folder):
    (folder / place).parent.mkdir(exist_ok=True)
    Image.new("RGB", (30, 30)).save(folder / place)
    with pytest.raises(BadInputError, match=r"cannot read images with classes from .*lies directly in the folder of"):
        open_images(ImageRecipe(data=str(folder), examples=30))


@pytest.mark.parametrize(("column", "message"), [("image", "it has no image"), ("label", "it has no class")])
def test_a_row_without_an_image_or_a_class_is_named(column, message, cache, folder, monkeypatch):
    import datasets

    rows = datasets.load_dataset("imagefolder", data_dir=str(folder))["train"].cast_column(
        "image", datasets.Image(decode=False)
    )
    half = rows.to_list()
    half[3][column] = None
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["blue", "red"]))
    data = {"train": datasets.Dataset.from_list(half, features=features)}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    with pytest.raises(BadInputError, match=rf"hf:a: cannot read .* \({message}\)"):
        open_images(ImageRecipe(data="hf:a", examples=30))


def test_other_images_in_a_folder_of_the_same_name_are_other_data(cache, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    recipe = ImageRecipe(data="pictures", examples=30)
    before = open_images(recipe)
    assert open_images(recipe).sha256 == before.sha256
    for path in folder.rglob("*.png"):
        Image.new("RGB", (30, 30), (0, 255, 0)).save(path)
    assert open_images(recipe).sha256 != before.sha256


def test_a_run_inside_the_images_is_refused(cli, folder, capsys):
    before = {*folder.rglob("*")}
    (folder.parent / "link").symlink_to(folder)
    sizes = (
        "--examples",
        "20",
        "--images",
        "10",
        "20",
        "--size",
        "8",
        "--steps",
        "20",
        "--warmup",
        "2",
        "--width",
        "32",
        "--layers",
        "1",
    )
    assert cli("run", "vit", "--data", str(folder), "--out", folder.parent / "link" / "run", *sizes) == 2
    assert "link/run lies inside" in capsys.readouterr().err
    assert {*folder.rglob("*")} == before


@pytest.mark.parametrize("text", ["{", "[]", '{"channels": 3}'])
def test_a_damaged_description_is_named(text, cache):
    open_images(ImageRecipe(examples=10))
    (description,) = cache.rglob(META)
    description.write_text(text)
    with pytest.raises(BadInputError, match=r"is damaged \(.*\); remove it"):
        Images.open(description.parent)


def test_a_damaged_folder_is_named(cache):
    open_images(ImageRecipe(examples=10))
    (store,) = (path.parent for path in cache.rglob(META))
    labels = (store / "train-labels.bin").read_bytes()
    (store / "train-labels.bin").write_bytes(labels[:-4])
    with pytest.raises(BadInputError, match=r"is damaged: its files are not as long as images\.json says; remove it"):
        Images.open(store)


@pytest.mark.parametrize("name", ["train.bin", "train-labels.bin", "valid.bin", "valid-labels.bin"])
def test_other_images_or_classes_of_the_same_number_are_refused(name, cache):
    open_images(ImageRecipe(examples=100))
    (path,) = cache.rglob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 // 4 * 4] ^= 1
    path.write_bytes(content)
    split = name.partition(".")[0].removesuffix("-labels")
    with pytest.raises(
        BadInputError, match=rf"is damaged: the SHA-256 of {split} is not what images\.json says; remove"
    ):
        open_images(ImageRecipe(examples=100))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"classes": 5}, "train has classes beyond 5"), ({"classes": True}, "classes is True"), ({"channels": 0}, "")],
)
def test_a_description_that_does_not_fit_the_images_is_refused(change, said, cache):
    open_images(ImageRecipe(examples=100))
    (path,) = cache.rglob(META)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInputError, match=rf"is damaged.*{said}.*remove it"):
        open_images(ImageRecipe(examples=100))
