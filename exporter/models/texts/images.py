"""Images as a user names them: a folder, a data set of the Hugging Face hub, or noise.

A folder holds image files, or a subfolder with image files for each class, which is then named as
the subfolder is (as torchvision and the library datasets have it). ``random`` is noise from a seed,
and so is ``pydoc``, the text that is usual for other models.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import (
    DepthcutError,
    TextSourceError,
    UnsafeInputError,
    first_line,
    pass_on_memory_error,
)
from exporter.files import sha256_bytes, sha256_file
from exporter.models.texts.pairs import RANDOM
from exporter.models.texts.sources import PYDOC, Part, TextSource, hub_rows
from exporter.optional import require
from graph_passes.files.reading import check_file, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
IMAGES_HINT = (
    "Give a folder of images, one with a subfolder of images for each class, "
    "hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]], or random for noise."
)
MOST_IMAGES = 1_000
"""Of a folder or a data set, at most: more are neither hashed nor read."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
_LARGEST_BYTES = 1 << 28
_MOST_PIXELS = 1 << 26
_LONGEST_TO_SHORTEST = 64
"""Where the shorter side is resized to a few hundred pixels, the longer one grows with it."""
_NOISE = "noise images"


@dataclass(frozen=True, eq=False)
class Picture:
    """One image.

    Attributes:
        name: What errors call it.
        label: The name or number of its class; None where it isn't known.
        image: Makes Pillow's object; None where it is read from the file of that name.
        root: The folder that was named, out of which no link leads; None: the file's own.
        sha256: Of the file, as it was found; empty where it isn't known.
    """

    name: str
    label: str | int | None = None
    image: Callable[[], Any] | None = None
    root: Path | None = None
    sha256: str = ""

    def read(self) -> Any:
        """The image, as Pillow has it, in RGB, turned as its EXIF data say."""
        pillow = require("PIL.Image", extra="vision")
        operations = require("PIL.ImageOps", extra="vision")
        try:
            if self.image is not None:
                image = self.image()
            else:
                image = pillow.open(io.BytesIO(self._content()), formats=_FORMATS)
            refuse_large(image, self.name)
            return operations.exif_transpose(image).convert("RGB")
        except (DepthcutError, UnsafeInputError):
            raise
        # Pillow's decoders raise many classes for a file that is none of theirs.
        except Exception as error:
            pass_on_memory_error(error)
            raise TextSourceError(
                f"{self.name} is no image that can be read: {first_line(error)}.",
                "Save it anew as PNG or JPEG, or leave it out.",
                code="no-image",
            ) from error

    def _content(self) -> bytes:
        """Of the file, if it is still the one that was found."""
        try:
            content = read_bytes(Path(self.name), self.root, limit=_LARGEST_BYTES)
        except FileNotFoundError as error:
            raise self._changed("is no longer there") from error
        if self.sha256 and sha256_bytes(content) != self.sha256:
            raise self._changed("is another file than when it was found")
        return content

    def _changed(self, how: str) -> TextSourceError:
        return TextSourceError(
            f"{self.name} {how}; hashes and figures are of what was found.",
            "Run the command again once nothing changes the folder any more.",
            code="images-changed",
        )


@dataclass(frozen=True, eq=False)
class Images(TextSource):
    """Images where a model of texts has documents, of which there are then none.

    Attributes:
        sha256: Of what they show: the same ones have it in whatever order, with whatever labels.
        content_sha256: Of their labels, names and order, too.
        pictures: So ordered that the first ones are of all classes, no more than
            :data:`MOST_IMAGES`; none for noise.
        there: How many there are.
    """

    content_sha256: str = ""
    pictures: tuple[Picture, ...] = ()
    there: int = 0

    @property
    def is_random(self) -> bool:
        """Whether they are noise."""
        return not self.pictures

    @property
    def has_labels(self) -> bool:
        """Whether it is known what is right."""
        return bool(self.pictures) and self.pictures[0].label is not None


def read_images(spec: str, *, part: Part) -> Images:
    """Finds the images that a user named; files are read later."""
    if spec in (RANDOM, PYDOC):
        label = f"{RANDOM} ({_NOISE}, {part})"
        digest = sha256_bytes(label.encode())
        return Images(label, (), digest, content_sha256=digest)
    if spec.startswith("hf:"):
        return _of_hub(spec, part)
    path = Path(spec)
    if not path.is_dir():
        raise TextSourceError(
            f"{spec} is no folder of images, which this model reads.",
            IMAGES_HINT,
            code="no-images",
        )
    files = _files(path)
    labelled = [(file, place) for place in _folders(path) for file in _files(place)]
    if files and labelled:
        raise TextSourceError(
            f"{path} holds images beside folders of images: {files[0].name} has no class.",
            "Put all images into folders named as their classes, or all side by side.",
            code="one-sided",
        )
    found = [Picture(str(file), root=path) for file in files]
    found += [Picture(str(file), place.name, root=path) for file, place in labelled]
    if not found:
        raise TextSourceError(
            f"{path} holds no images ({', '.join(SUFFIXES)}).", IMAGES_HINT, code="no-images"
        )
    chosen = _mixed(found)
    for each in chosen:
        check_file(Path(each.name), path, limit=_LARGEST_BYTES)
    chosen = tuple(replace(each, sha256=sha256_file(Path(each.name))) for each in chosen)
    told = [f"{each.label}/{Path(each.name).name}" for each in chosen]
    return _known(spec, chosen, told, len(found))


