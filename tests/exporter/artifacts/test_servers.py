"""Which runtimes can hold which cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts.servers import (
    SERVERS,
    STAYS,
    is_plain,
    other_arithmetic,
    refuse_unheld,
    serving_rows,
    where_served,
)
from exporter.errors import PlanError
from exporter.options import build
from exporter.pipeline.request import ExportRequest
from tests.raising import raises
from tests.tiny_models import planned

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


def test_a_plain_cut_is_told_from_others() -> None:
    assert is_plain(planned(("block", 0, "none")))
    assert not is_plain(planned(("block", 0, "none"), ("mlp", 1, "none")))
    assert not is_plain(planned(("block", 0, "bias")))


def test_layers_that_can_not_be_left_out() -> None:
    """A folder whose layers keep their numbers holds a block as two gaps."""
    with raises(PlanError, "server-needs-it", "attention 0", "vllm"):
        refuse_unheld(["vllm"], planned(("block", 0, "none")), plain=False)
    refuse_unheld(["vllm"], planned(("block", 1, "none")), plain=False)


def test_a_row_tells_what_may_become_of_each_sublayer() -> None:
    rows = {row.runtime: row for row in serving_rows()}
    assert set(rows) == ALL
    assert rows["vllm"].first == STAYS != rows["vllm"].attention
    assert rows["mlx"].first == rows["vllm"].attention
    assert rows["onnxruntime"].mlp == rows["onnxruntime"].first
    assert "bias" in rows["onnxruntime"].mlp
    assert all(row.problem is None for row in rows.values())


def test_a_row_says_why_a_plan_does_not_go_there() -> None:
    plan = planned(("attention", 3, "none"))
    assert {row.runtime for row in serving_rows("", plan) if row.problem == ""} == ALL
    alien = {row.runtime: row for row in serving_rows("its type is qwen3", plan)}
    assert {name for name, row in alien.items() if row.problem == ""} == GRAPHS
    assert "qwen3" in (alien["vllm"].problem or "")
    assert alien["vllm"].attention == STAYS
    blocks = serving_rows("its type is qwen3", planned(("block", 3, "none")))
    assert {row.runtime for row in blocks if row.problem == ""} == ALL


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
