from __future__ import annotations

from exporter.engines.build.logs import read_layers

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


def test_only_layers_that_do_work_count() -> None:
    assert read_layers(LOG).layers == {"attention": 1, "gemm": 1, "kgen": 2}


def test_the_largest_memory_of_a_kind_is_told() -> None:
    assert read_layers(LOG).memory_bytes == {"activation": 8248320, "weights": 496512}


def test_another_log_gives_an_empty_table() -> None:
    table = read_layers(["Layer x of kind y", "Total memory: much"])
    assert (table.layers, table.memory_bytes) == ({}, {})
