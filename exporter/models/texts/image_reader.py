"""Images as a classifier takes them: by the settings of its folder's image processor.

transformers' classes that work with Pillow and numpy do it, with torchvision installed or without,
so that a model sees the same numbers wherever it is judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError, ModelSourceError, first_line, pass_on_memory_error
from exporter.models.anatomy.residual_stream import probe_inputs, run_backbone
from exporter.models.decoding_rules import settings_of
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.model_folder import OF_IMAGES, PIXELS, image_shape, read_object
from exporter.models.texts.batches import Sources
from exporter.models.texts.held_images import HeldImages, Levels, Pixels, noise
from exporter.models.texts.images import MOST_IMAGES, Images, Picture, read_images, refuse_large
from exporter.models.texts.pairs import RANDOM
from exporter.models.texts.samples import CalibrationText
from exporter.models.texts.sources import Part
from exporter.optional import require
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

IMAGES = 64
"""Images where nobody says how many."""
_PREPROCESSOR = "preprocessor_config.json"
_KINDS = ("ViT", "DeiT", "Beit", "Bit")
_ENDS = ("ImageProcessor", "FeatureExtractor", "ImageProcessorFast", "ImageProcessorPil")
_SEEDS: Mapping[Part, int] = {"calibration": 0, "evaluation": 1}
_COLOURS = 3
_WITHOUT_NUMBERS = {"do_rescale": False, "do_normalize": False}
_WITHOUT_SIZES = {"do_resize": False, "do_center_crop": False}
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
    """Turns images into a classifier's input.

    Attributes:
        name: What errors call the model.
        folder: The model's, with the settings of its image processor.
        config: As ``config.json`` has it.
    """

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
        return self.held(pictures).pixels()

    def held(self, pictures: Sequence[Picture]) -> HeldImages:
        """Images as they are held: decoded and resized, a byte a colour of each pixel."""
        return HeldImages.of(self._one(picture) for picture in pictures)

    def noise(self, number: int, part: Part) -> HeldImages:
        """Normal noise from a seed, of the same shape."""
        return HeldImages.of(noise(number, image_shape(self.config), _SEEDS[part]))

    def of_images(self, images: Images, number: int, part: Part) -> HeldImages:
        """The first images, or noise."""
        if images.is_random:
            return self.noise(number, part)
        return self.held(images.pictures[:number])

    def _one(self, picture: Picture) -> Levels:
        image, (resizing, _, shortest) = picture.read(), self._processors
        refuse_large(image, picture.name, shortest)
        try:
            with quiet_transformers():
                found = Levels(_processed(resizing, image), self._numbers)
            if found.levels.dtype != np.uint8:
                raise ValueError(f"it makes {found.levels.dtype} of 8 bits")
        # A processor's settings may contradict each other in many ways.
        except Exception as error:
            pass_on_memory_error(error)
            raise ModelSourceError(
                f"The image processor of {self.name} fails on {picture.name}: {first_line(error)}.",
                "Take the file that belongs to the model.",
                code="image-processor-fails",
            ) from error
        wanted = image_shape(self.config)
        if found.levels.shape != wanted:
            raise ModelSourceError(
                f"The image processor of {self.name} makes images of the shape "
                f"{list(found.levels.shape)}; the model takes {list(wanted)}.",
                "Take the file that belongs to the model.",
                code="other-image-size",
            )
        return found

    @cached_property
    def _numbers(self) -> Pixels:
        """What the processor makes of each level of each colour, ``[colours, 256]``."""
        # As high as no number of colours, which a processor would take for them.
        greys = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (8, 256, _COLOURS))
        image = require("PIL.Image", extra="vision").fromarray(np.ascontiguousarray(greys))
        _, normalising, _ = self._processors
        numbers: Pixels = _processed(normalising, image)[:, 0].astype(np.float32)
        return numbers

    @cached_property
    def _processors(self) -> tuple[Any, Any, int]:
        """What makes an image as large as the model takes it, and what makes it numbers.

        Behind them the pixels to which the shorter side is resized, whatever the longer one's are.
        """
        told, where = self._told()
        kind = str(told.get("image_processor_type") or told.get("feature_extractor_type"))
        family = next((f for f in _KINDS if kind in {f + end for end in _ENDS}), None)
        if family is None:
            raise ModelSourceError(
                f"{where}: the image processor {kind[:60]} is none of those that are used here: "
                f"{', '.join(f'{each}ImageProcessor' for each in _KINDS)}.",
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
        said = {name: value for name, value in told.items() if value is not None}
        settings = settings_of(_Settings, said, where).model_dump(exclude_unset=True)
        require("PIL.Image", extra="vision")
        library = require("transformers", extra="torch")
        # transformers 4.57 calls so what 5 calls ...Pil; 5 makes the plain one with torchvision.
        name = f"{family}ImageProcessor"
        made = getattr(library, f"{name}Pil", None) or getattr(library, name)
        size = settings.get("size") or 0
        shortest = size if isinstance(size, int) else size.get("shortest_edge", 0)
        return made(**settings | _WITHOUT_NUMBERS), made(**settings | _WITHOUT_SIZES), shortest

    def _told(self) -> tuple[dict[str, Any], str]:
        for name in (_PREPROCESSOR, "processor_config.json"):
            told = read_object(self.folder / name)
            told = told.get("image_processor", told)
            if isinstance(told, dict) and told:
                return told, str(self.folder / name)
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
    """Makes the samples of a model that reads images.

    Returns:
        A token stands for each position of the residual stream; all have the id 0.
    """
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
        held = reader.noise(int(places.max(initial=-1)) + 1, part).rows(places)
    else:
        held = reader.held([images.pictures[place] for place in places])
    if samples is not None and len(held) < samples:
        progress.say(f"{images.source}: {len(held)} images of the {samples} asked for")
    return of_pixels(held, _positions(loaded.model), images.source, images.sha256, places)


def of_pixels(
    held: HeldImages,
    positions: int,
    source: str,
    sha256: str,
    places: NDArray[np.int64] | None = None,
) -> CalibrationText:
    """Images as samples with so many tokens, all of the id 0."""
    ids = np.zeros((len(held), positions), np.int64)
    text = CalibrationText.unpadded(ids, source, sha256, places)
    return replace(text, sources=Sources({}, text.mask, held))


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


def _positions(model: Any) -> int:
    return int(run_backbone(model, probe_inputs(model)).last_hidden_state.shape[1])


def _processed(processor: Any, image: Any) -> Any:
    """What a processor makes of an image, ``[colours, height, width]``."""
    return processor(image, return_tensors="np")["pixel_values"][0]
