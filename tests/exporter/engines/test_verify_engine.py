"""An engine, or a second ONNX file, against ONNX Runtime by Polygraphy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import load as load_proto
from onnx.shape_inference import infer_shapes

from exporter.cli import run
from exporter.engines.build import polygraphy_run
from exporter.engines.build.build import build_engines
from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.build.settings import BuildSettings
from exporter.engines.build.sidecar import EngineRecord, read_sidecar, sidecar_path
from exporter.engines.explain import arms, narrowing, verify
from exporter.engines.explain.polygraphy_runs import Difference, differences, run_onnx
from exporter.errors import EngineError, MissingDependencyError
from exporter.files import sha256_file
from exporter.progress import QUIET
from graph_passes import save_model
from graph_passes.locate import locate
from tests.raising import raises
from tests.stand_in.decoders import RANGES, decoder_engine
from tests.stand_in.engine_files import write_engine
from tests.stand_in.installed import stand_in
from tests.tiny_graphs import TinySpec, tiny_model

pytestmark = pytest.mark.rtx  # Polygraphy comes with that extra


def faulty(layer: int, kind: str, file: Path) -> ir.Node:
    """Writes the tiny model with a wrong weight in one sublayer; gives the node that reads it."""
    model = tiny_model(TinySpec(layers=3))
    site = next(s for s in locate(model).sites if (s.layer, s.kind) == (layer, kind))
    node = [n for n in model.graph if n in site.dying and n.op_type == "MatMul"][-1]
    spoil(node)
    save_model(model, file)
    return node


def spoil(node: ir.Node) -> None:
    """Makes a node's weight wrong."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.5, name=weight.name)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    save_model(tiny_model(TinySpec(layers=3)), tmp_path / "sound.onnx")
    return tmp_path / "sound.onnx"


@pytest.mark.parametrize(("layer", "kind"), [(0, "attention"), (1, "mlp"), (2, "attention")])
def test_a_planted_fault_is_narrowed_to_its_node(
    layer: int, kind: str, sound: Path, tmp_path: Path
) -> None:
    node = faulty(layer, kind, tmp_path / "faulty.onnx")
    results = verify.verify_engine(tmp_path / "faulty.onnx", sound, tmp_path / "out", threads=1)
    first = results[-1].first
    assert first is not None
    assert first.sublayer == (layer, kind)
    assert [each.name for each in first.nodes] == [node.name]
    assert first.difference.tensor == node.outputs[0].name
    assert not first.fused
    assert not results[-1].worst.passed


def test_the_smallest_part_is_written_with_its_inputs_for_polygraphy(
    sound: Path, tmp_path: Path
) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    faulty(1, "mlp", tmp_path / "faulty.onnx")
    out = tmp_path / "out"
    (result,) = verify.verify_engine(tmp_path / "faulty.onnx", sound, out, threads=1)
    assert result.first is not None
    tensor = result.first.difference.tensor
    (inputs,) = load_json(str(out / narrowing.SUBGRAPH_INPUTS))
    alone = run_onnx(out / narrowing.SUBGRAPH, inputs, 1)
    marked = arms.OnnxArm(sound, tmp_path, 1).run(
        load_json(str(out / "inputs-prefill.json"))[0], [tensor]
    )
    np.testing.assert_allclose(alone[0][1][0][tensor], marked[0][1][0][tensor], rtol=1e-5)
    told = [RunResults.load(str(out / f"{n}-prefill.json")) for n in ("onnxruntime", "engine")]
    failed = [each.tensor for each in differences(*told, 1e-3) if not each.passed]
    assert "logits" in failed
    assert "present.0.key" not in failed


