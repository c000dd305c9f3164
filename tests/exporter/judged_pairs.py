"""Two arms held against each other, and no others."""

from __future__ import annotations

from typing import Any

from exporter.compare.quality.agreement import PredictionAgreement, compare_predictions
from exporter.engines.runners.base import Runner


def compare_pair(
    baseline: Runner, candidate: Runner, token_ids: Any, **options: Any
) -> PredictionAgreement:
    """What ``compare_predictions`` says of a pair alone."""
    arms = {"baseline": baseline, "candidate": candidate}
    (found,) = compare_predictions(arms, [("baseline", "candidate")], token_ids, **options)
    return found
