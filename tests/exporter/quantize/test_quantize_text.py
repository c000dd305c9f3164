"""What looks at a text: int8 of activations, pairs for rerankers; ModelOpt in its own Python."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.comparison import QUANTIZATION_KEY, QuantizationRecord
from exporter.artifacts.plans import noted_texts
from exporter.cli import run
from exporter.errors import CalibrationError, MissingDependencyError, QuantizationError, UsageError
from exporter.models.texts.sources import read_texts
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.quantize.calibration import calibration_beside
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import load_model
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from tests.graph_passes.decoder_graphs import decoder_model
from tests.raising import raises
from tests.reading import Heard, names_in
from tests.text_graphs import (
    INNER,
    TIED,
    VOCABULARY,
    WIDTH,
    WORDS,
    write_tokenizer,
    written,
)
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
    given = (words,) if scheme == "int8-qdq" else ()
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


@pytest.mark.parametrize(
    ("source", "classes", "config", "paired"),
    [
        ("text", 3, {}, False),
        ("text", 1, {"problem_type": "regression"}, False),
        ("text", None, {}, False),
        ("pairs", 1, {}, True),
        ("pairs", 3, {}, True),
        ("pairs", None, {}, False),
    ],
)
def test_pairs_are_what_a_reranker_reads_and_whoever_is_given_them_classes(
    source: str, classes: int | None, config: dict[str, str], paired: bool, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    model = write_classifier(tmp_path / "m", 3 if source == "text" else 1, **config)
    calibration = calibration_beside(model, (request.getfixturevalue(source),), classes)
    assert (calibration.types is not None) is paired
    assert (len(calibration.input_ids) == 24) is paired
    assert source == "pairs" or calibration.mask.all()


def test_pairs_beside_a_text_without_sentences_are_mixed_and_that_is_told(
    reranker: Path, pairs: str, tmp_path: Path
) -> None:
    words, heard = tmp_path / "words.txt", Heard()
    words.write_text(" ".join(WORDS * 40))
    mixed = calibration_beside(reranker, (pairs, str(words)), 1, heard)
    assert len(heard.lines) == 1
    assert str(words) in heard.lines[0]
    own, single = mixed.apart
    assert not own.mask.all()
    assert single.types is not None  # all of them first texts
    assert single.mask.all()
    assert not single.types.any()
    settings = QuantizeSettings("int8-qdq", calibration=(pairs,))
    done = quantize_file(reranker, tmp_path / "out" / "model.onnx", settings)
    assert "pairs.jsonl" in str(done.record.calibration)


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


STAND_IN = """\
#!{python}
import sys
if sys.argv[1] == "-c":
    print("0.47.0")
    sys.exit(0)
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1:3] == ["-m", "modelopt.onnx.quantization"], sys.argv
assert options["--calibration_eps"] == "cpu" and options["--high_precision_dtype"] == "fp32"
import numpy as np, onnx_ir as ir
given = np.load(options["--calibration_data_path"])
samples, length = given["input_ids"].shape
assert samples > 1 and given["attention_mask"].shape == (samples, length)
assert all(given[n].shape[0] == samples and given[n].shape[2] == 0 for n in given if "past" in n)
model = ir.load(options["--onnx_path"])
{action}
model.metadata_props.clear()
for node in model.graph:
    for value in node.outputs:
        if not value.is_graph_output():
            value.shape = None
ir.save(model, options["--output_path"])
open(options["--onnx_path"], "w").close()  # it may spoil what it was given
"""
QUANTISES = """\
for node in list(model.graph):
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is not None and weight.is_initializer():
        data = weight.const_value.numpy()
        scale = ir.val(weight.name + ".s", const_value=ir.tensor(np.float32(abs(data).max() / 127)))
        whole = np.round(data / scale.const_value.numpy()).astype(np.int8)
        small = ir.val(weight.name + ".q", const_value=ir.tensor(whole))
        model.graph.initializers.add(scale), model.graph.initializers.add(small)
        back = ir.node("DequantizeLinear", [small, scale])
        model.graph.insert_before(node, back)
        node.replace_input_with(1, back.outputs[0])
