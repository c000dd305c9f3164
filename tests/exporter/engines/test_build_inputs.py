"""What is known of a build before it: how a graph is changed for it, and what the parser takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter.artifacts import EngineParse, PlannedDeletion, PruneReport
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build import check as checking
from exporter.engines.build.build import Adapted, adapt
from exporter.engines.build.logs import Obstacle, no_engine
from exporter.engines.build.profiles import (
    Ranges,
    Span,
    graph_inputs,
    phases_of,
    profile,
    refuse_unknown_axes,
)
from exporter.engines.build.settings import BuildSettings, Phase
from exporter.engines.tensors import TensorSpec
from exporter.errors import EngineError, OptionError, UsageError, VerificationError
from exporter.progress import QUIET
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from graph_passes.fusing.grouped import GroupedAttentionPass
from tests.graph_passes.decoder_graphs import DecoderSpec, decoder_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, saved, tiny_model


def adapted(
    phases: Sequence[Phase], *, grows: bool = False,
    settings: dict[str, Any] | None = None, output: str = "", **spec: Any,
) -> tuple[ir.Model, Adapted]:  # fmt: skip
    """A decoder, its caches in place, for an engine of some phases."""
    model = decoder_model(DecoderSpec(**spec))
    (GroupedAttentionPass() if grows else CacheInPlacePass(256))(model)
    model.graph.outputs[0].name = output or model.graph.outputs[0].name
    made = BuildSettings(**settings or {})
    return model, adapt(model, made, phases)


@pytest.mark.parametrize(
    ("phases", "given", "reads"),
    [
        (["prefill"], {}, "new"),
        (["prefill"], {"settings": {"logits": "all"}}, "room"),
        (["prefill"], {"window": 8}, "room"),
        (["decode"], {}, "room"),
        (["prefill", "decode"], {}, "room"),
        (["decode"], {"grows": True}, None),
    ],
)
def test_an_engine_is_told_by_a_mask_what_is_filled_but_for_prompts_alone(
    phases: Sequence[Phase], given: Any, reads: str | None
) -> None:
    model, made = adapted(phases, **given)
    assert made.attention == reads
    for node in model.graph:
        if reads and node.op_type == "Attention":
            assert any(node.inputs[3:4]) == (reads == "room")
            assert not any(node.inputs[6:])


@pytest.mark.parametrize(
    ("phases", "wanted", "logits", "length"),
    [
        (["prefill"], "last", "last", 1),
        (["prefill", "decode"], "last", "last", 1),
        (["prefill"], "all", "all", None),
        (["decode"], "last", "last", None),
        (["encode"], "last", "all", None),
    ],
)
def test_a_prompt_gives_the_logits_that_are_wanted(
    phases: Sequence[Phase], wanted: str, logits: str, length: int | None
) -> None:
    model, result = adapted(phases, settings={"logits": wanted})
    assert result.logits == logits
    shape = model.graph.outputs[0].shape
    assert shape is not None
    assert (shape[1] if isinstance(shape[1], int) else None) == length
    assert adapted(phases, output="hidden")[1].logits is None


def test_nothing_of_a_file_that_needs_nothing_is_changed() -> None:
    model = decoder_model(DecoderSpec(softmax=True))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not adapt(model, BuildSettings(logits="all"), ["decode"]).changed
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


ATTENTION = """
<ir_version: 10, opset_import: ["": 23]>
m (float[1, 2, s, 32] q, float[1, 2, s, 32] k, float[1, 2, s, 32] v) => (float[1, 2, s, 32] y) {
    y = Attention(q, k, v)
}
"""


def test_the_attribute_is_added_once_and_everywhere() -> None:
    proto = ir.to_proto(ir.from_onnx_text(ATTENTION))
    inner = ir.to_proto(ir.from_onnx_text(ATTENTION)).graph
    proto.graph.node.append(onnx.NodeProto(op_type="If"))
    body = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner)
    proto.graph.node[-1].attribute.append(body)
    model = ir.from_proto(proto)
    for _ in range(2):
        assert adapt(model, BuildSettings(), ["encode"]).changed
        assert str(ir.to_proto(model)).count("TRT_decomposable") == 2


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (["something new", "second"], "no-engine-made"),
        (["first", "Requested amount could not be allocated: Out of memory"], "out-of-memory"),
        ([], "no-engine-made"),
    ],
)
def test_what_the_builder_says_is_passed_on(said: list[str], code: str) -> None:
    error = no_engine(said)
    assert error.code == code
    assert all(text in error.message for text in said[:1])


CUT = [PlannedDeletion(layer=1, kind="attention")]
BROKEN = Obstacle("n", "Odd", "no plugin")
UNVERIFIED = CutOptions(verify="none")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tiny_model(TinySpec()), tmp_path, "m.onnx")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [(True, True, (True, [])), (True, False, None),
     (False, False, (False, ["node 'n' (Odd): no plugin"]))],
)  # fmt: skip
def test_a_cut_is_held_to_what_the_parser_took_before(
    before: bool, after: bool, told: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(onnx: Path, **_: object) -> EngineParse:
        sound = before if onnx.name == "m.onnx" else after
        reasons = [] if sound else [str(BROKEN)]
        return EngineParse(backend="tensorrt-rtx", version="1", parsed=sound, reasons=reasons)

    monkeypatch.setattr(checking, "check_engine", check)
    call = (source, source.with_name("cut.onnx"), CUT, UNVERIFIED)
    if told is None:
        with raises(VerificationError, "not-parsed", "'n'", "(Odd)", "no plugin"):
            prune_file(*call, engine_check=checking.engine_gate())
        assert [path.name for path in source.parent.iterdir()] == ["m.onnx"]
        return
    engine = prune_file(*call, engine_check=checking.engine_gate()).engine
    assert engine is not None
    assert (engine.parsed, list(engine.reasons)) == told
    assert PruneReport.read(source.with_name("prune.json")).engine == engine


def test_where_nobody_asked_a_library_that_fails_is_no_failure(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> EngineParse:
        raise EngineError("its libraries can't be loaded")

    monkeypatch.setattr(checking, "check_engine", fails)
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda _: object())
    check = checking.gate_where_installed(QUIET)
    target = source.with_name("cut.onnx")
    assert prune_file(source, target, CUT, UNVERIFIED, engine_check=check).engine is None
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda _: None)
    assert checking.gate_where_installed(QUIET) is None


PAGE = Path(__file__).parents[3] / "exporter" / "engines" / "build" / "docs" / "builds.md"


INT64, FLOAT = np.dtype(np.int64), np.dtype(np.float32)
IDS = TensorSpec("input_ids", INT64, ("batch", "seq"))
MASK = TensorSpec("attention_mask", INT64, ("batch", "total"))
CACHE = TensorSpec("past_key_values.0.key", FLOAT, ("batch", 2, "past", 16))
IMAGE = TensorSpec("pixel_values", FLOAT, ("batch", 3, "height", 224))
DECODER, ENCODER = [IDS, MASK, CACHE], [IDS, MASK]
RANGES = Ranges(batch=Span(1, 2, 4), prompt=Span(1, 8, 16), context=Span(0, 32, 64))
BATCH = (1, 2, 4)


@pytest.mark.parametrize(
    ("inputs", "phase", "name", "sizes"),
    [
        (DECODER, "decode", IDS.name, [BATCH, (1, 1, 1)]),
        (DECODER, "decode", MASK.name, [BATCH, (1, 33, 65)]),
        (DECODER, "decode", CACHE.name, [BATCH, (2, 2, 2), (0, 32, 64), (16, 16, 16)]),
        (DECODER, "prefill", IDS.name, [BATCH, (1, 8, 16)]),
        (DECODER, "prefill", MASK.name, [BATCH, (1, 8, 16)]),
        (DECODER, "prefill", CACHE.name, [BATCH, (2, 2, 2), (0, 0, 0), (16, 16, 16)]),
        (ENCODER, "encode", MASK.name, [BATCH, (1, 8, 16)]),
    ],
)
def test_a_profile_has_the_sizes_of_its_phase(
    inputs: list[TensorSpec], phase: str, name: str, sizes: list[tuple[int, int, int]]
) -> None:
    shapes = profile(inputs, phase, RANGES).shapes[name]
    assert list(zip(shapes.low, shapes.usual, shapes.high, strict=True)) == sizes


@pytest.mark.parametrize(
    ("inputs", "phase", "code", "named"),
    [
        ([IDS, CACHE], "encode", "no-profile-fits", ("prefill", "decode")),
        ([IDS], "decode", "no-profile-fits", ("encode",)),
        ([IMAGE], "encode", "unknown-axis", ("'height'", "'pixel_values'")),
    ],
)
def test_what_has_no_profile_is_refused(
    inputs: list[TensorSpec], phase: str, code: str, named: tuple[str, ...]
) -> None:
    with raises(UsageError, code, *named):
        profile(inputs, phase, RANGES)


GIVEN: dict[str, Any] = {"prompt": Span(1, 8, 16), "context": Span(1, 8, 16)}


@pytest.mark.parametrize(
    ("inputs", "ranges", "code", "named"),
    [
        *(([IMAGE], {name: Span(1, 2, 3)}, "unknown-axis",
           (f"--{name}-range",)) for name in ("prompt", "context")),
        *((DECODER, {name: Span(1, 2, 3)}, "", ()) for name in ("batch", "prompt", "context")),
        ([TensorSpec("pixel_values", FLOAT, (1, 3))], {"batch": Span(1, 2, 3)},
         "unknown-axis", ("--batch-range",)),
        (ENCODER, {"prompt": Span(1, 8, 16)}, "", ()),
        (ENCODER, GIVEN, "unknown-axis", ("--context-range",)),
    ],
)  # fmt: skip
def test_a_range_for_an_axis_that_is_not_there_is_refused(
    inputs: list[TensorSpec], ranges: dict[str, Any], code: str, named: tuple[str, ...]
) -> None:
    if not code:
        refuse_unknown_axes(inputs, Ranges(**ranges))
        return
    with raises(UsageError, code, *named):
        refuse_unknown_axes(inputs, Ranges(**ranges))


@pytest.mark.parametrize("text", ["", "a", "1:2", "3:2:1", "1:2:3:4", "-1:0:1"])
def test_what_is_no_range_is_refused(text: str) -> None:
    assert Span.parse("7") == Span(7, 7, 7)
    with pytest.raises(UsageError):
        Span.parse(text)


@pytest.mark.parametrize("bad", [{"batch": "0"}, {"prompt": "0:1:2"}])
def test_ranges_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Ranges(**bad)


def test_sizes_that_are_digits_in_a_name_are_numbers(tmp_path: Path) -> None:
    model = tiny_model(TinySpec())
    for value in model.graph.inputs:
        if value.name == "past_key_values.0.key":
            value.shape = ir.Shape(["batch", "2", "past", "4"])
    result = {spec.name: spec for spec in graph_inputs(saved(model, tmp_path))}
    assert result["past_key_values.0.key"].shape == ("batch", 2, "past", 4)
    assert phases_of([result["past_key_values.0.key"]]) == ("prefill", "decode")
    assert phases_of([result["input_ids"]]) == ("encode",)