def test_equal_files_agree_in_both_phases(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify-engine", str(sound), str(sound), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["phase"] for each in told] == ["prefill", "decode"]
    assert all(each["first_difference"] is None for each in told)
    assert {output["max_abs_error"] for each in told for output in each["outputs"]} == {0.0}


def test_the_command_says_no_and_where(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "faulty.onnx"
    node = faulty(1, "mlp", other)
    assert run(["verify-engine", str(other), str(sound), "--json"]) == 1
    first = json.loads(capsys.readouterr().out)[-1]["first_difference"]
    assert (first["layer"], first["kind"], first["node"]) == (1, "mlp", node.name)
    assert run(["verify-engine", str(other), str(sound), "--tolerance", "1e6"]) == 0
    assert run(["verify-engine", str(other), str(sound), "-o", str(tmp_path / "out")]) == 1
    assert "mlp of layer 1" in capsys.readouterr().out
    assert (tmp_path / "out" / narrowing.SUBGRAPH).is_file()


def test_what_differs_only_while_fused_is_told_as_its_sublayer(sound: Path, tmp_path: Path) -> None:
    """An engine whose inner tensors are outputs is built otherwise: the fault is gone then."""
    reference = arms.OnnxArm(sound, tmp_path, 1)
    faulty(1, "mlp", tmp_path / "faulty.onnx")
    wrong = arms.OnnxArm(tmp_path / "faulty.onnx", tmp_path, 1)
    streams: list[int] = []

    class Fused:
        def has(self, tensor: str) -> bool:
            return True

        def run(self, feed: arms.Feed, marks: Any = ()) -> Any:
            streams.append(len(marks))
            return (wrong if len(streams) == 1 else reference).run(feed, marks)

    shape = verify.Shape("prefill", 1, 4)
    found = narrowing.Narrowing(reference, Fused(), verify._inputs(reference, shape), 1e-3).first(
        Difference("logits", 1.0, 1e-3)
    )
    assert found.fused
    assert found.sublayer == (1, "mlp")
    assert len(found.nodes) > 1


def results(**outputs: Any) -> Any:
    from polygraphy.comparator import RunResults

    found = RunResults()
    found.add([outputs], runner_name="one")
    return found


def test_logits_of_the_last_position_are_held_against_the_last() -> None:
    whole = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
    (same,) = differences(results(logits=whole), results(logits=whole[:, -1:]), 1e-3)
    assert same.max_abs_error == 0
    (other,) = differences(results(logits=whole), results(logits=whole[:, :1]), 1e-3)
    assert other == Difference("logits", 9.0, pytest.approx(11e-3))


@pytest.mark.parametrize(
    "wrong", [np.full((1, 2), np.nan, np.float32), np.zeros((1, 5), np.float32)]
)
def test_no_number_or_another_shape_is_an_infinite_difference(wrong: np.ndarray[Any, Any]) -> None:
    right = results(x=np.ones((1, 2), np.float32))
    (found,) = differences(right, results(x=wrong), 1e-3)
    assert found.max_abs_error == float("inf")
    assert not found.passed


@pytest.mark.parametrize("in_place", [True, False])
def test_an_engine_runs_by_polygraphys_own_runner(in_place: bool, tmp_path: Path) -> None:
    from tests.stand_in.for_polygraphy import polygraphy_on

    engine = decoder_engine(tmp_path, in_place=in_place)
    with stand_in() as machine, polygraphy_on(machine):
        found = verify.verify_engine(engine, tmp_path / "model.onnx", threads=1)
        assert [each.phase for each in found] == ["prefill", "decode"]
        assert [each.first for each in found] == [None, None]
        assert {run.profile for run in machine.runs} == {0, 1}


def test_an_engine_with_host_code_runs_where_its_record_says_so(tmp_path: Path) -> None:
    from tests.stand_in.for_polygraphy import polygraphy_on

    settings = BuildSettings(version_compatible=True)
    engine = decoder_engine(tmp_path, backend="tensorrt", settings=settings, host_code=True)
    with stand_in() as machine, polygraphy_on(machine, "tensorrt"):
        found = verify.verify_engine(engine, tmp_path / "model.onnx", threads=1)
    assert [each.first for each in found] == [None, None]


def inferred(onnx: Path) -> ir.Model:
    """A graph with the types of its inner tensors."""
    return ir.from_proto(infer_shapes(load_proto(onnx)))


def computes(engine: Path, onnx: Path) -> None:
    """Has an engine of the stand-in compute another graph than the one that it was built from."""
    told = json.loads(engine.read_text())
    engine.write_text(json.dumps({**told, "onnx": str(onnx)}))
    record = EngineRecord.read(sidecar_path(engine))
    changes = {"engine_sha256": sha256_file(engine), "engine_bytes": engine.stat().st_size}
    record.model_copy(update=changes).write(sidecar_path(engine))


def test_a_wrong_engine_is_narrowed_by_engines_with_inner_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.stand_in.for_polygraphy import polygraphy_on

    engine = decoder_engine(tmp_path, in_place=False)
    model = ir.load(tmp_path / "model.onnx")
    site = next(s for s in locate(model).sites if (s.layer, s.kind) == (1, "mlp"))
    node = [n for n in model.graph if n in site.dying and n.op_type == "MatMul"][-1]
    spoil(node)
    ir.save(model, tmp_path / "faulty.onnx")
    computes(engine, tmp_path / "faulty.onnx")
    built: list[Path] = []

    def build(onnx: Path, target: Path, **_: Any) -> list[tuple[Path, None]]:
        """The library's fault is in what it builds of any form of the graph."""
        marks = [value.name or "" for value in ir.load(onnx).graph.outputs]
        wrong = arms.OnnxArm(tmp_path / "faulty.onnx", target.parent, 1).marked(marks)
        save_model(inferred(wrong), target.with_suffix(".onnx"))
        built.append(write_engine(target.with_suffix(".onnx"), target, ["prefill"], RANGES))
        return [(target, None)]

    monkeypatch.setattr(arms, "build_engines", build)
    with stand_in() as machine, polygraphy_on(machine):
        (found,) = verify.verify_engine(engine, tmp_path / "model.onnx", threads=1)
    assert found.first is not None
    assert found.first.sublayer == (1, "mlp")
    assert [each.name for each in found.first.nodes] == [node.name]
    assert len(built) == 2  # the residual stream, then the sublayer


@pytest.mark.parametrize("cache", [True, False])
def test_the_real_builder_gives_inner_tensors_as_outputs(cache: bool, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    save_model(tiny_model(TinySpec(layers=2, cache=cache)), model)
    stream = [value for value, _ in narrowing._stream(ir.load(model))]
    context = Span(1, 4, 8) if cache else None
    sizes = Ranges(batch=Span(1, 1, 2), prompt=Span(1, 4, 8), context=context)
    settings = BuildSettings(compute_capabilities=("sm89",))
    built = build_engines(model, tmp_path / "engines", ranges=sizes, settings=settings)
    engines = find_engines([path for path, _ in built])
    source = arms.OnnxArm(model, tmp_path, 1)
    arm = arms.EngineArm(engines, engines.slots[-1], source, tmp_path, QUIET)
    record = read_sidecar(arm._marked(stream[:2]))
    assert {each.name for each in record.outputs} >= {"logits", *stream[:2]}
    assert [each.phase for each in record.profiles] == [engines.slots[-1].profile.phase]


def test_an_engine_of_another_graph_is_refused(sound: Path, tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)
    with raises(EngineError, "not-built-from", engine, sound):
        verify.verify_engine(engine, sound, threads=1)


def test_without_polygraphy_the_extra_is_named(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, *, extra: str) -> Any:
        raise MissingDependencyError(module, extra)

    monkeypatch.setattr(polygraphy_run, "require", missing)
    with raises(MissingDependencyError, "", "polygraphy", "rtx"):
        verify.verify_engine(sound, sound, threads=1)


def test_polygraphys_failure_is_one_line() -> None:
    from polygraphy.logger import G_LOGGER

    with (
        raises(EngineError, "polygraphy-failed", "no engine") as caught,
        polygraphy_run.polygraphy(),
    ):
        G_LOGGER.critical("no engine\nand much more")
    assert "\n" not in caught.value.message
