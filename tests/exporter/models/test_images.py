"""Images as a user names them, and as a classifier takes them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.choose.budgets.inputs import measured_on
from exporter.errors import (
    CalibrationError,
    MissingDependencyError,
    ModelSourceError,
    TextSourceError,
    UnsafeInputError,
)
from exporter.models.loading.model_source import load_model
from exporter.models.texts import sources
from exporter.models.texts.calibration import calibration_text, mixed_text
from exporter.models.texts.images import ImageReader, Picture, of_pixels, read_images
from exporter.models.texts.samples import CalibrationText
from exporter.models.texts.sources import read_texts, refuse_same_text
from exporter.pipeline.request import QUICK
from exporter.pipeline.run import file_hash
from exporter.quantize.calibration import calibration_beside
from exporter.score.scoring import score_on
from tests.raising import raises
from tests.reading import Heard
from tests.tiny_models import (
    KINDS,
    tiny_config,
    tiny_loaded,
    write_classifier,
    write_image,
    write_images,
    write_processor,
)

CONFIG = {"image_size": 16, "num_channels": 3}


def test_images_have_the_labels_of_their_folders(tmp_path: Path, monkeypatch: Any) -> None:
    flat = write_images(tmp_path / "flat", 5)
    shutil.move(write_image(flat / "a.png", 0), flat / os.fsdecode(b"\xe4.png"))
    (flat / "notes.txt").write_text("no image")
    images = read_images(str(flat), part="calibration")
    assert (len(images.pictures), images.has_labels, images.is_random) == (6, False, False)
    assert images.source == str(flat)
    named = str(write_images(tmp_path / "named", 9, KINDS[:3]))
    images = read_images(named, part="evaluation")
    labels = [picture.label for picture in images.pictures]
    assert images.has_labels
    assert all(set(labels[start : start + 3]) == set(KINDS[:3]) for start in (0, 3, 6))
    monkeypatch.setattr("exporter.models.texts.images.MOST_IMAGES", 4)
    few = read_images(named, part="evaluation")
    assert (len(few.pictures), few.there) == (4, 9)


def test_the_same_images_are_known_again_with_or_without_labels(tmp_path: Path) -> None:
    flat, named = write_images(tmp_path / "a", 4), write_images(tmp_path / "b", 4, KINDS[:2])
    turned = tmp_path / "c"
    shutil.copytree(flat, turned)
    (turned / "0.png").rename(turned / "z.png")
    (turned / "1.png").rename(turned / "0.png")
    first, *more = (read_images(str(path), part="calibration") for path in (flat, named, turned))
    for other in more:
        assert other.sha256 == first.sha256
        with raises(Exception, "same-text"):
            refuse_same_text(other, [first], "the same")
    # What a figure rests on are their labels and order, too.
    assert len({item.content_sha256 for item in (first, *more)}) == 3
    assert file_hash(str(named)) == more[0].content_sha256
    write_image(turned / "0.png", 99)
    changed = read_images(str(turned), part="calibration")
    assert changed.sha256 != first.sha256
    refuse_same_text(changed, [first], "the same")


def test_noise_says_so_and_is_another_for_each_end(
    tmp_path: Path,
) -> None:
    first, second = (read_images("random", part=part) for part in ("calibration", "evaluation"))
    assert first.is_random
    assert "noise" in first.source
    assert first.sha256 != second.sha256
    assert not first.has_labels
    for spec in QUICK["calibration"]:  # the text of a first look
        assert read_images(spec, part="calibration").sha256 == first.sha256
    reader = ImageReader("model", tmp_path, CONFIG)
    many, few = (reader.noise(number, "calibration") for number in (8, 3))
    assert np.array_equal(many[:3], few)
    assert not np.array_equal(reader.noise(3, "evaluation"), few)


@pytest.mark.parametrize("spec", ["docstrings", "self", "missing/", "a.txt", "texts", "mixed"])
def test_what_holds_no_images_is_refused(
    tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts", "empty").mkdir(parents=True)
    for name in ("a.txt", "texts/a.txt"):
        Path(name).write_text("text")
    write_images(tmp_path / "mixed", 2)
    write_images(tmp_path / "mixed", 2, KINDS[:1])
    with raises(TextSourceError, "one-sided" if spec == "mixed" else "no-images", spec):
        read_images(spec, part="calibration")
    with raises(TextSourceError, "no-text", "mixed"):
        read_texts("mixed", part="calibration")


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, link: str) -> None:
    secret = write_image(tmp_path / "elsewhere" / "a.png", 0)
    images = write_images(tmp_path / "images", 2, KINDS[:1])
    (images / "alias").symlink_to(images / KINDS[0])  # within the folder
    assert read_images(str(images), part="calibration").there == 4
    if link == "file":
        (images / KINDS[0] / "a.png").symlink_to(secret)
    else:
        (images / KINDS[1]).symlink_to(secret.parent)
    with pytest.raises(UnsafeInputError):
        read_images(str(images), part="calibration")


def test_a_link_that_takes_a_folders_place_later_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_image(tmp_path / "elsewhere" / "0.png", 1)
    images = write_images(tmp_path / "images", 1, KINDS[:1])
    (picture,) = read_images(str(images), part="calibration").pictures
    file = Path(picture.name)
    assert picture.read().size == (24, 20)
    shutil.rmtree(file.parent)
    file.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError):
        picture.read()


@pytest.mark.parametrize(
    ("size", "most", "large"),
    [((20, 24), 1 << 26, False), ((20, 24), 100, True), ((4, 256), 1 << 26, False),
     ((4, 260), 1 << 26, True)],
)  # fmt: skip
def test_an_image_of_no_sane_size_is_refused(
    tmp_path: Path, monkeypatch: Any, size: tuple[int, int], most: int, large: bool
) -> None:
    pytest.importorskip("PIL")
    monkeypatch.setattr("exporter.models.texts.images._MOST_PIXELS", most)
    image = Picture(str(write_image(tmp_path / "a.png", 0, size)))
    if not large:
        assert image.read().size == size[::-1]
        return
    with raises(TextSourceError, "image-too-large", *size):
        image.read()


@pytest.mark.parametrize(("orientation", "size"), [(1, (24, 20)), (6, (20, 24))])
def test_images_are_turned_as_their_camera_says(
    tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    image = pillow.open(write_image(tmp_path / "a.png", 0))
    result = image.getexif()
    result[274] = orientation
    image.save(tmp_path / "b.png", exif=result)
    assert Picture(str(tmp_path / "b.png")).read().size == size


@pytest.mark.parametrize("content", [b"no image at all", None])
def test_a_broken_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("PIL")
    whole = write_image(tmp_path / "a.png", 0).read_bytes()
    (tmp_path / "b.png").write_bytes(content or whole[:300])
    with raises(TextSourceError, "unreadable", "b.png"):
        Picture(str(tmp_path / "b.png")).read()


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    with raises(MissingDependencyError, "", "vision"):
        Picture(str(write_image(tmp_path / "a.png", 0))).read()


class Rows(list[dict[str, Any]]):
    """Rows as the library datasets streams them: images as files, where it is told to."""

    features = {"label": types.SimpleNamespace(names=["cat", "dog"])}  # noqa: RUF012

    def cast_column(self, column: str, feature: Any) -> Rows:
        assert (column, feature.decode) == ("image", False)
        return self


@dataclasses.dataclass
class Feature:
    """The library's feature of images; it knows where those are that come without their file."""

    elsewhere: Any = None
    decode: bool = True

    def decode_example(self, value: dict[str, Any]) -> Any:
        if self.elsewhere is None:
            raise OSError("no image")
        return self.elsewhere


