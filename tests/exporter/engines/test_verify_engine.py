"""An engine, or a second ONNX file, against ONNX Runtime by Polygraphy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.cli import run
from exporter.engines import verify
from exporter.engines.build import polygraphy_run
from exporter.engines.build.engine_set import EngineRecord, sidecar_path
from exporter.errors import EngineError, MissingDependencyError
from exporter.files import sha256_file
from graph_passes.locate import locate
from tests.raising import raises
from tests.stand_in.decoders import decoder_engine
from tests.stand_in.installed import stand_in
from tests.tiny_graphs import TinySpec, saved, tiny_model

pytestmark = pytest.mark.rtx  # Polygraphy comes with that extra


def written(file: Path, *spoilt: tuple[int, str], source: Path | None = None) -> Path:
    """A model, with a wrong weight in some sublayers."""
    model = tiny_model(TinySpec(layers=3)) if source is None else ir.load(source)
    for site in locate(model).sites:
        if (site.layer, site.kind) in spoilt:
            node = [n for n in model.graph if n in site.dying and n.op_type == "MatMul"][-1]
            assert node.inputs[1] is not None
            weight = node.inputs[1]
            assert weight.const_value is not None
            weight.const_value = ir.tensor(weight.const_value.numpy() * 1.5, name=weight.name)
    return saved(model, file.parent, file.name)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return written(tmp_path / "sound.onnx")


@pytest.mark.parametrize(("layer", "kind"), [(0, "attention"), (1, "mlp"), (2, "attention")])
def test_a_planted_fault_differs_and_inputs_and_results_are_written_for_polygraphy(
    layer: int, kind: str, sound: Path, tmp_path: Path
) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    faulty, out = written(tmp_path / "faulty.onnx", (layer, kind)), tmp_path / "out"
    results = verify.verify_engine(faulty, sound, out, threads=1)
    assert [result.phase for result in results] == ["prefill", "decode"]
    assert not any(result.agrees or result.worst.passed for result in results)
    (inputs,) = load_json(str(out / "inputs-decode.json"))
    kept = RunResults.load(str(out / "engine-decode.json"))
    outputs = verify.differences(verify.run_onnx(sound, inputs, 1), kept, 1e-3)
    assert outputs == list(results[1].outputs)


def test_the_command_says_yes_or_no(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify-engine", str(sound), str(sound), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [item["phase"] for item in content] == ["prefill", "decode"]
    assert {output["max_abs_error"] for item in content for output in item["outputs"]} == {0.0}
    faulty = written(tmp_path / "faulty.onnx", (1, "mlp"))
    assert run(["verify-engine", str(faulty), str(sound)]) == 1
    assert "differs" in capsys.readouterr().out
    assert run(["verify-engine", str(faulty), str(sound), "--tolerance", "1e6"]) == 0


def results(**outputs: Any) -> Any:
    from polygraphy.comparator import RunResults

    result = RunResults()
    result.add([outputs], runner_name="one")
    return result


def test_logits_of_the_last_position_are_held_against_the_last() -> None:
    whole = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
    (same,) = verify.differences(results(logits=whole), results(logits=whole[:, -1:]), 1e-3)
    assert same.max_abs_error == 0
    (other,) = verify.differences(results(logits=whole), results(logits=whole[:, :1]), 1e-3)
    assert other == verify.Difference("logits", 9.0, pytest.approx(11e-3))


@pytest.mark.parametrize(
    "wrong", [np.full((1, 2), np.nan, np.float32), np.zeros((1, 5), np.float32)]
)
def test_no_number_or_another_shape_is_an_infinite_difference(wrong: np.ndarray[Any, Any]) -> None:
    right = results(x=np.ones((1, 2), np.float32))
    (result,) = verify.differences(right, results(x=wrong), 1e-3)
    assert result.max_abs_error == float("inf")
    assert not result.passed


@pytest.mark.parametrize("in_place", [True, False])
def test_an_engine_runs_by_polygraphys_own_runner(in_place: bool, tmp_path: Path) -> None:
    from tests.stand_in.for_polygraphy import polygraphy_on

    engine = decoder_engine(tmp_path, in_place=in_place)
    with stand_in() as machine, polygraphy_on(machine):
        result = verify.verify_engine(engine, tmp_path / "model.onnx", threads=1)
        assert [item.phase for item in result] == ["prefill", "decode"]
        assert all(item.agrees for item in result)
        assert {run.profile for run in machine.runs} == {0, 1}


def test_a_wrong_engine_differs(tmp_path: Path) -> None:
    """The stand-in's engine computes another graph than the one that it was built from."""
    from tests.stand_in.for_polygraphy import polygraphy_on

    engine = decoder_engine(tmp_path, in_place=False)
    other = written(tmp_path / "faulty.onnx", (1, "mlp"), source=tmp_path / "model.onnx")
    content = json.loads(engine.read_text())
    engine.write_text(json.dumps({**content, "onnx": str(other)}))
    record = EngineRecord.read(sidecar_path(engine))
    changes = {"engine_sha256": sha256_file(engine), "engine_bytes": engine.stat().st_size}
    record.model_copy(update=changes).write(sidecar_path(engine))
    with stand_in() as machine, polygraphy_on(machine):
        result = verify.verify_engine(engine, tmp_path / "model.onnx", threads=1)
    assert not any(item.agrees for item in result)


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
        raises(EngineError, "run-failed", "no engine") as caught,
        polygraphy_run.polygraphy(),
    ):
        G_LOGGER.critical("no engine\nand much more")
    assert "\n" not in caught.value.message
