"""Images as a user names them, and as a classifier takes them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.choose.budgets.judges import measured_on
from exporter.errors import (
    CalibrationError,
    MissingDependencyError,
    ModelSourceError,
    TextSourceError,
    UnsafeInputError,
)
from exporter.files import sha256_bytes
from exporter.models.texts import sources
from exporter.models.texts.batches import CalibrationText, HeldImages, Levels, noise
from exporter.models.texts.images import ImageReader, Picture, of_pixels, read_images
from exporter.models.texts.sources import read_texts, refuse_same_text
from exporter.pipeline.request import QUICK
from exporter.pipeline.run import file_hash
from exporter.progress import Quiet
from exporter.quantize.calibration import calibration_beside
from tests.exporter.image_folders import (
    KINDS,
    write_classifier,
    write_image,
    write_images,
    write_processor,
)
from tests.raising import raises

CONFIG = {"image_size": 16, "num_channels": 3}


def test_images_side_by_side_have_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    (tmp_path / "notes.txt").write_text("no image")
    found = read_images(str(tmp_path), part="calibration")
    assert len(found.pictures) == 5
    assert not found.has_labels
    assert not found.is_random
    assert found.source == str(tmp_path)


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    shutil.move(write_image(tmp_path / "a.png", 0), folder / os.fsdecode(b"\xe4.png"))
    assert len(read_images(str(tmp_path), part="calibration").pictures) == 1


def test_folders_name_the_classes_which_take_turns(tmp_path: Path) -> None:
    write_images(tmp_path, 9, KINDS[:3])
    found = read_images(str(tmp_path), part="evaluation")
    labels = [picture.label for picture in found.pictures]
    assert found.has_labels
    for start in (0, 3, 6):
        assert set(labels[start : start + 3]) == set(KINDS[:3])


def test_no_more_are_read_than_fit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("exporter.models.texts.images.MOST_IMAGES", 4)
    found = read_images(str(write_images(tmp_path, 9, KINDS[:3])), part="evaluation")
    assert (len(found.pictures), found.there) == (4, 9)
    assert {picture.label for picture in found.pictures} == set(KINDS[:3])


def test_the_same_images_are_known_again_and_others_are_not(tmp_path: Path) -> None:
    one, two = (write_images(tmp_path / name, 3) for name in ("a", "b"))
    other = write_images(tmp_path / "c", 3, seed=9)
    first, second, third = (read_images(str(p), part="calibration") for p in (one, two, other))
    assert first.sha256 == second.sha256 != third.sha256
    with pytest.raises(Exception, match="same") as caught:
        refuse_same_text(second, [first], "the same")
    assert getattr(caught.value, "code", "") == "same-text"
    refuse_same_text(third, [first], "the same")


def test_the_same_images_have_one_hash_with_or_without_labels(tmp_path: Path) -> None:
    flat, named = write_images(tmp_path / "a", 4), write_images(tmp_path / "b", 4, KINDS[:2])
    turned = tmp_path / "c"
    shutil.copytree(flat, turned)
    (turned / "0.png").rename(turned / "z.png")
    (turned / "1.png").rename(turned / "0.png")
    found = [read_images(str(path), part="calibration") for path in (flat, named, turned)]
    assert len({each.sha256 for each in found}) == 1
    # What a figure rests on are their labels and order, too.
    assert len({each.content_sha256 for each in found}) == 3
    assert [file_hash(str(path)) for path in (flat, named)] == [
        each.content_sha256 for each in found[:2]
    ]
    write_image(turned / "0.png", 99)
    assert read_images(str(turned), part="calibration").sha256 != found[0].sha256


def test_noise_says_so_and_is_another_for_each_end() -> None:
    first, second = (read_images("random", part=part) for part in ("calibration", "evaluation"))
    assert first.is_random
    assert "noise" in first.source
    assert first.sha256 != second.sha256
    assert not first.has_labels


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with raises(TextSourceError, "no-images", tmp_path):
        read_images(str(tmp_path), part="calibration")


def test_the_text_of_a_first_look_stands_for_noise() -> None:
    for spec in QUICK["calibration"]:
        found = read_images(spec, part="calibration")
        assert found.is_random
        assert found.sha256 == read_images("random", part="calibration").sha256


@pytest.mark.parametrize("spec", ["docstrings", "self", "missing/"])
def test_an_image_model_reads_no_texts(spec: str) -> None:
    with raises(TextSourceError, "no-images", spec):
        read_images(spec, part="calibration")


def test_an_image_model_reads_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with raises(TextSourceError, "no-images", "a.txt"):
        read_images(str(tmp_path / "a.txt"), part="calibration")


def test_a_text_model_reads_no_folder(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    with raises(TextSourceError, "folder-for-text", tmp_path):
        read_texts(str(tmp_path), part="calibration")


def test_all_images_have_a_class_or_none(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    write_images(tmp_path, 2, KINDS[:1])
    with raises(TextSourceError, "one-sided", tmp_path):
        read_images(str(tmp_path), part="calibration")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = write_image(tmp_path / "elsewhere" / "a.png", 0)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(secret)
    with pytest.raises(UnsafeInputError):
        read_images(str(tmp_path / "images"), part="calibration")


def test_so_is_a_folder_of_a_class_that_lies_elsewhere(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere" / "a.png", 0)
    images = write_images(tmp_path / "images", 2, KINDS[:1])
    (images / "alias").symlink_to(images / KINDS[0])  # within the folder
    assert read_images(str(images), part="calibration").there == 4
    (images / KINDS[1]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError):
        read_images(str(images), part="calibration")


def test_a_folder_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_image(tmp_path / "elsewhere" / "0.png", 1)
    images = write_images(tmp_path / "images", 1, KINDS[:1])
    (picture,) = read_images(str(images), part="calibration").pictures
    assert picture.read().size == (24, 20)
    shutil.rmtree(images / KINDS[0])
    (images / KINDS[0]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError):
        picture.read()


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    whole = write_image(tmp_path / "a.png", 0)
    broken = tmp_path / "b.png"
    broken.write_bytes(whole.read_bytes()[:300])
    (tmp_path / "c.png").write_text("no image at all")
    for name in ("b.png", "c.png"):
        with raises(TextSourceError, "no-image", name):
            Picture(str(tmp_path / name)).read()
    assert Picture(str(whole)).read().size == (24, 20)


@pytest.mark.parametrize("change", ["gone", "other", "touched"])
def test_a_file_that_changes_after_it_was_found_is_told(tmp_path: Path, change: str) -> None:
    pytest.importorskip("PIL")
    (picture,) = read_images(str(write_images(tmp_path, 1)), part="calibration").pictures
    file = Path(picture.name)
    if change == "gone":
        file.unlink()
    elif change == "other":
        write_image(file, 99)
    else:
        file.touch()
        assert picture.read().size == (24, 20)
        return
    with raises(TextSourceError, "images-changed", file.name):
        picture.read()


def test_an_image_of_no_sane_size_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("PIL")
    monkeypatch.setattr("exporter.models.texts.images._MOST_PIXELS", 100)
    with raises(TextSourceError, "image-too-large", 24, 20):
        Picture(str(write_image(tmp_path / "a.png", 0))).read()


@pytest.mark.parametrize(("width", "large"), [(256, False), (260, True)])
def test_an_image_that_is_a_line_is_refused(tmp_path: Path, width: int, large: bool) -> None:
    pytest.importorskip("PIL")
    image = Picture(str(write_image(tmp_path / "a.png", 0, (4, width))))
    if not large:
        assert image.read().size == (width, 4)
        return
    with raises(TextSourceError, "image-too-large", width, 4):
        image.read()


@pytest.mark.parametrize(("orientation", "size"), [(1, (24, 20)), (6, (20, 24))])
def test_images_are_turned_as_their_camera_says(
    tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    image = pillow.open(write_image(tmp_path / "a.png", 0))
    told = image.getexif()
    told[274] = orientation
    image.save(tmp_path / "b.png", exif=told)
    assert Picture(str(tmp_path / "b.png")).read().size == size


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with raises(MissingDependencyError, "", "vision"):
        Picture(str(write_image(tmp_path / "a.png", 0))).read()


class _Rows(list[dict[str, Any]]):
    features = {"label": types.SimpleNamespace(names=["cat", "dog"])}  # noqa: RUF012


def hub(monkeypatch: Any, rows: _Rows) -> None:
    """Stands in for the library datasets."""
    told = types.SimpleNamespace(
        get_dataset_split_names=lambda *_: ["train", "test"],
        load_dataset=lambda *_, **__: rows,
    )
    monkeypatch.setattr(sources, "require", lambda *_, **__: told)


def image_row(colour: int, **more: Any) -> dict[str, Any]:
    image = types.SimpleNamespace(
        width=2, height=2, convert=lambda _: None, tobytes=lambda: bytes([colour])
    )
    return {"image": image, **more}


def test_a_data_set_has_images_and_names_of_labels(monkeypatch: Any) -> None:
    hub(monkeypatch, _Rows([image_row(0, label=0), image_row(1, label=1)]))
    found = read_images("hf:some/pets", part="evaluation")
    assert found.source == "hf:some/pets::test:image"
    assert {picture.label for picture in found.pictures} == {"cat", "dog"}


class _Files(_Rows):
    """Rows with images as a data set holds them: files, which the library decodes on demand."""

    def cast_column(self, column: str, feature: Any) -> _Files:
        assert (column, feature.decode) == ("image", False)
        return self


@dataclasses.dataclass
class _Feature:
    """The library's feature of images."""

    decode: bool = True
    decoded: list[bytes] = dataclasses.field(default_factory=list)

    def decode_example(self, value: dict[str, Any]) -> Any:
        self.decoded.append(value["bytes"])
        colour = value["bytes"] or value["path"].encode()
        if colour == b"broken":
            raise OSError("no image")
        return image_row(colour[0])["image"]


