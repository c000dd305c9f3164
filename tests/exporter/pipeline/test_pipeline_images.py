"""The whole road with a classifier of images, held against PyTorch on the same images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ComparisonReport
from exporter.choose.budgets.budget import Budget, Floors
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.errors import (
    ComparisonError,
    ModelSourceError,
    PlanError,
    TextSourceError,
)
from exporter.gate.gate import check
from exporter.gate.limits import Limits
from exporter.pipeline.request import DropRequest, ExportRequest
from exporter.quantize.settings import QuantizeSettings
from exporter.report.files import rendered
from exporter.score import ScoreOptions
from tests.raising import raises
from tests.tiny_models import KINDS, skipped, write_classifier, write_images

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]
IMAGES = 14
NOISE = CompareOptions(rounds=2, threads=1)


def judged_on(images: Path | str, **changes: Any) -> CompareOptions:
    return CompareOptions(rounds=2, threads=1, eval_text=str(images), **changes)


def request_for(source: Path, out: Path, **changes: Any) -> ExportRequest:
    options: dict[str, Any] = {
        "drops": DropRequest(Budget(attention=1)), "compare": NOISE,
        "score": ScoreOptions(samples=4),
    }  # fmt: skip
    return ExportRequest(source=str(source), out=out, **options | changes)


@pytest.fixture(scope="module")
def noisy(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model that was scored and judged on noise, since nobody named images."""
    from exporter.pipeline.road import export_model

    place = tmp_path_factory.mktemp("noisy")
    source = write_classifier(place / "source")
    quantize = QuantizeSettings(scheme="int8-qdq", calibration=("random",))
    request = request_for(source, place / "out", checkpoint=True, quantize=quantize)
    return place, export_model(request)


