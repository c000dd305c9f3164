"""What a choice of so many sublayers refuses before it begins: more than may go, other scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from exporter.artifacts import ImportanceReport
from exporter.artifacts.plans.by_score import JOINT_KINDS
from exporter.choose.selection.options import Group, most_sublayers, options_for
from exporter.errors import PlanError
from exporter.printable import are, counted
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_GROUPS: tuple[Group, ...] = ("attention", "cross_attention", "mlp", "block", "joint")


def groups_of(counts: Mapping[str, int]) -> Iterator[tuple[Group, int]]:
    """What is asked for and how many, in the order in which they are chosen."""
    for group in _GROUPS:
        if counts.get(group):
            yield group, counts[group]


def refuse_too_many(
    report: ImportanceReport, counts: Mapping[str, int], protected: frozenset[SublayerRef]
) -> None:
    """Refuses more than have a score, where some are protected.

    Args:
        report: The scores of those that may go.
        counts: How many are to go.
        protected: What stays.

    Raises:
        PlanError: It says how many may go.
    """
    for group, number in groups_of(counts) if protected else ():
        kinds = JOINT_KINDS if group == "joint" else (group,)
        left = sum(score.kind in kinds for score in report.scores)
        if number > left:
            refuse_number(group, number, left, report.model.source)


def refuse_counts(
    report: ImportanceReport,
    counts: Mapping[str, int],
    protected: frozenset[SublayerRef],
    *,
    allow_all: bool,
) -> None:
    """Refuses before the model is loaded more than may go, or everything.

    Args:
        report: The scores of all.
        counts: How many are to go.
        protected: What stays.
        allow_all: Whether every attention and every MLP may go.

    Raises:
        PlanError: It says how many may go.
    """
    layers = report.model.num_layers
    for group, number in groups_of(counts):
        options = options_for(group, layers, protected)
        left = len(options)
        if sum(len(option.names) for option in options) > most_sublayers(layers, allow_all):
            left -= 1
        if number > left:
            refuse_number(group, number, left, report.model.source)


def refuse_number(group: Group, number: int, left: int, model: str) -> NoReturn:
    """Refuses a number of one group, of which a model has only so many left.

    Raises:
        PlanError: Always.
    """
    what = {"joint": "sublayer", "mlp": "MLP"}.get(group, group)
    raise PlanError(
        f"{counted(number, what)} {are(number)} to be dropped, but of {model} only {left} may "
        "be dropped.",
        f"Ask for at most {left}: protected sublayers are kept, and at least one sublayer.",
        code="too-many",
    )


def refuse_another_model(report: ImportanceReport, loaded: LoadedModel) -> None:
    """Refuses scores of another model than the one that the search would run.

    Raises:
        PlanError: They are.
    """
    if report.model.sha256 != loaded.ref.sha256:
        raise PlanError(
            f"The scores are of {report.model.source} (sha256 {report.model.sha256[:12]}), but "
            f"{loaded.ref.source} is another model (sha256 {loaded.ref.sha256[:12]}).",
            "Name the model that was scored, or score this one first: depthcut score.",
            code="another-model",
        )
