"""Images as a user names them: a folder, a data set of the Hugging Face hub, or noise."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError, ModelSourceError, TextSourceError, blaming
from exporter.files import sha256_bytes, sha256_file
from exporter.models.decoding_rules import settings_of
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.model_folder import OF_IMAGES, PIXELS, image_shape, read_object
from exporter.models.residual_stream import probe_inputs, run_backbone
from exporter.models.texts.samples import CalibrationText, Sources
from exporter.models.texts.sources import PYDOC, RANDOM, Part, TextSource, column_missing, hub_rows
from exporter.optional import require
from exporter.processes import available_bytes
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import check_file, read_bytes

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

Pixels = NDArray[np.float32]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
IMAGES_HINT = (
    f"Give a folder of images ({', '.join(SUFFIXES)}), one with a subfolder of images for each "
    "class, hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]], or random for noise."
)
IMAGES = 64
"""Images where nobody says how many."""
MOST_IMAGES = 1_000
"""Of a folder or a data set, at most: more are neither hashed nor read."""
OTHER_FILE = "Take the file that belongs to the model."
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
_LARGEST_BYTES = 1 << 28
_MOST_PIXELS = 1 << 26
_LONGEST_TO_SHORTEST = 64
"""Where the shorter side is resized to a few hundred pixels, the longer one grows with it."""
_NOISE = "noise images"
_KIND = re.compile(r"(ViT|DeiT|Beit|Bit)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
_SEEDS: Mapping[Part, int] = {"calibration": 0, "evaluation": 1}
_Size = Annotated[int, Field(gt=0, le=1 << 12)]
_Sizes = _Size | dict[str, _Size]


@dataclass(frozen=True, eq=False)
class Picture:
    """One image."""

    name: str
    label: str | int | None = None  # the name or number of its class; None where it isn't known
    root: Path | None = None  # None: the file's own
    content: bytes | None = None  # None: that of the file of that name
    sha256: str = ""

    def read(self) -> Any:
        """The image, as Pillow has it, in RGB, turned as its EXIF data say."""
        pillow = require("PIL.Image", extra="vision")
        operations = require("PIL.ImageOps", extra="vision")
        hint = "Save it anew as PNG or JPEG, or leave it out."
        with blaming(f"{self.name} is no image that can be read", hint, TextSourceError):
            content = self.content
            if content is None:
                content = read_bytes(Path(self.name), self.root, limit=_LARGEST_BYTES)
            image = pillow.open(io.BytesIO(content), formats=_FORMATS)
            refuse_large(image, self.name)
            return operations.exif_transpose(image).convert("RGB")


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
    folders = sorted(place for place in path.iterdir() if place.is_dir()) if path.is_dir() else []
    pictures = [Picture(str(file), root=path) for file in _files(path)]
    labelled = [Picture(str(f), folder.name, path) for folder in folders for f in _files(folder)]
    if pictures and labelled:
        raise TextSourceError(
            f"{path} holds images beside folders of images: {pictures[0].name} has no class.",
            "Put all images into folders named as their classes, or all side by side.",
            code="one-sided",
        )
    pictures += labelled
    chosen = _mixed(pictures, spec)
    for picture in chosen:
        check_file(Path(picture.name), path, limit=_LARGEST_BYTES)
    chosen = [replace(picture, sha256=sha256_file(Path(picture.name))) for picture in chosen]
    names = [f"{picture.label}/{Path(picture.name).name}" for picture in chosen]
    return _known(spec, chosen, names, len(pictures))


def _known(source: str, chosen: Sequence[Picture], texts: Sequence[str], there: int) -> Images:
    """Images with their hashes, each by what it shows and by what else is told of it."""
    digests = [picture.sha256 for picture in chosen]
    shown = sha256_bytes("\n".join(sorted(set(digests))).encode())
    lines = (" ".join(pair) for pair in zip(texts, digests, strict=True))
    content = sha256_bytes(os.fsencode("\n".join(lines)))  # names needn't be UTF-8
    return Images(source, (), shown, content_sha256=content, pictures=tuple(chosen), there=there)


def _files(folder: Path) -> list[Path]:
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES)


def _mixed(pictures: Sequence[Picture], spec: str) -> list[Picture]:
    """The first ones in an order by chance, the same each time, in which the classes take turns."""
    if not pictures:
        raise TextSourceError(
            f"{spec} holds no images, which this model reads.", IMAGES_HINT, code="no-images"
        )
    order = np.random.default_rng(0).permutation(len(pictures))
    seen: dict[str | int | None, int] = {}
    turns = []
    for place in order:
        label = pictures[place].label
        turns.append(seen.setdefault(label, 0))
        seen[label] += 1
    return [pictures[order[at]] for at in np.argsort(turns, kind="stable")[:MOST_IMAGES]]


def _of_hub(spec: str, part: Part) -> Images:
    """The first images of a data set, with their labels where a column has them."""
    label, rows = hub_rows(spec, part, "image")
    features = getattr(rows, "features", None) or {}
    column = label.rpartition(":")[2]
    feature: Any = features.get(column)
    names = getattr(features.get("label"), "names", ())
    with blaming(f"{spec} can't be read", IMAGES_HINT, TextSourceError):
        if hasattr(feature, "decode_example"):  # files take a tenth of the images' memory
            rows = rows.cast_column(column, replace(feature, decode=False))
        result = [_of_row(row, column, feature, names, spec) for row in islice(rows, MOST_IMAGES)]
    chosen = _mixed(result, spec)
    return _known(label, chosen, [str(picture.label) for picture in chosen], len(result))


def _of_row(row: Any, column: str, feature: Any, names: Sequence[str], spec: str) -> Picture:
    value, number, name = row.get(column), row.get("label"), f"an image of {spec}"
    content = value.get("bytes") if isinstance(value, dict) else None
    if content is None:  # an image, or where there is one
        image = feature.decode_example(value) if isinstance(value, dict) and feature else value
        if not hasattr(image, "save"):
            raise column_missing(spec, column, row)
        refuse_large(image, name)
        kept = io.BytesIO()
        image.convert("RGB").save(kept, "PNG")
        content = kept.getvalue()
    if isinstance(number, int) and number < 0:
        number = None  # so data sets mark what has no label, such as a test's images
    if isinstance(number, int) and number < len(names):
        number = names[number]
    return Picture(name, number, content=content, sha256=sha256_bytes(content))


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
        with self._own_processor(f"fails on {picture.name}"), quiet_transformers():
            pixels: Pixels = processor(image, return_tensors="np")["pixel_values"][0]
            if pixels.shape != wanted:
                raise ValueError(f"it makes the shape {list(pixels.shape)} of {list(wanted)}")
        return pixels

    def _own_processor(self, fails: str) -> AbstractContextManager[None]:
        """Its settings may contradict each other, and the model's, in many ways."""
        what = f"The image processor of {self.name} {fails}"
        return blaming(what, OTHER_FILE, ModelSourceError, "odd-setting")

    @cached_property
    def _processor(self) -> tuple[Any, int]:
        """Transformers' own, and the pixels to which it resizes the shorter side."""
        result, where = processor_settings(self.folder, "image_processor")
        kind = str(result.get("image_processor_type") or result.get("feature_extractor_type"))
        family = _KIND.fullmatch(kind)
        if family is None:
            raise ModelSourceError(
                f"{where}: the image processor {kind[:60]} is none of those that are used here: "
                "those of ViT, DeiT, Beit and Bit.",
                "Write its settings as one of these, if they say the same.",
                code="other-image-processor",
            )
        # The fast processors write null for what they leave to their class.
        said = {name: value for name, value in result.items() if value is not None}
        settings = settings_of(_Settings, said, where).model_dump(exclude_unset=True)
        require("PIL.Image", extra="vision")
        library = require("transformers", extra="torch")
        # transformers 4.57 calls so what 5 calls ...Pil; 5 makes the plain one with torchvision.
        name = f"{family[1]}ImageProcessor"
        made = getattr(library, f"{name}Pil", None) or getattr(library, name)
        size = settings.get("size") or 0
        shortest = size if isinstance(size, int) else size.get("shortest_edge", 0)
        with self._own_processor("can't be made"):  # of names of sizes that don't belong together
            return made(**settings), shortest


def processor_settings(folder: Path, part: str) -> tuple[dict[str, Any], str]:
    """What a model's folder says of how its input becomes numbers, and in which file."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        result = read_object(folder / name)
        result = result.get(part, result)
        if isinstance(result, dict) and result:
            return result, str(folder / name)
    raise ModelSourceError(
        f"{folder} has no preprocessor_config.json, which says how inputs become numbers.",
        "Put the model's own there, or give random for noise.",
        code="no-processor",
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
    if not (name := type(loaded.model).__name__).endswith(OF_IMAGES):
        raise CalibrationError(
            f"{loaded.ref.source} is a {name}: of models that read images, those that classify "
            "them by one head are taken.",
            f"Give one whose config names a class that ends with {OF_IMAGES} under architectures; "
            "for DeiTForImageClassificationWithTeacher, DeiTForImageClassification has the head "
            "of the class token alone.",
            code="takes-no-text",
        )
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
