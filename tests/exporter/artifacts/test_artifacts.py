"""The files that pass between the stages, the words they are read by, and who holds which cuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from exporter.artifacts import (
    SCHEMA_VERSION,
    Accuracy,
    Artifact,
    Corner,
    HealedBranch,
    HistoryEntry,
    ImportanceReport,
    LatencyRow,
    MachineState,
    PlannedDeletion,
    PruningPlan,
    SampleAnswer,
    SweepCell,
    SweepReport,
)
from exporter.artifacts.base import FILE_KINDS, Record
from exporter.artifacts.servers import SERVERS, other_arithmetic, refuse_unheld, where_served
from exporter.artifacts.yaml_file import parse_yaml
from exporter.choose.costs.table import CostTable
from exporter.engines.build.engine_set import EngineRecord
from exporter.errors import ArtifactError, PlanError, UnsafeInputError
from exporter.options import build
from exporter.pipeline.request import ExportRequest
from tests.made_reports import gate_row, importance_of
from tests.made_tables import made_cell
from tests.raising import raises
from tests.tiny_models import planned

KINDS = ["attention", "mlp", "block", "cross_attention", "mixer"]
NEWER = SCHEMA_VERSION + 1


def plan_json(**changes: Any) -> bytes:
    plan = PruningPlan(deletions=[PlannedDeletion(layer=25, kind="attention")])
    return json.dumps(json.loads(plan.to_json()) | changes).encode()


def test_what_a_terminal_acts_on_is_escaped_in_what_is_written(tmp_path: Path) -> None:
    plan = PruningPlan(deletions=[], budget={"for": "\x9b31m\u202e"})
    path = plan.write(tmp_path / "plan.json")
    assert path.read_text("utf-8").isascii()
    assert PruningPlan.read(path).budget == plan.budget


@given(
    st.lists(
        st.builds(
            PlannedDeletion,
            layer=st.integers(0, 200),
            kind=st.sampled_from(KINDS),
            replacement=st.sampled_from(["none", "bias", "linear"]),
        ),
        max_size=20,
    )
)
def test_a_plan_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, deletions: list[PlannedDeletion]
) -> None:
    plan = PruningPlan(deletions=deletions, budget={"attention": 8})
    path = plan.write(tmp_path_factory.mktemp("plan") / "plan.json")
    assert PruningPlan.read(path) == plan


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, ("file-missing",)),
        (plan_json(schema_version=NEWER, something_new=1),
         ("other-schema", "$.schema_version", NEWER, SCHEMA_VERSION)),
        (plan_json(deletions=[{"layer": 1, "kind": "head"}]), ("", "$.deletions[0].kind:")),
        (plan_json(deletions=[{"layer": -1, "kind": "mlp"}]), ("", "$.deletions[0].layer:")),
        (plan_json(deletion=[]), ("other-schema", "$.deletion:")),
        (plan_json(schema_version="one"), ("", "$.schema_version:")),
        (b'{"schema_version": 1, "kind": "importance_report"}',
         ("wrong-kind", "depthcut plan", "an importance file")),
        (b'{"schema_version": 1, "kind": "stranger"}', ("wrong-kind", "depthcut plan", "stranger")),
        *((text, ("wrong-kind", "depthcut plan"))
          for text in (b'{"model_type": "llama"}', b"[]", b'{"schema_version": 1}', b"\xff\xfe")),
        *((text, ("", "plan.json is not JSON")) for text in (b"", b"{")),
        (b'{"schema_version": "one"}', ("", "plan.json: $")),
    ],
)  # fmt: skip
def test_a_file_that_can_t_be_read_is_named_with_the_place_and_what_is_wrong(
    tmp_path: Path, content: bytes | None, told: tuple[Any, ...]
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with raises(ArtifactError, *told, path):
        PruningPlan.read(path)


def test_every_kind_of_file_has_a_name_and_a_command() -> None:
    classes = {CostTable, EngineRecord, *Artifact.__subclasses__()}
    ours = (one for one in classes if one.__module__.startswith("exporter"))
    assert {one.model_fields["kind"].default for one in ours} == FILE_KINDS.keys() - {
        HistoryEntry.model_fields["kind"].default
    }


def test_what_the_user_names_may_be_a_link_and_what_is_found_may_not(tmp_path: Path) -> None:
    plan = PruningPlan(deletions=[])
    plan.write(tmp_path / "elsewhere.json")
    link = tmp_path / "folder" / "plan.json"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "elsewhere.json")
    assert PruningPlan.read(link) == plan
    with pytest.raises(UnsafeInputError):
        PruningPlan.read(link, named=False)


@pytest.mark.parametrize(
    ("written", "value"),
    [("3e-4", 3e-4), ("-1E3", -1e3), ("2.e+1", 20.0), ("2.5e-1", 0.25), ("'3e-4'", "3e-4"),
     *((name, name) for name in ("e4", "3e", "3e-4x", "3e4e5", "12e4567"))],
)  # fmt: skip
def test_a_number_with_an_exponent_is_a_number_and_a_name_a_name(written: str, value: Any) -> None:
    assert parse_yaml(f"rate: {written}", Path("file.yaml")).data == {"rate": value}


# Which runtimes can hold which cuts.


ALL = set(SERVERS)
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 512}
GRAPHS = {"onnxruntime", "openvino", "tensorrt"}


@pytest.mark.parametrize(
    ("plan", "holding"),
    [
        (planned(("block", 0, "none")), ALL),
        (planned(("attention", 3, "none"), ("mlp", 3, "none")), ALL),
        (planned(("attention", 3, "none")), ALL),
        (planned(("mlp", 0, "none")), ALL),
        (planned(("attention", 0, "none")), GRAPHS | {"tensorrt-llm", "mlx"}),
        (planned(("attention", 0, "linear")), GRAPHS | {"tensorrt-llm", "llama.cpp"}),
        (planned(("attention", 3, "linear")), GRAPHS | {"tensorrt-llm", "llama.cpp", "mlx"}),
        (planned(("mlp", 3, "linear")), GRAPHS | {"tensorrt-llm", "mlx"}),
        (planned(("attention", 3, "bias")), GRAPHS),
        (planned(("block", 3, "linear")), GRAPHS | {"tensorrt-llm", "mlx"}),
    ],
)
def test_where_a_plan_can_be_served(plan: Any, holding: set[str]) -> None:
    texts = where_served(plan)
    assert {server for server, reason in texts.items() if not reason} == holding
    for server in ALL - holding:
        with pytest.raises(PlanError):
            refuse_unheld([server], plan)


def test_layers_that_can_not_be_left_out() -> None:
    """A folder whose layers keep their numbers holds a block as two gaps."""
    with raises(PlanError, "replacement-unheld", "attention 0", "vllm"):
        refuse_unheld(["vllm"], planned(("block", 0, "none")), plain=False)
    refuse_unheld(["vllm"], planned(("block", 1, "none")), plain=False)


@pytest.mark.parametrize(
    ("told", "other"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, False),
        ({"architectures": ["Qwen3ForCausalLM"]}, True),
        ({"architectures": "LlamaForCausalLM"}, False),
        ({"architectures": 5}, False),
        ({"architectures": [5]}, False),
        ({"model_type": "llama", **SIZES}, False),
        ({"model_type": "llama", **SIZES, "intermediate_size": 100}, True),
        ({"model_type": "llama", **SIZES, "num_attention_heads": 0}, False),
        ({"model_type": "llama", **SIZES, "hidden_size": "x"}, False),
        ({"model_type": "llama", **SIZES, "head_dim": 16}, True),
        ({"model_type": "llama", **SIZES, "head_dim": "x"}, False),
    ],
)
def test_a_config_tells_whether_it_computes_as_llama(told: dict[str, Any], other: bool) -> None:
    """What isn't a size or a class tells nothing."""
    assert bool(other_arithmetic(told)) is other


