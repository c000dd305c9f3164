"""Images as a user names them: a folder, a data set of the Hugging Face hub, or noise."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from exporter.artifacts import CalibrationRef
from exporter.errors import (
    CalibrationError,
    DepthcutError,
    ModelSourceError,
    TextSourceError,
    UnsafeInputError,
    first_line,
    pass_on_memory_error,
)
from exporter.files import sha256_bytes, sha256_file
from exporter.models.decoding_rules import settings_of
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.model_folder import OF_IMAGES, PIXELS, image_shape, read_object
from exporter.models.residual_stream import probe_inputs, run_backbone
from exporter.models.texts.pairs import RANDOM
from exporter.models.texts.samples import CalibrationText, Sources
from exporter.models.texts.sources import PYDOC, Part, TextSource, hub_rows
from exporter.optional import require
from exporter.processes import available_bytes
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import check_file, read_bytes

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

Pixels = NDArray[np.float32]
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
    """One image."""

    name: str
    label: str | int | None = None  # the name or number of its class; None where it isn't known
    image: Callable[[], Any] | None = None  # None where it is read from the file of that name
    root: Path | None = None  # None: the file's own
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
    """Images where a model of texts has documents, of which there are then none."""

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
    folders = sorted(place for place in path.iterdir() if place.is_dir())
    labelled = [(file, place) for place in folders for file in _files(place)]
    if files and labelled:
        raise TextSourceError(
            f"{path} holds images beside folders of images: {files[0].name} has no class.",
            "Put all images into folders named as their classes, or all side by side.",
            code="one-sided",
        )
    pictures = [Picture(str(file), root=path) for file in files]
    pictures += [Picture(str(file), place.name, root=path) for file, place in labelled]
    if not pictures:
        raise TextSourceError(
            f"{path} holds no images ({', '.join(SUFFIXES)}).", IMAGES_HINT, code="no-images"
        )
    chosen = _mixed(pictures)
    for picture in chosen:
        check_file(Path(picture.name), path, limit=_LARGEST_BYTES)
    chosen = tuple(replace(picture, sha256=sha256_file(Path(picture.name))) for picture in chosen)
    names = [f"{picture.label}/{Path(picture.name).name}" for picture in chosen]
    return _known(spec, chosen, names, len(pictures))


def _known(source: str, chosen: tuple[Picture, ...], texts: list[str], there: int) -> Images:
    """Images with their hashes, each by what it shows and by what else is told of it."""
    digests = [picture.sha256 for picture in chosen]
    shown = sha256_bytes("\n".join(sorted(set(digests))).encode())
    lines = (" ".join(pair) for pair in zip(texts, digests, strict=True))
    content = sha256_bytes(os.fsencode("\n".join(lines)))  # names needn't be UTF-8
    return Images(source, (), shown, content_sha256=content, pictures=chosen, there=there)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


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
    result = list(_read(pictures, spec))
    if not result:
        raise TextSourceError(f"{spec} holds no images.", IMAGES_HINT, code="no-images")
    chosen = _mixed(result)
    return _known(label, chosen, [str(picture.label) for picture in chosen], len(result))


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


IMAGES = 64
"""Images where nobody says how many."""
_PREPROCESSOR = "preprocessor_config.json"
_KINDS = ("ViT", "DeiT", "Beit", "Bit")
_ENDS = ("ImageProcessor", "FeatureExtractor", "ImageProcessorFast", "ImageProcessorPil")
_SEEDS: Mapping[Part, int] = {"calibration": 0, "evaluation": 1}
_COLOURS = 3
_Size = Annotated[int, Field(gt=0, le=1 << 12)]
_Sizes = _Size | dict[str, _Size]


class _Settings(BaseModel):
    """The settings of an image processor that matter for classifiers."""

    model_config = ConfigDict(strict=True)

    do_resize: bool = True
    size: _Sizes | None = None
    resample: Annotated[int, Field(ge=0, le=5)] = 2
    do_center_crop: bool = False
    crop_size: _Sizes | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


@dataclass(frozen=True)
class ImageReader:
    """Turns images into a classifier's input."""

    name: str
    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def of(cls, loaded: LoadedModel) -> ImageReader:
        """That of a loaded model."""
        model: Any = loaded.model
        return cls(loaded.ref.source, loaded.path, model.config.to_dict())

    def pixels(self, pictures: Sequence[Picture]) -> Pixels:
        """What the model reads of images, ``[images, colours, height, width]``."""
        wanted = image_shape(self.config)
        needed, free = 4 * len(pictures) * math.prod(wanted), available_bytes()
        if free is not None and needed > free:
            raise ModelSourceError(
                f"{len(pictures):,} images of the shape {list(wanted)} take {needed / 1e9:.1f} GB; "
                f"{free / 1e9:.1f} GB are free.",
                "Take fewer of them.",
                code="images-too-large",
            )
        pixels = np.empty((len(pictures), *wanted), np.float32)
        for number, picture in enumerate(pictures):
            pixels[number] = self._one(picture, wanted)
        return pixels

    def noise(self, number: int, part: Part) -> Pixels:
        """Normal noise of the same shape; the first images are the same however many are asked."""
        shape = (number, *image_shape(self.config))
        return np.random.default_rng(_SEEDS[part]).standard_normal(shape, dtype=np.float32)

    def of_images(self, images: Images, number: int, part: Part) -> Pixels:
        """The first images, or noise."""
        if images.is_random:
            return self.noise(number, part)
        return self.pixels(images.pictures[:number])

    def _one(self, picture: Picture, wanted: tuple[int, ...]) -> Pixels:
        image, (processor, shortest) = picture.read(), self._processor
        refuse_large(image, picture.name, shortest)
        try:
            with quiet_transformers():
                pixels: Pixels = processor(image, return_tensors="np")["pixel_values"][0]
        # A processor's settings may contradict each other in many ways.
        except Exception as error:
            pass_on_memory_error(error)
            raise ModelSourceError(
                f"The image processor of {self.name} fails on {picture.name}: {first_line(error)}.",
                "Take the file that belongs to the model.",
                code="image-processor-fails",
            ) from error
        if pixels.shape != wanted:
            raise ModelSourceError(
                f"The image processor of {self.name} makes images of the shape "
                f"{list(pixels.shape)}; the model takes {list(wanted)}.",
                "Take the file that belongs to the model.",
                code="other-image-size",
            )
        return pixels

    @cached_property
    def _processor(self) -> tuple[Any, int]:
        """Transformers' own, and the pixels to which it resizes the shorter side."""
        result, where = self._told()
        kind = str(result.get("image_processor_type") or result.get("feature_extractor_type"))
        family = next((f for f in _KINDS if kind in {f + end for end in _ENDS}), None)
        if family is None:
            raise ModelSourceError(
                f"{where}: the image processor {kind[:60]} is none of those that are used here: "
                f"{', '.join(f'{item}ImageProcessor' for item in _KINDS)}.",
                "Write its settings as one of these, if they say the same.",
                code="other-image-processor",
            )
        if image_shape(self.config)[0] != _COLOURS:
            raise ModelSourceError(
                f"{self.name} takes images of {image_shape(self.config)[0]} colours.",
                f"Classifiers of {_COLOURS} are taken.",
                code="other-colours",
            )
        # The fast processors write null for what they leave to their class.
        said = {name: value for name, value in result.items() if value is not None}
        settings = settings_of(_Settings, said, where).model_dump(exclude_unset=True)
        require("PIL.Image", extra="vision")
        library = require("transformers", extra="torch")
        # transformers 4.57 calls so what 5 calls ...Pil; 5 makes the plain one with torchvision.
        name = f"{family}ImageProcessor"
        made = getattr(library, f"{name}Pil", None) or getattr(library, name)
        size = settings.get("size") or 0
        shortest = size if isinstance(size, int) else size.get("shortest_edge", 0)
        try:
            return made(**settings), shortest
        except ValueError as error:  # names of sizes that don't belong together
            raise ModelSourceError(
                f"{where}: {first_line(error)}.",
                "Take the file that belongs to the model.",
                code="odd-setting",
            ) from error

    def _told(self) -> tuple[dict[str, Any], str]:
        for name in (_PREPROCESSOR, "processor_config.json"):
            result = read_object(self.folder / name)
            result = result.get("image_processor", result)
            if isinstance(result, dict) and result:
                return result, str(self.folder / name)
        raise ModelSourceError(
            f"{self.folder} has no {_PREPROCESSOR}, which says how an image becomes numbers.",
            "Put the model's own there, or give random for noise in place of images.",
            code="no-image-processor",
        )