@pytest.mark.parametrize(
    ("value", "times"),
    [({"bytes": b"abc", "path": "a"}, 2), ({"bytes": None, "path": "a"}, 1)],
    ids=["file", "elsewhere"],
)
def test_images_of_a_data_set_are_held_as_files_where_they_are_there(
    monkeypatch: Any, value: dict[str, Any], times: int
) -> None:
    feature = _Feature()
    rows = _Files([{"image": value}])
    monkeypatch.setattr(rows, "features", {"image": feature}, raising=False)
    hub(monkeypatch, rows)
    (picture,) = read_images("hf:some/pets", part="evaluation").pictures
    assert picture.image is not None
    assert picture.image().tobytes() == b"a"
    assert len(feature.decoded) == times
    hub(monkeypatch, _Rows([image_row(ord("a"))]))
    assert picture.sha256 == read_images("hf:some/pets", part="evaluation").pictures[0].sha256


def test_a_broken_file_of_a_data_set_is_told(monkeypatch: Any) -> None:
    rows = _Files([{"image": {"bytes": b"broken", "path": "a"}}])
    monkeypatch.setattr(rows, "features", {"image": _Feature()}, raising=False)
    hub(monkeypatch, rows)
    with raises(TextSourceError, "no-image", "hf:some/pets"):
        read_images("hf:some/pets", part="evaluation")


