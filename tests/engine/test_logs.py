from __future__ import annotations

import pytest

from exporter.engines.build.logs import Phases, read_layers

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
    found = read_layers(["Layer x of kind y", "Total memory: much"])
    assert (found.layers, found.memory_bytes) == ({}, {})


def test_nested_phases_add_up_and_never_fall_back() -> None:
    told: list[float] = []
    phases = Phases(told.append)
    phases.start("all", None, 2)
    phases.start("first", "all", 4)
    for step in range(4):
        phases.step("first", step)
    phases.finish("first")
    assert told[-1] == pytest.approx(0.5)
    phases.start("second", "all", 1)
    phases.finish("second")
    phases.finish("all")
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


def test_a_phase_that_never_began_is_no_harm() -> None:
    told: list[float] = []
    Phases(told.append).step("unknown", 3)
    assert told == []