def from_hub(monkeypatch: Any, *rows: dict[str, Any], elsewhere: Any = None) -> Any:
    """What is read of a data set, with a stand-in for the library datasets."""
    held = Rows(rows)
    if any(isinstance(row.get("image"), dict) for row in rows):
        held.features = {**Rows.features, "image": Feature(elsewhere)}
    namespace = types.SimpleNamespace(
        get_dataset_split_names=lambda *_: ["train", "test"], load_dataset=lambda *_, **__: held
    )
    monkeypatch.setattr(sources, "require", lambda *_, **__: namespace)
    return read_images("hf:some/pets", part="evaluation")


def file_row(content: bytes | None, **more: Any) -> dict[str, Any]:
    return {"image": {"bytes": content, "path": "a"}, **more}


@pytest.mark.parametrize(
    ("labels", "named"), [((0, 1), {"cat", "dog"}), ((None, None), {None}), ((-1, -1), {None})]
)
def test_a_data_set_has_images_and_names_of_labels(
    monkeypatch: Any, labels: Any, named: set[Any]
) -> None:
    rows = [
        file_row(b"%d" % n, **({} if x is None else {"label": x})) for n, x in enumerate(labels)
    ]
    images = from_hub(monkeypatch, *rows)
    assert images.source == "hf:some/pets::test:image"
    assert {picture.label for picture in images.pictures} == named
    assert images.has_labels == (None not in named)
    bare = from_hub(monkeypatch, file_row(b"0"), file_row(b"1"))
    assert bare.sha256 == images.sha256
    assert (bare.content_sha256 == images.content_sha256) == (None in named)


