"""Plans as LLM-Drop, Puzzletron and our own checkpoints write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plan_dialects import with_drops
from exporter.artifacts.plans import is_foreign_plan, read_plan
from exporter.errors import ArtifactError, PlanError
from tests.raising import raises

Drops = list[tuple[str, int]]
ATTENTION = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 4}
FFN = {"no_op": False, "replace_with_linear": False, "ffn_mult": 2.625}
NO_OP = {"no_op": True, "n_heads_in_group": None, "ffn_mult": None}
LINEAR = {"no_op": False, "replace_with_linear": True}


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return path


def drops(tmp_path: Path, content: Any) -> Drops:
    plan = read_plan(written(tmp_path, content))
    assert all(deletion.replacement == "none" for deletion in plan.deletions)
    return [(deletion.kind, deletion.layer) for deletion in plan.deletions]


def deci(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"block_configs": [{"attention": a, "ffn": f} for a, f in pairs]}


def subblocks(*layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"block_configs": [{"subblock_configs": layer} for layer in layers]}


def kind(name: str, **entry: Any) -> dict[str, Any]:
    return {"kind": name, "name": name, **entry}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (
            {"drop_mlp_list": [], "drop_attn_list": [25, 26, 24, 22], "num_hidden_layers": 32},
            [("attention", 25), ("attention", 26), ("attention", 24), ("attention", 22)],
        ),
        (
            {"drop_attn_list": [False, True, False], "drop_mlp_list": [True, False, False],
             "num_hidden_layers": 3},
            [("attention", 1), ("mlp", 0)],
        ),
        ({"drop_attn_list": None, "drop_mlp_list": [2, 0]}, [("mlp", 2), ("mlp", 0)]),
        ({"text_config": {"drop_attn_list": [1], "num_hidden_layers": 2}}, [("attention", 1)]),
    ],
)  # fmt: skip
def test_llm_drop(tmp_path: Path, content: Any, wanted: Drops) -> None:
    assert drops(tmp_path, content) == wanted


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"drop_attn_list": [], "drop_mlp_list": []}, ("drops-nothing",)),
        ({"drop_attn_list": [1, True]}, ("", "$.drop_attn_list[1]", True)),
        ({"drop_attn_list": [-1]}, ("layer-missing", "$.drop_attn_list[0]", -1)),
        ({"drop_attn_list": "3"}, ("", "$.drop_attn_list:", 3)),
        ({"drop_mlp_list": [True], "num_hidden_layers": 2}, ("", "$.drop_mlp_list:", 1, 2)),
        (
            {"drop_mlp_list": [2], "num_hidden_layers": 2},
            ("layer-missing", "$.drop_mlp_list[0]", 2),
        ),
        ({"drop_mlp_list": [1, 1]}, ("dropped-twice", "mlp 1")),
    ],
)
def test_llm_drop_lists_that_make_no_plan(
    tmp_path: Path, content: Any, told: tuple[Any, ...]
) -> None:
    with raises(PlanError, *told):
        drops(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        deci((ATTENTION, FFN), (NO_OP, FFN), (ATTENTION, NO_OP)),
        subblocks(
            [kind("attention", num_kv_heads=2), kind("ffn", intermediate_size=64)],
            [kind("attention", no_op=True), kind("ffn", intermediate_size=64)],
            [kind("attention", num_kv_heads=2), kind("moe", no_op=True)],
        ),
        deci((ATTENTION, FFN), (NO_OP, FFN), (ATTENTION, NO_OP))["block_configs"],
    ],
    ids=["DeciLM", "Puzzletron", "a bare list"],
)
def test_block_configs(tmp_path: Path, content: Any) -> None:
    assert drops(tmp_path, content) == [("attention", 1), ("mlp", 2)]


def test_layers_of_another_type_may_be_another_width(tmp_path: Path) -> None:
    wide, narrow = kind("attention", num_kv_heads=4), kind("attention", num_kv_heads=1)
    gone, ffn = kind("attention", no_op=True), kind("ffn", intermediate_size=8)
    content = subblocks([wide, ffn], [narrow, ffn], [wide, ffn], [gone, ffn])
    types = ["full_attention", "sliding_attention"] * 2
    assert drops(tmp_path, content | {"layer_types": types}) == [("attention", 3)]
    with raises(PlanError, "", "$.block_configs[1].subblock_configs[0]", "num_kv_heads"):
        drops(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (deci((ATTENTION, FFN), (LINEAR, FFN)),
         ("", "$.block_configs[1].attention.replace_with_linear")),
        (deci((ATTENTION, FFN), (ATTENTION, FFN), (ATTENTION, FFN | {"ffn_mult": 1.0})),
         ("", "$.block_configs[2].ffn", "ffn_mult")),
        (deci((ATTENTION, FFN), (ATTENTION, FFN), (ATTENTION | {"window_length": 64}, NO_OP)),
         ("", "$.block_configs[2].attention", "window_length")),
        (deci((NO_OP, FFN)) | {"num_hidden_layers": 2}, ("", "$.block_configs:", 1, 2)),
        ({"block_configs": [{"block_type": "mamba"}]}, ("", "$.block_configs[0]:")),
        (subblocks([kind("mamba"), kind("ffn")]), ("", "mamba", "subblock_configs[0]")),
        ({"block_configs": [{"attention": NO_OP, "ffn": FFN, "parallel_blocks": [{}]}]},
         ("", "$.block_configs[0]")),
        ({"block_configs": [3]}, ("", "$.block_configs[0]:", 3)),
        (deci((ATTENTION | {"no_op": "yes"}, FFN)), ("", "$.block_configs[0].attention.no_op")),
    ],
)  # fmt: skip
def test_block_configs_with_more_than_drops(
    tmp_path: Path, content: Any, told: tuple[Any, ...]
) -> None:
    with raises(PlanError, *told):
        drops(tmp_path, content)


def test_what_is_written_is_read_again_and_the_models_own_stays(tmp_path: Path) -> None:
    deletions = [PlannedDeletion(layer=3, kind="block"), PlannedDeletion(layer=1, kind="attention")]
    own = {"num_hidden_layers": 4, "per_layer_config": {"2": {"head_dim": 8}}}
    config = with_drops(own, deletions)
    assert config == {**own, "drop_attn_list": [3, 1], "drop_mlp_list": [3]}
    assert set(drops(tmp_path, config)) == {("attention", 3), ("attention", 1), ("mlp", 3)}
    healed = [PlannedDeletion(layer=1, kind="attention", replacement="bias")]
    assert with_drops({"num_hidden_layers": 4}, healed) == {"num_hidden_layers": 4}


def test_what_the_base_said_is_not_said_of_the_checkpoint() -> None:
    base = {
        "num_hidden_layers": 4, "drop_attn_list": [3], "drop_mlp_list": [False] * 4,
        "auto_map": {"AutoConfig": "configuration_dropped_llama.LlamaConfig"},
        "block_configs": [{"attention": ATTENTION, "ffn": NO_OP}] * 4,
    }  # fmt: skip
    own: dict[str, Any] = {"num_hidden_layers": 4}
    healed = [PlannedDeletion(layer=2, kind="attention", replacement="bias")]
    assert with_drops(base, healed) == own
    assert with_drops({"text_config": {**own, "drop_attn_list": [1]}}, healed) == {
        "text_config": own
    }
    config = with_drops(base, [PlannedDeletion(layer=2, kind="attention")])
    assert config == {**own, "drop_attn_list": [2], "drop_mlp_list": []}


def test_dialects_in_one_file_must_agree(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "drop_attn_list": [1], **deci((ATTENTION, FFN), (NO_OP, FFN), (ATTENTION, FFN)),
    }  # fmt: skip
    assert drops(tmp_path, content) == [("attention", 1)]
    content["drop_attn_list"] = [2]
    with raises(PlanError, "dialects-disagree", "LLM-Drop", "Puzzletron"):
        drops(tmp_path, content)


def test_our_own_checkpoint(tmp_path: Path) -> None:
    section: dict[str, Any] = {"deletions": [{"layer": 2, "kind": "block", "replacement": "none"}]}
    assert drops(tmp_path, {"depthcut": section}) == [("block", 2)]
    assert drops(tmp_path, {"depthcut_origin": section}) == [("block", 2)]
    section["deletions"][0]["replacement"] = "linear"
    with raises(PlanError, "", "block 2", "linear"):
        drops(tmp_path, {"depthcut": section})
    section["deletions"] = [{"layer": 2, "kind": "brick"}]
    with raises(PlanError, "", "$.depthcut.deletions[0].kind"):
        drops(tmp_path, {"depthcut": section})


def test_files_in_no_dialect_are_plans_of_our_own(tmp_path: Path) -> None:
    foreign = written(tmp_path, {"drop_attn_list": [1]})
    assert is_foreign_plan(foreign)
    own = read_plan(foreign).write(tmp_path / "plan.json")
    assert not is_foreign_plan(own)
    assert read_plan(own).made_from.keys() == {"config"}
    with raises(ArtifactError, "wrong-kind"):
        drops(tmp_path, {"num_hidden_layers": 4})
    (tmp_path / "config.json").write_text("no JSON")
    with pytest.raises(ArtifactError):
        read_plan(tmp_path / "config.json")
