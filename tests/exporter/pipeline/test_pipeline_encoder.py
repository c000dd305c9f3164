"""The whole road with a sentence encoder: its pooling becomes a part of both graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.choose.budgets.budget import Budget
from exporter.compare.options import CompareOptions
from exporter.engines.build.profiles import Span
from exporter.errors import ExportError, ModelSourceError
from exporter.pipeline.request import DropRequest, ExportRequest
from exporter.pipeline.run import Run, measure_key
from exporter.pipeline.stages import _ranges
from exporter.progress import QUIET
from exporter.quantize.settings import QuantizeSettings
from exporter.score import ScoreOptions
from tests.raising import raises
from tests.reading import lines_of, run_lines
from tests.text_graphs import WORDS
from tests.tiny_models import (
    write_bert_tokenizer,
    write_encoder,
    write_passages,
    write_sentence_files,
)

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

ARMS = ("baseline", "candidate", "baseline-quantized", "candidate-quantized")


def request_for(source: Path, out: Path, **changes: Any) -> ExportRequest:
    text, other = source / "scored.txt", source / "judged.txt"
    write_passages(text)
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
    from exporter.pipeline.road import export_model

    source = tmp_path_factory.mktemp("source")
    write_encoder(source)
    write_sentence_files(source, normalise=True, prompts={"query": "the value"})
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    out = source / "out"
    quantize = QuantizeSettings(scheme="int8")
    report = export_model(request_for(source, out, pooling=True, quantize=quantize))
    return out, report


def vectors(folder: Path) -> np.ndarray[Any, Any]:
    _, made = run_lines(lines_of((folder / "USE.md").read_text())["ONNX Runtime"], folder)
    array: np.ndarray[Any, Any] = made["found"]
    return array


def test_both_models_give_vectors_of_length_1(pooled: tuple[Path, Any]) -> None:
    out, report = pooled
    names = {check.name.split(" against")[0] for check in report.parity}
    assert {"last_hidden_state", "sentence_embedding"} <= names
    arrays = {arm: vectors(out / arm) for arm in ARMS}
    for array in arrays.values():
        assert array.shape == (2, 32)
        assert np.linalg.norm(array, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.abs(arrays["baseline"] - arrays["candidate"]).max() > 1e-3
    assert report.accuracy.embeddings.cosine < 0.9999


def test_usual_lengths_are_measured_again_where_they_are_asked_for(
    pooled: tuple[Path, Any],
) -> None:
    out, _ = pooled
    request = request_for(out.parent, out, pooling=True)

    def key(lengths: tuple[int, ...] | None) -> Any:
        compare = replace(request.compare, prefill_lengths=lengths)
        return measure_key(Run(replace(request, compare=compare), QUIET))

    assert key(None) == key((32,))
    assert key(None) != key((128, 512))


@pytest.mark.parametrize(("asked", "usual"), [({}, 32), ({"prefill_lengths": (64,)}, 64)])
def test_engines_are_built_for_texts_of_users(
    pooled: tuple[Path, Any], asked: dict[str, Any], usual: int
) -> None:
    out, _ = pooled
    run: Any = SimpleNamespace(
        request=SimpleNamespace(compare=CompareOptions(**asked)),
        ledger=SimpleNamespace(path=lambda name: out / name),
    )
    assert _ranges(run).prompt == Span(1, usual, 2048)


def test_the_files_of_sentence_transformers_go_with_each(pooled: tuple[Path, Any]) -> None:
    out, _ = pooled
    for arm in ARMS:
        for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
            assert (out / arm / name).read_text() == (out.parent / name).read_text()


def test_without_the_option_the_graph_gives_token_states_alone(
    pooled: tuple[Path, Any], tmp_path: Path
) -> None:
    from exporter.export.forms.targets import write_form
    from exporter.models.loading.model_source import load_model
    from graph_passes.files.storage import load_model as load_graph

    source = pooled[0].parent
    graph, _ = write_form(load_model(str(source)), tmp_path / "plain")
    assert [value.name for value in load_graph(graph).graph.outputs] == ["last_hidden_state"]


@pytest.mark.parametrize(
    ("head", "spoil", "kind", "code"),
    [
        ("Model", "modules.json", ModelSourceError, "no-modules"),
        ("Model", "1_Pooling/config.json", ModelSourceError, "pooling-missing"),
        ("ForSequenceClassification", "", ExportError, "no-token-states"),
    ],
)
def test_what_can_t_be_pooled_is_refused_before_it_is_scored(
    tmp_path: Path, head: str, spoil: str, kind: Any, code: str
) -> None:
    from exporter.pipeline.road import export_model

    write_encoder(tmp_path, head)
    write_sentence_files(tmp_path)
    if spoil:
        (tmp_path / spoil).unlink()
    with raises(kind, code):
        export_model(request_for(tmp_path, tmp_path / "out", pooling=True))
    assert not (tmp_path / "out" / "importance.json").exists()


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_a_classifier_keeps_its_head_and_its_labels(
    exports_once: None, tmp_path: Path, head: str
) -> None:
    from exporter.models.loading.model_source import load_model
    from exporter.pipeline.road import export_model

    labels = {0: "bad", 1: "good", 2: "middling"}
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_encoder(source, head, id2label=labels, label2id={v: k for k, v in labels.items()})
    report = export_model(request_for(source, out, checkpoint=True))
    accuracy = report.accuracy
    assert accuracy.kl_divergence > 0
    assert accuracy.kl_interval.ci95[0] > 0
    assert 0 <= accuracy.top1_agreement <= 1
    for folder in (out / "baseline", out / "candidate", out / "candidate" / "hf"):
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == {str(number): name for number, name in labels.items()}
        assert config["architectures"] == [f"Bert{head}"]
    shape = (2, 3) if head == "ForSequenceClassification" else (2, 7, 3)
    assert vectors(out / "candidate").shape == shape
    assert load_model(str(source)).model.config.num_labels == 3


def _of_sentences(path: Path, words: Sequence[str]) -> None:
    paragraphs = [
        f"the {word} the {word} of in to a of in. rest of {word} in the value string to the class"
        for word in words
    ]
    path.write_text("\n\n".join(paragraphs))


def test_a_reranker_is_scored_and_judged_on_pairs(exports_once: None, tmp_path: Path) -> None:
    from exporter.artifacts import ImportanceReport
    from exporter.pipeline.road import export_model

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_encoder(source, "ForSequenceClassification", num_labels=1)
    write_bert_tokenizer(source)
    request = request_for(source, out)
    _of_sentences(source / "scored.txt", WORDS[:10])
    _of_sentences(source / "judged.txt", WORDS[10:])
    report = export_model(replace(request, score=replace(request.score, sequence_length=64)))
    importance = ImportanceReport.read(out / "importance.json")
    assert importance.calibration.tokens < importance.calibration.samples * 64  # padded: pairs
    assert report.accuracy.compared == "order"
    assert report.accuracy.tokens == 10  # the order of each two of 20 pairs
    assert report.accuracy.kl_divergence > 0


@pytest.mark.long
@pytest.mark.optimum
@pytest.mark.parametrize("arm", ARMS)
def test_sentence_transformers_loads_what_an_export_writes(
    pooled: tuple[Path, Any], arm: str
) -> None:
    pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers brings scikit-learn and scipy"
    )
    folder = pooled[0] / arm
    lines = lines_of((folder / "USE.md").read_text())
    _, theirs = run_lines(lines["sentence-transformers"], folder)
    assert np.allclose(theirs["vectors"], vectors(folder), atol=1e-5)
