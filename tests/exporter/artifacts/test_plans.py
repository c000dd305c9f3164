"""What plans drop and what is refused; the two stacks of an encoder-decoder; plans of others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import exporter.cli as command_line
from exporter.artifacts import (
    CalibrationRef,
    ImportanceReport,
    PlannedDeletion,
    PruningPlan,
    ReplacementsRef,
)
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plan_dialects import with_drops
from exporter.artifacts.plans import (
    MODEL_KEY,
    hold_against_model,
    is_foreign_plan,
    note_texts,
    noted_texts,
    parse_drops,
    plan_cut,
    read_plan,
    validate_plan,
)
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.options import protected_names
from exporter.cut.surgery import prune_file
from exporter.errors import ArtifactError, PlanError, UnknownArchitectureError, UsageError
from graph_passes.files.storage import load_model, save_model
from graph_passes.types import SublayerRef
from tests.made_reports import full_importance, importance_of
from tests.raising import raises
from tests.reading import Heard
from tests.tiny_graphs import TinySpec, tiny_model

ATTENTION = [0.9, 0.2, 0.1, 0.2, 0.5]
MLP = [0.8, 0.15, 0.3, 0.4, 0.6]
BLOCK = [0.95, 0.3, 0.35, 0.25, 0.7]

Drops = list[tuple[str, int]]


def scored(attention: list[float] = ATTENTION) -> ImportanceReport:
    return importance_of({"attention": attention, "mlp": MLP, "block": BLOCK})


def drops_of(plan: PruningPlan) -> Drops:
    return [(deletion.kind, deletion.layer) for deletion in plan.deletions]


def drop(kind: Any, layer: int, replacement: Any = "none") -> PlannedDeletion:
    return PlannedDeletion(layer=layer, kind=kind, replacement=replacement)


def test_the_lowest_scores_are_chosen_on_their_text() -> None:
    report = scored()
    assert plan_cut(report, attention=1).roles == {"chosen": [report.calibration]}
    none = report.calibration.model_copy(update={"samples": 0})
    without_text = report.model_copy(update={"calibration": none})
    assert plan_cut(without_text, attention=1).roles == {}


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"attention": 3}, [("attention", 2), ("attention", 1), ("attention", 3)]),
        ({"mlp": 2}, [("mlp", 1), ("mlp", 2)]),
        ({"block": 2}, [("block", 3), ("block", 1)]),
        ({"joint": 3}, [("attention", 2), ("mlp", 1), ("attention", 1)]),
        ({"attention": 1, "mlp": 1}, [("attention", 2), ("mlp", 1)]),
        ({"attention": 1, "block": 1}, [("attention", 2), ("block", 3)]),
    ],
)
def test_the_lowest_scores_go_first(asked: dict[str, int], chosen: Drops) -> None:
    report = scored()
    plan = plan_cut(report, **asked, importance_sha256="ab")
    assert drops_of(plan) == chosen
    assert (plan.budget, plan.importance_sha256) == (asked, "ab")
    assert plan.made_from == {"model": report.model.sha256, "importance": "ab"}
    assert plan_cut(report, **asked).made_from == {"model": report.model.sha256}


@given(st.lists(st.floats(0, 2), min_size=5, max_size=5), st.integers(1, 5))
def test_nothing_kept_scores_lower_than_anything_dropped(scores: list[float], number: int) -> None:
    dropped = {layer for _, layer in drops_of(plan_cut(scored(scores), attention=number))}
    assert len(dropped) == number
    kept = set(range(5)) - dropped
    assert all(scores[a] <= scores[b] for a in dropped for b in kept)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, ("nothing-asked",)),
        ({"attention": -1}, ("nothing-asked", -1)),
        ({"attention": 6}, ("too-many", 6, 5)),
        ({"block": 6}, ("too-many", 6, 5)),
        ({"joint": 11}, ("too-many", 11, 10)),
        *(({kind: 1, "joint": 1}, ("dropped-twice", "joint")) for kind in ("attention", "mlp")),
        ({"attention": 3, "block": 1}, ("dropped-twice", "attention 3")),
    ],
)
def test_impossible_budgets(asked: dict[str, int], told: tuple[Any, ...]) -> None:
    with raises(PlanError, *told):
        plan_cut(scored(), **asked)


@pytest.mark.parametrize("asked", [{"joint": 10}, {"block": 5}, {"attention": 5, "mlp": 5}])
def test_everything_may_go_where_it_is_allowed(asked: dict[str, int]) -> None:
    plan = plan_cut(scored(), **asked, allow_all=True)
    assert len(plan.deletions) == sum(asked.values())
    with raises(PlanError, "nothing-left", "--allow-empty"):
        plan_cut(scored(), **asked)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with raises(PlanError, "not-finite", "attention 1"):
        plan_cut(scored([0.1, float("nan"), 0.3, 0.4, 0.5]), attention=1)


def test_drops_by_hand_keep_their_order() -> None:
    plan = parse_drops(["attention:25,7", "mlp:3", "block:10-12"])
    assert drops_of(plan) == [
        ("attention", 25), ("attention", 7), ("mlp", 3), ("block", 10), ("block", 11),
        ("block", 12),
    ]  # fmt: skip
    assert plan.importance_sha256 is None


@pytest.mark.parametrize(
    ("texts", "kind", "told"),
    [
        ([], PlanError, ("drops-nothing",)),
        (["mlp:3,3"], PlanError, ("dropped-twice", "mlp 3")),
        (["mlp:3", "block:2-4"], PlanError, ("dropped-twice", "mlp 3")),
        (["attention:5-3"], UsageError, ("malformed-drop", "attention:5-3")),
        (["attention:0-99999999999"], UsageError, ("malformed-drop", "attention:0-99999999999")),
        (["mlp:3", "attention:x"], UsageError, ("malformed-drop", "attention:x")),
        (["attn:3"], UsageError, ("malformed-drop", "attn:3")),
        *(([text], UsageError, ("malformed-drop", text))
          for text in ("attention", "attention:", "attention:1,", "attention:-1")),
    ],
)  # fmt: skip
def test_drops_that_make_no_sense(
    texts: list[str], kind: type[PlanError | UsageError], told: tuple[Any, ...]
) -> None:
    with raises(kind, *told) as caught:
        parse_drops(texts)
    assert caught.value.hint or kind is PlanError


@pytest.mark.parametrize(
    ("texts", "code", "told"),
    [
        (["attention:5"], "layer-missing", ("attention 5", 0, 4)),
        (["cross_attention:1"], "sublayer-missing", ("cross_attention",)),
        (["block:0-4"], "nothing-left", ()),
    ],
)
def test_plans_that_do_not_fit_the_model(
    texts: list[str], code: str, told: tuple[Any, ...]
) -> None:
    with raises(PlanError, code, "tiny/model", *told) as caught:
        validate_plan(parse_drops(texts), 5, model="tiny/model")
    assert caught.value.hint
    with raises(PlanError, code, "plan.json"):
        validate_plan(parse_drops(texts), 5, path=Path("plan.json"))
    if code == "nothing-left":
        validate_plan(parse_drops(texts), 5, allow_all=True)
        return
    with raises(PlanError, code, "tiny/model", *told):
        validate_plan(parse_drops(texts), 5, model="tiny/model", allow_all=True)


# Two stacks, whose layers are numbered through.

STACKS = Stacks(2, 3)


def plan_of(*drops: tuple[Any, int], encoder_layers: int | None = 2) -> PruningPlan:
    return PruningPlan(deletions=[drop(*item) for item in drops], encoder_layers=encoder_layers)


def test_both_ways_of_writing_depths_are_read() -> None:
    assert Stacks.of(SimpleNamespace(encoder_layers=2, decoder_layers=3)) == STACKS
    assert Stacks.of(SimpleNamespace(num_layers=2, num_decoder_layers=3)) == STACKS
    with raises(UnknownArchitectureError, "no-stacks"):
        Stacks.of(SimpleNamespace(num_hidden_layers=5))


def test_each_graph_gets_its_own_numbers() -> None:
    plan = plan_of(("mlp", 1), ("attention", 2), ("block", 4)).deletions
    assert STACKS.within(plan, "encoder") == [drop("mlp", 1)]
    assert STACKS.within(plan, "decoder") == [drop("attention", 0), drop("block", 2)]


@pytest.mark.parametrize(
    ("plan", "encoder_layers", "code"),
    [
        (plan_of(("mlp", 0), encoder_layers=None), 2, "other-stacks"),
        (plan_of(("mlp", 0)), None, "other-stacks"),
        (plan_of(("mlp", 0), encoder_layers=3), 2, "other-stacks"),
        (plan_of(("mlp", 5)), 2, "layer-missing"),
        (plan_of(("cross_attention", 0)), 2, "sublayer-missing"),
        (plan_of(("block", 2), ("cross_attention", 2)), 2, "dropped-twice"),
        (plan_of(*(("block", layer) for layer in range(5))), 2, "nothing-left"),
    ],
)
def test_a_plan_for_other_stacks_is_refused(
    plan: PruningPlan, encoder_layers: int | None, code: str, tmp_path: Path
) -> None:
    with raises(PlanError, code):
        validate_plan(plan, 5, encoder_layers=encoder_layers)
    if code == "other-stacks" and encoder_layers is None:  # and no graph is cut by its numbers
        with raises(PlanError, code):
            prune_file(tmp_path / "a.onnx", tmp_path / "b.onnx", LoadedPlan(plan))


def test_a_joint_number_takes_cross_attentions_too() -> None:
    report = importance_of({kind: [0.0] * 5 for kind in ("attention", "mlp", "block")})
    scores = [
        report.scores[0].model_copy(update={"layer": n, "kind": kind, "score": 10.0 * n + place})
        for n in range(5)
        for place, kind in enumerate(STACKS.units(n))
    ]
    model = report.model.model_copy(update={"encoder_layers": 2})
    report = report.model_copy(update={"model": model, "scores": scores})
    plan = plan_cut(report, joint=7)
    assert plan.encoder_layers == 2
    assert drops_of(plan)[4:] == [("attention", 2), ("cross_attention", 2), ("mlp", 2)]
    assert [layer for _, layer in drops_of(plan_cut(report, cross_attention=2))] == [2, 3]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("encoder", {0, 1}), ("decoder", {2, 3, 4}), ("first", {0, 2}), ("last", {1, 4})],
)
def test_what_stays_is_named_by_its_stack(text: str, layers: set[int]) -> None:
    assert {ref.layer for ref in protected_names([text], STACKS)} == layers
    one = protected_names(["cross_attention:3"], STACKS)
    assert one == {SublayerRef(3, "cross_attention")}


@pytest.mark.parametrize(
    ("text", "code"),
    [("middle", "no-sublayers"), ("cross_attention:1", "sublayer-missing"),
     ("mlp:9", "layer-missing")],
)  # fmt: skip
def test_what_can_not_stay_is_refused(text: str, code: str) -> None:
    with raises(UsageError, code, text):
        protected_names([text], STACKS)


# Plans as LLM-Drop, Puzzletron and our own checkpoints write them.

HEADS = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 4}
FFN = {"no_op": False, "replace_with_linear": False, "ffn_mult": 2.625}
NO_OP = {"no_op": True, "n_heads_in_group": None, "ffn_mult": None}
LINEAR = {"no_op": False, "replace_with_linear": True}


def written(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def drops(folder: Path, content: Any) -> Drops:
    plan = read_plan(written(folder, content))
    assert all(deletion.replacement == "none" for deletion in plan.deletions)
    return drops_of(plan)


def deci(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"block_configs": [{"attention": a, "ffn": f} for a, f in pairs]}


THREE = deci((HEADS, FFN), (NO_OP, FFN), (HEADS, NO_OP))
OF_THREE = [("attention", 1), ("mlp", 2)]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"drop_mlp_list": [], "drop_attn_list": [25, 26, 24, 22], "num_hidden_layers": 32},
         [("attention", 25), ("attention", 26), ("attention", 24), ("attention", 22)]),
        ({"drop_attn_list": [False, True, False], "drop_mlp_list": [True, False, False],
          "num_hidden_layers": 3}, [("attention", 1), ("mlp", 0)]),
        ({"drop_attn_list": None, "drop_mlp_list": [2, 0]}, [("mlp", 2), ("mlp", 0)]),
        ({"text_config": {"drop_attn_list": [1], "num_hidden_layers": 2}}, [("attention", 1)]),
        (THREE, OF_THREE),
        (THREE["block_configs"], OF_THREE),
    ],
)  # fmt: skip
def test_plans_of_llm_drop_decilm_and_puzzletron(
    tmp_path: Path, content: Any, wanted: Drops
) -> None:
    assert drops(tmp_path, content) == wanted


def test_layers_of_another_type_may_be_another_width(tmp_path: Path) -> None:
    wide, narrow = {"num_kv_heads": 4}, {"num_kv_heads": 1}
    content = deci((wide, FFN), (narrow, FFN), (wide, FFN), (NO_OP, FFN))
    types = ["full_attention", "sliding_attention"] * 2
    assert drops(tmp_path, content | {"layer_types": types}) == [("attention", 3)]
    with raises(PlanError, "", "$.block_configs[1].attention", "num_kv_heads"):
        drops(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"drop_attn_list": [], "drop_mlp_list": []}, ("drops-nothing",)),
        ({"drop_attn_list": [1, True]}, ("", "$.drop_attn_list[1]", True)),
        ({"drop_attn_list": [-1]}, ("", "$.drop_attn_list[0]", -1)),
        ({"drop_attn_list": "3"}, ("", "$.drop_attn_list:", 3)),
        ({"drop_mlp_list": [1, 1]}, ("dropped-twice", "mlp 1")),
        (deci((LINEAR, FFN)), ("", "$.block_configs[0].attention.replace_with_linear")),
        (deci((HEADS, FFN), (HEADS, FFN), (HEADS, FFN | {"ffn_mult": 1.0})),
         ("", "$.block_configs[2].ffn", "ffn_mult")),
        (deci((HEADS, FFN), (HEADS, FFN), (HEADS | {"window_length": 64}, NO_OP)),
         ("", "$.block_configs[2].attention", "window_length")),
        ({"block_configs": [{"block_type": "mamba"}]}, ("", "$.block_configs[0].attention:")),
        (deci((HEADS | {"mamba": {"state": 8}}, FFN)), ("", "$.block_configs[0].attention.mamba")),
        ({"block_configs": [{"attention": NO_OP, "ffn": FFN, "parallel_blocks": [{}]}]},
         ("", "$.block_configs[0]")),
        ({"block_configs": [3]}, ("", "$.block_configs[0]:", 3)),
        (deci((HEADS | {"no_op": "yes"}, FFN)), ("", "$.block_configs[0].attention.no_op")),
        ({"depthcut": {"deletions": [{"layer": 2, "kind": "block", "replacement": "linear"}]}},
         ("", "$.depthcut.deletions[0].replacement", "linear")),
        ({"depthcut": {"deletions": [{"layer": 2, "kind": "brick"}]}},
         ("", "$.depthcut.deletions[0].kind")),
    ],
)  # fmt: skip
def test_plans_of_others_that_make_none(
    tmp_path: Path, content: Any, told: tuple[Any, ...]
) -> None:
    with raises(PlanError, *told):
        drops(tmp_path, content)


def test_what_is_written_is_read_again_and_the_models_own_stays(tmp_path: Path) -> None:
    own = {"num_hidden_layers": 4, "per_layer_config": {"2": {"head_dim": 8}}}
    config = with_drops(own, [drop("block", 3), drop("attention", 1)])
    assert config == {**own, "drop_attn_list": [3, 1], "drop_mlp_list": [3]}
    assert set(drops(tmp_path, config)) == {("attention", 3), ("attention", 1), ("mlp", 3)}
    healed = [drop("attention", 1, "bias")]
    assert with_drops({"num_hidden_layers": 4}, healed) == {"num_hidden_layers": 4}


def test_what_the_base_said_is_not_said_of_the_checkpoint() -> None:
    base = {
        "num_hidden_layers": 4, "drop_attn_list": [3], "drop_mlp_list": [False] * 4,
        "auto_map": {"AutoConfig": "configuration_dropped_llama.LlamaConfig"},
        "block_configs": [{"attention": HEADS, "ffn": NO_OP}] * 4,
    }  # fmt: skip
    own: dict[str, Any] = {"num_hidden_layers": 4}
    healed = [drop("attention", 2, "bias")]
    assert with_drops(base, healed) == own
    nested = {"text_config": {**own, "drop_attn_list": [1]}}
    assert with_drops(nested, healed) == {"text_config": own}
    config = with_drops(base, [drop("attention", 2)])
    assert config == {**own, "drop_attn_list": [2], "drop_mlp_list": []}


@pytest.mark.parametrize(
    ("other", "dialects"),
    [
        (deci((HEADS, FFN), (NO_OP, FFN), (HEADS, FFN)), ["LLM-Drop", "Puzzletron"]),
        ({"text_config": {"drop_attn_list": [1], "drop_mlp_list": []}}, ["LLM-Drop"]),
    ],
)
def test_dialects_and_parts_of_one_file_must_agree(
    tmp_path: Path, other: dict[str, Any], dialects: list[str]
) -> None:
    assert drops(tmp_path, {"drop_attn_list": [1], **other}) == [("attention", 1)]
    with raises(PlanError, "", *dialects):
        drops(tmp_path, {"drop_attn_list": [2], **other})


def test_a_part_that_drops_nothing_takes_nothing_back(tmp_path: Path) -> None:
    nothing = {"text_config": {"drop_attn_list": [], "drop_mlp_list": []}}
    assert drops(tmp_path, {"drop_attn_list": [3], **nothing}) == [("attention", 3)]


@pytest.mark.parametrize("name", ["depthcut", "depthcut_origin"])
def test_our_own_checkpoint(tmp_path: Path, name: str) -> None:
    section = {"deletions": [{"layer": 2, "kind": "block", "replacement": "none"}]}
    assert drops(tmp_path, {name: section}) == [("block", 2)]


def test_files_in_no_dialect_are_plans_of_our_own(tmp_path: Path) -> None:
    foreign = written(tmp_path, {"drop_attn_list": [1]})
    assert is_foreign_plan(foreign)
    own = read_plan(foreign).write(tmp_path / "plan.json")
    assert not is_foreign_plan(own)
    assert read_plan(own).made_from.keys() == {"config"}
    with raises(ArtifactError, "wrong-kind"):
        drops(tmp_path, {"num_hidden_layers": 4})
    foreign.write_text("no JSON")
    with pytest.raises(ArtifactError):
        read_plan(foreign)
    with raises(ArtifactError, "file-missing", tmp_path / "none.json"):
        read_plan(tmp_path / "none.json")
    PruningPlan(deletions=[]).write(own)
    with raises(PlanError, "drops-nothing", own):
        read_plan(own)


# Plans name their model, and are held against the one that they are to cut.

OURS, OTHER = "a" * 64, "b" * 64
FITTED = ReplacementsRef(path="plan.safetensors", sha256="c" * 64)


def made_for(model: str | None, **changes: Any) -> PruningPlan:
    made_from = {} if model is None else {"model": model}
    return PruningPlan(deletions=[drop("mlp", 1)], made_from=made_from, **changes)


def said(plan: PruningPlan, sha256: str | None, **options: Any) -> list[str]:
    heard = Heard()
    hold_against_model(plan, sha256, model="tiny", progress=heard, **options)
    return heard.lines


@pytest.mark.parametrize(("meant", "sha256"), [(OURS, OURS), (None, OURS), (OURS, None)])
def test_the_same_model_or_one_that_is_not_told(meant: str | None, sha256: str | None) -> None:
    assert said(made_for(meant), sha256) == []
    assert said(made_for(meant, replacements=FITTED), sha256) == []


def test_a_plan_of_another_model_is_warned_of_and_refused_where_it_was_fitted() -> None:
    (line,) = said(made_for(OTHER), OURS, path=Path("plan.json"))
    assert all(named in line for named in ("plan.json", OTHER[:12], "tiny", OURS[:12]))
    with raises(PlanError, "another-model", OTHER[:12], OURS[:12]):
        said(made_for(OTHER, replacements=FITTED), OURS)
    (line,) = said(made_for(OTHER, replacements=FITTED), OURS, refits=True)
    assert "warning" in line


@pytest.mark.parametrize(("meant", "warned"), [(OURS, False), (OTHER, True)])
def test_prune_holds_a_plan_against_the_graphs_own_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meant: str, warned: bool
) -> None:
    model = tiny_model(TinySpec())
    model.metadata_props[MODEL_KEY] = OURS
    save_model(model, tmp_path / "model.onnx")
    plan, output = made_for(meant).write(tmp_path / "plan.json"), tmp_path / "out" / "model.onnx"
    call = ["prune", str(tmp_path / "model.onnx"), "-o", str(output), "--plan", str(plan)]
    assert command_line.run([*call, "--verify", "none"]) == 0
    assert (OTHER[:12] in "".join(capsys.readouterr())) is warned
    assert load_model(output).metadata_props[MODEL_KEY] == OURS


def test_a_graph_notes_the_texts_of_all_plans_that_cut_it() -> None:
    def text(digit: str) -> CalibrationRef:
        ref = full_importance().calibration
        return ref.model_copy(update={"source": f"/home/me/{digit}", "sha256": digit * 64})

    metadata: dict[str, str] = {}
    note_texts(metadata, made_for(None, judged_on=[text("1")]).decided)
    assert metadata == {}
    note_texts(metadata, made_for(None, chosen_on=[text("2"), text("1")]).decided)
    note_texts(metadata, made_for(None, chosen_on=[text("2")], fitted_on=[text("3")]).decided)
    assert noted_texts(metadata) == {"chosen": ["1" * 64, "2" * 64], "fitted": ["3" * 64]}
    assert "home" not in str(metadata)
    assert noted_texts(dict.fromkeys(metadata, "[[")) == {}
