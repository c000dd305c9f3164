"""The whole road with what reads no plain text: sentence encoders, classifiers, and images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter import errors
from exporter.artifacts import ComparisonReport, ImportanceReport
from exporter.checkpoint.pruned_model import load_pruned
from exporter.choose.budgets.budget import Budget, Floors
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.gate.gate import check
from exporter.gate.limits import Limits
from exporter.models.loading.meta_model import load_meta
from exporter.models.loading.model_source import load_model
from exporter.models.texts.images import ImageReader, read_images
from exporter.pipeline.request import DropRequest, ExportRequest
from exporter.pipeline.road import export_model
from exporter.quantize.settings import QuantizeSettings
from exporter.score.options import ScoreOptions
from exporter.score.scoring import score
from tests import tiny_models
from tests.made_reports import as_page
from tests.raising import raises
from tests.reading import lines_of, run_lines
from tests.text_graphs import WORDS

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]


ARMS = ("baseline", "candidate", "baseline-quantized", "candidate-quantized")


def request_for(source: Path, out: Path, **changes: Any) -> ExportRequest:
    text, other = source / "scored.txt", source / "judged.txt"
    tiny_models.write_passages(text)
    other.write_text(text.read_text().replace("\n\n", " if if\n\n"))
    return ExportRequest(
        source=str(source), out=out, drops=DropRequest(Budget(attention=1)),
        score=ScoreOptions(
            calibration=(str(text),), samples=4, sequence_length=16, batch_size=2
        ),
        compare=CompareOptions(
            prefill_lengths=(8,), decode_past_lengths=(), rounds=2, eval_text=str(other),
            threads=1,
        ),
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pooled(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    source = tmp_path_factory.mktemp("source")
    tiny_models.write_encoder(source)
    tiny_models.write_sentence_files(source, normalise=True, prompts={"query": "the value"})
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    out = source / "out"
    quantize = QuantizeSettings(scheme="int8")
    report = export_model(request_for(source, out, pooling=True, quantize=quantize))
    return out, report


def vectors(folder: Path) -> np.ndarray[Any, Any]:
    _, made = run_lines(lines_of((folder / "USE.md").read_text())["ONNX Runtime"], folder)
    array: np.ndarray[Any, Any] = made["found"]
    return array


def test_both_models_give_vectors_of_length_1_and_keep_their_files(
    pooled: tuple[Path, Any],
) -> None:
    out, report = pooled
    names = {check.name.split(" against")[0] for check in report.parity}
    assert {"last_hidden_state", "sentence_embedding"} <= names
    arrays = {arm: vectors(out / arm) for arm in ARMS}
    for array in arrays.values():
        assert array.shape == (2, 32)
        assert np.linalg.norm(array, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.abs(arrays["baseline"] - arrays["candidate"]).max() > 1e-3
    assert report.accuracy.figures["embedding_cosine"] < 0.9999
    for arm in ARMS:
        for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
            assert (out / arm / name).read_text() == (out.parent / name).read_text()


@pytest.mark.parametrize(
    ("head", "spoil", "kind", "code"),
    [
        ("Model", "modules.json", errors.ModelSourceError, "no-modules"),
        ("Model", "1_Pooling/config.json", errors.ModelSourceError, "broken-sentence-folder"),
        ("ForSequenceClassification", "", errors.ExportError, "takes-no-tokens"),
    ],
)
def test_what_can_t_be_pooled_is_refused_before_it_is_scored(
    tmp_path: Path, head: str, spoil: str, kind: Any, code: str
) -> None:
    tiny_models.write_encoder(tmp_path, head)
    tiny_models.write_sentence_files(tmp_path)
    if spoil:
        (tmp_path / spoil).unlink()
    with raises(kind, code):
        export_model(request_for(tmp_path, tmp_path / "out", pooling=True))
    assert not (tmp_path / "out" / "importance.json").exists()


@pytest.mark.parametrize(
    "head",
    ["ForSequenceClassification", pytest.param("ForTokenClassification", marks=pytest.mark.long)],
)
def test_a_classifier_keeps_its_head_and_its_labels(
    exports_once: None, tmp_path: Path, head: str
) -> None:
    labels = {0: "bad", 1: "good", 2: "middling"}
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    tiny_models.write_encoder(
        source, head, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    report = export_model(request_for(source, out, checkpoint=True))
    accuracy = report.accuracy
    assert accuracy.kl_divergence > 0
    assert accuracy.intervals["kl_divergence"].ci95[0] > 0
    assert 0 <= accuracy.top1_agreement <= 1
    for folder in (out / "baseline", out / "candidate", out / "checkpoint"):
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == {str(number): name for number, name in labels.items()}
        assert config["architectures"] == [f"Bert{head}"]
    shape = (2, 3) if head == "ForSequenceClassification" else (2, 7, 3)
    assert vectors(out / "candidate").shape == shape
    assert load_model(str(source)).model.config.num_labels == 3


def test_a_reranker_is_scored_and_judged_on_pairs(exports_once: None, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    tiny_models.write_encoder(source, "ForSequenceClassification", num_labels=1)
    tiny_models.write_bert_tokenizer(source)
    request = request_for(source, out)
    line = "the {0} the {0} of in to a of in. rest of {0} in the value string to the class"
    for name, words in (("scored.txt", WORDS[:10]), ("judged.txt", WORDS[10:])):
        (source / name).write_text("\n\n".join(map(line.format, words)))
    report = export_model(replace(request, score=replace(request.score, sequence_length=64)))
    importance = ImportanceReport.read(out / "importance.json")
    assert importance.calibration.tokens < importance.calibration.samples * 64  # padded: pairs
    assert report.accuracy.compared == "order"
    assert report.accuracy.tokens == 10  # the order of each two of 20 pairs
    assert report.accuracy.kl_divergence > 0


IMAGES = 14
NOISE = CompareOptions(rounds=2, threads=1)


def judged_on(images: Path | str, **changes: Any) -> CompareOptions:
    return CompareOptions(rounds=2, threads=1, eval_text=str(images), **changes)


def image_request(source: Path, out: Path, **changes: Any) -> ExportRequest:
    options: dict[str, Any] = {
        "drops": DropRequest(Budget(attention=1)), "compare": NOISE,
        "score": ScoreOptions(samples=4),
    }  # fmt: skip
    return ExportRequest(source=str(source), out=out, **options | changes)


@pytest.fixture(scope="module")
def noisy(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model that was scored and judged on noise, since nobody named images."""
    place = tmp_path_factory.mktemp("noisy")
    source = tiny_models.write_classifier(place / "source")
    quantize = QuantizeSettings(scheme="int8-qdq", calibration=("random",))
    request = image_request(source, place / "out", checkpoint=True, quantize=quantize)
    return place, export_model(request)


