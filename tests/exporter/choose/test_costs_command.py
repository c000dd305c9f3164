"""`depthcut costs`."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.choose.costs.table import CostTable
from exporter.cli import run
from exporter.engines.build.libraries import Driver
from tests.reading import in_file
from tests.tiny_graphs import tiny_model

pytest.importorskip("onnxruntime")
QUICK = ("--at", "prompt=4,new=1", "--threads", "1", "--time-budget", "0.01s")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    ir.save(tiny_model(), tmp_path / "model.onnx")
    return tmp_path


def test_a_table_is_written_and_printed(graph: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = graph / "costs.json"
    call = ["costs", str(graph), "-o", str(output), *QUICK, *in_file(graph, ["replacement: none"])]
    assert run(call) == 0
    printed = capfd.readouterr()
    title, header, *rows, place = printed.out.splitlines()
    assert title.startswith("A request (batch=1,prompt=4,new=1) takes ")
    assert header.split() == ["sublayer", "layers", "alone"]
    assert [row.split()[:2] for row in rows] == [["attention", "0,1,2"], ["mlp", "0,1,2"]]
    assert place == str(output)
    table = CostTable.read(output)
    assert {t.replacement for group in table.groups for t in group.trials} == {"none"}
    assert run([*call, "--json"]) == 0  # nothing is measured again
    assert CostTable.model_validate_json(capfd.readouterr().out).groups == table.groups


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--at", "batch=0"], 2, "batch must be at least 1"),
        (["--at", "past=7"], 2, "'past' is not part of a request"),
        (["-o", "{graph}"], 2, "is a directory"),
        (["-o", "{graph}/model.onnx"], 2, "is no table of costs"),
        (["--engine", "tensorrt"], 2, "Engines can't be timed here: "),
    ],
)
def test_a_wrong_call_is_told(
    graph: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], code: int, told: str,
) -> None:  # fmt: skip
    driver = Driver(problem="there is no NVIDIA driver")
    monkeypatch.setattr("exporter.choose.costs.backend_cost_runners.ask_driver", lambda: driver)
    before = (graph / "model.onnx").read_bytes()
    given = [option.format(graph=graph) for option in options]
    assert run(["costs", str(graph), *QUICK, *given]) == code
    assert told in capfd.readouterr().err
    assert (graph / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("model", "code", "told"),
    [
        ("torch-compile:{graph}", 2, "would be compiled again for each variant"),
        ("{graph}/model.engine", 2, "can be made"),
        ("{graph}/nothing", 2, "does not exist"),
    ],
)
def test_a_model_of_which_nothing_can_be_cut_is_refused(
    graph: Path, capfd: pytest.CaptureFixture[str], model: str, code: int, told: str
) -> None:
    assert run(["costs", model.format(graph=graph), *QUICK]) == code
    assert told in capfd.readouterr().err
