"""Rule 1: a deleted branch equals the same model with that branch multiplied by zero.

And what else a cut promises: an unharmed original, honest flags, the same bytes every time, and
nothing left that is dead or private. Every call of ``oracle_error`` holds the result to that.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph_passes import Deletion, SurgeryError, prune_graph, save_model
from graph_passes.cleanup import CleanupPass, Swept, sweep
from graph_passes.delete_sublayers import DeleteSublayersPass
from graph_passes.pipeline import graph_size
from graph_passes.testing import masked_model
from tests.graph_passes.fused_graphs import FUSED
from tests.graph_passes.graph_support import (
    GRAPHS,
    PLAN,
    SPECS,
    all_deletions,
    feeds,
    kinds,
    largest_difference,
    logits_apart,
    node_of,
    oracle_error,
    plan,
    proper_subsets,
    pruned_soundly,
    publish,
    run,
    sites_of,
    text,
    tiny,
    tolerance,
    usual,
    value_of,
)
from tests.raising import raises
from tests.tiny_graphs import HEAD_DIM, HEADS, TinySpec, _Builder, tiny_feed, tiny_model

SECRET = "/home/someone/secret.py"
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TEXTS = {p.name: t for p, t in runpy.run_path(str(GOLDEN / "regenerate.py"))["golden_texts"]()}


@pytest.mark.parametrize("name", GRAPHS)
def test_all_subsets_equal_the_masked_original(name: str) -> None:
    """To the bit, where no norm is taken apart; what is the caller's stays."""
    model = tiny(name, layers=2)
    model.metadata_props.update({"owner": "me", "notes": "not the exporter's"})
    model.doc_string, model.domain, model.model_version = "a model", "org.example", 7
    subsets = proper_subsets(all_deletions(model))
    assert len(subsets) == 14
    assert max(oracle_error(model, subset) for subset in subsets) <= tolerance(name)
    for subset in subsets:
        pruned, report = prune_graph(model, subset)
        assert kinds(pruned) == [ref for ref in usual(2) if Deletion(*ref) not in subset]  # type: ignore[arg-type]
        nodes = sum(entry.nodes_removed for entry in report.deleted)
        added = report.before.nodes - report.after.nodes - nodes
        assert abs(added) <= (2 if name in SPECS else 0)
    # ONNX Runtime fuses the Adds of the two graphs differently, so sums round differently.
    assert max(oracle_error(model, subset, optimise=True) for subset in subsets[::4]) <= 1e-5


@pytest.mark.parametrize("name", GRAPHS)
def test_everything_goes_where_it_is_allowed(name: str) -> None:
    model = tiny(name, layers=2)
    everything = all_deletions(model)
    assert oracle_error(model, everything, allow_all=True) <= tolerance(name)
    pruned, report = prune_graph(model, everything, allow_all=True)
    assert len(report.deleted) == len(everything)
    assert not [site for site in sites_of(pruned) if site.kind in ("attention", "mlp")]


def test_all_subsets_of_three_layers_are_bit_exact() -> None:
    model = tiny("pre_norm")
    subsets = proper_subsets(all_deletions(model))
    assert len(subsets) == 62
    assert max(oracle_error(model, subset) for subset in subsets) == 0.0


_forms = st.sampled_from(
    ["pre_norm", "post_norm", "sandwich", "multiplier", "parallel", "parallel_in_turn", "split_mlp"]
)
# ONNX Runtime's Attention takes no mask that broadcasts over the queries, as an encoder's does.
_specs = st.builds(
    TinySpec, form=_forms, layers=st.integers(1, 4), cache=st.booleans(), past_from=st.just(0),
    gather_past=st.booleans(), fused=st.booleans(), tied=st.booleans(), router=st.booleans(),
    mask_in_branch=st.booleans(), annotated=st.booleans(),
).filter(lambda spec: spec.cache or not spec.fused)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=_specs, data=st.data())
def test_any_model_any_subset(spec: TinySpec, data: st.DataObject) -> None:
    model = tiny_model(spec, seed=1)
    everything = all_deletions(model)
    assert len(everything) == 2 * spec.layers
    subset = data.draw(
        st.lists(st.sampled_from(everything), min_size=1, max_size=len(everything) - 1, unique=True)
    )
    assert oracle_error(model, subset) == 0.0