@pytest.fixture(scope="module")
def labelled(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model that was scored on images, and judged on others with labels."""
    pytest.importorskip("PIL")
    place = tmp_path_factory.mktemp("labelled")
    source = tiny_models.write_classifier(place / "source")
    scored = tiny_models.write_images(place / "scored", 6)
    judged = tiny_models.write_images(place / "judged", IMAGES, tiny_models.KINDS, seed=50)
    request = image_request(
        source,
        place / "out",
        score=ScoreOptions(calibration=(str(scored),), samples=4),
        compare=judged_on(judged, batches=(1, 2)),
    )
    return place, export_model(request)


def logits_of(place: Path, report: ComparisonReport) -> tuple[Any, Any, list[str]]:
    """PyTorch's on the judged images, whole and with the same sublayers skipped; the labels."""
    import torch

    loaded = load_model(str(place / "source"))
    images = read_images(str(place / "judged"), part="evaluation")
    pixels = torch.from_numpy(ImageReader.of(loaded).pixels(images.pictures))
    model: Any = loaded.model
    with torch.inference_mode():
        whole = model(pixel_values=pixels).logits.double()
        with tiny_models.skipped(model, report.plan):
            cut = model(pixel_values=pixels).logits.double()
    return whole, cut, [str(picture.label) for picture in images.pictures]


def test_noise_is_labelled_as_such_and_all_arms_compute_what_pytorch_does(
    noisy: tuple[Path, Any],
) -> None:
    place, report = noisy
    accuracy = report.accuracy
    assert all("noise" in source for source in (accuracy.text_source, report.calibration.source))
    assert (accuracy.compared, accuracy.tasks) == ("images", [])
    assert accuracy.kl_divergence > 0
    assert 0 <= accuracy.top1_agreement <= 1
    assert [(check.phase, check.passed) for check in report.parity] == [("encode", True)] * 2
    assert len(report.plan) == 1
    for arm in ARMS:
        assert (place / "out" / arm / "preprocessor_config.json").is_file()
    assert len(report.corners) == 4
    quantized = [corner for corner in report.corners if corner.quantized]
    assert all(corner.figures["kl_divergence"] > 0 for corner in quantized)


def test_the_checkpoint_is_the_cut_model(noisy: tuple[Path, Any]) -> None:
    import torch

    place, report = noisy
    folder = place / "out" / "checkpoint"
    assert (folder / "preprocessor_config.json").is_file()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole: Any = load_model(str(place / "source")).model
    pruned: Any = load_pruned(folder).model
    with torch.inference_mode(), tiny_models.skipped(whole, report.plan):
        expected = whole(pixel_values=images).logits
    with torch.inference_mode():
        assert pruned(pixel_values=images).logits == pytest.approx(expected, abs=1e-5)


def test_models_by_layer_and_of_pytorch_are_the_same(noisy: tuple[Path, Any]) -> None:
    source, options = str(noisy[0] / "source"), ScoreOptions(samples=4)
    whole, streamed = score(load_model(source), options), score(load_meta(source), options)
    assert [item.score for item in streamed.scores] == [item.score for item in whole.scores]
    place, _ = noisy
    source = f"torch:{place / 'source'}"
    accuracy = compare(source, source, NOISE).accuracy
    assert accuracy is not None
    assert accuracy.kl_divergence == pytest.approx(0, abs=1e-9)
    assert accuracy.top1_agreement == 1


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
    assert accuracy.compared == "images"
    assert accuracy.kl_divergence == pytest.approx(float(kl), rel=1e-3)
    assert accuracy.top1_agreement == pytest.approx(float(same))
    assert accuracy.figures["top5_agreement"] == pytest.approx(shared)
    assert "kl_divergence" in accuracy.intervals


def test_labels_are_part_of_what_a_report_knows_and_times(labelled: tuple[Path, Any]) -> None:
    place, report = labelled
    images = read_images(str(place / "judged"), part="evaluation")
    assert report.accuracy.text_sha256 == images.content_sha256
    assert images.content_sha256 != images.sha256
    rows = [(row.phase, row.batch, row.sequence_length, row.counts) for row in report.latency]
    assert rows == [("encode", 1, 4, "patches"), ("encode", 2, 4, "patches")]
    page = as_page(report)
    for words in ("top1", "top5", f"{IMAGES} images"):
        assert words in page
    result = {"max_task_drop": 0.0, "min_top1_agreement": 0.0, "max_kl": 100.0}
    outcome = check(report, Limits(**result))
    names = {item.subject for item in outcome.checks}
    assert {f"image classes, {metric}" for metric in ("top1", "top5")} <= names
    assert {item.quantity for item in outcome.checks} == {"task", "top1_agreement", "kl_divergence"}


def test_labels_give_the_shares_of_right_images(labelled: tuple[Path, Any]) -> None:
    place, report = labelled
    whole, cut, labels = logits_of(place, report)
    right = np.array([tiny_models.KINDS.index(label) for label in labels])
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


@pytest.mark.parametrize(
    ("scored", "changes", "kind", "code", "named"),
    [
        ("judged", {}, errors.ComparisonError, "same-text", "judged"),
        (
            "scored",
            {"drops": DropRequest(Budget(floors=Floors(top1_agreement=0.98))), "compare": NOISE},
            errors.PlanError,
            "too-few-to-show",
            183,
        ),
    ],
)
def test_images_that_serve_both_ends_or_are_too_few_are_refused(
    labelled: tuple[Path, Any], scored: str, changes: Any, kind: Any, code: str, named: object
) -> None:
    place, _ = labelled
    score = ScoreOptions(calibration=(str(place / scored),), samples=4)
    options = {"compare": judged_on(place / "judged"), **changes}
    request = image_request(place / "source", place / code, score=score, **options)
    with raises(kind, code, named, place / scored):
        export_model(request)


@pytest.mark.parametrize(
    ("judged", "kind", "code", "named"),
    [
        ("labels", errors.ComparisonError, "labels-mismatch", ("zebra", "kind0")),
        ("broken", errors.TextSourceError, "unreadable", ("1.png",)),
        ("a.txt", errors.TextSourceError, "no-images", ("a.txt",)),
    ],
)
def test_what_an_image_model_can_not_be_judged_on_is_refused(
    labelled: tuple[Path, Any], tmp_path: Path, judged: str, kind: Any, code: str, named: Any
) -> None:
    tiny_models.write_images(tmp_path / "labels", 2, ("zebra",))
    tiny_models.write_images(tmp_path / "broken", 2)
    (tmp_path / "broken" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "a.txt").write_text("text")
    arms = [labelled[0] / "out" / arm for arm in ("baseline", "candidate")]
    with raises(kind, code, *named):
        compare(*arms, judged_on(tmp_path / judged))