@pytest.mark.parametrize("form", ["file", "elsewhere", "decoded", "CMYK"])
def test_images_of_a_data_set_are_known_as_those_of_a_folder(
    tmp_path: Path, monkeypatch: Any, form: str
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    file = write_image(tmp_path / "a.png", 7)
    image = pillow.open(file)
    if form == "CMYK":  # which PNG can't hold
        image = image.convert(form)
    row = {"image": image} if form in ("decoded", "CMYK") else file_row(file.read_bytes())
    if form == "elsewhere":
        row = file_row(None)
    images = from_hub(monkeypatch, row, elsewhere=image)
    (picture,) = images.pictures
    assert np.array_equal(np.asarray(picture.read()), np.asarray(image.convert("RGB")))
    if form == "file":
        assert images.sha256 == read_images(str(tmp_path), part="evaluation").sha256


def test_data_sets_without_usable_images_are_refused(monkeypatch: Any) -> None:
    for row, code, field in (
        (file_row(None), "unreadable", "hf:some/pets"),
        ({"text": "no image"}, "no-such-data", "text"),
    ):
        with raises(TextSourceError, code, field):
            from_hub(monkeypatch, row)
    pytest.importorskip("PIL")
    (picture,) = from_hub(monkeypatch, file_row(b"broken")).pictures
    with raises(TextSourceError, "unreadable", "hf:some/pets"):
        picture.read()


@pytest.fixture
def reader(tmp_path: Path) -> ImageReader:
    pytest.importorskip("PIL")
    write_processor(tmp_path)
    return ImageReader("model", tmp_path, CONFIG)


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_processor_type": "ViTImageProcessorFast"},
        {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor", "size": 16},
        {
            "image_processor_type": "DeiTImageProcessor", "size": {"height": 20, "width": 20},
            "do_center_crop": True, "crop_size": {"height": 16, "width": 16},
        },
        {
            "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 10},
            "do_center_crop": True, "crop_size": {"height": 16, "width": 16},
            "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3,
        },
        {"do_rescale": False, "image_mean": [100.0, 90.0, 80.0], "image_std": [70.0, 60.0, 50.0]},
        {"do_normalize": False, "do_rescale": False},
    ],
)  # fmt: skip
def test_images_become_what_the_model_takes(
    reader: ImageReader, tmp_path: Path, changes: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    write_processor(tmp_path, **changes)
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    kind = str(content.pop("image_processor_type", "ViTImageProcessor")).removesuffix("Fast")
    made = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    content.pop("feature_extractor_type", None)
    pictures = [Picture(str(write_image(tmp_path / f"{n}.png", n))) for n in range(2)]
    whole = [
        made(**content)(picture.read(), return_tensors="np")["pixel_values"][0]
        for picture in pictures
    ]
    pixels = reader.pixels(pictures)
    assert (pixels.shape, pixels.dtype) == ((2, 3, 16, 16), np.float32)
    assert np.array_equal(pixels, np.stack(whole).astype(np.float32))
    assert not np.array_equal(pixels[0], pixels[1])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"size": {"height": 8, "width": 8}}, "odd-setting", "[3, 8, 8]"),
        ({"size": {"height": 1 << 30, "width": 8}}, "odd-setting", "size"),
        ({"image_mean": "grey"}, "odd-setting", "image_mean"),
        ({"size": {"x": 1}}, "odd-setting", "size"),
        ({"image_processor_type": "OwlViTImageProcessor"}, "other-image-processor", "OwlViT"),
        ({"image_processor_type": None}, "other-image-processor", "None"),
        ({"image_mean": [0.5, 0.5]}, "odd-setting", "a.png"),
        (None, "no-processor", "preprocessor_config.json"),
    ],
)
def test_a_processor_of_another_model_is_refused(
    reader: ImageReader, tmp_path: Path, changes: dict[str, Any] | None, code: str, named: str
) -> None:
    if changes is None:
        (tmp_path / "preprocessor_config.json").unlink()
    else:
        write_processor(tmp_path, **changes)
    with raises(ModelSourceError, code, named):
        reader.pixels([Picture(str(write_image(tmp_path / "a.png", 0)))])


