"""What quantisations of rerankers look at: pairs, with their masks and types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_modelopt import QUANTISES, stand_in

from exporter.errors import CalibrationError
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.progress import Progress
from exporter.quantize.calibration import calibration_beside
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from tests.raising import raises
from tests.text_graphs import INNER, VOCABULARY, WIDTH, WORDS, written
from tests.tiny_models import write_bert_tokenizer

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


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"query": f"the {word} of the {word}", "passages": [f"a {word} is a value", "of in to"]}
        for word in WORDS[4:16]
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def test_a_reranker_is_calibrated_on_pairs_of_any_text(reranker: Path, text: str) -> None:
    calibration_text = calibration_beside(reranker, (text,), 1)
    assert calibration_text.types is not None
    assert len(calibration_text.input_ids) in range(18, 25, 2)
    tokenizer = tokenizer_in(reranker.with_name("tokenizer.json"))
    own = []
    for paragraph in Path(text).read_text().split("\n\n"):
        first, rest = paragraph[: paragraph.index(".") + 1], paragraph[paragraph.index(".") + 2 :]
        own.append(tokenizer.pair(first, rest, LONGEST))
    packed = (
        calibration_text.input_ids[0][calibration_text.mask[0]].tolist(),
        calibration_text.types[0][calibration_text.mask[0]].tolist(),
    )
    assert packed in own
    assert {*calibration_text.types[0].tolist()} == {0, 1}
    assert {*calibration_text.input_ids[~calibration_text.mask].tolist()} == {PADDING}


@pytest.mark.parametrize(
    ("classes", "config"), [(3, {}), (1, {"problem_type": "regression"}), (None, {})]
)
def test_others_are_calibrated_on_single_texts(
    classes: int | None, config: dict[str, str], tmp_path: Path, text: str
) -> None:
    calibration_text = calibration_beside(
        write_classifier(tmp_path / "m", 3, **config), (text,), classes
    )
    assert calibration_text.types is None
    assert calibration_text.mask.all()


@pytest.mark.parametrize(("classes", "paired"), [(1, True), (3, True), (None, False)])
def test_pairs_of_a_file_are_read_by_whoever_gives_texts_classes(
    classes: int | None, paired: bool, reranker: Path, pairs: str
) -> None:
    calibration_text = calibration_beside(reranker, (pairs,), classes)
    assert (calibration_text.types is not None) is paired
    assert (len(calibration_text.input_ids) == 24) is paired


def test_pairs_beside_a_text_without_sentences_are_mixed_and_that_is_told(
    reranker: Path, pairs: str, tmp_path: Path
) -> None:
    said: list[str] = []

    class Heard(Progress):
        def say(self, message: str) -> None:
            said.append(message)

    words = tmp_path / "words.txt"
    words.write_text(" ".join(WORDS * 40))
    mixed = calibration_beside(reranker, (pairs, str(words)), 1, Heard())
    assert len(said) == 1
    assert str(words) in said[0]
    own, single = mixed.apart
    assert not own.mask.all()
    assert single.types is not None  # all of them first texts
    assert single.mask.all()
    assert not single.types.any()


def test_few_pairs_are_refused(reranker: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"query": "the", "passage": "value"}\n')
    with raises(CalibrationError, "text-too-short", path):
        calibration_beside(reranker, (str(path),), 1)


def test_modelopt_is_given_all_pairs_at_once(reranker: Path, text: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen.npz"
    program = stand_in(tmp_path, f"{QUANTISES}\nnp.savez({str(seen)!r}, **given)")
    settings = QuantizeSettings("int8-qdq", calibration=(text,), modelopt=program)
    quantize_file(reranker, tmp_path / "out" / "model.onnx", settings)
    given, samples = np.load(seen), calibration_beside(reranker, (text,), 1)
    width = int(samples.mask.sum(1).max())
    assert width < LONGEST
    assert np.array_equal(given["attention_mask"], samples.mask[:, :width])
    assert samples.types is not None
    assert np.array_equal(given["token_type_ids"], samples.types[:, :width])
    assert np.array_equal(given["input_ids"], samples.input_ids[:, :width])


def test_a_reranker_is_quantised_by_what_it_is_asked(
    reranker: Path, pairs: str, tmp_path: Path
) -> None:
    settings = QuantizeSettings("int8-qdq", calibration=(pairs,))
    done = quantize_file(reranker, tmp_path / "out" / "model.onnx", settings)
    assert "pairs.jsonl" in str(done.record.calibration)