"""
FAILS = 'sys.exit("no kernel for TensorScatter")'


def stand_in(folder: Path, action: str) -> Path:
    program = folder / "python"
    program.write_text(STAND_IN.format(python=sys.executable, action=action))
    program.chmod(0o755)
    return program


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    model = decoder_model()
    model.metadata_props["depthcut.plan"] = "kept"
    path = saved(model, tmp_path / "float")
    write_tokenizer(path.parent)
    path.with_name("config.json").write_text('{"max_position_embeddings": 16}')
    return path


@pytest.fixture
def settings(tmp_path: Path) -> QuantizeSettings:
    """As they are asked for; who runs it comes from :func:`stand_in`."""
    text = tmp_path / "text.txt"
    text.write_text("the a and of in to is for on with " * 8)  # the graph knows no more words
    return QuantizeSettings(
        "int4-awq", calibration=(str(text),), modelopt=stand_in(tmp_path, QUANTISES)
    )


def test_notes_and_shapes_are_put_back_and_the_source_stays(
    decoder: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    before, out = decoder.read_bytes(), tmp_path / "out" / "model.onnx"
    record = quantize_file(decoder, out, settings).record
    assert decoder.read_bytes() == before
    assert (record.scheme, record.method) == ("int4-awq", "modelopt 0.47.0, awq_clip")
    assert (record.block_size, record.symmetric, record.embedding_bits) == (None, None, None)
    assert record.calibration is not None
    assert "text.txt, sha256 " in record.calibration
    model = load_model(out)
    assert record.bits == {"4": sum(n.op_type == "DequantizeLinear" for n in model.graph)}
    assert record.head_bits == 4
    note = model.metadata_props[QUANTIZATION_KEY]
    assert QuantizationRecord.model_validate_json(note) == record
    assert model.metadata_props["depthcut.plan"] == "kept"
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.inputs[0] is not None
    assert attention.inputs[0].shape is not None
    assert {*names_in(out.parent)} <= {"model.onnx", "model.onnx.*.data"}


@pytest.mark.parametrize(
    ("action", "code", "field"),
    [(FAILS, "modelopt-failed", "no kernel"), ("", "nothing-to-quantize", "fp8")],
)
def test_what_fails_leaves_nothing(
    action: str, code: str, field: str, decoder: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    failing = replace(settings, scheme="fp8", modelopt=stand_in(tmp_path, action))
    with raises(QuantizationError, code, field):
        quantize_file(decoder, tmp_path / "out" / "model.onnx", failing)
    assert not list(tmp_path.glob("out/*"))


def test_caches_in_place_are_refused_before_it_runs(
    decoder: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    model = load_model(decoder)
    CacheInPlacePass(32).call(model)
    never = replace(settings, modelopt=tmp_path / "none")
    with raises(QuantizationError, "caches-in-place", "cache_length: 0"):
        quantize_file(saved(model, tmp_path / "fixed"), tmp_path / "o.onnx", never)


def test_a_python_without_it_is_told(
    decoder: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    for python, code in (
        (tmp_path / "none", "python-missing"),
        (Path(sys.executable), "modelopt-missing"),
    ):
        with raises(MissingDependencyError, code, python, "pip install 'nvidia-modelopt[onnx]'"):
            quantize_file(decoder, out, replace(settings, modelopt=python))
    with pytest.raises(UsageError):
        quantize_file(decoder, decoder, settings)


def test_the_command_passes_int8_on_to_it_only_where_it_is_named(
    decoder: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    result = ["quantize", str(decoder), "--quantize", "int8-qdq", "-q", "--calibration"]
    result.append(settings.calibration[0])
    named, plain = tmp_path / "named" / "m.onnx", tmp_path / "plain" / "m.onnx"
    assert run([*result, "-o", str(named), "--modelopt-python", str(settings.modelopt)]) == 0
    assert run([*result, "-o", str(plain)]) == 0
    notes = [load_model(path).metadata_props[QUANTIZATION_KEY] for path in (named, plain)]
    methods = [QuantizationRecord.model_validate_json(note).method for note in notes]
    assert methods == ["modelopt 0.47.0, max", "rtn"]
