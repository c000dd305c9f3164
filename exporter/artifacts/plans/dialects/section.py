"""The section that depthcut itself writes into a pruned checkpoint's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.base import json_path
from exporter.artifacts.plans.dialects.facts import wanted, wrong
from exporter.errors import PlanError

SECTION = "depthcut"
"""Of a checkpoint whose layers lack sublayers; it says which modules stand in their places."""
ORIGIN = "depthcut_origin"
"""Of a checkpoint with fewer layers, which is a plain one; it says where they come from."""
KEYS = (SECTION, ORIGIN)


def read(config: Mapping[str, Any], where: str) -> list[PlannedDeletion]:
    """What the checkpoint lacks of the model that it was pruned from.

    Raises:
        PlanError: It is healed: what took the branches' places is not in the config.
    """
    name = SECTION if config.get(SECTION) is not None else ORIGIN
    section = wanted(config[name], dict, where, name)
    listed = wanted(section.get("deletions"), list, where, f"{name}.deletions")
    deletions = []
    for number, each in enumerate(listed):
        try:
            deletions.append(PlannedDeletion.model_validate(each))
        except ValidationError as error:
            first = error.errors()[0]
            place = json_path((name, "deletions", number, *first["loc"]))
            raise PlanError(f"{where}: {place}: {first['msg']}.") from error
    healed = next((each for each in deletions if each.replacement != "none"), None)
    if healed is not None:
        raise wrong(
            where,
            f"{name}.deletions",
            f"{healed.kind} {healed.layer} is replaced ({healed.replacement}), and the numbers of "
            "that are not in this file",
            "Give the healed plan that the checkpoint was made with.",
        )
    return deletions
