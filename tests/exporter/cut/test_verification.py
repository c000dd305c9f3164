"""The check of a cut: it passes what is right, catches what is wrong, and says when it can't."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graph_passes
from exporter.artifacts import PlannedDeletion, Verification
from exporter.cut.random_inputs import cases, draw, half_written
from exporter.cut.surgery import prune_file
from exporter.cut.verify import compare_run, judge, with_exact_products
from exporter.errors import VerificationError
from graph_passes.files.storage import save_model
from tests import tiny_graphs
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

CUT = [PlannedDeletion(layer=1, kind="attention")]
ENCODER = TinySpec(cache=False)


def prune(model: ir.Model, folder: Path, cut: list[PlannedDeletion] = CUT) -> Verification:
    save_model(model, folder / "source.onnx")
    return prune_file(folder / "source.onnx", folder / "o" / "m.onnx", cut).verification


@pytest.fixture
def wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surgery cuts the layer after the one that it reports."""
    right = graph_passes.prune_graph

    def wrong(model: ir.Model, value: Any, **options: Any) -> Any:
        _, report = right(model, value, **options)
        moved = [type(d)((d.layer + 1) % 3, d.kind) for d in value]
        return right(model, moved, **options)[0], report

    monkeypatch.setattr(graph_passes, "prune_graph", wrong)


def with_suppressed_token(value: float) -> ir.Model:
    """A model that adds ``value`` to the last token's logit, so that it is never chosen."""
    model = tiny_model(ENCODER)
    (raw,) = model.graph.outputs
    raw.name = "raw"
    suppression = np.array([0] * 10 + [value], np.float32)
    added = ir.Value(
        name="suppression",
        const_value=ir.tensor(suppression, name="suppression"),
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([11]),
    )
    model.graph.register_initializer(added)
    total = ir.node("Add", [raw, added], name="suppress")
    result = total.outputs[0]
    result.name, result.type, result.shape = "logits", raw.type, raw.shape
    model.graph.append(total)
    model.graph.outputs[0] = result
    return model


def with_scaled_branches(scale: float) -> ir.Model:
    """A model whose branches join the stream times ``scale``, as LayerScale does."""

    class Scaled(tiny_graphs._Builder):
        def _constant(self, data: Any) -> ir.Value:
            is_multiplier = isinstance(data, np.float32) and data == np.float32(0.22)
            return super()._constant(np.float32(scale) if is_multiplier else data)

    return Scaled(TinySpec(form="multiplier", cache=False), 0).build()


@pytest.mark.parametrize("value", [-1e9, -np.inf])
def test_suppressed_tokens_do_not_hide_a_wrong_cut(
    value: float, tmp_path: Path, wrong_layer: None
) -> None:
    with raises(VerificationError, "wrong-results"):
        prune(with_suppressed_token(value), tmp_path)


@pytest.mark.parametrize("value", [-1e9, -np.inf])
def test_suppressed_tokens_do_not_spoil_a_right_cut(value: float, tmp_path: Path) -> None:
    verification = prune(with_suppressed_token(value), tmp_path)
    assert verification.passed is True
    assert verification.max_abs_error == pytest.approx(0.0, abs=1e-5)
    assert verification.tolerance is not None
    assert verification.tolerance < 1e-2


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_a_wrong_cut_of_a_weak_branch_is_caught(
    scale: float, tmp_path: Path, wrong_layer: None
) -> None:
    with raises(VerificationError, "wrong-results"):
        prune(with_scaled_branches(scale), tmp_path)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-4])
def test_a_right_cut_of_a_weak_branch_passes(scale: float, tmp_path: Path) -> None:
    assert prune(with_scaled_branches(scale), tmp_path).passed is True


@pytest.mark.parametrize("scale", [1e-9, 0.0])
def test_a_branch_that_changes_nothing_leaves_it_undecided(scale: float, tmp_path: Path) -> None:
    verification = prune(with_scaled_branches(scale), tmp_path)
    assert verification.passed is None
    assert "has no measurable effect" in verification.method
    assert verification.runs == 1


@pytest.mark.parametrize("more", [[], [PlannedDeletion(layer=2, kind="mlp")]])
def test_a_model_that_was_cut_before_can_be_verified(
    more: list[PlannedDeletion], tmp_path: Path
) -> None:
    prune(tiny_model(), tmp_path, CUT)
    again = prune_file(tmp_path / "o" / "m.onnx", tmp_path / "p" / "m.onnx", CUT + more)
    assert again.verification.passed is True
    assert len(again.deleted) == len(more)


def test_a_sequence_can_not_be_compared(tmp_path: Path) -> None:
    model = tiny_model()
    sequence = ir.node("SequenceConstruct", [model.graph.outputs[0]], name="collect")
    sequence.outputs[0].name = "all"
    sequence.outputs[0].type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    model.graph.append(sequence)
    model.graph.outputs.append(sequence.outputs[0])
    with raises(VerificationError, "not-numbers", "'all'"):
        prune(model, tmp_path)
    assert not (tmp_path / "o").exists()


def verdict(plain: Any, masked: Any, pruned: Any, dtype: str = "float32") -> Verification:
    arrays = [{"y": np.array(values, dtype)} for values in (plain, masked, pruned)]
    return judge(compare_run("encode", *arrays), cut_anything=True)


def _fails(plain: Any, masked: Any, pruned: Any, dtype: str = "float32") -> None:
    with pytest.raises(VerificationError):
        verdict(plain, masked, pruned, dtype)


