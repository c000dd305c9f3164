"""Sizes and costs of tiny graphs: by the surgery, on ONNX Runtime, on engines, by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts.latency import Shape
from exporter.choose.budgets.options import Option, PlanCandidate
from exporter.choose.budgets.target_speedup import Stopwatch
from exporter.choose.costs.measuring import CostSettings, Effort, graph_runner, measure_costs
from exporter.choose.costs.table import CostTable, RequestShape
from exporter.choose.costs.weighing import sizes, weigh
from exporter.cli import run
from exporter.errors import CostError
from graph_passes.finding.weights import is_weight
from graph_passes.fusing.logits_to_keep import LogitsToKeepPass
from graph_passes.locate import survey
from graph_passes.pipeline import graph_size, prune_graph
from graph_passes.replacements import ReplacementTensors
from graph_passes.types import Deletion, SublayerRef
from tests.graph_passes import fused_graphs
from tests.graph_passes.fused_graphs import FUSED, fused_model
from tests.raising import raises
from tests.tiny_graphs import HEAD_DIM, HEADS, HIDDEN, VOCABULARY, TinySpec, tiny_model

pytest.importorskip("onnxruntime")

SPECS = [
    TinySpec(),
    TinySpec("post_norm", cache=False),
    TinySpec("sandwich"),
    TinySpec("norm_after"),
    TinySpec("multiplier"),
    TinySpec("parallel_in_turn"),
    TinySpec("split_mlp"),
    TinySpec(fused=True),
    TinySpec(tied=True),
    TinySpec(router=True),
    TinySpec(mask_in_branch=True),
]


def random_numbers(ref: SublayerRef, kind: str) -> dict[SublayerRef, ReplacementTensors]:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(HIDDEN).astype(np.float32)
    weight = rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32)
    return {ref: ReplacementTensors(bias, weight if kind == "linear" else None)}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_sublayer_is_what_the_surgery_removes(spec: TinySpec) -> None:
    model = tiny_model(spec)
    result = weigh(model, {})
    assert len(result.sublayers) == 2 * spec.layers
    for (layer, kind), size in result.sublayers.items():
        pruned, report = prune_graph(model, [Deletion(layer, kind)])
        (entry,) = report.deleted
        assert size.parameters == entry.parameters_removed
        assert size.weight_bytes == report.before.bytes - report.after.bytes
        assert result.total_parameters({(layer, kind): "none"}) == graph_size(pruned).parameters
        assert result.total_bytes({(layer, kind): "none"}) == graph_size(pruned).bytes
    weights = [v.const_value for v in model.graph.initializers.values() if is_weight(v)]
    assert result.weight_bytes == sum(tensor.nbytes for tensor in weights if tensor is not None)
    if spec.form.startswith("parallel"):  # two branches share a norm
        return
    _, *gone = result.sublayers  # not all: one must stay
    left = graph_size(prune_graph(model, [Deletion(*name) for name in gone])[0])
    sizes = [result.sublayers[name] for name in gone]
    assert result.parameters - sum(size.parameters for size in sizes) == left.parameters
    assert result.weight_bytes - sum(size.weight_bytes for size in sizes) == left.bytes


@pytest.mark.parametrize("kind", ["bias", "linear"])
def test_a_replacement_takes_as_much_as_the_surgery_puts_in(kind: str) -> None:
    model = tiny_model()
    result = weigh(model, {})
    for name in result.sublayers:
        ref = SublayerRef(*name)
        deletion = Deletion(*name, kind)
        pruned, report = prune_graph(model, [deletion], replacements=random_numbers(ref, kind))
        (entry,) = report.deleted
        own = result[name]
        removed = own.linear_parameters if kind == "linear" else own.parameters
        assert entry.parameters_removed == removed
        assert result.replacement_parameters(kind) == entry.parameters_added
        assert result.total_parameters({name: kind}) == graph_size(pruned).parameters
        assert result.total_bytes({name: kind}) == graph_size(pruned).bytes


def test_a_norm_that_two_branches_share_goes_with_neither() -> None:
    model = tiny_model(TinySpec("parallel"))
    result = weigh(model, {})
    for name, size in result.sublayers.items():
        _, report = prune_graph(model, [Deletion(*name)])
        assert size.parameters == report.deleted[0].parameters_removed
    pruned, _ = prune_graph(model, [Deletion(0, "block")])
    alone = result.total_parameters({(0, "attention"): "none", (0, "mlp"): "none"})
    assert graph_size(pruned).parameters == alone - 2 * HIDDEN  # never more than was foretold


def test_a_cache_grows_by_the_token_and_by_the_sequence() -> None:
    result = weigh(tiny_model(), {})
    attention, mlp = result[0, "attention"], result[0, "mlp"]
    per_token = 2 * HEADS * HEAD_DIM * 4
    assert attention.kv_bytes(100, batch=3) == 300 * per_token
    assert mlp.kv_bytes(100, batch=3) == 0
    whole = result.total_bytes(context=100, batch=3)
    assert whole == result.weight_bytes + 3 * 300 * per_token  # three layers
    without = result.total_bytes({(0, "attention"): "none"}, context=100, batch=3)
    assert whole - without == attention.weight_bytes + 300 * per_token


def test_a_window_bounds_what_is_kept_and_a_buffer_fixes_it() -> None:
    model = tiny_model()
    names = [f"past_key_values.1.{part}" for part in ("key", "value")]
    result = weigh(model, dict.fromkeys(names, 16))
    per_token = 2 * HEADS * HEAD_DIM * 4
    assert result[1, "attention"].kv_bytes(10) == 10 * per_token
    assert result[1, "attention"].kv_bytes(100) == 16 * per_token
    assert result[0, "attention"].kv_bytes(100) == 100 * per_token
    for value in model.graph.inputs:
        if value.name in names:
            value.shape = ir.Shape(["batch", HEADS, 64, HEAD_DIM])
    result = weigh(model, {})
    fixed = result[1, "attention"]
    assert fixed.kv_bytes(1) == fixed.kv_bytes(64) == 64 * per_token
    assert [fixed.reach(n) for n in (1, 64)] == [1, 64]
    step = Shape("decode", 2, 1, 15)
    saved = result.work(step).pair_multiplications
    saved -= result.work(step, {(1, "attention"): "none"}).pair_multiplications
    # Queries by keys, and their weights by values; beside the matrices, a norm and a bias count.
    assert saved == pytest.approx(2 * 16 * 2 * HEADS * HEAD_DIM, rel=0.1)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose weights lie in a data file."""
    path = tmp_path_factory.mktemp("whole") / "model.onnx"
    model = tiny_model(TinySpec(layers=4))
    ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=128)
    path.with_name("config.json").write_text('{"max_position_embeddings": 64}')
    return path


