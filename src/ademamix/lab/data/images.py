"""Images and their classes, as files of pixels that are mapped into memory: from a folder, from the hub, or drawn here.

A folder holds {split}.bin (uint8 [images, channels, size, size]), {split}-labels.bin (int32) and images.json.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ademamix.backends.cache import cache_folder
from ademamix.lab.config import BadInputError, ImageRecipe, to_json
from ademamix.lab.console import say
from ademamix.lab.data.sources import HUB, Tally, files_in, first_line, state_of
from ademamix.lab.data.tokens import PIECE, drawn, identity
from ademamix.lab.files import another_may_win, written_aside

META = "images.json"
SPLITS = ("train", "valid")
VALID_SHARE = 0.1  # of the images where the data has no validation split of its own
VALID_GLYPHS = 4000
DIGITS = "0123456789"

Example = tuple[NDArray[np.uint8], int]  # pixels [channels, size, size] and a class


@dataclass(frozen=True)
class Images:
    """Images on disk."""

    channels: int
    classes: int
    sha256: str  # of what images.json says, which holds the checksums of all pixels
    pixels: dict[str, NDArray[np.uint8]]
    labels: dict[str, NDArray[np.int32]]

    @classmethod
    def open(cls, folder: Path) -> "Images":
        """Open a folder that `write_images` made; BadInputError where it is damaged."""
        try:
            text = (folder / META).read_text()
            meta = json.loads(text)
            shape = (-1, meta["channels"], meta["size"], meta["size"])
            pixels = {split: np.memmap(folder / f"{split}.bin", np.uint8, mode="r").reshape(shape) for split in SPLITS}
            labels = {split: np.fromfile(folder / f"{split}-labels.bin", np.int32) for split in SPLITS}
            whole = all({len(pixels[split]), len(labels[split])} == {meta[split]["images"]} for split in SPLITS)
            channels, classes = meta["channels"], meta["classes"]
            if type(classes) is not int:
                raise TypeError(f"classes is {classes!r:.60}")
            expected = {split: meta[split]["sha256"] for split in SPLITS}
        except (ValueError, TypeError, KeyError) as error:
            raise BadInputError(f"{folder} is damaged ({error}); remove it") from error
        if not whole:
            raise BadInputError(f"{folder} is damaged: its files are not as long as {META} says; remove it")
        for split in SPLITS:
            found = _sum_of(folder, split, meta["size"] ** 2 * channels, *map(identity, _files(folder, split)))
            if found != expected[split]:
                raise BadInputError(f"{folder} is damaged: the SHA-256 of {split} is not what {META} says; remove it")
            if not 0 <= labels[split].min() <= labels[split].max() < classes:
                raise BadInputError(f"{folder} is damaged: {split} has classes beyond {classes} ({META}); remove it")
        return cls(channels, classes, hashlib.sha256(text.encode()).hexdigest(), pixels, labels)

    def batch(
        self, split: str, seed: int, number: int, count: int, examples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return random images, of the first `examples`, and their classes: a pure function of the arguments."""
        return self._at(split, drawn(seed, number, examples or len(self.labels[split]), count))

    def first(self, split: str, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return the first `count` images, `size` at a time."""
        chosen = np.arange(min(count, len(self.labels[split])))
        return [self._at(split, part) for part in np.split(chosen, range(size, len(chosen), size))]

    def _at(self, split: str, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        pixels, labels = self.pixels[split][chosen], self.labels[split][chosen]
        return torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))


def _files(folder: Path, split: str) -> tuple[Path, Path]:
    """The pixels and the classes of a split."""
    return folder / f"{split}.bin", folder / f"{split}-labels.bin"


@cache  # as that of token files
def _sum_of(folder: Path, split: str, size: int, *_: tuple[int, int, int]) -> str:
    """The SHA-256 of a split's images, each with its class behind it."""
    pixels, labels = _files(folder, split)
    images = np.memmap(pixels, np.uint8, mode="r").reshape(-1, size)
    classes = np.fromfile(labels, np.int32).view(np.uint8).reshape(-1, 4)
    digest, at_once = hashlib.sha256(), max(1, PIECE // size)
    for start in range(0, len(images), at_once):
        some = slice(start, start + at_once)
        digest.update(np.concatenate([images[some], classes[some]], axis=1).data)
    return digest.hexdigest()


def open_images(recipe: ImageRecipe) -> Images:
    """Return the images that a recipe trains on, prepared and kept in the cache folder on first use.

    Raises:
        BadInputError: there is no such data, or it has fewer training images than the recipe wants.
    """
    glyphs = recipe.data == "glyphs"
    about: dict[str, Any] = {"source": recipe.data, "size": recipe.size}
    if glyphs:  # as many as wanted; more of them begin with the same ones
        about["train"] = 1 << math.ceil(math.log2(max(recipe.examples, 1024)))
        about["drawn by"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # others would be drawn otherwise
    key, tally, files = json.dumps(about), Tally(), None
    if not glyphs and not recipe.data.startswith(HUB):
        if not Path(recipe.data).is_dir():
            given = f"{recipe.data} (a dataset of the Hugging Face hub is hf:NAME)"
            raise BadInputError(f"no such folder of images: {given}")
        files = files_in(Path(recipe.data), tally)
        key += state_of(files, Path(recipe.data))  # another folder of this name, or other images in it, are other data
    name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    folder = cache_folder() / f"images-{name}"
    if not (folder / META).exists():
        splits = _glyphs(recipe.size, about["train"]) if glyphs else _dataset(recipe.data, recipe.size, files, tally)
        with another_may_win(folder):
            write_images(folder, about, splits)
    images = Images.open(folder)
    found = len(images.labels["train"])
    if found < recipe.examples:
        raise BadInputError(f"{recipe.data} has {found:,} training images, {recipe.examples:,} are wanted (--examples)")
    return images


def write_images(out: Path, about: dict[str, Any], splits: Iterable[tuple[str, Example]]) -> None:
    """Write a folder of images, whole or not at all, from examples and the split that each belongs to."""
    counts, digests = dict.fromkeys(SPLITS, 0), {split: hashlib.sha256() for split in SPLITS}
    classes, channels = 0, 0
    with written_aside(out) as aside:
        pixel_files = {split: open(aside / f"{split}.bin", "wb") for split in SPLITS}  # noqa: SIM115
        label_files = {split: open(aside / f"{split}-labels.bin", "wb") for split in SPLITS}  # noqa: SIM115
        try:
            for split, (pixels, label) in splits:
                classes, channels = max(classes, label + 1), len(pixels)
                data = pixels.tobytes()
                pixel_files[split].write(data)
                label_files[split].write(np.int32(label).tobytes())
                digests[split].update(data + np.int32(label).tobytes())
                counts[split] += 1
        finally:
            for file in (*pixel_files.values(), *label_files.values()):
                file.close()
        empty = [split for split in SPLITS if not counts[split]]
        if empty:
            raise BadInputError(f"{about['source']} has no images for {empty[0]}: {sum(counts.values())} in all")
        found = {split: {"images": counts[split], "sha256": digests[split].hexdigest()} for split in SPLITS}
        to_json(aside / META, about | {"channels": channels, "classes": classes} | found)


def _dataset(source: str, size: int, files: list[Path] | None, tally: Tally) -> Iterator[tuple[str, Example]]:
    """The images of a folder with a folder for each class, which has these files, or of a dataset of the hub."""
    import datasets

    try:
        if files is None:
            splits = dict(datasets.load_dataset(source.removeprefix(HUB)))
        else:
            splits = dict(datasets.load_dataset("imagefolder", data_dir=source))
        features = splits["train"].features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if len(images) != 1 or len(labels) != 1:
            raise ValueError(
                "every image must have one class; in a folder, it lies directly in the folder of its class"
            )
    except Exception as error:  # whatever the library, the hub or the network raises
        raise BadInputError(f"cannot read images with classes from {source} ({first_line(error)})") from error
    as_stored = {name: rows.cast_column(images[0], datasets.Image(decode=False)) for name, rows in splits.items()}
    if files is not None:
        found = {image["path"] for rows in as_stored.values() for image in rows[images[0]]}
        tally.files = len(found)
        for file in files:
            if os.path.abspath(file) not in found:
                tally.skip("other file", file)
    valid = next((name for name in ("validation", "test") if name in splits), None)
    for name in splits:
        if name not in ("train", valid):
            tally.skip("split", name)
    say(f"{source}: {tally}")
    if valid is None:
        parts = as_stored["train"].train_test_split(VALID_SHARE, seed=0)
        chosen = {"train": parts["train"], "valid": parts["test"]}
    else:
        chosen = {"train": as_stored["train"], "valid": as_stored[valid]}
    decode = features[images[0]].decode_example
    for split, rows in chosen.items():
        for number, row in enumerate(rows.shuffle(seed=0), 1):
            stored, label = row[images[0]], row[labels[0]]
            try:
                if stored is None or label is None or label < 0:  # -1 stands for an unknown class
                    raise ValueError("it has no class" if stored else "it has no image")
                if stored["bytes"] is None:  # what opens a path leaves it open when the image is damaged
                    stored["bytes"] = Path(stored["path"]).read_bytes()
                example = _squared(decode(stored), size), label
            except Exception as error:  # as above; a damaged image may raise anything
                where = (stored or {}).get("path") or f"image {number} of {split}"
                raise BadInputError(f"{source}: cannot read {where} ({first_line(error)})") from error
            yield split, example


def _squared(image: Any, size: int) -> NDArray[np.uint8]:
    """An RGB image scaled and cut to a square around its middle."""
    from PIL import ImageOps

    if image.mode[0] in "IF":  # they would be clipped to white
        raise ValueError("it has more than 8 bits per channel")
    pixels: NDArray[np.uint8] = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size))).transpose(2, 0, 1)
    return pixels


