"""ONNX graphs, and the configs of onnxruntime-genai beside them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable

import onnx
from google.protobuf.message import DecodeError

from tests.fuzz.mutations import MUTATIONS, spoil_bytes, spoil_locations
from tests.hostile.spoilt import ACTIVE, ELSEWHERE, Spoilt, mutation, odd_values, read

_SIZES = ([2**40, 2**20], [10**9], [-1, 4], [0], [2**62, 2**62], [1 << 33])
_FILE = "model.onnx"


@mutation("genai config")
def genai_entry(spoilt: Spoilt, rng: random.Random) -> None:
    result = spoilt.json("genai_config.json")
    model = result.get("model", {})
    options = {
        "provider_options": [{"x": {"shared_lib_path": "../beside/evil.so"}}],
        "custom_ops_library": "custom_ops.so",
        "config_entries": {"x": "y"},
    }
    decoder = {**model.get("decoder", {}), "session_options": options}
    decoder["filename"] = rng.choice((_FILE, "../beside/x.onnx"))
    other = {rng.choice(("vision", "x")): {"filename": "../x"}}
    result = {**result, "model": {**model, "decoder": decoder, **other}}
    spoilt.put_json("genai_config.json", result)


@mutation("graph")
def bytes_of_graph(spoilt: Spoilt, rng: random.Random) -> None:
    spoilt.write(_FILE, spoil_bytes(read(spoilt.folder / _FILE), rng))


def _graph(change: Callable[[Spoilt, onnx.ModelProto, random.Random], None]) -> None:
    """Registers a change of the model that a file holds."""

    @mutation("graph", hostile=change is _data_elsewhere)
    def changed(spoilt: Spoilt, rng: random.Random) -> None:
        try:
            model = onnx.load(spoilt.folder / _FILE, load_external_data=False)
        except DecodeError as error:
            raise FileNotFoundError from error
        spoilt.note(change.__name__)
        change(spoilt, model, rng)
        spoilt.write(_FILE, model.SerializeToString())


def _outside(model: onnx.ModelProto, rng: random.Random) -> onnx.TensorProto:
    return rng.choice([tensor for tensor in model.graph.initializer if tensor.external_data])


def _data_elsewhere(spoilt: Spoilt, model: onnx.ModelProto, rng: random.Random) -> None:
    location = rng.choice((*ELSEWHERE, str(spoilt.place.beside / "secret.txt"),
    "sub/../../beside/secret.txt"))  # fmt: skip
    spoilt.note(location)
    for item in _outside(model, rng).external_data:
        item.value = location if item.key == "location" else item.value


def _odd_data(spoilt: Spoilt, model: onnx.ModelProto, rng: random.Random) -> None:
    spoil_locations(model, rng)


def _mutated(spoilt: Spoilt, model: onnx.ModelProto, rng: random.Random) -> None:
    """In one of the ways of the fuzz of ONNX files."""
    for name in rng.choices(sorted(MUTATIONS), k=rng.choice((1, 2))):
        spoilt.note(name)
        MUTATIONS[name](model, rng)


def _huge_weight(spoilt: Spoilt, model: onnx.ModelProto, rng: random.Random) -> None:
    tensor, sparse = _outside(model, rng), rng.random() < 0.5
    tensor.dims[:] = rng.choice(_SIZES)
    spoilt.note(f"{list(tensor.dims)} {sparse}")
    if sparse:
        for item in tensor.external_data:
            item.value = str(1 << 40) if item.key == "length" else item.value
        os.truncate(spoilt.folder / "model.onnx.data", 1 << 41)


def _active_metadata(spoilt: Spoilt, model: onnx.ModelProto, rng: random.Random) -> None:
    marks = [mark for mark in ACTIVE if mark not in ("\0", "\ud800")]
    key = rng.choice(("depthcut.plan", "depthcut", "x")) + rng.choice(("", *marks))
    value = rng.choice(("[" * 100_000, "{}", json.dumps([{"layer": 10**30, "kind":
    "x\x1b[2J"}]), "\n::error::x", json.dumps({"a": "../x"}), "null",))  # fmt: skip
    model.metadata_props.add(key=key, value=value)
    for node in rng.sample(list(model.graph.node), 3):
        node.name += rng.choice(marks)
    model.producer_name = "x\x1b[2J"
    model.graph.doc_string = "\n::error::"


def _noted_plan(spoilt: Spoilt, model: onnx.ModelProto, rng: random.Random) -> None:
    result = [{"layer": 1, "kind": "attention", "replacement": "none"}]
    value = json.dumps(odd_values(result, rng, spoilt.note))
    model.metadata_props.add(key="depthcut.plan", value=value)


def _context_node(spoilt: Spoilt, model: onnx.ModelProto, rng: random.Random) -> None:
    """Nodes that make a runtime open files."""
    kind = rng.choice(("TensorrtExecutionProvider", "QNN", "x"))
    texts = {"ep_cache_context": "../beside/secret.txt", "source": kind}
    node = model.graph.node.add(op_type="EPContext", domain="com.microsoft", name="c", output=["c"])
    for key, text in texts.items():
        node.attribute.add(name=key, type=onnx.AttributeProto.STRING, s=text.encode())
    node.attribute.add(name="embed_mode", type=onnx.AttributeProto.INT, i=0)
    if rng.random() < 0.5:
        model.opset_import.add(domain="com.microsoft", version=1)


for _change in (_data_elsewhere, _odd_data, _mutated, _huge_weight, _active_metadata, _noted_plan,
                _context_node):  # fmt: skip
    _graph(_change)
