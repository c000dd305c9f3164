"""What a graph is changed to for an engine of one phase, and what TensorRT-RTX makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.engines.build.build import Adapted, adapt, build_engines
from exporter.engines.build.engine_set import EngineRecord, find_engines, read_sidecar
from exporter.engines.build.libraries import LIBRARIES
from exporter.engines.build.network import Builder
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.build.settings import BuildSettings, Phase
from graph_passes import save_model
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from graph_passes.fusing.grouped import GroupedAttentionPass
from tests.graph_passes.decoder_graphs import DecoderSpec, decoder_model
from tests.tiny_graphs import attention_in_place

ROOM = 256
LARGE = Ranges(batch=Span(1, 32, 32), prompt=Span(1, 128, 128))
SMALL = Ranges(prompt=Span(1, 4, 8))


def in_place(**spec: Any) -> ir.Model:
    model = decoder_model(DecoderSpec(**spec))
    CacheInPlacePass(ROOM)(model)
    return model


def adapted(model: ir.Model, *phases: Phase, has_lengths: bool = True, **settings: Any) -> Adapted:
    made = BuildSettings(**settings)
    return adapt(ir.to_proto(model), made, phases, has_lengths=has_lengths)


@pytest.mark.parametrize(
    ("phases", "has_lengths", "told_by", "reads"),
    [
        (["prefill"], True, "order", "new"),
        (["prefill"], False, "order", "new"),
        (["decode"], True, "lengths", "filled"),
        (["decode"], False, "mask", "room"),
        (["prefill", "decode"], True, "mask", "room"),
    ],
)
def test_an_engine_for_one_phase_reads_no_more_than_it_needs(
    phases: Sequence[Phase], has_lengths: bool, told_by: str, reads: str
) -> None:
    made = adapted(in_place(), *phases, has_lengths=has_lengths)
    attention = made.attention
    assert attention is not None
    assert bool(made.lengths) == (told_by == "lengths")
    assert (attention.told_by, attention.reads, attention.remark is None) == (
        told_by,
        reads,
        reads != "room",
    )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_window_keeps_its_mask(phase: Phase) -> None:
    result = adapted(in_place(window=8), phase)
    assert result.attention is not None
    assert result.attention.reads == "room"
    assert result.attention.remark is not None
    masks = [node.input[3] for node in result.model.graph.node if node.op_type == "Attention"]
    assert all(masks)


def test_the_mask_can_be_asked_for() -> None:
    attention = adapted(in_place(), "decode", cache_reads="room").attention
    assert attention is not None
    assert (attention.reads, attention.remark) == ("room", None)


def test_caches_that_grow_are_told_by_nothing() -> None:
    grown = decoder_model()
    GroupedAttentionPass()(grown)
    assert adapted(grown, "decode").attention is None


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
    result = adapted(in_place(), *phases, logits=wanted)
    assert result.logits == logits
    size = result.model.graph.output[0].type.tensor_type.shape.dim[1]
    assert (size.dim_value or None) == length


def test_a_graph_without_logits_has_none_on_record() -> None:
    model = in_place()
    model.graph.outputs[0].name = "hidden"
    assert adapted(model, "prefill").logits is None


def test_nothing_of_a_file_that_needs_nothing_is_changed(tmp_path: Path) -> None:
    model = ir.to_proto(decoder_model(DecoderSpec(softmax=True)))
    result = adapt(model, BuildSettings(logits="all"), ["decode"], has_lengths=True)
    assert not result.changed
    assert result.model is model
    assert result.write(tmp_path / "graph.onnx") is None
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("backend", "version", "has_lengths"),
    [
        ("tensorrt", "10.16.0.72", False),  # and IAttention has none there
        ("tensorrt", "11.0.0.12", True),
        ("tensorrt-rtx", "1.6.0.1", False),
        ("tensorrt-rtx", "1.7.1.116", True),
        ("tensorrt-rtx", "1.10.0.1", True),
        ("tensorrt-rtx", "2.0.0.1", True),
    ],
)
def test_lengths_begin_with_a_version(backend: str, version: str, has_lengths: bool) -> None:
    assert LIBRARIES[backend].has_lengths(version) == has_lengths


@pytest.mark.rtx
def test_the_installed_library_has_what_its_version_says() -> None:
    import tensorrt_rtx as trt

    flag = LIBRARIES["tensorrt-rtx"].has_lengths(trt.__version__)
    assert flag == hasattr(getattr(trt, "IAttention", None), "key_value_lengths")


def built(folder: Path, phase: Phase, attention: str, dtype: str = "float16") -> EngineRecord:
    onnx = folder / "m.onnx"
    save_model(attention_in_place(dtype, heads=8, kv_heads=2, size=64, room=ROOM), onnx)
    settings = BuildSettings(compute_capabilities=("sm89",), cache_reads=attention)  # type: ignore[arg-type]
    target = folder / f"{attention}.engine"
    new = "1" if phase == "decode" else "1:128:128"
    ranges = Ranges(batch=Span(1, 32, 32), dims=(f"sequence={new}",))  # type: ignore[arg-type]
    ((engine, record),) = build_engines(
        onnx, target, phases=[phase], ranges=ranges, settings=settings
    )
    assert read_sidecar(engine).attention == record.attention
    return record


@pytest.mark.rtx
def test_a_decode_step_is_a_scatter_and_one_attention(tmp_path: Path) -> None:
    filled, room = (built(tmp_path, "decode", name) for name in ("filled", "room"))
    assert filled.attention is not None
    assert filled.attention.reads == "filled"
    assert filled.layers == {"attention": 1, "kgen": 2}  # and the lengths, once for all layers
    assert filled.memory_bytes["activation"] < 1e4 < room.memory_bytes["activation"]


@pytest.mark.rtx
def test_a_prefill_is_one_attention_and_a_scatter(tmp_path: Path) -> None:
    new, room = (built(tmp_path, "prefill", name) for name in ("filled", "room"))
    mask_bytes = 32 * 128 * ROOM * 2
    assert new.layers == {"attention": 1, "kgen": 1}
    assert room.layers["kgen"] > 1
    assert new.memory_bytes["activation"] < 1e4
    assert room.memory_bytes["activation"] >= mask_bytes


@pytest.mark.rtx
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_lengths_are_set_on_every_attention_of_a_decode_step(phase: Phase, tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    save_model(in_place(layers=3), tmp_path / "m.onnx")
    made = adapted(in_place(layers=3), phase)
    graph = made.write(tmp_path / "graph.onnx")
    network = Builder(trt).parse(tmp_path / "m.onnx", graph, made.lengths).network
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    result = [item for item in layers if item.type == trt.LayerType.ATTENTION_INPUT]
    assert len(result) == 3
    for layer in result:
        layer.__class__ = trt.IAttentionInputLayer
        attention = layer.attention
        assert attention.mask is None
        assert (attention.key_value_lengths is not None) == (phase == "decode")
        causal = trt.CausalMaskKind.UPPER_LEFT if phase == "prefill" else trt.CausalMaskKind.NONE
        assert attention.causal_kind == causal
    updates = [item for item in layers if item.type == trt.LayerType.KV_CACHE_UPDATE]
    assert len(updates) == 6


@pytest.mark.rtx
def test_of_caches_in_place_there_is_an_engine_for_each_phase(tmp_path: Path) -> None:
    save_model(in_place(), tmp_path / "m.onnx")
    built = build_engines(tmp_path / "m.onnx", tmp_path / "out", ranges=LARGE)
    assert ["prefill" in path.name for path, _ in built] == [True, False]
    decode, prefill = find_engines(tmp_path / "out").records
    assert (decode.attention and decode.attention.reads) == "filled"
    assert (prefill.attention and prefill.attention.reads) == "new"
    assert [item.logits for item in (decode, prefill)] == ["last", "last"]
    assert decode.layers["attention"] == 2  # one kernel for each layer's attention
    assert {output.name: output.shape for output in prefill.outputs}["logits"][1] == 1


@pytest.mark.rtx
@pytest.mark.parametrize("grows", [True, False])
def test_one_engine_for_both_can_be_asked_for(grows: bool, tmp_path: Path) -> None:
    """Caches that grow need not be asked for: one engine is what they had."""
    save_model(decoder_model() if grows else in_place(), tmp_path / "m.onnx")
    target = tmp_path / "m.engine"
    split = None if grows else False
    ((path, record),) = build_engines(tmp_path / "m.onnx", target, split=split, ranges=SMALL)
    assert path == target
    assert [profile.phase for profile in record.profiles] == ["prefill", "decode"]
    assert (record.attention and record.attention.reads) == (None if grows else "room")
    assert record.logits == "last"