def _glyphs(size: int, train: int) -> Iterator[tuple[str, Example]]:
    """Digits in matplotlib's text fonts, dark on light, placed, sized and turned at random, under noise."""
    from PIL import Image, ImageDraw, ImageFont

    fonts = _fonts()
    of_size = {
        (path, pixels): ImageFont.truetype(str(path), pixels)
        for path in fonts
        for pixels in range(3 * size // 5, size + 1, max(1, size // 12))
    }
    cases = list(of_size.values())
    for part, (split, count) in enumerate((("valid", VALID_GLYPHS), ("train", train))):
        random = np.random.default_rng(part)
        for _ in range(count):
            label = int(random.integers(len(DIGITS)))
            font = cases[random.integers(len(cases))]
            place = size / 2 + random.uniform(-0.1, 0.1, 2) * size
            mask = Image.new("L", (size, size))
            ImageDraw.Draw(mask).text(tuple(place), DIGITS[label], fill=255, font=font, anchor="mm")
            mask = mask.rotate(float(random.uniform(-15, 15)), Image.Resampling.BILINEAR)
            paper, ink = random.uniform(160, 255), random.uniform(0, 90)
            share = np.asarray(mask, np.float32)[None] / 255
            pixels = paper + (ink - paper) * share + random.normal(0, random.uniform(5, 25), (1, size, size))
            yield split, (pixels.clip(0, 255).astype(np.uint8), label)


def _fonts() -> list[Path]:
    """matplotlib's fonts for text; those of mathematics lack letters or have others in their places."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    kinds = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*")
    return sorted(path for kind in kinds for path in folder.glob(f"{kind}.ttf") if "Display" not in path.name)
