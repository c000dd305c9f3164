"""`depthcut export --force` of a plan that drops everything, and what is refused without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_pipeline import _request, _walk, checkpoint, own_cache

from exporter.artifacts import PruneReport
from exporter.choose.budgets.budget import Budget
from exporter.errors import PlanError
from exporter.pipeline.request import DropRequest
from tests.raising import raises

pytestmark = pytest.mark.torch

__all__ = ["checkpoint", "own_cache"]  # fixtures
EVERYTHING = DropRequest(Budget(joint=6))


def test_everything_goes_and_equals_pytorch_and_the_oracle(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    request = _request(checkpoint, out, drops=EVERYTHING, allow_empty=True)
    report, _ = _walk(request)
    pruned = PruneReport.read(out / "prune.json")
    assert len(pruned.deleted) == 6
    assert pruned.verification.passed
    assert all(check.passed for check in report.parity)
    assert report.arms.candidate.kv_cache_bytes_per_token == 0
    before = (out / "plan.json").read_bytes()
    with raises(PlanError, "nothing-left"):
        _walk(_request(checkpoint, out, drops=EVERYTHING))  # though no stage is to be redone
    assert (out / "plan.json").read_bytes() == before


def test_caches_of_fixed_length_do_not_all_go(checkpoint: Path, tmp_path: Path) -> None:
    drops = DropRequest(Budget(attention=3))
    with raises(PlanError, "no-caches-left", "tensorrt-rtx", "--cache-length 0"):
        _walk(_request(checkpoint, tmp_path / "out", target="tensorrt-rtx", drops=drops))