def _passes(plain: Any, masked: Any, pruned: Any, dtype: str = "float32") -> None:
    assert verdict(plain, masked, pruned, dtype).passed is True


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(("judgement", "plain", "masked", "pruned", "dtype"), [
    (_passes, [1, 2], [3, 4], [3, 4.0001], "float32"),
    (_fails, [1, 2], [3, 4], [3, 4.001], "float32"),
    (_fails, [3, 4.001], [3, 4], [3, 4.0001], "float32"),  # within 1e-4, a tenth of the effect
    (_passes, [3, 4.001], [3, 4], [3, 4.00001], "float32"),
    (_passes, [1, 2], [3, 4], [3, 4.03], "float16"),
    (_fails, [1, 2], [3, 4], [3, 4.1], "float16"),
    (_passes, [1, -INF], [3, -INF], [3, -INF], "float32"),
    (_fails, [1, -INF], [3, -INF], [3, INF], "float32"),
    (_fails, [1, -INF], [3, -INF], [3, -5], "float32"),
    (_fails, [1, -INF], [3, -5], [3, -INF], "float32"),
    (_passes, [1, NAN], [3, NAN], [3, NAN], "float32"),
    (_fails, [1, 2], [3, NAN], [3, 4], "float32"),
    (_fails, [NAN, 1], [NAN, NAN], [NAN, NAN], "float32"),
    (_passes, [1, -1e9], [3, -1e9], [3, -1e9 - 64], "float32"),
    (_fails, [1, -1e9], [3, -1e9], [3, -2e9], "float32"),
    (_passes, [1, 2], [3, 4], [3, 4], "int64"),
    (_fails, [1, 2], [3, 4], [3, 5], "int64"),
    (_fails, [1, 2], [3, 4], [3], "float32"),
])  # fmt: skip
def test_what_counts_as_equal(
    judgement: Callable[..., None], plain: Any, masked: Any, pruned: Any, dtype: str
) -> None:
    judgement(plain, masked, pruned, dtype)


def test_each_output_has_its_own_scale() -> None:
    plain = {"logits": np.array([9e5], np.float32), "present": np.array([1.0], np.float32)}
    masked = {"logits": np.array([8e5], np.float32), "present": np.array([2.0], np.float32)}
    pruned = {"logits": np.array([8e5], np.float32), "present": np.array([2.5], np.float32)}
    judge(compare_run("prefill", plain, masked, masked), cut_anything=True)
    with raises(VerificationError, "wrong-results", "'present'"):
        judge(compare_run("prefill", plain, masked, pruned), cut_anything=True)


def test_packed_weights_are_multiplied_in_float32() -> None:
    """At level 4 inputs are quantised, and a last place that differs grows to a whole step."""
    node = ir.Node("com.microsoft", "MatMulNBits", [], [ir.AttrInt64("accuracy_level", 4)])
    plain = ir.Node("", "Add", [], [ir.AttrInt64("axis", 4)])
    graph = ir.Graph([], [], nodes=[node, plain], opset_imports={"": 20}, name="packed")
    given = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    seen = onnx.ModelProto.FromString(with_exact_products(given))
    assert [n.attribute[0].i for n in seen.graph.node] == [1, 4]
    assert with_exact_products(b"none") == b"none"


@pytest.mark.parametrize(("kept", "length"), [(1, 8), (0, 6)])
def test_a_cache_that_is_kept_to_a_window_gets_the_windows_room(kept: int, length: int) -> None:
    cache = ir.Value(
        name="past_key_values.0.key",
        shape=ir.Shape(["batch", 2, "past", 16]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    attributes = [ir.AttrInt64("sliding_window_cache", kept), ir.AttrInt64("local_window_size", 8)]
    mask = ir.Value(name="attention_mask", type=ir.TensorType(ir.DataType.INT64))
    mask.shape = ir.Shape(["batch", "total"])
    operands = [None, None, None, cache, None, mask]
    node = ir.Node("com.microsoft", "GroupQueryAttention", operands, attributes)
    node.outputs[0].name = "present.0.key"
    graph = ir.Graph([cache, mask], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    decode = next(case for case in cases(model) if case.name == "decode")
    drawn = draw(model, decode, np.random.default_rng(0))
    assert drawn["past_key_values.0.key"].shape == (2, 2, length, 16)
    assert drawn["attention_mask"].shape == (2, 7)
    assert drawn["attention_mask"].all() == bool(kept)  # such an attention takes no padding
    assert half_written(model) == ({"present.0.key"} if kept else set())


@pytest.mark.parametrize(("shape", "positions"), [([], 6), (["batch", "seq"], [[6], [6]])])
def test_positions_go_on_after_the_past(shape: list[str], positions: object) -> None:
    drawn = drawn_beside_a_cache("cache_position", ir.DataType.INT64, shape)
    np.testing.assert_array_equal(drawn, np.array(positions))


def test_an_input_without_a_type_can_not_be_drawn() -> None:
    with raises(VerificationError, "type-missing", "'mystery'"):
        drawn_beside_a_cache("mystery", None, ["batch"])


def drawn_beside_a_cache(name: str, dtype: ir.DataType | None, shape: list[str]) -> object:
    """What an input of a decoder is filled with at its second step."""
    model = tiny_model(TinySpec())
    type_ = None if dtype is None else ir.TensorType(dtype)
    model.graph.inputs.append(ir.Value(name=name, type=type_, shape=ir.Shape(shape)))
    decode = next(case for case in cases(model) if case.name == "decode")
    return draw(model, decode, np.random.default_rng(0))[name]