@pytest.mark.torch
def test_more_than_the_memory_holds_is_refused(
    reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [Picture(str(write_image(tmp_path / "a.png", 0)))] * 3
    nbytes = reader.pixels(pictures).nbytes
    monkeypatch.setattr("exporter.models.texts.images.available_bytes", lambda: nbytes)
    assert len(reader.pixels(pictures)) == 3
    monkeypatch.setattr("exporter.models.texts.images.available_bytes", lambda: nbytes - 1)
    with raises(ModelSourceError, "images-too-large", 3):
        reader.pixels(pictures)
    large = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 2048}}
    write_processor(tmp_path, **large)  # that is what it is resized to
    with raises(TextSourceError, "image-too-large", "a.png", 2048):
        other = ImageReader("model", tmp_path, CONFIG)
        other.pixels([Picture(str(write_image(tmp_path / "a.png", 0, (8, 512))))])


@pytest.mark.parametrize("spec", ["pydoc", "random"])
def test_weights_are_fitted_to_noise_where_no_images_are_named(tmp_path: Path, spec: str) -> None:
    result = {**CONFIG, "patch_size": 8, "architectures": ["ViTForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(result))
    text = calibration_beside(tmp_path / "model.onnx", (spec,))
    assert "noise" in text.ref.source
    assert text.sources is not None
    assert text.sources.arrays["pixel_values"].shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("size", [None, "16", 0, [16], 1 << 20, [1 << 13, 1 << 13]])
def test_a_config_must_say_how_large_its_images_are(tmp_path: Path, size: Any) -> None:
    with raises(ModelSourceError, "odd-setting", "image_size"):
        ImageReader("model", tmp_path, {"image_size": size}).noise(1, "calibration")


@pytest.mark.torch
def test_samples_have_a_token_for_each_position(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    loaded = load_model(str(write_classifier(tmp_path / "model")))
    folders = [str(write_images(tmp_path / n, 3, seed=s)) for n, s in (("a", 0), ("b", 9))]
    text = calibration_text(loaded, folders[0], samples=2)
    assert text.input_ids.shape == (2, 5)  # four patches and the class token
    assert (text.ref.source, text.ref.samples, text.ref.tokens) == (folders[0], 2, 10)
    parts = [part.sources for part in mixed_text(loaded, folders).apart]
    again = [calibration_text(loaded, folder).sources for folder in folders]
    for part, expected in zip(parts, again, strict=True):
        assert part is not None
        assert expected is not None
        assert np.array_equal(part.arrays["pixel_values"], expected.arrays["pixel_values"])


def test_few_images_choose_nothing_however_many_positions_they_have() -> None:
    images = of_pixels(np.zeros((40, 3, 2, 2), np.float32), 1370, "made", "0")
    text = CalibrationText.unpadded(images.input_ids, "made", "0")
    few = images.rows(slice(0, 5))
    for samples, tokens, wanted in (
        (images, 4096, 32), (images, 36 * 1370, 36), (few, 4096, 5), (text, 4096, 3),
    ):  # fmt: skip
        assert len(measured_on(samples, tokens).input_ids) == wanted


@pytest.mark.torch
@pytest.mark.parametrize(("spec", "told"), [(None, True), ("pydoc", True), ("random", False)])
def test_without_a_name_the_samples_are_noise(spec: str | None, told: bool) -> None:
    loaded, heard = tiny_loaded("vit", head="ImageClassification"), Heard()
    text = calibration_text(loaded, spec, samples=3, progress=heard)
    assert "noise" in text.ref.source
    assert text.ref.samples == 3
    assert any("noise" in line for line in heard.lines) == told


@pytest.mark.torch
def test_models_of_images_without_one_head_and_samples_of_the_other_kind_are_refused() -> None:
    from transformers import DeiTForImageClassificationWithTeacher as TwoHeads

    with raises(CalibrationError, "takes-no-text", "ViTModel"):
        calibration_text(tiny_loaded("vit"))
    loaded = dataclasses.replace(tiny_loaded("deit"), model=TwoHeads(tiny_config("deit")))
    with raises(CalibrationError, "takes-no-text", "DeiTForImageClassificationWithTeacher"):
        calibration_text(loaded)
    seeing, reading = tiny_loaded("vit", head="ImageClassification"), tiny_loaded("llama")
    images = calibration_text(seeing, samples=2)
    text = CalibrationText.unpadded(np.ones((2, 5), np.int64), "made", "0")
    for loaded, samples in ((seeing, text), (reading, images)):
        with raises(CalibrationError, "other-samples", loaded.ref.source):
            score_on(loaded, samples)