def test_a_data_set_without_labels_has_none(monkeypatch: Any) -> None:
    hub(monkeypatch, _Rows([image_row(0), image_row(1)]))
    assert not read_images("hf:some/pets", part="evaluation").has_labels


def test_a_data_set_whose_labels_are_held_back_has_none(monkeypatch: Any) -> None:
    hub(monkeypatch, _Rows([image_row(0, label=-1), image_row(1, label=-1)]))
    assert not read_images("hf:some/pets", part="evaluation").has_labels


def test_a_data_set_is_known_again_without_its_labels(monkeypatch: Any) -> None:
    found = []
    for label in (0, 1, -1):
        hub(monkeypatch, _Rows([image_row(n, label=label) for n in range(2)]))
        found.append(read_images("hf:some/pets", part="evaluation"))
    assert len({each.sha256 for each in found}) == 1
    assert len({each.content_sha256 for each in found}) == 3


def test_a_large_image_of_a_data_set_is_refused(monkeypatch: Any) -> None:
    row = image_row(0)
    row["image"].width = 1 << 20
    hub(monkeypatch, _Rows([row]))
    with raises(TextSourceError, "image-too-large", 1 << 20):
        read_images("hf:some/pets", part="evaluation")


def test_a_data_set_without_images_is_refused(monkeypatch: Any) -> None:
    hub(monkeypatch, _Rows([{"text": "no image"}]))
    with raises(TextSourceError, "column-missing", "text"):
        read_images("hf:some/texts", part="evaluation")


