"""An engine's own figures, by the form that the library's documentation gives them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.engines.build.logs import LayerTable, inspected, read_inspected

LAYERS = [
    {"Name": "__myl_Cast_myl0_1", "LayerType": "kgen", "Inputs": []},
    {"Name": "_gemv_mha_v1_myl0_2", "LayerType": "kgen"},
    {"Name": "wait", "LayerType": "wait"},
    {"Name": "gemm", "LayerType": "gemm"},
]
TOLD = LayerTable({"kgen": 1}, {"weights": 5, "host_persistent": 7})


def library(engine: Any) -> Any:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: engine)
    return SimpleNamespace(
        Runtime=lambda log: runtime,
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        EngineStat=SimpleNamespace(TOTAL_WEIGHTS_SIZE="weights"),
    )


def engine(information: str) -> Any:
    inspector = SimpleNamespace(get_engine_information=lambda form: information)
    return SimpleNamespace(
        create_engine_inspector=lambda: inspector,
        device_memory_size_v2=300,
        get_engine_stat={"weights": 2000}.__getitem__,
    )


def test_it_tells_its_layers_and_its_memory() -> None:
    listener: Any = SimpleNamespace(log=None)
    one = engine(json.dumps({"Layers": LAYERS, "Bindings": []}))
    table = inspected(library(one), listener, memoryview(b""), TOLD)
    assert table.layers == {"attention": 1, "gemm": 1, "kgen": 1}
    assert table.memory_bytes == {"activation": 300, "host_persistent": 7, "weights": 2000}


def test_what_does_not_load_stays_as_the_log_has_it() -> None:
    listener: Any = SimpleNamespace(log=None)
    assert inspected(library(None), listener, memoryview(b""), TOLD) == TOLD


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["conv1", "conv2"]}', '{"Layers": [{}]}'])
def test_a_text_of_another_form_gives_no_table(text: str) -> None:
    assert read_inspected(text) == {}
