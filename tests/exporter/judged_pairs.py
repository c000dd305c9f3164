"""Two arms held against each other, and no others."""

from __future__ import annotations

from typing import Any

from exporter.artifacts import Accuracy
from exporter.compare.agreement import compare_predictions
from exporter.compare.evaluation import EvaluationTokens
from exporter.engines.runners.base import Runner


def compare_pair(baseline: Runner, candidate: Runner, token_ids: Any, *, causal: bool) -> Accuracy:
    """What ``compare_predictions`` says of a pair alone."""
    arms = {"baseline": baseline, "candidate": candidate}
    tokens = EvaluationTokens(token_ids, "text", "0" * 64, is_text=True)
    (accuracy,) = compare_predictions(arms, [("baseline", "candidate")], tokens, causal=causal)
    return accuracy
