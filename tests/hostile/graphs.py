"""ONNX graphs, and the configs of onnxruntime-genai beside them."""

from __future__ import annotations

import json
import os
import random
from typing import Any

from tests.hostile.configs import ODD
from tests.hostile.records import spots_of
from tests.hostile.spoilt import Spoilt, mutation, read


@mutation("genai config")
def genai(spoilt: Spoilt, rng: random.Random) -> None:
    result = spoilt.json("genai_config.json")
    spots = list(spots_of(result))
    if not spots:
        return
    for _ in range(rng.choice((1, 2))):
        holder, key = rng.choice(spots)
        holder[key] = rng.choice(
            (*ODD, "../beside/secret.txt", "%d%d%s", "/etc/hostname", "past.%n")
        )
        spoilt.note(f"{key}={str(holder[key])[:50]!r}")
    spoilt.put_json("genai_config.json", result)


@mutation("genai config")
def genai_entry(spoilt: Spoilt, rng: random.Random) -> None:
    result = spoilt.json("genai_config.json")
    options = {
        "provider_options": [{"x": {"shared_lib_path": "../beside/evil.so"}}],
        "custom_ops_library": "custom_ops.so",
        "config_entries": {"x": "y"},
    }
    with_options = {
        **result.get("model", {}).get("decoder", {}),
        "session_options": options,
        "filename": rng.choice(("model.onnx", "../beside/x.onnx")),
    }
    spoilt.put_json("genai_config.json", {**result, "model": {**result.get("model", {}), "decoder":
    with_options, rng.choice(("vision", "x")): {"filename": "../x"}}},)  # fmt: skip


@mutation("graph", hostile=True)
def data_elsewhere(spoilt: Spoilt, rng: random.Random) -> None:
    model = _graph(spoilt)
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    tensor = rng.choice(tensors)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location = rng.choice(("../beside/secret.txt", str(spoilt.place.beside /
            "secret.txt"), "/dev/zero", "/etc/hostname", "../victim/mine.txt",
            "sub/../../beside/secret.txt",))  # fmt: skip
    spoilt.note(location)
    spoilt.write("model.onnx", model.SerializeToString())


@mutation("graph")
def odd_data(spoilt: Spoilt, rng: random.Random) -> None:
    from tests.fuzz.mutations import spoil_locations

    model = _graph(spoilt)
    spoil_locations(model, rng)
    spoilt.write("model.onnx", model.SerializeToString())


@mutation("graph")
def mutated_graph(spoilt: Spoilt, rng: random.Random) -> None:
    """In one of the ways of the fuzz of ONNX files."""
    from tests.fuzz.mutations import MUTATIONS

    model = _graph(spoilt)
    for name in rng.choices(sorted(MUTATIONS), k=rng.choice((1, 2))):
        spoilt.note(name)
        MUTATIONS[name](model, rng)
    spoilt.write("model.onnx", model.SerializeToString())


@mutation("graph")
def bytes_of_graph(spoilt: Spoilt, rng: random.Random) -> None:
    from tests.fuzz.mutations import spoil_bytes

    spoilt.write("model.onnx", spoil_bytes(read(spoilt.folder / "model.onnx"), rng))


@mutation("graph")
def huge_weight(spoilt: Spoilt, rng: random.Random) -> None:
    model = _graph(spoilt)
    tensor = rng.choice([tensor for tensor in model.graph.initializer if tensor.external_data])
    del tensor.dims[:]
    tensor.dims.extend(
        rng.choice(([2**40, 2**20], [10**9], [-1, 4], [0], [2**62, 2**62], [1 << 33]))
    )
    sparse = rng.random() < 0.5
    spoilt.note(f"{list(tensor.dims)} {sparse}")
    if sparse:
        for entry in tensor.external_data:
            if entry.key == "length":
                entry.value = str(1 << 40)
        os.truncate(spoilt.folder / "model.onnx.data", 1 << 41)
    spoilt.write("model.onnx", model.SerializeToString())


@mutation("graph")
def active_metadata(spoilt: Spoilt, rng: random.Random) -> None:
    model = _graph(spoilt)
    entry = model.metadata_props.add()
    entry.key = rng.choice(("depthcut.plan", "depthcut", "x")) + rng.choice(
        ("", "\x1b[2J", "\n::error::x")
    )
    entry.value = rng.choice(("[" * 100_000, "{}", json.dumps([{"layer": 10**30, "kind":
    "x\x1b[2J"}]), "\n::error::x", json.dumps({"a": "../x"}), "null",))  # fmt: skip
    for node in rng.sample(list(model.graph.node), 3):
        node.name += rng.choice(("\n::error::x", "\x1b]0;x\x07", "\u202e", "##[error]"))
    model.producer_name = "x\x1b[2J"
    model.graph.doc_string = "\n::error::"
    spoilt.write("model.onnx", model.SerializeToString())


@mutation("graph")
def context_node(spoilt: Spoilt, rng: random.Random) -> None:
    """Nodes that make a runtime open files."""
    import onnx

    model = _graph(spoilt)
    node = onnx.NodeProto(op_type="EPContext", domain="com.microsoft", name="c", output=["c"])
    for key, value in {
        "ep_cache_context": "../beside/secret.txt",
        "source": rng.choice(("TensorrtExecutionProvider", "QNN", "x")),
    }.items():
        node.attribute.add(name=key, type=onnx.AttributeProto.STRING, s=value.encode())
    node.attribute.add(name="embed_mode", type=onnx.AttributeProto.INT, i=0)
    model.graph.node.append(node)
    if rng.random() < 0.5:
        model.opset_import.add(domain="com.microsoft", version=1)
    spoilt.write("model.onnx", model.SerializeToString())


def _graph(spoilt: Spoilt) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(spoilt.folder / "model.onnx", load_external_data=False)
    except DecodeError as error:
        raise FileNotFoundError from error