def test_an_export_for_a_runtime_plans_and_heals_for_it(tmp_path: Path) -> None:
    result = {
        "source": "M",
        "output": str(tmp_path),
        "drop_attn": 2,
        "heal": "linear",
        "for": "mlx",
    }
    request = build(ExportRequest, result)
    assert request.plan_settings.server == "mlx"
    assert request.heal is not None
    assert request.heal.server == "mlx"
    assert not request.heal.intercept
    free = build(ExportRequest, {key: result[key] for key in result if key != "for"})
    assert free.plan_settings.server is None
    assert free.heal is not None
    assert free.heal.intercept


_SPEEDUP = {"ratio": 1.1, "ci95": [1.0, 1.2]}
_ESTIMATE = {"value": 0.1, "ci95": [0.0, 0.2]}
_ROW = gate_row().model_dump()
_CORNER = {"arm": "candidate", "pruned": True, "quantized": True}
_RESULT = {"against_float": None, "perplexity": None}
_ON_TEXT = {"text_source": "t", "text_sha256": "0", "tokens": 9, "perplexity": None}
_SWEEP: dict[str, Any] = {"source": "s", "text": "", "cells": []}
_CELL = made_cell("m", "a", "fp32").model_dump()


@pytest.mark.parametrize(
    ("record", "earlier", "now"),
    [
        (LatencyRow, {**_ROW, "noise_floor": {
            "ratio": 1.02, "rounds": 6, "speedup": _SPEEDUP}}, {**_ROW, "noise_floor": 1.02}),
        (MachineState, {"seconds": 1.0, "throttled": True}, {"throttled": True}),
        (Corner, {**_CORNER, "file_bytes": 9, "perplexity": 20.0, "exact_match": None,
                  "other_perplexity": 30.0, "log_perplexity_increase": _ESTIMATE,
                  "other_log_perplexity_increase": _ESTIMATE},
         {**_CORNER, "figures": {"perplexity": 20.0, "other_perplexity": 30.0},
          "rises": {"perplexity": _ESTIMATE, "other_perplexity": _ESTIMATE}}),
        (Accuracy, {**_ON_TEXT, "top5_agreement": 0.9, "images": None, "kl_interval": _ESTIMATE,
                    "log_perplexity_increase": _ESTIMATE, "top1_interval": None,
                    "generation": {"prompts": 8, "exact_match": 0.5, "new_tokens": 64},
                    "embeddings": None},
         {**_ON_TEXT, "prompts": 8, "figures": {"exact_match": 0.5},
          "intervals": {"kl_divergence": _ESTIMATE, "perplexity": _ESTIMATE}}),
        (Accuracy, {**_ON_TEXT, "top5_agreement": 0.9, "images": 64, "compared": "classes"},
         {**_ON_TEXT, "compared": "images", "figures": {"top5_agreement": 0.9}}),
        (Accuracy, {**_ON_TEXT, "embeddings": {
            "cosine": 0.9, "lowest_cosine": 0.8, "rank_agreement": 0.7, "texts": 64,
            "cosine_interval": _ESTIMATE, "rank_interval": None}},
         {**_ON_TEXT, "compared": "embeddings", "intervals": {"embedding_cosine": _ESTIMATE},
          "figures": {"embedding_cosine": 0.9, "lowest_cosine": 0.8, "rank_agreement": 0.7}}),
        (SweepCell, {**_CELL, "status": "done", "result": _RESULT}, _CELL),
        (SweepReport, {**_SWEEP, "models": ["m"], "plans": ["p"], "precisions": ["fp32"]}, _SWEEP),
        (SampleAnswer, {"prompt": "a", "baseline": {"text": "b", "ended": True},
                        "candidate": {"text": "c", "ended": False}},
         {"prompt": "a", "baseline": "b", "candidate": "c …"}),
        (HealedBranch, {"layer": 1, "kind": "mlp", "replacement": "bias", "parameters": 8,
                        "ridge": 0.1, "bias_explained": 0.2, "linear_explained": None},
         {"layer": 1, "kind": "mlp", "replacement": "bias", "parameters": 8}),
    ],
)  # fmt: skip
def test_records_of_earlier_versions_are_read(
    record: type[Record], earlier: dict[str, Any], now: dict[str, Any]
) -> None:
    assert record.model_validate(earlier) == record.model_validate(now)
    with pytest.raises(ValidationError, match="new_key"):
        record.model_validate({**earlier, "new_key": 1})


@pytest.mark.parametrize(
    ("kind", "broken", "place"),
    [
        (SweepReport, {"cells": [_CELL | {"result": 5}]}, "$.cells[0].result"),
        (ImportanceReport, {"further": [{"metric": ["kl"], "scores": []}]}, "$.further"),
        (ImportanceReport, {"further": 5}, "$.further"),
    ],
)
def test_a_broken_file_of_an_earlier_version_is_named_with_the_place(
    tmp_path: Path, kind: type[SweepReport | ImportanceReport], broken: dict[str, Any], place: str
) -> None:
    sound = importance_of({"mlp": [0.1]})
    if kind is SweepReport:
        sound = SweepReport(**_SWEEP)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(json.loads(sound.to_json()) | broken))
    with raises(ArtifactError, "", path, place):
        kind.read(path)


def test_scores_by_further_metrics_of_earlier_versions_are_read() -> None:
    report = importance_of({"mlp": [0.1, 0.2]})
    score = report.scores[0].model_dump()
    earlier = {**report.model_dump(), "further": [{"metric": "kl", "scores": [score]}]}
    assert ImportanceReport.model_validate(earlier).tables["kl"] == report.scores[:1]