def _known(source: str, chosen: tuple[Picture, ...], told: list[str], there: int) -> Images:
    """Images with their hashes, each by what it shows and by what else is told of it."""
    digests = [each.sha256 for each in chosen]
    shown = sha256_bytes("\n".join(sorted(set(digests))).encode())
    lines = (" ".join(each) for each in zip(told, digests, strict=True))
    content = sha256_bytes(os.fsencode("\n".join(lines)))  # names needn't be UTF-8
    return Images(source, (), shown, content_sha256=content, pictures=chosen, there=there)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _folders(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir())


def _mixed(pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    """The first ones in an order by chance, the same each time, in which the classes take turns."""
    order = np.random.default_rng(0).permutation(len(pictures))
    seen: dict[str | int | None, int] = {}
    turns = []
    for place in order:
        label = pictures[place].label
        turns.append(seen.setdefault(label, 0))
        seen[label] += 1
    first = np.argsort(turns, kind="stable")[:MOST_IMAGES]
    return tuple(pictures[order[at]] for at in first)


def _of_hub(spec: str, part: Part) -> Images:
    """The first images of a data set, with their labels where a column has them."""
    label, rows = hub_rows(spec, part, "image")
    features = getattr(rows, "features", None) or {}
    column = label.rpartition(":")[2]
    rows = _undecoded(rows, features, column)
    pictures = (_of_row(row, column, features, spec) for row in islice(rows, MOST_IMAGES))
    found = list(_read(pictures, spec))
    if not found:
        raise TextSourceError(f"{spec} holds no images.", IMAGES_HINT, code="no-images")
    chosen = _mixed(found)
    return _known(label, chosen, [str(each.label) for each in chosen], len(found))


def _undecoded(rows: Any, features: Any, column: str) -> Any:
    """The same rows with images as their files are, which take a tenth of the memory."""
    feature = features.get(column)
    if not hasattr(feature, "decode_example"):
        return rows
    return rows.cast_column(column, replace(feature, decode=False))


def _opened(value: Any, feature: Any) -> tuple[Any, Callable[[], Any]]:
    """The image that a row's value is, and what makes it again: of its file, if that came along."""
    if not isinstance(value, dict) or not hasattr(feature, "decode_example"):
        return value, lambda: value
    image = feature.decode_example(value)
    if value.get("bytes"):
        return image, lambda: feature.decode_example(value)
    return image, lambda: image


def _read(pictures: Iterable[Picture], spec: str) -> Iterable[Picture]:
    try:
        yield from pictures
    except DepthcutError:
        raise
    except Exception as error:  # the library raises anything from OSError to its own classes
        pass_on_memory_error(error)
        raise TextSourceError(
            f"{spec} can't be read: {first_line(error)}.", IMAGES_HINT, code="no-image"
        ) from error


def _of_row(row: Any, column: str, features: Any, spec: str) -> Picture:
    image, make = _opened(row.get(column), features.get(column))
    if not hasattr(image, "convert"):
        raise TextSourceError(
            f"{spec}: there is no image in the column {column!r}.",
            f"The columns are {', '.join(row)}. Name it: hf:DATASET:CONFIG:SPLIT:COLUMN.",
            code="column-missing",
        )
    name, number = f"an image of {spec}", row.get("label")
    refuse_large(image, name)
    if isinstance(number, int) and number < 0:
        number = None  # so data sets mark what has no label, such as a test's images
    names = getattr(features.get("label"), "names", None)
    if isinstance(number, int) and names is not None and 0 <= number < len(names):
        number = names[number]
    return Picture(name, number, make, sha256=sha256_bytes(image.tobytes()))


def refuse_large(image: Any, name: str, shortest: int = 0) -> None:
    """Refuses an image that takes too much memory, as it is or resized, before it does."""
    shorter, longer = sorted((image.width, image.height))
    pixels = shorter * longer * max(1.0, shortest / shorter) ** 2 if shorter else 0
    if pixels > _MOST_PIXELS or longer > _LONGEST_TO_SHORTEST * shorter:
        resized = f", resized to {shortest} on the shorter side" if shortest else ""
        raise TextSourceError(
            f"{name} has {image.width} x {image.height} pixels{resized}; {_MOST_PIXELS:,} are "
            f"taken, on sides of which one is at most {_LONGEST_TO_SHORTEST} times the other.",
            "Make it smaller, or less narrow: classifiers see a few hundred.",
            code="image-too-large",
        )
