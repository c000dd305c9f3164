"""An engine's own figures, by the forms that the library logs and tells them in."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.engines.build.logs import LayerTable, inspected, read_inspected, read_layers

# Lines as TensorRT-RTX 1.7.1 logs them, shortened.
LOG = [
    "Layers:\n"
    "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: []\n"
    "Name: __mye1_0_myl1_0, LayerType: shape_call, Inputs: [], Metadata: \n"
    "Name: __myl_Cast_myl1_1, LayerType: kgen, Inputs: [ { Name: input_ids, Dimensions: [-1,1] }]\n"
    "Name: gemm_myl1_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [8,8] }]\n"
    "Name: __myl_Mul_myl1_3, LayerType: kgen, Inputs: []\n"
    "Name: _gemv_mha_v1_myl1_4, LayerType: kgen, Inputs: []\n"
    "Name: s, LayerType: signal, Inputs: []\nName: w, LayerType: wait, Inputs: []\n",
    "Total Activation Memory: 8248320 bytes",
    "Total Activation Memory: 512 bytes",
    "Total Weights Memory: 496512 bytes",
    "a Total of nothing",
]
LAYERS = [
    {"Name": "__myl_Cast_myl0_1", "LayerType": "kgen", "Inputs": []},
    {"Name": "_gemv_mha_v1_myl0_2", "LayerType": "kgen"},
    {"Name": "wait", "LayerType": "wait"},
    {"Name": "gemm", "LayerType": "gemm"},
]
LOGGED = LayerTable({"kgen": 1}, {"weights": 5, "host_persistent": 7})


def test_a_log_tells_the_layers_that_do_work_and_the_largest_memory_of_a_kind() -> None:
    memory = {"activation": 8248320, "weights": 496512}
    assert read_layers(LOG) == LayerTable({"attention": 1, "gemm": 1, "kgen": 2}, memory)
    assert read_layers(["Layer x of kind y", "Total memory: much"]) == LayerTable({}, {})


def test_an_engine_tells_its_layers_and_what_does_not_load_stays_as_the_log_has_it() -> None:
    information = json.dumps({"Layers": LAYERS, "Bindings": []})
    inspector = SimpleNamespace(get_engine_information=lambda form: information)
    engine = SimpleNamespace(
        create_engine_inspector=lambda: inspector,
        device_memory_size_v2=300,
        get_engine_stat={"weights": 2000}.__getitem__,
    )
    memory = {"activation": 300, "host_persistent": 7, "weights": 2000}
    loaded = LayerTable({"attention": 1, "gemm": 1, "kgen": 1}, memory)
    for item, table in ((engine, loaded), (None, LOGGED)):
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda content, item=item: item)
        library: Any = SimpleNamespace(
            Runtime=lambda log, runtime=runtime: runtime,
            LayerInformationFormat=SimpleNamespace(JSON="json"),
            EngineStat=SimpleNamespace(TOTAL_WEIGHTS_SIZE="weights"),
        )
        listener: Any = SimpleNamespace(log=None)
        assert inspected(library, listener, memoryview(b""), LOGGED) == table


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["conv1", "conv2"]}', '{"Layers": [{}]}'])
def test_a_text_of_another_form_gives_no_table(text: str) -> None:
    assert read_inspected(text) == {}
