"""The caches of a cut encoder-decoder, in the order in which optimum's runtime hands them over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graph_passes.fusing.cache_in_place import pair_caches


def step(own: Sequence[int], cross: Sequence[int], *, takes: bool = True) -> ir.Model:
    """A step whose caches are those of some layers, each carried on as it is."""
    shape = "float[batch, 2, {}, 4]"
    inputs, outputs, nodes = ["int64[batch, seq] input_ids"], ["float[batch, seq] logits"], [
        "logits = Cast<to = 1>(input_ids)"
    ]  # fmt: skip
    for layer in sorted({*own, *cross}):
        for side, held in (("decoder", own), ("encoder", cross)):
            for part in ("key", "value") if layer in held else ():
                if takes:
                    length = "past" if side == "decoder" else "source"
                    inputs.append(f"{shape.format(length)} past_{layer}_{side}_{part}")
                source = f"past_{layer}_{side}_{part}" if takes else "four"
                if not takes or side == "decoder":
                    outputs.append(f"{shape.format('total')} present_{layer}_{side}_{part}")
                    nodes.append(f"present_{layer}_{side}_{part} = Identity({source})")
    if not takes:
        nodes.insert(0, "four = ConstantOfShape(sizes)")
        nodes.insert(0, "sizes = Constant<value_ints = [1, 2, 3, 4]>()")
    lines = "\n".join(nodes)
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 20]>\n'
        f"graph ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{lines}\n}}"
    )
    for value in (*model.graph.inputs, *model.graph.outputs):
        words = str(value.name).split("_")
        if len(words) == 4:
            stem = {"past": "past_key_values", "present": "present"}[words[0]]
            value.name = ".".join([stem, *words[1:]])
    return model


def names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def run(model: ir.Model, feeds: dict[str, Any]) -> dict[str, Any]:
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_outputs()]
    return dict(zip(wanted, session.run(wanted, feeds), strict=True))


def test_pairs_take_turns_whatever_their_layers_are() -> None:
    model = step(own=(0, 2), cross=(1, 2))
    pair_caches(model)
    assert [name.split(".")[1:3] for name in names(model.graph.inputs)[1::2]] == [
        ["0", "decoder"], ["1", "encoder"], ["2", "decoder"], ["2", "encoder"],
    ]  # fmt: skip
    assert len(model.graph.outputs) == 1 + 4


@pytest.mark.parametrize(("own", "cross"), [((0, 1, 2), (1,)), ((0,), ()), ((1,), (0,))])
def test_nothing_is_added_where_self_attentions_suffice(
    own: tuple[int, ...], cross: tuple[int, ...]
) -> None:
    for takes in (True, False):
        model = step(own, cross, takes=takes)
        before = sorted(names(model.graph.inputs)), names(model.graph.outputs)
        pair_caches(model)
        assert (sorted(names(model.graph.inputs)), names(model.graph.outputs)) == before


def test_spare_caches_grow_by_a_number_a_token() -> None:
    model = step(own=(1,), cross=(0, 1, 2))
    pair_caches(model)
    spare = [name for name in names(model.graph.inputs) if ".spare." in name]
    assert spare == [
        f"past_key_values.{n}.decoder.spare.{part}" for n in (0, 1) for part in ("key", "value")
    ]
    cross = np.zeros((3, 2, 7, 4), np.float32)
    feeds = {name: cross for name in names(model.graph.inputs) if ".encoder." in name}
    feeds |= {name: cross[:, :, :5] for name in names(model.graph.inputs) if ".1.decoder." in name}
    feeds |= dict.fromkeys(spare, np.zeros((3, 1, 5, 1), np.float32))
    result = run(model, {**feeds, "input_ids": np.ones((3, 2), np.int64)})
    for name in spare:
        assert result[name.replace("past_key_values", "present")].shape == (3, 1, 7, 1)


def test_the_first_step_begins_spare_caches() -> None:
    model = step(own=(), cross=(0,), takes=False)
    pair_caches(model)
    result = run(model, {"input_ids": np.ones((2, 3), np.int64)})
    for part in ("key", "value"):
        assert result[f"present.0.decoder.spare.{part}"].shape == (2, 1, 3, 1)
        assert not result[f"present.0.decoder.spare.{part}"].any()


def test_a_graph_without_caches_stays_as_it_is() -> None:
    model = step(own=(), cross=())
    pair_caches(model)
    assert (names(model.graph.inputs), names(model.graph.outputs)) == (["input_ids"], ["logits"])
