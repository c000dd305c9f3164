"""What looks at a text: activations in 8 bits, for ONNX Runtime and TensorRT; rerankers' pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.plans import noted_texts
from exporter.engines.build.build import build_engines
from exporter.engines.build.profiles import Ranges, Span
from exporter.errors import CalibrationError, UsageError
from exporter.models.texts.sources import read_texts
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.quantize.calibration import calibration_beside
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import load_model
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from tests.graph_passes.decoder_graphs import decoder_model
from tests.raising import raises
from tests.text_graphs import INNER, TIED, VOCABULARY, WIDTH, WORDS, write_tokenizer, written
from tests.tiny_graphs import saved
from tests.tiny_models import write_bert_tokenizer


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A text without sentences."""
    chosen = np.random.default_rng(0).choice(["the", "value", "of", "list", "is", "type"], 2000)
    (tmp_path / "words.txt").write_text(" ".join(chosen), encoding="utf-8")
    return str(tmp_path / "words.txt")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = written(TIED, tmp_path / "source" / "model.onnx")
    write_tokenizer(path.parent)
    return path


@pytest.mark.parametrize(
    ("scheme", "operator"),
    [("int8-dynamic", "MatMulInteger"), ("int8-qdq", "DequantizeLinear")],
)
def test_onnx_runtimes_own_quantisers_keep_the_notes_and_tell_what_they_leave(
    model: Path, tmp_path: Path, words: str, scheme: Any, operator: str
) -> None:
    given = () if scheme == "int8-dynamic" else (words,)
    settings = QuantizeSettings(scheme=scheme, calibration=given)
    result = quantize_file(model, tmp_path / "out.onnx", settings)
    assert result.record.bits == {"8": 2}
    assert list(result.in_float) == ["head_node"]
    assert "table" in result.in_float["head_node"]
    assert 0 < result.difference.max_abs_error < 0.2
    graph = load_model(tmp_path / "out.onnx").graph
    assert operator in {node.op_type for node in graph}
    if not given:
        assert result.record.calibration is None
        return
    assert str(result.record.calibration).startswith(f"{words}, sha256 ")
    source = read_texts(words, part="calibration")
    noted = noted_texts(load_model(tmp_path / "out.onnx").metadata_props)
    assert noted == {"quantised": sorted({source.sha256, f"content:{source.content.written()}"})}
    sources = [n.inputs[0].producer() for n in graph if n.op_type == "QuantizeLinear"]  # type: ignore[union-attr]
    assert sources
    assert "MatMul" not in {source.op_type for source in sources if source is not None}


def test_what_is_no_calibration_is_refused(model: Path, tmp_path: Path, words: str) -> None:
    short, few = tmp_path / "short.txt", tmp_path / "few.jsonl"
    short.write_text("the value of", encoding="utf-8")
    few.write_text('{"query": "the", "passage": "value"}\n')
    for text, kind, code, named in (
        (str(short), CalibrationError, "text-too-short", 512),
        (words, UsageError, "overwrites-input", words),
        (words, CalibrationError, "no-tokenizer", model.parent),
    ):
        if code == "no-tokenizer":
            model.with_name("tokenizer.json").unlink()
        target = Path(words) if kind is UsageError else tmp_path / "out.onnx"
        before = Path(words).read_bytes()
        with raises(kind, code, named):
            quantize_file(model, target, QuantizeSettings("int8-qdq", calibration=(text,)))
        assert Path(words).read_bytes() == before
    with raises(CalibrationError, "text-too-short", few):
        calibration_beside(write_classifier(tmp_path / "reranker", 1), (str(few),), 1)


