"""Weights in 4 and 8 bits: what is quantised, what stays in float, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter.artifacts import PruneReport
from exporter.artifacts.comparison import QUANTIZATION_KEY, QuantizationRecord
from exporter.cut.surgery import NOT_VERIFIED
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import OptionError, QuantizationError, UsageError
from exporter.quantize.products import find_products, read_array
from exporter.quantize.quantize import quantize_file, refuse_quantised
from exporter.quantize.rewrite import (
    Blocks,
    PackedWeights,
    already_rounded,
    drop_unused,
    round_to_nearest,
    rounded,
    use_in_product,
)
from exporter.quantize.settings import QuantizeSettings
from exporter.quantize.weight_only import BlockSums, with_whole_zero_points
from graph_passes.files.storage import load_model, save_model
from graph_passes.files.weight_file import WeightWriter
from graph_passes.pipeline import graph_size
from tests.raising import raises
from tests.reading import names_in
from tests.text_graphs import (
    GEMM,
    INNER,
    ONLY_HEAD,
    OTHERS,
    RAGGED,
    TIED,
    TWO_ACTIVATIONS,
    VOCABULARY,
    WIDTH,
    contents,
    set_weight,
    written,
)
from tests.tiny_graphs import saved


def numbers_of(blocks: Blocks) -> np.ndarray:  # type: ignore[type-arg]
    """What is packed, ``[N, blocks * block]``."""
    steps = blocks.quants.astype(np.float32) - blocks.offsets[..., None]
    return (steps * blocks.scales[..., None]).reshape(len(steps), -1)  # type: ignore[no-any-return]


DYNAMIC: dict[str, Any] = {"scheme": "int8-dynamic"}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return written(TIED, tmp_path / "source" / "model.onnx")


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:  # type: ignore[type-arg]
    with OnnxRuntimeRunner(path, threads=1) as runner:
        return next(iter(runner.run(feed).values()))


def operators(path: Path) -> list[str]:
    return sorted(node.op_type for node in load_model(path).graph)


@pytest.mark.parametrize(("scheme", "bits", "limit"), [("int4", 4, 0.5), ("int8", 8, 0.03)])
def test_products_table_and_tied_head_are_quantised(
    tied: Path, tmp_path: Path, scheme: Any, bits: int, limit: float
) -> None:
    before = contents(tied.parent)
    output = tmp_path / "out" / "model.onnx"
    result = quantize_file(tied, output, QuantizeSettings(scheme=scheme))
    assert operators(output) == [
        "Add", "GatherBlockQuantized", "MatMulNBits", "MatMulNBits", "MatMulNBits", "Relu",
    ]  # fmt: skip
    expected = {"8": 3} if bits == 8 else {"4": 2, "8": 1}
    assert result.record.bits == expected
    assert (result.record.head_bits, result.record.embedding_bits) == (8, 8)
    assert result.in_float == {}
    assert result.difference.kl_divergence is not None
    assert 0 < result.difference.max_abs_error < limit
    assert result.bytes_after < result.bytes_before / 2
    assert contents(tied.parent) == before
    assert names_in(output.parent) == ["model.onnx", "model.onnx.*.data"]
    onnx.checker.check_model(str(output))
    places = [
        (tensor.offset, tensor.length)
        for value in load_model(output).graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor) and "table" in value.name  # type: ignore[operator]
        and tensor.dtype == ir.DataType.UINT8
    ]  # fmt: skip
    assert (len(places), len(set(places))) == (2, 1)  # the head and the table
    with raises(UsageError, "overwrites-input"):
        quantize_file(tied, tied, QuantizeSettings())
    assert contents(tied.parent) == before


@pytest.mark.parametrize(
    ("graph", "settings"),
    [
        (TIED, QuantizeSettings(scheme="int4")),
        (TIED, QuantizeSettings(scheme="int8", symmetric=False)),
        (TIED, QuantizeSettings(scheme="int4", head_bits=None, embedding_bits=8)),
        pytest.param(TIED, QuantizeSettings(scheme="int4", method="hqq"), marks=pytest.mark.torch),
        (RAGGED, QuantizeSettings(scheme="int4")),  # what fills the last block is none
    ],
)
def test_parameters_are_the_weights_that_packed_bytes_stand_for(
    tmp_path: Path, graph: str, settings: QuantizeSettings
) -> None:
    source = written(graph, tmp_path / "source.onnx")
    quantize_file(source, tmp_path / "out.onnx", settings)
    packed, plain = (load_model(path) for path in (tmp_path / "out.onnx", source))
    assert "MatMulNBits" in {node.op_type for node in packed.graph}
    # A head of other bits than its table is a matrix of its own.
    apart = VOCABULARY * WIDTH if settings.head_bits is None else 0
    assert graph_size(packed).parameters == graph_size(plain).parameters + apart


def test_a_table_of_other_bits_than_its_head_is_apart(tied: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    settings = QuantizeSettings(scheme="int4", head_bits=None, embedding_bits=8)
    record = quantize_file(tied, output, settings).record
    assert (record.head_bits, record.embedding_bits) == (4, 8)
    assert all(value.uses() for value in load_model(output).graph.initializers.values())
    left = quantize_file(tied, tmp_path / "left.onnx", QuantizeSettings(embedding_bits=None))
    assert left.record.embedding_bits is None
    assert "Gather" in operators(tmp_path / "left.onnx")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_graph_computes_with_the_unpacked_weights(
    tmp_path: Path, bits: int, symmetric: bool
) -> None:
    """K is 40, no multiple of the block: the last one is padded, and nothing is left out."""
    source = written(RAGGED, tmp_path / "model.onnx")
    settings = QuantizeSettings(
        scheme=f"int{bits}", symmetric=symmetric, accuracy_level=1, head_bits=None
    )
    quantize_file(source, tmp_path / "out.onnx", settings)
    weight = read_array(load_model(source).graph.initializers["weight"])
    packed = round_to_nearest(weight, bits, 32, symmetric=symmetric)
    x = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    expected = x @ numbers_of(packed)[:, :40].T
    np.testing.assert_allclose(run(tmp_path / "out.onnx", {"x": x}), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - x @ weight).max() > 1e-4


def test_a_gemm_keeps_its_bias(tmp_path: Path) -> None:
    source, out = written(GEMM, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    quantize_file(source, out, QuantizeSettings(scheme="int8", accuracy_level=1))
    assert operators(out) == ["MatMulNBits"]
    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    assert np.abs(run(out, {"x": x}) - run(source, {"x": x})).max() < 0.02
    assert np.abs(read_array(load_model(source).graph.initializers["bias"])).max() > 0.2
    result = quantize_file(source, tmp_path / "dynamic.onnx", QuantizeSettings(**DYNAMIC))
    assert (result.record.bits, result.in_float) == ({"8": 1}, {})


def test_what_stays_in_float_is_told_with_its_reason(tmp_path: Path) -> None:
    source = written(OTHERS, tmp_path / "model.onnx")
    result = quantize_file(source, tmp_path / "out.onnx", QuantizeSettings())
    assert result.record.bits == {"8": 1}  # the last one, as a head
    assert result.in_float == {
        "many": "its weight is no float matrix",
        "first": "its weight is the first operand",
        "with_factor": "its operator, FusedMatMul, takes float weights only",
    }


def test_the_graphs_own_notes_stay_and_the_record_is_added(tied: Path, tmp_path: Path) -> None:
    model = load_model(tied)
    model.metadata_props["depthcut.plan"] = "[]"
    noted = saved(model, tmp_path, "noted.onnx")
    for name in ("one", "two"):
        record = quantize_file(noted, tmp_path / name / "m.onnx", QuantizeSettings()).record
    notes = load_model(tmp_path / "one" / "m.onnx").metadata_props
    assert notes["depthcut.plan"] == "[]"
    assert QuantizationRecord.model_validate_json(notes[QUANTIZATION_KEY]) == record
    assert json.loads(notes[QUANTIZATION_KEY])["block_size"] == 32
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_half_precision_weights_keep_half_precision_scales(tmp_path: Path) -> None:
    source = written(RAGGED, tmp_path / "model.onnx", kind=ir.DataType.FLOAT16)
    quantize_file(source, tmp_path / "out.onnx", QuantizeSettings(scheme="int8"))
    scales = load_model(tmp_path / "out.onnx").graph.initializers["weight_Q8_scales"]
    assert scales.dtype == ir.DataType.FLOAT16


def test_a_quantised_graph_is_not_quantised_again(tied: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.onnx"
    quantize_file(tied, ours, QuantizeSettings())
    with raises(QuantizationError, "already-quantized", "ours.onnx"):
        quantize_file(ours, tmp_path / "out.onnx", QuantizeSettings())
    model = load_model(ours)
    del model.metadata_props[QUANTIZATION_KEY]
    with raises(QuantizationError, "already-quantized", "GatherBlockQuantized"):
        refuse_quantised(model, ours)


def spoilt(wrong: float) -> Any:
    weight = np.ones((INNER, WIDTH), np.float32)
    weight[3, 5] = wrong
    return lambda path: set_weight(written(TIED, path), "down", weight, path.with_name("bad.onnx"))


@pytest.mark.parametrize(
    ("make", "settings", "code", "named"),
    [
        (lambda path: written(RAGGED, path, kind=ir.DataType.BFLOAT16), {}, "wrong-dtype",
         ["bfloat16"]),
        (lambda path: written(RAGGED, path), {"method": "hqq"}, "ragged-block",
         ["ragged_node", "32", "--block-size"]),
        (lambda path: written(TWO_ACTIVATIONS, path), {}, "nothing-to-quantize", []),
        (spoilt(np.nan), {}, "not-finite", ["down_node"]),
        (spoilt(np.inf), {}, "not-finite", ["down_node"]),
        (lambda path: written(TIED, path, kind=ir.DataType.BFLOAT16), DYNAMIC, "wrong-dtype",
         ["not in bfloat16"]),
        (lambda path: written(TIED, path, kind=ir.DataType.FLOAT16), DYNAMIC, "wrong-dtype",
         ["not in float16"]),
        (spoilt(np.nan), DYNAMIC, "not-finite", ["down_node"]),
        (lambda path: written(ONLY_HEAD, path), DYNAMIC, "nothing-to-quantize", ["head_node"]),
    ],
)  # fmt: skip
def test_graphs_that_can_t_be_quantised_are_refused_and_nothing_is_written(
    tmp_path: Path, make: Any, settings: Any, code: str, named: list[str]
) -> None:
    source = make(tmp_path / "model.onnx")
    with raises(QuantizationError, code, *named):
        quantize_file(source, tmp_path / "out" / "out.onnx", QuantizeSettings(**settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"block_size": 24}, "option-value", ["block_size"]),
        ({"block_size": 8}, "option-value", ["block_size"]),
        ({"accuracy_level": 5}, "option-value", ["accuracy_level"]),
        ({"scheme": "int8-qdq"}, "no-calibration", ["calibration"]),
        ({"method": "hqq", "symmetric": True}, "options-clash", ["symmetric"]),
        ({"scheme": "int8-dynamic", "method": "hqq"}, "options-clash", ["method"]),
        ({"method": "gguf"}, "options-clash", ["method", "gguf"]),
        ({"gguf": Path("m.gguf")}, "options-clash", ["method", "gguf"]),
    ],
)
def test_settings_that_fit_nothing_are_refused(
    tied: Path, tmp_path: Path, settings: dict[str, Any], code: str, named: list[str]
) -> None:
    with raises(OptionError, code, *named):
        quantize_file(tied, tmp_path / "out.onnx", QuantizeSettings(**settings))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_usual_blocks_are_taken(tied: Path, tmp_path: Path, block: int) -> None:
    result = quantize_file(tied, tmp_path / "out.onnx", QuantizeSettings(block_size=block))
    assert result.record.block_size == block
    left = {"table": "its rows of 64 are no multiple of the block of 128"} if block == 128 else {}
    assert result.in_float == left
    assert (result.record.embedding_bits is None) == bool(left)


def test_weights_that_were_rounded_before_are_kept() -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 16, (6, 3, 32)).astype(np.float32)
    steps[..., 0], steps[..., 1] = 0, 15
    scales = rng.uniform(0.01, 0.02, (6, 3, 1)).astype(np.float16).astype(np.float32)
    lowest = rng.uniform(-0.2, 0.05, (6, 3, 1)).astype(np.float16).astype(np.float32)
    scales[0, 0], lowest[1, 1], scales[1, 1] = 0, 0, 0  # blocks of one number, of nothing
    matrix = np.ascontiguousarray((steps * scales + lowest).reshape(6, -1).T)
    kept = rounded(matrix, 4, 32, symmetric=False)
    assert with_whole_zero_points(kept, 4)[1]
    np.testing.assert_allclose(numbers_of(kept).T, matrix, rtol=0, atol=1e-7)
    for symmetric, bits in ((True, 4), (False, 8)):
        assert not with_whole_zero_points(rounded(matrix, bits, 32, symmetric=symmetric), 4)[1]
    assert already_rounded(matrix.astype(np.float16).astype(np.float32), 4, 32) is not None
    assert already_rounded(matrix[:90], 4, 32) is None
    matrix[5, 5] += 0.003
    assert already_rounded(matrix, 4, 32) is None
    assert not with_whole_zero_points(rounded(matrix, 4, 32, symmetric=False), 4)[1]


@pytest.mark.parametrize(("target", "there"), [("m.onnx", False), ("other.onnx", True)])
def test_the_report_of_a_cut_goes_with_the_file_that_it_speaks_of(
    tied: Path, tmp_path: Path, target: str, there: bool
) -> None:
    size = {"nodes": 1, "parameters": 1, "bytes": 1}
    report = PruneReport.model_validate(
        {
            "made_from": {}, "target": target, "deleted": [], "refused": [], "before": size,
            "after": size, "verification": NOT_VERIFIED.model_dump(),
        }
    ).write(tmp_path / "prune.json")  # fmt: skip
    (tmp_path / "m.onnx").write_bytes(tied.read_bytes())
    quantize_file(tied, tmp_path / "m.onnx", QuantizeSettings(scheme="int8"))
    assert report.exists() is there


DEPTH, BREADTH, BLOCK = 96, 40, 16
TWO_READERS = f"""<ir_version: 10, opset_import: ["": 20]>
small (float[batch, rows, {DEPTH}] x) => (float[batch, rows, {BREADTH}] y)
<float[{DEPTH}, {BREADTH}] first, float[{DEPTH}, {BREADTH}] second> {{
  [one] a = MatMul(x, first)
  [two] b = MatMul(x, second)
  y = Add(a, b)
}}"""


def random_blocks(bits: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(seed)
    count = DEPTH // BLOCK
    quants = rng.integers(0, 1 << bits, (BREADTH, count, BLOCK)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.02, (BREADTH, count)).astype(np.float32)
    # Some lie outside the range, as those of blocks that are all of one sign.
    return quants, scales, rng.uniform(-2, 1 << bits, (BREADTH, count)).astype(np.float32)


def meant(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:  # type: ignore[type-arg]
    quants, scales, offsets = parts
    return ((quants - offsets[..., None]) * scales[..., None]).reshape(BREADTH, DEPTH)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("bits", "level", "limit"), [(4, 1, 2e-5), (4, 4, 0.03), (8, 1, 2e-5), (8, 4, 0.02)]
)
def test_products_with_fractions(tmp_path: Path, bits: int, level: int, limit: float) -> None:
    model = load_model(written(TWO_READERS, tmp_path / "model.onnx"))
    made = {"one": random_blocks(bits, 1), "two": random_blocks(bits, 2)}
    with WeightWriter(tmp_path / "packed.data") as writer:
        store = PackedWeights(model, writer)
        sums = BlockSums(store, level)
        products = find_products(model).products
        for product in products:
            blocks, copies = with_whole_zero_points(Blocks(*made[product.name], bits), level)
            assert copies == (1 if level == 4 else {4: 4, 8: 2}[bits])
            stored = store.store(blocks, product.weight)
            use_in_product(product, stored, level, sums.follow(product, BLOCK, copies))
        drop_unused(model, [product.weight for product in products])
    assert sum(node.op_type == "Concat" for node in model.graph) == 1
    save_model(model, tmp_path / "out.onnx")
    x = np.random.default_rng(3).standard_normal((2, 3, DEPTH)).astype(np.float32) + 1
    with OnnxRuntimeRunner(tmp_path / "out.onnx", threads=1) as runner:
        y = runner.run({"x": x})["y"]
    wanted = x @ (meant(made["one"]) + meant(made["two"])).T
    np.testing.assert_allclose(y, wanted, rtol=0, atol=limit * np.abs(wanted).max())
