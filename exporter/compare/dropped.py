"""What the candidate's own record says was cut out of it."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts import PlannedDeletion
from exporter.compare.arms import ComparedArm, Pair
from exporter.errors import ComparisonError
from graph_passes.files.reading import parse_json


def dropped(pair: Pair) -> list[PlannedDeletion]:
    """What the candidate's metadata say was cut, and the baseline's don't.

    Raises:
        ComparisonError: A record can't be read.
    """
    already, recorded = (recorded_plan(arm) for arm in (pair.baseline, pair.candidate))
    return [deletion for deletion in recorded if deletion not in already]


def recorded_plan(arm: ComparedArm) -> list[PlannedDeletion]:
    """What an arm's metadata say was cut.

    Raises:
        ComparisonError: The record can't be read.
        UnsafeInputError: It is nested too deep.
    """
    from graph_passes.plan_record import PLAN_KEY

    text = arm.facts.metadata.get(PLAN_KEY)
    if text is None:
        return []
    try:
        return TypeAdapter(list[PlannedDeletion]).validate_python(
            parse_json(text, f"{arm.folder.onnx}: the metadata entry {PLAN_KEY}")
        )
    except (ValueError, ValidationError) as error:
        raise ComparisonError(
            f"{arm.folder.onnx}: the metadata entry {PLAN_KEY} is not a list of deletions."
        ) from error
