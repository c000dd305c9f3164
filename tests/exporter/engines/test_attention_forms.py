"""What TensorRT-RTX makes of an attention, by how the graph writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from exporter.engines.build.build import build_engines
from exporter.engines.build.check import check_engine
from exporter.engines.build.engine_set import EngineRecord
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.errors import UsageError
from graph_passes import Deletion, prune_graph, save_model
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from graph_passes.fusing.grouped import GroupedAttentionPass
from tests.graph_passes.decoder_graphs import decoder_model
from tests.raising import raises

pytestmark = pytest.mark.rtx

ROOM = 1024
LARGE = Ranges(batch=Span(1, 64, 64), prompt=Span(1, 8, 16), context=Span(1, 512, ROOM - 1))
REPEATED_BYTES = 64 * 4 * ROOM * 32 * 4
"""Keys of one layer, written out for each of four query heads of 32 numbers, in float32."""


def written(folder: Path, form: Literal["repeated", "grouped", "in_place"]) -> Path:
    model = decoder_model()
    if form != "repeated":
        (GroupedAttentionPass() if form == "grouped" else CacheInPlacePass(ROOM))(model)
    folder.mkdir(exist_ok=True)
    save_model(model, folder / f"{form}.onnx")
    return folder / f"{form}.onnx"


def built(onnx: Path, *phases: str) -> EngineRecord:
    ranges = fitting(graph_inputs(onnx), LARGE)
    out = onnx.parent / "out"
    ((_, record),) = build_engines(onnx, out, phases=phases, split=False, ranges=ranges)
    return record


def test_keys_that_are_repeated_take_memory(tmp_path: Path) -> None:
    scratch = {
        form: built(written(tmp_path, form), "decode").memory_bytes["activation"]
        for form in ("repeated", "grouped", "in_place")
    }
    assert scratch["repeated"] > REPEATED_BYTES
    assert scratch["grouped"] < REPEATED_BYTES / 4
    assert scratch["in_place"] < REPEATED_BYTES / 4


def test_in_place_both_phases_are_built_whole_and_cut(tmp_path: Path) -> None:
    onnx = written(tmp_path, "in_place")
    record = built(onnx, "prefill", "decode")
    assert [entry.phase for entry in record.profiles] == ["prefill", "decode"]
    caches = [item.shape for item in record.inputs if "past" in item.name]
    assert caches == [(-1, 2, ROOM, 32)] * 4
    cut, _ = prune_graph(decoder_in_place(), [Deletion(0, "attention")])
    save_model(cut, tmp_path / "cut.onnx")
    assert not check_engine(tmp_path / "cut.onnx").findings
    assert built(tmp_path / "cut.onnx", "decode").network_layers < record.network_layers


def decoder_in_place():  # type: ignore[no-untyped-def]
    model = decoder_model()
    CacheInPlacePass(ROOM)(model)
    return model


def test_a_context_is_no_matter_of_the_engine_where_the_graph_fixes_it(tmp_path: Path) -> None:
    onnx = written(tmp_path, "in_place")
    with raises(UsageError, "range-without-axis", "--context-range"):
        build_engines(onnx, tmp_path / "out", ranges=LARGE)