@pytest.fixture(scope="module")
def labelled(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model that was scored on images, and judged on others with labels."""
    pytest.importorskip("PIL")
    from exporter.pipeline.road import export_model

    place = tmp_path_factory.mktemp("labelled")
    source = write_classifier(place / "source")
    scored = write_images(place / "scored", 6)
    judged = write_images(place / "judged", IMAGES, KINDS, seed=50)
    request = request_for(
        source,
        place / "out",
        score=ScoreOptions(calibration=(str(scored),), samples=4),
        compare=judged_on(judged, batches=(1, 2)),
    )
    return place, export_model(request)


def logits_of(place: Path, report: ComparisonReport) -> tuple[Any, Any, list[str]]:
    """PyTorch's on the judged images, whole and with the same sublayers skipped; the labels."""
    import torch

    from exporter.models.loading.model_source import load_model
    from exporter.models.texts.images import ImageReader, read_images

    loaded = load_model(str(place / "source"))
    images = read_images(str(place / "judged"), part="evaluation")
    pixels = torch.from_numpy(ImageReader.of(loaded).pixels(images.pictures))
    model: Any = loaded.model
    with torch.inference_mode():
        whole = model(pixel_values=pixels).logits.double()
        with skipped(model, report.plan):
            cut = model(pixel_values=pixels).logits.double()
    return whole, cut, [str(picture.label) for picture in images.pictures]


def test_noise_is_labelled_as_such(noisy: tuple[Path, Any]) -> None:
    _, report = noisy
    accuracy = report.accuracy
    assert all("noise" in source for source in (accuracy.text_source, report.calibration.source))
    assert accuracy.images == 64
    assert accuracy.tasks == []
    assert accuracy.kl_divergence > 0
    assert 0 <= accuracy.top1_agreement <= 1


def test_both_graphs_compute_what_pytorch_does(noisy: tuple[Path, Any]) -> None:
    place, report = noisy
    assert [check.passed for check in report.parity] == [True, True]
    assert {check.phase for check in report.parity} == {"encode"}
    assert len(report.plan) == 1
    for arm in ("baseline", "candidate"):
        assert (place / "out" / arm / "preprocessor_config.json").is_file()


def test_the_checkpoint_is_the_cut_model(noisy: tuple[Path, Any]) -> None:
    import torch

    from exporter.checkpoint.pruned_model import load_pruned
    from exporter.models.loading.model_source import load_model

    place, report = noisy
    folder = place / "out" / "candidate" / "hf"
    assert (folder / "preprocessor_config.json").is_file()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole: Any = load_model(str(place / "source")).model
    pruned: Any = load_pruned(folder).model
    with torch.inference_mode(), skipped(whole, report.plan):
        expected = whole(pixel_values=images).logits
    with torch.inference_mode():
        assert pruned(pixel_values=images).logits == pytest.approx(expected, abs=1e-5)


def test_quantised_arms_have_scales_of_the_images(noisy: tuple[Path, Any]) -> None:
    place, report = noisy
    assert len(report.corners) == 4
    for arm in ("baseline-quantized", "candidate-quantized"):
        assert (place / "out" / arm / "preprocessor_config.json").is_file()
    quantized = [corner for corner in report.corners if corner.quantized]
    assert all(corner.kl_divergence > 0 for corner in quantized)


def test_layers_that_come_one_by_one_have_the_same_scores(noisy: tuple[Path, Any]) -> None:
    from exporter.models.loading.meta_model import load_meta
    from exporter.models.loading.model_source import load_model
    from exporter.score import score

    source, options = str(noisy[0] / "source"), ScoreOptions(samples=4)
    whole, streamed = score(load_model(source), options), score(load_meta(source), options)
    assert [item.score for item in streamed.scores] == [item.score for item in whole.scores]


def test_the_classes_are_those_of_pytorch(labelled: tuple[Path, Any]) -> None:
    place, report = labelled
    whole, cut, _ = logits_of(place, report)
    log_p, log_q = whole.log_softmax(-1), cut.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    same = (whole.argmax(-1) == cut.argmax(-1)).double().mean()
    fives = [set(row) for row in whole.topk(5).indices.tolist()]
    others = [set(row) for row in cut.topk(5).indices.tolist()]
    shared = np.mean([len(a & b) / 5 for a, b in zip(fives, others, strict=True)])
    accuracy = report.accuracy
    assert accuracy.images == IMAGES
    assert accuracy.kl_divergence == pytest.approx(float(kl), rel=1e-3)
    assert accuracy.top1_agreement == pytest.approx(float(same))
    assert accuracy.top5_agreement == pytest.approx(shared)
    assert accuracy.kl_interval is not None


def test_a_report_knows_its_images_by_their_labels_and_order_too(
    labelled: tuple[Path, Any],
) -> None:
    from exporter.models.texts.images import read_images

    place, report = labelled
    images = read_images(str(place / "judged"), part="evaluation")
    assert report.accuracy.text_sha256 == images.content_sha256
    assert images.content_sha256 != images.sha256


def test_labels_give_the_shares_of_right_images(labelled: tuple[Path, Any]) -> None:
    place, report = labelled
    whole, cut, labels = logits_of(place, report)
    right = np.array([KINDS.index(label) for label in labels])
    tasks = {task.metric: task for task in report.accuracy.tasks}
    for metric, many in (("top1", 1), ("top5", 5)):
        shares = [
            (logits.topk(many).indices.numpy() == right[:, None]).any(1).mean()
            for logits in (whole, cut)
        ]
        task = tasks[metric]
        assert [task.baseline, task.candidate] == pytest.approx(shares)
        assert task.items == IMAGES
        assert task.difference.ci95[0] <= task.difference.value <= task.difference.ci95[1]


def test_the_batches_are_timed_at_the_one_size(labelled: tuple[Path, Any]) -> None:
    _, report = labelled
    rows = [(row.phase, row.batch, row.sequence_length, row.counts) for row in report.latency]
    assert rows == [("encode", 1, 4, "patches"), ("encode", 2, 4, "patches")]


def test_the_figures_are_in_the_page_and_the_gate(labelled: tuple[Path, Any]) -> None:
    _, report = labelled
    page = rendered({"report": report})
    for words in ("top1", "top5", f"{IMAGES} images"):
        assert words in page
    result = {"max_task_drop": 0.0, "min_top1_agreement": 0.0, "max_kl": 100.0}
    outcome = check(report, Limits(**result))
    names = {item.subject for item in outcome.checks}
    assert {f"image classes, {metric}" for metric in ("top1", "top5")} <= names
    assert {item.quantity for item in outcome.checks} == {"task", "top1_agreement", "kl_divergence"}


def test_the_same_images_never_serve_both_ends(labelled: tuple[Path, Any]) -> None:
    from exporter.pipeline.road import export_model

    place, _ = labelled
    request = request_for(
        place / "source",
        place / "twice",
        score=ScoreOptions(calibration=(str(place / "judged"),)),
        compare=judged_on(place / "judged"),
    )
    with raises(ComparisonError, "same-text", place / "judged"):
        export_model(request)


def test_too_few_images_for_a_limit_are_told(
    labelled: tuple[Path, Any],
) -> None:
    from exporter.pipeline.road import export_model

    place, _ = labelled
    few = ScoreOptions(calibration=(str(place / "scored"),), samples=4)
    drops = DropRequest(Budget(floors=Floors(top1_agreement=0.98)))
    request = request_for(place / "source", place / "few", score=few, drops=drops)
    with raises(PlanError, "too-few-to-show", "183", place / "scored"):
        export_model(request)


def test_labels_of_another_head_are_refused(labelled: tuple[Path, Any], tmp_path: Path) -> None:
    place, _ = labelled
    arms = [place / "out" / arm for arm in ("baseline", "candidate")]
    images = write_images(tmp_path / "images", 2, ("zebra",))
    with raises(ComparisonError, "labels-mismatch", "zebra", "kind0"):
        compare(*arms, judged_on(images))


def test_a_broken_image_is_named(labelled: tuple[Path, Any], tmp_path: Path) -> None:
    place, _ = labelled
    arms = [place / "out" / arm for arm in ("baseline", "candidate")]
    images = write_images(tmp_path / "images", 2)
    (images / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with raises(TextSourceError, "no-image", "1.png"):
        compare(*arms, judged_on(images))


def test_an_image_model_is_not_judged_on_a_text(noisy: tuple[Path, Any], tmp_path: Path) -> None:
    place, _ = noisy
    arms = [place / "out" / arm for arm in ("baseline", "candidate")]
    (tmp_path / "a.txt").write_text("text")
    with raises(TextSourceError, "no-images", "a.txt"):
        compare(*arms, judged_on(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("preprocessor_config.json", ModelSourceError, "no-image-processor"),
        ("config.json", ComparisonError, "no-image-config"),
    ],
)
def test_what_a_folder_lacks_is_told(
    noisy: tuple[Path, Any], tmp_path: Path, name: str, kind: Any, code: str
) -> None:
    pytest.importorskip("PIL")
    place, _ = noisy
    arms = [tmp_path / arm for arm in ("baseline", "candidate")]
    for arm in arms:
        shutil.copytree(place / "out" / arm.name, arm)
        (arm / name).unlink()
    images = write_images(tmp_path / "images", 2)
    options = judged_on(images) if name != "config.json" else NOISE
    with raises(kind, code, name):
        compare(*arms, options)


def test_pytorch_models_are_compared_too(noisy: tuple[Path, Any]) -> None:
    place, _ = noisy
    source = f"torch:{place / 'source'}"
    accuracy = compare(source, source, NOISE).accuracy
    assert accuracy is not None
    assert accuracy.kl_divergence == pytest.approx(0, abs=1e-9)
    assert accuracy.top1_agreement == 1
