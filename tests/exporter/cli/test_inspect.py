"""What `depthcut inspect` tells of a model: its sublayers, and which runtimes hold cuts of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts.servers import SERVERS, STAYS
from exporter.cli import run
from graph_passes import save_model
from tests.tiny_gguf import TinyGguf
from tests.tiny_graphs import tiny_model

ON_GRAPHS = {"onnxruntime", "openvino", "tensorrt"}
BY_FOLDERS = set(SERVERS) - ON_GRAPHS
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "model.onnx")
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    assert run(["inspect", str(path), "--json"]) == 0
    results: dict[str, Any] = json.loads(capsys.readouterr().out)
    return results


def holding(found: dict[str, Any]) -> set[str]:
    return {row["runtime"] for row in found["runtimes"] if row["attention"] != STAYS}


@pytest.mark.parametrize("config", [None, LLAMA], ids=["alone", "exported"])
def test_a_graph_can_go_where_graphs_are_read(
    graph: Path, capsys: pytest.CaptureFixture[str], config: Any
) -> None:
    if config is not None:
        (graph / "config.json").write_text(json.dumps(config))
    result = told(capsys, graph)
    assert len(result["sites"]) == 6
    assert {row["runtime"] for row in result["runtimes"]} == holding(result) == ON_GRAPHS
    assert run(["inspect", str(graph)]) == 0
    *table, others = capsys.readouterr().out.splitlines()
    assert not any(line.startswith(server) for server in BY_FOLDERS for line in table)
    assert all(server in others for server in BY_FOLDERS)


def test_a_gguf_file_tells_its_sublayers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = told(capsys, TinyGguf.llama(layers=2).write(tmp_path / "a.gguf"))
    named = [(sublayer["layer"], sublayer["kind"]) for sublayer in result["sublayers"]]
    assert named == [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
    assert all(sublayer["bytes"] == 4 * sublayer["parameters"] for sublayer in result["sublayers"])
    assert holding(result) == set(SERVERS)
    other = TinyGguf.llama(layers=2, architecture="qwen2").write(tmp_path / "b.gguf")
    assert holding(told(capsys, other)) == ON_GRAPHS
    assert run(["inspect", str(other)]) == 0
    out = capsys.readouterr().out
    assert all(server in out for server in SERVERS)
    assert "no ONNX files" not in out
