"""Which runtimes can hold which cuts."""

from __future__ import annotations

from typing import Any

import pytest
from healed_models import planned

from exporter.artifacts.servers import SERVERS, is_plain, refuse_unheld, where_served
from exporter.errors import PlanError
from tests.raising import raises

ALL = set(SERVERS)
GRAPHS = {"onnxruntime", "tensorrt"}


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
    found = where_served(plan)
    assert {server for server, reason in found.items() if not reason} == holding
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