@pytest.mark.parametrize(
    ("told", "longest"),
    [('{"max_seq_length": 32}', 32), ("{}", None), ('{"max_seq_length": true}', None)],
)
def test_a_graph_s_folder_says_where_its_users_cut_texts(
    tmp_path: Path, told: str, longest: int | None
) -> None:
    ir.save(tiny_model(TinySpec(layers=2)), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    (tmp_path / "sentence_bert_config.json").write_text(told)
    result = sizes(tmp_path / "model.onnx")
    assert (result.longest, result.longest_text) == (64, longest)
    assert result.total_bytes(context=64) > result.total_bytes(context=63)
    with raises(CostError, "context-too-long", 64, 65):
        result.total_bytes(context=65)


@pytest.mark.parametrize(
    ("config", "multiplied"),
    [
        ({"num_local_experts": 4, "num_experts_per_tok": 1}, 16 + 256 / 4),
        ({"text_config": {"num_experts": 4, "num_experts_per_tok": 2}}, 16 + 256 / 2),
        ({"num_local_experts": 4, "num_experts_per_tok": 9}, 272),
        ({"num_local_experts": 0, "num_experts_per_tok": "2"}, 272),
        ({}, 272),
    ],
)
def test_a_config_says_how_many_experts_a_token_takes(
    tmp_path: Path, config: dict[str, Any], multiplied: float
) -> None:
    model = tiny_model(TinySpec(layers=2))
    for site in survey(model).sites:
        for value in {value for node in site.dying for value in node.inputs if value}:
            if site.ref == (0, "mlp") and is_weight(value) and len(value.shape or ()) == 2:
                value.name = f"mlp.experts.{value.name}"
    ir.save(model, tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = sizes(tmp_path / "model.onnx")
    assert [result[n, "mlp"].used(1)[0] for n in (0, 1)] == [multiplied, 272]


def test_a_graph_is_measured_and_the_folder_is_left_clean(graph: Path, tmp_path: Path) -> None:
    before, kept, work = sorted(graph.parent.iterdir()), tmp_path / "costs.jsonl", tmp_path / "work"
    at = RequestShape(2, 4, 2)
    settings = CostSettings(at, 1, seconds=0.1, variants=QUICK, kept=kept)
    table = measure_costs(graph, settings, folder=work)
    assert sorted(graph.parent.iterdir()) == before
    assert list(work.iterdir()) == []
    assert len(table.names) == 8
    for how in ("none", "bias", "linear"):
        assert all(table.saved_ms(name, how) < table.baseline_ms for name in table.names)
    (variant, *_) = table.variants
    assert [(row.phase, row.batch, row.past_length) for row in variant.rows] == [
        ("prefill", 2, 0), ("decode", 2, 4), ("decode", 2, 5),
    ]  # fmt: skip
    assert measure_costs(graph, settings, folder=work) == table
    other = tmp_path / "other.onnx"
    ir.save(tiny_model(TinySpec(layers=4), seed=1), other)
    assert measure_costs(other, settings, folder=work).made_from != table.made_from


@pytest.mark.parametrize("spec", [TinySpec(tied=True), TinySpec(fused=True), TinySpec()], ids=str)
def test_what_a_run_multiplies_is_counted(spec: TinySpec) -> None:
    model = tiny_model(spec)
    result = weigh(model, {})
    work, cut = (result.work(Shape("prefill", 2, 8), c) for c in ({}, {(0, "mlp"): "none"}))
    own = result[0, "mlp"]
    assert work.multiplications - cut.multiplications == 16 * own.parameters
    assert work.weight_bytes - cut.weight_bytes == own.weight_bytes
    assert result.rest.parameters == HIDDEN * VOCABULARY  # what makes the answers
    # Each query by each key, and its weight by the value; a norm and a bias count beside matrices.
    pairs = 2 * 8 * 8 * 2 * HEADS * HEAD_DIM * 3
    assert work.pair_multiplications == pytest.approx(pairs, rel=0.1)
    step = result.work(Shape("decode", 2, 1, 15))
    assert step.cache_bytes == 2 * sum(size.kv_bytes(16) for size in result.sublayers.values())
    without = result.work(Shape("decode", 2, 1, 15), {(0, "attention"): "none"})
    assert step.cache_bytes - without.cache_bytes == result[0, "attention"].kv_bytes(16, 2)


def test_a_graph_without_a_cache_is_measured_on_its_input(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    ir.save(tiny_model(TinySpec("post_norm", cache=False)), path)
    table = measure_costs(path, CostSettings(RequestShape(1, 8, 0), 1, seconds=0.1))
    assert [run.split()[0] for run in table.runs] == ["encode"] * 3


@pytest.mark.parametrize("is_there", [True, False])
def test_an_engine_has_the_sublayers_of_the_graph_that_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """ONNX Runtime stands for the engine."""
    onnx, module = tmp_path / "model.onnx", "exporter.choose.costs.measuring"
    ir.save(tiny_model(), onnx)
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"engine")
    whole = graph_runner(onnx, tmp_path).whole
    monkeypatch.setattr(f"{module}.find_builds", lambda path: [path])
    monkeypatch.setattr(f"{module}.source_of", lambda _: onnx if is_there else None)
    monkeypatch.setattr(f"{module}.open_arm", lambda *_: whole)
    settings = CostSettings(RequestShape(2, 4, 3), seconds=0.1)
    if is_there:
        assert len(measure_costs(engine, settings).sublayers) == 6
        return
    with raises(CostError, "", engine):
        measure_costs(engine, settings)


def test_a_table_is_written_and_printed(
    graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "costs.json"
    call = ["costs", str(graph.parent), "-o", str(output), *CALL]
    assert run(call) == 0
    printed = capfd.readouterr()
    title, header, *rows, place = printed.out.splitlines()
    assert title.startswith("A request (batch=1,prompt=4,new=1) takes ")
    assert header.split() == ["sublayer", "layers", "alone", "bias", "linear"]
    assert [row.split()[:2] for row in rows] == [["attention", "0,1,2,3"], ["mlp", "0,1,2,3"]]
    assert place == str(output)
    table = CostTable.read(output)
    assert run([*call, "--json"]) == 0  # an earlier table is replaced
    assert CostTable.model_validate_json(capfd.readouterr().out) == CostTable.read(output) != table


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("{folder} --at batch=0", "batch and prompt must be at least 1"),
        ("{folder} --at past=7", "'past=7' is no request"),
        ("{folder} -o {folder}", "is a directory"),
        ("{folder} -o {folder}/model.onnx", "is an input"),
        ("{folder}/nothing", "does not exist"),
    ],
)
def test_a_wrong_call_is_told(
    graph: Path, capfd: pytest.CaptureFixture[str], call: str, told: str
) -> None:
    before = graph.read_bytes()
    model, *options = call.format(folder=graph.parent).split()
    assert run(["costs", model, *CALL, *options]) == 2
    assert told in capfd.readouterr().err
    assert graph.read_bytes() == before


QUICK = Effort(seconds=0.1, rounds=2, reload=False)
CALL = ("--at", "prompt=4,new=1", "--threads", "1", "--time-budget", "0.01s")


def test_a_finished_candidate_is_timed_and_leaves_no_file(tmp_path: Path) -> None:
    work, onnx = tmp_path / "work", tmp_path / "model.onnx"
    work.mkdir()
    ir.save(tiny_model(TinySpec(layers=4)), onnx)
    effort = Effort(rounds=6, reload=False)
    watch = Stopwatch(onnx, RequestShape(1, 4, 2), work, threads=1, candidates=effort)
    cut = PlanCandidate(tuple(Option((SublayerRef(n, "mlp"),)) for n in (1, 2)))
    speedup = watch.speedup(cut)
    assert 0 < speedup.ci95[0] <= speedup.ratio <= speedup.ci95[1]
    assert [path for path in work.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("answers_last", [False, True])
def test_the_rest_of_a_graph_with_fused_sums_is_what_makes_the_answers(answers_last: bool) -> None:
    model = fused_model(FUSED["genai"])
    if answers_last:
        LogitsToKeepPass()(model)
    result = weigh(model, {})
    assert result.rest.parameters == fused_graphs.HIDDEN * fused_graphs.VOCABULARY
    without = result.work(Shape("prefill", 2, 8), dict.fromkeys(result.sublayers, "none"))
    answered = 2 if answers_last else 2 * 8
    assert without.multiplications == answered * result.rest.parameters
