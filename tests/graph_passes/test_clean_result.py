"""A result holds what the original held, less what was cut: nothing dead, nothing private."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graph_support import SPECS, all_deletions, check_clean, tiny

from graph_passes import Deletion, prune_graph
from graph_passes.cleanup import CleanupPass
from graph_passes.files.storage import save_model

PLAN = [Deletion(1, "attention"), Deletion(2, "mlp")]
SECRET = "/home/someone/secret.py"
PUBLIC = {"owner": "me", "notes": "not the exporter's"}


def cuts(model: ir.Model) -> Iterator[list[Deletion]]:
    """Every sublayer alone, and three sets of them."""
    everything, chance = all_deletions(model), random.Random(0)
    yield from ([deletion] for deletion in everything)
    for _ in range(3):
        yield chance.sample(everything, chance.randint(2, len(everything) - 1))


@pytest.mark.parametrize("name", SPECS)
def test_after_any_cut_the_rest_is_as_it_was(name: str) -> None:
    model = tiny(name)
    model.metadata_props.update(PUBLIC)
    model.doc_string, model.domain, model.model_version = "a model", "org.example", 7
    for cut in cuts(model):
        pruned, report = prune_graph(model, cut)
        check_clean(pruned)
        before, after = ir.to_proto(model), ir.to_proto(pruned)
        for field in ("ir_version", "producer_name", "domain", "model_version", "doc_string"):
            assert getattr(after, field) == getattr(before, field)
        assert list(after.opset_import) == list(before.opset_import)
        own = {entry.key: entry.value for entry in after.metadata_props}
        assert own.pop("depthcut.plan")
        assert own == PUBLIC
        gone = [n for e in report.deleted for n in (*e.inputs_removed, *e.outputs_removed)]
        for which in ("input", "output"):
            old, new = (list(getattr(proto.graph, which)) for proto in (before, after))
            assert [value for value in old if value.name not in gone] == new


@pytest.mark.parametrize("version", [4, 7, 8, 9, 10, 11, 12, 13])
def test_the_ir_version_stays_and_the_runtime_takes_it(version: int) -> None:
    model = tiny("pre_norm")
    model.ir_version = version
    pruned, _ = prune_graph(model, PLAN)
    proto = ir.to_proto(pruned)
    assert proto.ir_version == version
    ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def test_weights_stay_inputs_where_the_ir_version_wants_it() -> None:
    model = tiny("pre_norm")
    model.ir_version = 3
    model.graph.inputs.extend(model.graph.initializers.values())
    pruned, _ = prune_graph(model, PLAN)
    check_clean(pruned)
    assert set(pruned.graph.initializers) <= {value.name for value in pruned.graph.inputs}


def annotated() -> onnx.ModelProto:
    """A model with a note on every message that can have one, but the model itself."""
    model = tiny("router")
    for number, node in enumerate(list(model.graph)):
        if number % 10 == 0:
            tensor = ir.tensor([1.0], name=f"extra{number}")
            attributes = ir.AttrTensors("extra", [tensor, tensor])
            node.attributes["extra"] = attributes
    proto = ir.to_proto(model)
    proto.functions.append(unused_function())
    for message in messages(proto):
        if "doc_string" in message.DESCRIPTOR.fields_by_name and message is not proto:
            message.doc_string = SECRET
        if "metadata_props" in message.DESCRIPTOR.fields_by_name and message is not proto:
            message.metadata_props.add(key="trace", value=SECRET)
    return proto


def messages(message: Any) -> Iterator[Any]:
    """A message and all in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else list(value):
                yield from messages(part)


def unused_function() -> onnx.FunctionProto:
    return onnx.parser.parse_function(
        '<domain: "pkg", opset_import: ["": 20]> Unused (x) => (y) { y = Relu(x) }'
    )


def test_no_note_is_left_on_any_message() -> None:
    proto = annotated()
    kinds = {type(m).__name__ for m in messages(proto) if SECRET in str(m)}
    assert kinds >= {"NodeProto", "AttributeProto", "TensorProto", "ValueInfoProto", "GraphProto"}
    pruned, _ = prune_graph(ir.from_proto(proto), PLAN)
    assert SECRET not in str(ir.to_proto(pruned))
    kept, _ = prune_graph(ir.from_proto(proto), PLAN, keep_debug=True)
    left = {type(m).__name__ for m in messages(ir.to_proto(kept)) if SECRET in str(m)}
    assert left >= kinds - {"FunctionProto"}


def test_functions_that_nothing_calls_go() -> None:
    model = tiny("pre_norm")
    proto = ir.to_proto(model)
    proto.functions.append(unused_function())
    given = ir.from_proto(proto)
    pruned, _ = prune_graph(given, PLAN, keep_debug=True)
    assert len(given.functions) == 1
    assert not pruned.functions
    assert CleanupPass()(given).modified
    assert not CleanupPass()(given).modified


def test_what_quantisers_note_on_a_value_stays_with_it_and_goes_with_it() -> None:
    proto = ir.to_proto(tiny("pre_norm"))
    names = [node.output[0] for node in proto.graph.node]
    for name in names:
        proto.graph.quantization_annotation.append(
            onnx.TensorAnnotation(
                tensor_name=name,
                quant_parameter_tensor_names=[onnx.StringStringEntryProto(key="SCALE", value="s")],
            )
        )
    pruned = ir.to_proto(prune_graph(ir.from_proto(proto), PLAN)[0])
    left = {name for node in pruned.graph.node for name in node.output}
    assert {note.tensor_name for note in pruned.graph.quantization_annotation} == left
    assert left < set(names)


SCRIPT = """
import os
from pathlib import Path
from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
junk = [object() for _ in range(int(os.environ["JUNK"]))]  # moves what comes after it in memory
plan = [PlannedDeletion(layer=1, kind="attention"), PlannedDeletion(layer=2, kind="mlp")]
for source in sorted(Path("../source").glob("*.onnx")):
    target = Path(source.stem, "cut.onnx")
    prune_file(source, target, plan, CutOptions(verify="none", renumber_kv=True))
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the seed of Python's hashes and the places of objects in memory."""
    folder = tmp_path / "source"
    for name in SPECS:
        save_model(tiny(name), folder / f"{name}.onnx")
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        env = os.environ | {"PYTHONHASHSEED": seed, "JUNK": seed + "0000"}
        subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=tmp_path / seed, check=True)
    first, second = (contents(tmp_path / seed) for seed in ("1", "2"))
    graphs = [name for name in first if not name.endswith("USE.md")]
    assert len(graphs) == 2 * len(SPECS)
    assert first == second


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
