"""Real builds with TensorRT-RTX, which needs no GPU for them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.engine.build import build_engines
from exporter.engine.check import check_engine
from exporter.engine.profiles import Ranges, Span
from exporter.engine.settings import BuildSettings
from exporter.engine.sidecar import read_sidecar, sidecar_path
from exporter.errors import EngineError, UsageError
from graph_passes import Deletion, prune_graph, save_model
from graph_passes.tiny_graphs import TinySpec, tiny_model

pytestmark = pytest.mark.rtx

SM89 = BuildSettings(compute_capabilities=("sm89",))
SMALL = Ranges(prompt=Span(1, 4, 8), context=Span(1, 4, 8))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny decoder, and the same without half of its attentions."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model(TinySpec(layers=4))
    pruned, _ = prune_graph(model, [Deletion(1, "attention"), Deletion(2, "attention")])
    for name, graph in (("whole", model), ("cut", pruned)):
        save_model(graph, folder / f"{name}.onnx")
    return folder / "whole.onnx", folder / "cut.onnx"


@pytest.fixture(scope="module")
def engines(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("engines")
    return [
        build_engines(model, folder, phases=["decode"], ranges=SMALL, settings=SM89)[0][0]
        for model in models
    ]


def test_the_name_says_what_an_engine_is(engines: list[Path]) -> None:
    whole, cut = (path.name.rpartition("-rtx")[0] for path in engines)
    assert (whole, cut) == ("whole-fp32-sm89", "cut-attn2-fp32-sm89")


def test_the_cut_engine_is_smaller_and_has_fewer_layers(engines: list[Path]) -> None:
    whole, cut = map(read_sidecar, engines)
    assert sum(cut.layers.values()) < sum(whole.layers.values())
    assert cut.engine_bytes < whole.engine_bytes
    assert cut.network_layers < whole.network_layers
    assert [entry["layer"] for entry in cut.plan] == [1, 2]
    assert whole.plan == []


def test_the_record_tells_profiles_and_tensors(engines: list[Path]) -> None:
    found = read_sidecar(engines[1])
    assert [entry.phase for entry in found.profiles] == ["decode"]
    assert found.profiles[0].shapes["attention_mask"].high == (1, 9)
    assert "past_key_values.1.key" not in [tensor.name for tensor in found.inputs]
    assert found.outputs[0].name == "logits"
    assert found.memory_bytes["weights"] > 0
    assert set(found.made_from) == {"model"}


def test_two_builds_are_the_same(
    models: tuple[Path, Path], engines: list[Path], tmp_path: Path
) -> None:
    again = build_engines(models[0], tmp_path, phases=["decode"], ranges=SMALL, settings=SM89)
    assert again[0][1].reproducible
    assert again[0][1].engine_sha256 == read_sidecar(engines[0]).engine_sha256


def test_split_gives_an_engine_for_each_phase(models: tuple[Path, Path], tmp_path: Path) -> None:
    built = build_engines(models[1], tmp_path / "m.engine", split=True, ranges=SMALL, settings=SM89)
    assert [path.name for path, _ in built] == ["m-prefill.engine", "m-decode.engine"]
    assert all(sidecar_path(path).is_file() for path, _ in built)


def test_a_graph_that_does_not_parse_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    model = tiny_model(TinySpec())
    strange = next(node for node in model.graph if node.op_type == "Softmax")
    strange.domain, strange.op_type = "com.example", "Odd"
    model.graph.opset_imports["com.example"] = 1
    save_model(model, path)
    with pytest.raises(EngineError, match=r"at node .*\(Odd\)"):
        build_engines(path, tmp_path / "out.engine", ranges=SMALL, settings=SM89)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.onnx"]
    found = check_engine(path)
    assert len(found.findings) == 1
    assert found.findings[0].operator == "Odd"


def test_a_graph_that_parses_has_no_findings(models: tuple[Path, Path]) -> None:
    assert check_engine(models[1]).findings == ()


def test_an_unknown_card_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not build for sm90") as caught:
        build_engines(models[0], tmp_path, settings=BuildSettings(compute_capabilities=("sm90",)))
    assert "sm89" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_other_library_are_refused(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no --version-compatible"):
        build_engines(models[0], tmp_path, settings=BuildSettings(version_compatible=True))
    with pytest.raises(UsageError, match="no --timing-cache"):
        build_engines(models[0], tmp_path, timing_cache=tmp_path / "cache")


def test_an_engine_never_takes_its_sources_place(models: tuple[Path, Path]) -> None:
    before = models[0].read_bytes()
    with pytest.raises(UsageError, match="is an input"):
        build_engines(models[0], models[0], phases=["decode"], ranges=SMALL, settings=SM89)
    assert models[0].read_bytes() == before


def test_without_a_driver_full_tensorrt_is_refused_in_words(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.engine import check
    from exporter.engine.driver import Driver

    monkeypatch.setattr(check, "ask_driver", lambda: Driver("no NVIDIA driver"))
    with pytest.raises(EngineError, match="no NVIDIA driver") as caught:
        build_engines(models[0], tmp_path, backend="tensorrt")
    assert "tensorrt-rtx" in caught.value.hint


def test_the_precision_is_the_graphs_own(tmp_path: Path) -> None:
    from exporter.engine.graph import graph_facts

    model = tiny_model(TinySpec())
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.dtype == ir.DataType.FLOAT:
            half = value.const_value.numpy().clip(-6e4, 6e4).astype("float16")
            value.const_value = ir.tensor(half, name=value.name)
    save_model(model, tmp_path / "half.onnx")
    assert graph_facts(tmp_path / "half.onnx").precision == "fp16"
