"""Images as a user names them: a folder, a data set of the Hugging Face hub, or noise.

A folder holds image files, or a subfolder with image files for each class, which is then named as
the subfolder is (as torchvision and the library datasets have it). ``random`` is noise from a seed,
and so is ``pydoc``, the text that is usual for other models.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
_NOISE = "noise images"


@dataclass(frozen=True, eq=False)
class Picture:
    """One image.

    Attributes:
        name: What errors call it.
        label: The name or number of its class; None where it isn't known.
        image: Pillow's object; None where it is read from the file of that name.
    """

    name: str
    label: str | int | None = None
    image: Any = None

    def read(self) -> Any:
        """The image, as Pillow has it, in RGB.

        Raises:
            TextSourceError: It can't be read, or is no image.
            UnsafeInputError: The file may not be read from where it is, or is too large.
            MissingDependencyError: Without Pillow.
        """
        pillow = require("PIL.Image", extra="vision")
        try:
            image = self.image
            if image is None:
                content = io.BytesIO(read_bytes(Path(self.name), limit=_LARGEST_BYTES))
                image = pillow.open(content, formats=_FORMATS)
            if image.width * image.height > _MOST_PIXELS:
                raise TextSourceError(
                    f"{self.name} has {image.width} x {image.height} pixels.",
                    "Make it smaller: classifiers see a few hundred.",
                    code="image-too-large",
                )
            return image.convert("RGB")
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


@dataclass(frozen=True, eq=False)
class Images(TextSource):
    """Images where a model of texts has documents, of which there are then none.

    Attributes:
        pictures: So ordered that the first ones are of all classes, no more than
            :data:`MOST_IMAGES`; none for noise.
        there: How many there are.
    """

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
    """Finds the images that a user named; files are read later.

    Args:
        spec: See above.
        part: What they are for; it picks the split of a data set that names none.

    Raises:
        TextSourceError: There is no such folder, or it holds no images, or only some have a class.
        UnsafeInputError: A file is no regular one, or is too large.
        MissingDependencyError: For ``hf:`` without the extra ``datasets``.
    """
    if spec in (RANDOM, PYDOC):
        label = f"{RANDOM} ({_NOISE}, {part})"
        return Images(label, (), sha256_bytes(label.encode()))
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
    found = [Picture(str(file)) for file in files]
    found += [Picture(str(file), place.name) for file, place in labelled]
    if not found:
        raise TextSourceError(
            f"{path} holds no images ({', '.join(SUFFIXES)}).", IMAGES_HINT, code="no-images"
        )
    chosen = _mixed(found)
    for each in chosen:
        check_file(Path(each.name), limit=_LARGEST_BYTES)
    told = "\n".join(map(_told, chosen))
    return Images(spec, (), sha256_bytes(told.encode()), pictures=chosen, there=len(found))


def _told(picture: Picture) -> str:
    """What an image is known again by: its label, its name in its folder, what it holds."""
    path = Path(picture.name)
    return f"{picture.label}/{path.name} {sha256_file(path)}"


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
    found = [_of_row(row, column, features, spec) for row in _read(islice(rows, MOST_IMAGES), spec)]
    if not found:
        raise TextSourceError(f"{spec} holds no images.", IMAGES_HINT, code="no-images")
    told = [str(each.label).encode() + each.image.tobytes() for each in found]
    digest = sha256_bytes("\n".join(map(sha256_bytes, told)).encode())
    return Images(label, (), digest, pictures=_mixed(found), there=len(found))


def _read(rows: Iterable[Any], spec: str) -> Iterable[Any]:
    try:
        yield from rows
    except Exception as error:  # the library raises anything from OSError to its own classes
        pass_on_memory_error(error)
        raise TextSourceError(
            f"{spec} can't be read: {first_line(error)}.", IMAGES_HINT, code="no-image"
        ) from error


def _of_row(row: Any, column: str, features: Any, spec: str) -> Picture:
    image = row.get(column)
    if not hasattr(image, "convert"):
        raise TextSourceError(
            f"{spec}: there is no image in the column {column!r}.",
            f"The columns are {', '.join(row)}. Name it: hf:DATASET:CONFIG:SPLIT:COLUMN.",
            code="column-missing",
        )
    number = row.get("label")
    names = getattr(features.get("label"), "names", None)
    if isinstance(number, int) and names is not None and 0 <= number < len(names):
        number = names[number]
    return Picture(f"an image of {spec}", number, image)
