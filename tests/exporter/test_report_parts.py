"""The parts that Markdown and HTML share: each is there when its figures are, and left out else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from exporter.artifacts import Accuracy

BARE: dict[str, Any] = {
    "text_source": "t", "text_sha256": "e" * 64, "tokens": 8,
    "perplexity": None, "kl_divergence": None, "top1_agreement": None,
}  # fmt: skip


def test_the_first_reports_empty_tasks_are_none() -> None:
    assert Accuracy.model_validate_json(json.dumps({**BARE, "tasks": {}})).tasks == []
    with pytest.raises(ValidationError):
        Accuracy.model_validate_json(json.dumps({**BARE, "tasks": {"arc": 1}}))