@pytest.mark.parametrize("name", GRAPHS)
def test_the_oracle_catches_the_wrong_layer(name: str) -> None:
    model = tiny(name, layers=2)
    for masked, cut in ((0, 1), (1, 0)):
        for kind in ("attention", "mlp"):
            oracle = masked_model(model, [Deletion(masked, kind)])
            assert logits_apart(oracle, prune_graph(model, [Deletion(cut, kind)])[0]) > 1e-3
            assert logits_apart(model, oracle) > 1e-3


def test_the_oracle_refuses_to_mask_what_is_not_there() -> None:
    with raises(SurgeryError, "sublayer-missing", "attention 7"):
        masked_model(tiny("pre_norm"), [Deletion(7, "attention")])


# Plans that can't be carried out

EVERYTHING = [Deletion(layer, "block") for layer in range(3)]
WRONG: list[tuple[list[Deletion], bool, str, tuple[str, ...]]] = [
    ([], False, "nothing-to-delete", ()),
    ([], True, "nothing-to-delete", ()),
    (
        [Deletion(3, "mlp"), Deletion(7, "attention")], False, "sublayer-missing",
        ("mlp 3", "attention 7", "attention 0-2; mlp 0-2"),
    ),
    ([Deletion(3, "block")], False, "sublayer-missing", ("block 3",)),
    ([*EVERYTHING, Deletion(3, "block")], True, "sublayer-missing", ("block 3",)),
    ([*PLAN, Deletion(0, "mixer")], False, "sublayer-missing", ("mixer 0",)),
    (EVERYTHING, False, "nothing-left", ("--allow-empty",)),
    (plan(("mlp", 1, "bias")), False, "numbers-missing", ("bias",)),
    (plan(("mlp", 1, "linear")), False, "numbers-missing", ("linear",)),
    ([*EVERYTHING[1:], Deletion(0, "mlp", "bias")], True, "numbers-missing", ("bias",)),
    (
        plan(("block", 1, "bias"), ("mlp", 1, "none")), False, "other-numbers",
        ("mlp 1", "bias", "none"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", ["pre_norm", "genai"])
@pytest.mark.parametrize(("deletions", "allow_all", "code", "fields"), WRONG)
def test_a_wrong_plan_is_refused_before_anything_changes(
    name: str, deletions: list[Deletion], allow_all: bool, code: str, fields: tuple[str, ...]
) -> None:
    model = tiny(name)
    before = text(model)
    with raises(SurgeryError, code, *fields):
        prune_graph(model, deletions, allow_all=allow_all)
    with raises(SurgeryError, code, *fields):
        DeleteSublayersPass(deletions, allow_all=allow_all)(model)
    assert text(model) == before


# One cut, whatever way it is asked for


@pytest.mark.parametrize("name", GRAPHS)
def test_the_flag_is_honest_and_a_second_run_changes_nothing(name: str) -> None:
    model = tiny(name)
    for made in (DeleteSublayersPass(PLAN), CleanupPass()):
        before = text(model)
        assert made(model).modified == (text(model) != before)
    before = text(model)
    assert not DeleteSublayersPass(PLAN)(model).modified
    assert not CleanupPass()(model).modified
    assert text(model) == before


@pytest.mark.parametrize("name", GRAPHS)
def test_the_same_call_gives_the_same_bytes_and_two_steps_the_same_graph(name: str) -> None:
    once, other = (prune_graph(tiny(name), cut)[0] for cut in (PLAN, [*PLAN[::-1], *PLAN]))
    first, second = (
        ir.to_proto(made).SerializeToString(deterministic=True) for made in (once, other)
    )
    assert first == second
    twice, _ = prune_graph(prune_graph(tiny(name), PLAN[:1])[0], PLAN[1:])
    assert once.metadata_props == twice.metadata_props
    assert json.loads(once.metadata_props["depthcut.plan"]) == [
        {"kind": deletion.kind, "layer": deletion.layer, "replacement": "none"} for deletion in PLAN
    ]
    assert kinds(once) == kinds(twice) == [ref for ref in usual() if Deletion(*ref) not in PLAN]
    for feed in feeds(once):
        assert largest_difference(run(once, feed), run(twice, feed)) == 0.0


def test_a_block_is_all_sublayers_of_its_layer() -> None:
    as_block, report = prune_graph(tiny("pre_norm"), [Deletion(1, "block")])
    parts = [Deletion(1, "attention"), Deletion(1, "mlp")]
    assert text(as_block) == text(prune_graph(tiny("pre_norm"), parts)[0])
    assert [(entry.layer, entry.kind) for entry in report.deleted] == [(1, "attention"), (1, "mlp")]


@pytest.mark.parametrize("indices", [[1], [0, 1]])
def test_sums_that_are_outputs_keep_their_names_and_stay_apart(indices: list[int]) -> None:
    model = tiny("pre_norm")
    for i in indices:
        total = node_of(model, sites_of(model)[i].residual_add).outputs[0]
        publish(model, total, f"hidden_states.{i}")
    assert oracle_error(model, [Deletion(0, "mlp")]) == 0.0
    pruned, _ = prune_graph(model, [Deletion(0, "mlp")])
    assert ("Identity" in {node.op_type for node in pruned.graph}) == (len(indices) == 2)


def test_mask_and_ids_stay_declared_when_no_attention_is_left() -> None:
    cut = [Deletion(layer, "attention") for layer in range(3)]
    pruned, _ = pruned_soundly(tiny("pre_norm"), cut)
    assert [v.name for v in pruned.graph.inputs] == ["input_ids", "attention_mask"]
    assert [v.name for v in pruned.graph.outputs] == ["logits"]


# Lengths and shapes that only the branch knows


class LengthFromBranch(_Builder):
    """Every norm takes its shape from what layer 0's attention has computed."""

    context: ir.Value | None = None

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        made = super()._attention(x, layer)
        if layer == 0:
            self.context = self._nodes[-2].outputs[0]
        return made

    def _norm(self, x: ir.Value) -> ir.Value:
        normed = super()._norm(x)
        if self.context is None:
            return normed
        return self._op("Reshape", normed, self._op("Shape", self.context))


def test_a_deleted_branch_that_is_still_needed_for_its_shape_is_an_error() -> None:
    spec = TinySpec(cache=False, mask_in_branch=True, annotated=False)
    model = LengthFromBranch(spec, 0).build()
    assert oracle_error(model, [Deletion(0, "attention")]) == 0.0
    model.graph.inputs[0].shape = ir.Shape(["batch", None])
    before = text(model)
    with raises(SurgeryError, "still-computed", "attention 0", "Shape"):
        prune_graph(model, [Deletion(0, "attention")])
    assert text(model) == before
    assert oracle_error(model, [Deletion(1, "attention")]) == 0.0


def test_a_past_length_that_no_survivor_has_is_an_error() -> None:
    model = tiny("pre_norm")
    for value in model.graph.inputs:
        if (value.name or "").startswith(("past_key_values.1", "past_key_values.2")):
            value.shape = ir.Shape(["batch", 2, "window", 4])
    with raises(SurgeryError, "cache-still-read", "past_key_values.0.key"):
        prune_graph(model, [Deletion(0, "attention")])
    assert oracle_error(model, [Deletion(1, "attention")]) == 0.0


def test_a_public_shape_is_not_taken_from_another_cache() -> None:
    model = tiny("gathered_past")
    key = next(v for v in model.graph.inputs if v.name == "past_key_values.1.key")
    shape = next(user for user, _ in key.uses() if user.op_type == "Shape").outputs[0]
    publish(model, shape, "key_shape", 4)
    shape.type = ir.TensorType(ir.DataType.INT64)
    for other in model.graph.inputs:
        if (other.name or "").startswith(("past_key_values.0", "past_key_values.2")):
            other.shape = ir.Shape(["batch", 9, "past", HEAD_DIM])
    pruned, _ = prune_graph(model, [Deletion(1, "attention")])
    joined = value_of(pruned, "key_shape").producer()
    assert joined is not None
    heads = ir.convenience.get_const_tensor(joined.inputs[1])  # type: ignore[arg-type]
    assert heads is not None
    assert heads.numpy().tolist() == [HEADS]


# Caches get dense numbers where that is asked for


@pytest.mark.parametrize("name", ["pre_norm", *(n for n, s in FUSED.items() if s.form == "genai")])
@pytest.mark.parametrize("later", [False, True])
def test_renumbering_makes_the_caches_dense_and_keeps_the_map(name: str, later: bool) -> None:
    cut = [Deletion(0, "attention")]
    model = tiny(name)
    kept, report = prune_graph(model, cut)
    assert report.deleted[0].inputs_removed == ("past_key_values.0.key", "past_key_values.0.value")
    assert report.kv_renumbering == {}
    assert "past_key_values.2.key" in [value.name for value in kept.graph.inputs]
    pruned, report = prune_graph(kept if later else model, cut, renumber_kv=True)
    assert len(report.deleted) == (not later)
    names = [value.name or "" for value in (*pruned.graph.inputs, *pruned.graph.outputs)]
    assert {"past_key_values.0.key", "present.1.value"} <= set(names)
    assert not any(".2." in name for name in names)
    assert report.kv_renumbering["past_key_values.1.key"] == "past_key_values.0.key"
    assert json.loads(pruned.metadata_props["depthcut.kv_renumbering"]) == report.kv_renumbering
    assert not DeleteSublayersPass(cut, renumber_kv=True)(pruned).modified


def test_a_second_renumbering_keeps_the_way_to_the_original() -> None:
    first, _ = prune_graph(tiny("pre_norm"), [Deletion(0, "attention")], renumber_kv=True)
    second, report = prune_graph(first, [Deletion(1, "attention")], renumber_kv=True)
    assert report.kv_renumbering["present.1.key"] == "present.0.key"
    assert json.loads(second.metadata_props["depthcut.kv_renumbering"]) == {
        f"{stem}.2.{part}": f"{stem}.0.{part}"
        for stem in ("past_key_values", "present")
        for part in ("key", "value")
    }


def test_names_without_a_number_are_not_renumbered() -> None:
    model = tiny("pre_norm")
    model.graph.inputs[-1].name = "the_last_cache"
    with raises(SurgeryError, "cache-still-read", "the_last_cache"):
        prune_graph(model, [Deletion(0, "attention")], renumber_kv=True)


# Nothing dead, nothing private


@pytest.mark.parametrize("version", [4, 10, 13])
def test_the_ir_version_stays_and_the_runtime_takes_it(version: int) -> None:
    model = tiny("pre_norm")
    model.ir_version = version
    proto = ir.to_proto(pruned_soundly(model, PLAN)[0])
    ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def messages(message: Any) -> Iterator[Any]:
    """A message and all in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else list(value):
                yield from messages(part)


def with_notes(proto: Any) -> set[str]:
    return {type(message).__name__ for message in messages(proto) if SECRET in str(message)}


def unused_function() -> onnx.FunctionProto:
    return onnx.parser.parse_function(
        '<domain: "pkg", opset_import: ["": 20]> Unused (x) => (y) { y = Relu(x) }'
    )


def annotated() -> onnx.ModelProto:
    """A model with a note on every message that can have one, but the model itself."""
    model = tiny("router")
    for number, node in enumerate(list(model.graph)):
        if number % 10 == 0:
            tensor = ir.tensor([1.0], name=f"extra{number}")
            node.attributes["extra"] = ir.AttrTensors("extra", [tensor, tensor])
    proto = ir.to_proto(model)
    proto.functions.append(unused_function())
    for message in messages(proto):
        if "doc_string" in message.DESCRIPTOR.fields_by_name and message is not proto:
            message.doc_string = SECRET
        if "metadata_props" in message.DESCRIPTOR.fields_by_name and message is not proto:
            message.metadata_props.add(key="trace", value=SECRET)
    return proto


def test_no_note_is_left_on_any_message_and_the_callers_keeps_its_own() -> None:
    model = ir.from_proto(annotated())
    noted = with_notes(annotated())
    assert noted >= {"NodeProto", "AttributeProto", "TensorProto", "ValueInfoProto", "GraphProto"}
    for keep in (False, True):
        pruned, _ = prune_graph(model, PLAN, keep_debug=keep)
        left = with_notes(ir.to_proto(pruned))
        assert left >= noted - {"FunctionProto"} if keep else left == set()
    assert with_notes(ir.to_proto(model)) == noted
    # Weights that are in memory are shared, and so are copied without their notes.
    made = tiny("pre_norm")
    tensors = [value.const_value for value in made.graph.initializers.values()]
    for tensor in tensors:
        tensor.metadata_props["from"] = tensor.doc_string = SECRET  # type: ignore[union-attr]
    assert with_notes(ir.to_proto(prune_graph(made, PLAN)[0])) == set()
    assert all(t and t.metadata_props and t.doc_string == SECRET for t in tensors)
    assert [value.const_value for value in made.graph.initializers.values()] == tensors


def test_what_is_dead_goes_with_functions_that_nothing_calls() -> None:
    proto = ir.to_proto(tiny("pre_norm"))
    proto.functions.append(unused_function())
    model = ir.from_proto(proto)
    pruned, _ = prune_graph(model, PLAN, keep_debug=True)
    assert len(model.functions) == 1
    assert not pruned.functions
    dead = tiny("pre_norm")
    dead.graph.append(ir.node("Neg", [dead.graph[0].outputs[0]]))
    for made in (model, dead):
        assert CleanupPass()(made).modified
        assert not CleanupPass()(made).modified


SCRIPT = """
from pathlib import Path
from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
plan = [PlannedDeletion(layer=1, kind="attention"), PlannedDeletion(layer=2, kind="mlp")]
for source in sorted(Path("../source").glob("*.onnx")):
    target = Path(source.stem, "cut.onnx")
    prune_file(source, target, plan, CutOptions(verify="none", renumber_kv=True))
"""


def test_two_processes_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the seed of Python's hashes and the places of objects in memory."""
    names = [*SPECS][::3]
    for name in names:
        save_model(tiny(name), tmp_path / "source" / f"{name}.onnx")
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    written = []
    for name in ("here", "elsewhere"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "here":
            monkeypatch.setattr(sys, "argv", ["-c"])
            monkeypatch.chdir(folder)
            exec(SCRIPT, {})
        else:
            env = os.environ | {"PYTHONHASHSEED": seed}
            subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=folder, check=True)
        files = [path for path in folder.rglob("*") if path.is_file()]
        written.append({str(p.relative_to(folder)): p.read_bytes() for p in files})
    assert len([name for name in written[0] if not name.endswith("USE.md")]) == 2 * len(names)
    assert written[0] == written[1]


# What is counted


def test_weights_in_constant_nodes_are_counted() -> None:
    model = tiny("pre_norm")
    before = graph_size(model)
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) > 1:
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
            model.graph.insert_before(model.graph[0], constant)
            value.replace_all_uses_with(constant.outputs[0])
            del model.graph.initializers[value.name or ""]
    as_constants = graph_size(model)
    assert (as_constants.parameters, as_constants.bytes) == (before.parameters, before.bytes)
    _, report = prune_graph(model, PLAN)
    _, expected = prune_graph(tiny("pre_norm"), PLAN)
    assert report.after.parameters == expected.after.parameters
    assert [entry.parameters_removed for entry in report.deleted] == [
        entry.parameters_removed for entry in expected.deleted
    ]


def packed(name: str, rows: int, blocks: int) -> str:
    """Initializers of a packed matrix of 4 bits, in blocks of 32."""
    blanks = ", ".join(["0"] * (rows * blocks * 16))
    ones = ", ".join(["1"] * (rows * blocks))
    return (
        f"uint8[{rows}, {blocks}, 16] {name} = {{{blanks}}}, "
        f"float[{rows}, {blocks}] {name}_scales = {{{ones}}}"
    )


@pytest.mark.parametrize(
    ("name", "counted"), [("p/block_sums", 32 * 3), ("p/other", 32 * (32 + 6))]
)
def test_rows_for_the_sums_of_blocks_are_no_parameters(name: str, counted: int) -> None:
    """A product of 32 weights a row, which has further rows for the blocks' sums."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
        small (float[1, 32] x) => (float[1, 3] y)
        <{packed("ones", 32, 1)}, {packed("weight", 3, 2)}> {{
          [sums] sums = com.microsoft.MatMulNBits<K = 32, N = 32, bits = 4, block_size = 32>(
            x, ones, ones_scales)
          [joined] both = Concat<axis = -1>(x, sums)
          [p] y = com.microsoft.MatMulNBits<K = 64, N = 3, bits = 4, block_size = 32>(
            both, weight, weight_scales)
        }}""")
    model.graph.node("sums").name = name
    assert graph_size(model).parameters == counted
    model.graph.outputs.clear()
    assert sweep(model.graph, list(model.graph)) == Swept(nodes=3, parameters=counted)


# What is printed elsewhere


@pytest.mark.parametrize("name", TEXTS)
def test_the_graph_is_the_golden_one(name: str) -> None:
    """A few pruned graphs as text, so that a change of the output shows in a diff."""
    assert TEXTS[name] == (GOLDEN / name).read_text(encoding="utf-8")
    assert {path.name for path in GOLDEN.glob("*.txt")} == set(TEXTS)


def test_the_examples_of_the_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "graph_passes" / "README.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 7
    model = tiny_model(TinySpec(layers=3))
    save_model(model, Path("model.onnx"))
    scope: dict[str, Any] = {"feed": tiny_feed(model, seq=4, past=3)}
    for number, example in enumerate(examples):
        exec(compile(example, f"example {number}", "exec"), scope)
    printed = capsys.readouterr().out
    assert "1 attention" in printed
    assert "linear 72" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "pruned.onnx"]
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", page)
    assert len(links) == 3
    assert all((ROOT / "graph_passes" / link).is_file() for link in links)