@pytest.fixture
def reader(tmp_path: Path) -> ImageReader:
    pytest.importorskip("PIL")
    write_processor(tmp_path)
    return ImageReader("model", tmp_path, CONFIG)


PROCESSORS: list[dict[str, Any]] = [
    {},
    {"image_processor_type": "ViTImageProcessorFast"},
    {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor", "size": 16},
    {
        "image_processor_type": "DeiTImageProcessor", "size": {"height": 20, "width": 20},
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16},
    },
    {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 18},
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16},
    },
    {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 10},
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3,
    },
    {"do_rescale": False, "image_mean": [100.0, 90.0, 80.0], "image_std": [70.0, 60.0, 50.0]},
    {"do_normalize": False},
    {"do_normalize": False, "do_rescale": False},
]  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("changes", PROCESSORS)
def test_images_become_what_the_model_takes(
    reader: ImageReader, tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_processor(tmp_path, **changes)
    pictures = [Picture(str(write_image(tmp_path / f"{n}.png", n))) for n in range(2)]
    found = reader.pixels(pictures)
    assert found.shape == (2, 3, 16, 16)
    assert found.dtype == np.float32
    assert np.abs(found).max() <= (3 if changes.get("do_rescale", True) else 255)
    assert not np.array_equal(found[0], found[1])


@pytest.mark.torch
@pytest.mark.parametrize("changes", PROCESSORS)
def test_what_is_held_becomes_the_same_bits_as_the_processor_makes(
    reader: ImageReader, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Every level of every colour: an image that is as large as the model takes them has all."""
    transformers = pytest.importorskip("transformers")
    write_processor(tmp_path, **changes)
    told = json.loads((tmp_path / "preprocessor_config.json").read_text())
    kind = str(told.pop("image_processor_type", "ViTImageProcessor")).removesuffix("Fast")
    made = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    told.pop("feature_extractor_type", None)
    pictures = [Picture(str(write_image(tmp_path / f"{n}.png", n))) for n in range(4)]
    whole = [made(**told)(each.read(), return_tensors="np")["pixel_values"][0] for each in pictures]
    held = reader.held(pictures)
    assert np.array_equal(held.pixels(), np.stack(whole).astype(np.float32))
    other = reader.held([Picture(str(write_image(tmp_path / "other.png", 9)))]).pixels()
    assert not np.array_equal(held.pixels()[:1], other)


@pytest.mark.torch
@pytest.mark.parametrize("made", ["files", "noise"])
def test_memory_grows_with_the_images_by_a_byte_a_colour(tmp_path: Path, made: str) -> None:
    pytest.importorskip("PIL")
    write_processor(tmp_path, size={"height": 96, "width": 96})
    reader = ImageReader("model", tmp_path, {"image_size": 96, "num_channels": 3})
    write_images(tmp_path / "images", 4)
    found = read_images(str(tmp_path / "images"), part="calibration").pictures
    reader.held(found[:1])  # imports
    peaks = []
    for number in (40, 80):
        tracemalloc.start()
        pictures = [found[n % 4] for n in range(number)]
        held = reader.noise(number, "calibration") if made == "noise" else reader.held(pictures)
        text = of_pixels(held, 37, "made", "0")
        assert text.ids_sha256
        assert all(each.inputs() for each in text.batches(4))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    grown = (peaks[1] - peaks[0]) / 40
    assert grown < 1.1 * 3 * 96 * 96  # floats take four times as much
    assert (grown > 0.9 * 3 * 96 * 96) is (made == "files")


@pytest.mark.torch
def test_images_are_held_by_the_byte_and_known_by_what_is_read(
    reader: ImageReader, tmp_path: Path
) -> None:
    held = reader.held([Picture(str(write_image(tmp_path / f"{n}.png", n))) for n in range(3)])
    assert all(isinstance(each, Levels) for each in held.images)
    assert sum(each.levels.nbytes for each in held.images if isinstance(each, Levels)) == 3 * 768
    assert len({id(each.numbers) for each in held.images if isinstance(each, Levels)}) == 1
    text = of_pixels(held, 5, "made", "0")
    ids, mask = text.input_ids.astype("<i8").tobytes(), text.mask.tobytes()
    assert text.ids_sha256 == sha256_bytes(ids + mask + held.pixels().tobytes() + mask)
    assert text.rows(slice(1, 3)).ids_sha256 != text.rows(slice(0, 2)).ids_sha256


@pytest.mark.torch
def test_pixels_are_resized_and_normalised(reader: ImageReader, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    image = write_image(tmp_path / "a.png", 0)
    small = np.asarray(pillow.open(image).resize((16, 16), 2), np.float32)
    expected = (small / 255 - 0.5) / 0.5
    found = reader.pixels([Picture(str(image))])[0]
    assert found == pytest.approx(expected.transpose(2, 0, 1), abs=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"size": {"height": 8, "width": 8}}, "other-image-size", "[3, 8, 8]"),
        ({"size": {"height": 1 << 30, "width": 8}}, "odd-setting", "size"),
        ({"image_mean": "grey"}, "odd-setting", "image_mean"),
        ({"size": {"x": 1}}, "odd-setting", "size"),
        ({"image_processor_type": "OwlViTImageProcessor"}, "other-image-processor", "OwlViT"),
        ({"image_processor_type": None}, "other-image-processor", "None"),
        ({"image_mean": [0.5, 0.5]}, "image-processor-fails", "a.png"),
    ],
)
def test_a_processor_of_another_model_is_refused(
    reader: ImageReader, tmp_path: Path, changes: dict[str, Any], code: str, named: str
) -> None:
    write_processor(tmp_path, **changes)
    with raises(ModelSourceError, code, named):
        reader.pixels([Picture(str(write_image(tmp_path / "a.png", 0)))])


@pytest.mark.torch
def test_an_image_that_is_resized_to_more_than_a_machine_holds_is_refused(
    reader: ImageReader, tmp_path: Path
) -> None:
    write_processor(
        tmp_path, image_processor_type="BitImageProcessor", size={"shortest_edge": 2048}
    )
    narrow = write_image(tmp_path / "a.png", 0, (8, 512))
    with raises(TextSourceError, "image-too-large", "a.png", 2048):
        reader.pixels([Picture(str(narrow))])


@pytest.mark.torch
def test_null_leaves_a_setting_to_the_processor(reader: ImageReader, tmp_path: Path) -> None:
    image, path = write_image(tmp_path / "a.png", 0), tmp_path / "preprocessor_config.json"
    before = reader.pixels([Picture(str(image))])
    nulls = dict.fromkeys(("do_center_crop", "crop_size", "do_pad", "device"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **nulls}))
    again = ImageReader("model", tmp_path, CONFIG)
    assert np.array_equal(again.pixels([Picture(str(image))]), before)


@pytest.mark.torch
def test_a_missing_processor_is_told(reader: ImageReader, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").unlink()
    image = Picture(str(write_image(tmp_path / "a.png", 0)))
    with raises(ModelSourceError, "no-image-processor", "preprocessor_config.json"):
        reader.pixels([image])
    assert reader.noise(2, "calibration").pixels().shape == (2, 3, 16, 16)


@pytest.mark.parametrize("spec", ["pydoc", "random"])
def test_weights_are_fitted_to_noise_where_no_images_are_named(tmp_path: Path, spec: str) -> None:
    told = {**CONFIG, "patch_size": 8, "architectures": ["ViTForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    found = calibration_beside(tmp_path / "model.onnx", (spec,))
    assert "noise" in found.ref.source
    assert found.sources is not None
    assert found.sources.given()["pixel_values"].shape[1:] == (3, 16, 16)


def test_noise_is_the_same_however_much_is_asked_for(tmp_path: Path) -> None:
    reader = ImageReader("model", tmp_path, CONFIG)
    many, few = (reader.noise(number, "calibration").pixels() for number in (8, 3))
    assert np.array_equal(many[:3], few)
    assert not np.array_equal(reader.noise(3, "evaluation").pixels(), few)
    # The bits are those of all images made at once, which plans and hashes of older ones rest on.
    once = np.random.default_rng(0).standard_normal((8, 3, 16, 16), dtype=np.float32)
    assert np.array_equal(many, once)


@pytest.mark.parametrize("size", [None, "16", 0, [16], 1 << 20, [1 << 13, 1 << 13]])
def test_a_config_must_say_how_large_its_images_are(tmp_path: Path, size: Any) -> None:
    with raises(ModelSourceError, "odd-setting", "image_size"):
        ImageReader("model", tmp_path, {"image_size": size}).noise(1, "calibration")


@pytest.mark.torch
def test_samples_have_a_token_for_each_position(tmp_path: Path) -> None:
    from exporter.models.loading.model_source import load_model
    from exporter.models.texts.calibration import calibration_text
    from exporter.models.texts.mixtures import mixed_text

    pytest.importorskip("PIL")
    loaded = load_model(str(write_classifier(tmp_path / "model")))
    folders = [str(write_images(tmp_path / n, 3, seed=s)) for n, s in (("a", 0), ("b", 9))]
    text = calibration_text(loaded, folders[0], samples=2)
    assert text.input_ids.shape == (2, 5)  # four patches and the class token
    assert text.sources is not None
    assert text.sources.given()["pixel_values"].shape == (2, 3, 16, 16)
    assert (text.ref.source, text.ref.samples, text.ref.tokens) == (folders[0], 2, 10)
    both = mixed_text(loaded, folders)
    assert both.sources is not None
    parts = [part.sources.given()["pixel_values"] for part in both.apart if part.sources]
    again = [calibration_text(loaded, folder).sources for folder in folders]
    for found, expected in zip(parts, again, strict=True):
        assert expected is not None
        assert np.array_equal(found, expected.given()["pixel_values"])


class _Heard(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_few_images_choose_nothing_however_many_positions_they_have() -> None:
    images = of_pixels(HeldImages.of(noise(40, (3, 2, 2), 0)), 1370, "made", "0")
    assert len(measured_on(images, 4096).input_ids) == 32
    assert len(measured_on(images, 36 * 1370).input_ids) == 36
    few = images.rows(slice(0, 5))
    assert len(measured_on(few, 4096).input_ids) == 5
    text = CalibrationText.unpadded(images.input_ids, "made", "0")
    assert len(measured_on(text, 4096).input_ids) == 3


@pytest.mark.torch
@pytest.mark.parametrize(("spec", "told"), [(None, True), ("pydoc", True), ("random", False)])
def test_without_a_name_the_samples_are_noise(spec: str | None, told: bool) -> None:
    from exporter.models.texts.calibration import calibration_text
    from tests.exporter.tiny_families import tiny_loaded

    loaded = tiny_loaded("vit", head="ImageClassification")
    console = _Heard()
    text = calibration_text(loaded, spec, samples=3, progress=console)
    assert "noise" in text.ref.source
    assert text.ref.samples == 3
    assert any("noise" in line for line in console.lines) == told


@pytest.mark.torch
def test_models_of_images_without_classes_are_refused() -> None:
    from exporter.models.texts.calibration import calibration_text
    from tests.exporter.tiny_families import tiny_loaded

    with raises(CalibrationError, "takes-no-text", "ViTModel"):
        calibration_text(tiny_loaded("vit"))


@pytest.mark.torch
def test_models_of_two_heads_are_refused() -> None:
    from transformers import DeiTForImageClassificationWithTeacher as TwoHeads

    from exporter.models.texts.calibration import calibration_text
    from tests.exporter.tiny_families import tiny_config, tiny_loaded

    loaded = dataclasses.replace(tiny_loaded("deit"), model=TwoHeads(tiny_config("deit")))
    with raises(CalibrationError, "takes-no-text", "DeiTForImageClassificationWithTeacher"):
        calibration_text(loaded)


@pytest.mark.torch
def test_samples_of_the_other_kind_are_refused() -> None:
    from exporter.models.texts.calibration import CalibrationText, calibration_text
    from exporter.score import score_on
    from tests.exporter.tiny_families import tiny_loaded

    seeing, reading = tiny_loaded("vit", head="ImageClassification"), tiny_loaded("llama")
    images = calibration_text(seeing, samples=2)
    text = CalibrationText.unpadded(np.ones((2, 5), np.int64), "made", "0")
    assert score_on(seeing, images).scores
    for loaded, samples in ((seeing, text), (reading, images)):
        with raises(CalibrationError, "other-samples", loaded.ref.source):
            score_on(loaded, samples)