def test_a_mixture_has_alike_much_of_each_text(model: Path, tmp_path: Path, words: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text(Path(words).read_text() + " type")
    mixture = calibration_beside(model, (words, str(other)))
    assert [ref.samples for ref in mixture.parts] == [len(mixture.input_ids) // 2] * 2
    assert calibration_beside(model, (words,)).ref.mixture == []
    with raises(CalibrationError, "named-twice", words):
        calibration_beside(model, (words, words))


CLASSIFIER = f"""<ir_version: 10, opset_import: ["": 20]>
small (int64[batch, seq] input_ids, int64[batch, seq] attention_mask,
       int64[batch, seq] token_type_ids) => (float[batch, CLASSES] logits)
<float[{VOCABULARY}, {WIDTH}] table, float[2, {WIDTH}] kinds, float[{WIDTH}, {INNER}] up,
 float[{INNER}, CLASSES] head> {{
  words = Gather(table, input_ids)
  kind = Gather(kinds, token_type_ids)
  hidden = Add(words, kind)
  [up_node] inner = MatMul(hidden, up)
  active = Relu(inner)
  real = Cast<to = 1>(attention_mask)
  last = Constant<value_ints = [-1]>()
  rows = Unsqueeze(real, last)
  kept = Mul(active, rows)
  tokens = Constant<value_ints = [1]>()
  pooled = ReduceSum<keepdims = 0>(kept, tokens)
  [head_node] logits = MatMul(pooled, head)
}}"""
PADDING, LONGEST = 7, 64


def write_classifier(folder: Path, classes: int, **config: Any) -> Path:
    model = written(CLASSIFIER.replace("CLASSES", str(classes)), folder / "model.onnx")
    write_bert_tokenizer(folder)
    result = {"max_position_embeddings": LONGEST, "pad_token_id": PADDING, **config}
    (folder / "config.json").write_text(json.dumps(result))
    return model


@pytest.fixture
def reranker(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "reranker", 1)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Twelve passages of different lengths, each with a first sentence."""
    path = tmp_path / "text.txt"
    paragraphs = [
        f"the {word} the {word} of in to a of in. rest of {word} in the value string to the class"
        + f" {word}" * number
        for number, word in enumerate(WORDS[4:16])
    ]
    path.write_text("\n\n".join(paragraphs))
    return str(path)


def test_a_reranker_is_calibrated_on_pairs_of_any_text(reranker: Path, text: str) -> None:
    made = calibration_beside(reranker, (text,), 1)
    assert made.types is not None
    assert len(made.input_ids) in range(18, 25, 2)
    tokenizer = tokenizer_in(reranker.with_name("tokenizer.json"))
    own = []
    for paragraph in Path(text).read_text().split("\n\n"):
        first, rest = paragraph[: paragraph.index(".") + 1], paragraph[paragraph.index(".") + 2 :]
        own.append(tokenizer.pair(first, rest, LONGEST))
    real = made.mask[0]
    assert (made.input_ids[0][real].tolist(), made.types[0][real].tolist()) in own
    assert {*made.types[0].tolist()} == {0, 1}
    assert {*made.input_ids[~made.mask].tolist()} == {PADDING}


@pytest.mark.rtx
@pytest.mark.parametrize("room", [None, 32])
def test_tensorrt_builds_what_a_text_has_scaled(tmp_path: Path, room: int | None) -> None:
    """With caches that grow, and caches in place."""
    model, text = decoder_model(), tmp_path / "text.txt"
    if room is not None:
        CacheInPlacePass(room).call(model)
    path = saved(model, tmp_path / "float")
    write_tokenizer(path.parent)
    path.with_name("config.json").write_text('{"max_position_embeddings": 16}')
    text.write_text("the a and of in to is for on with " * 8)  # the graph knows no more words
    target = tmp_path / "small" / "model.onnx"
    settings = QuantizeSettings("int8-qdq", calibration=(str(text),))
    assert quantize_file(path, target, settings).record.head_bits == 8
    ranges = Ranges(prompt=Span(1, 8, 16), context=None if room else Span(1, 8, 31))
    records = [record for _, record in build_engines(target, tmp_path, ranges=ranges)]
    assert {record.precision for record in records} == {"fp32-int8"}