def reads_images(model: Any) -> bool:
    """Whether a model's input are images."""
    return bool(model.main_input_name == PIXELS)


def image_samples(
    loaded: LoadedModel,
    spec: str | None = None,
    *,
    samples: int | None = None,
    part: Part = "calibration",
    apart_from: Sequence[CalibrationRef] = (),
    progress: Progress = QUIET,
) -> CalibrationText:
    """Makes the samples of a model that reads images."""
    refuse_unclassifying(loaded)
    number, reader = samples or IMAGES, ImageReader.of(loaded)
    images = read_images(spec or RANDOM, part=part)
    if images.is_random and spec != RANDOM:
        progress.say(f"{part}: noise, since no images are named; a folder of them chooses better")
    spans = [span for ref in apart_from if ref.sha256 == images.sha256 for span in ref.spans]
    most = max(MOST_IMAGES, number) if images.is_random else len(images.pictures)
    left = (place for place in range(most) if not any(place in span for span in spans))
    places = np.array([*islice(left, number)], np.int64)
    if images.is_random:
        pixels = reader.noise(int(places.max(initial=-1)) + 1, part)[places]
    else:
        pixels = reader.pixels([images.pictures[place] for place in places])
    if samples is not None and len(pixels) < samples:
        progress.say(f"{images.source}: {len(pixels)} images of the {samples} asked for")
    positions = run_backbone(loaded.model, probe_inputs(loaded.model)).last_hidden_state.shape[1]
    return of_pixels(pixels, int(positions), images.source, images.sha256, places)


def of_pixels(
    pixels: Pixels,
    positions: int,
    source: str,
    sha256: str,
    places: NDArray[np.int64] | None = None,
) -> CalibrationText:
    """Images as samples with so many tokens, all of the id 0."""
    ids = np.zeros((len(pixels), positions), np.int64)
    text = CalibrationText.unpadded(ids, source, sha256, places)
    return replace(text, sources=Sources({PIXELS: pixels}, text.mask))


def refuse_unclassifying(loaded: LoadedModel) -> None:
    """Refuses models of images that give no classes, or give them by two heads."""
    name = type(loaded.model).__name__
    if not name.endswith(OF_IMAGES):
        raise CalibrationError(
            f"{loaded.ref.source} is a {name}: of models that read images, those that classify "
            "them by one head are taken.",
            f"Give one whose config names a class that ends with {OF_IMAGES} under architectures; "
            "for DeiTForImageClassificationWithTeacher, DeiTForImageClassification has the head "
            "of the class token alone.",
            code="takes-no-text",
        )
