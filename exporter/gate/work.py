"""The companion of time: what is counted of a graph, exact on every machine, and of its engine.

An engine's builder chooses by times and by the card: its figures can differ with the same graph. A
change is told whether it is limited or not, and so is a change of time without one.
"""

from __future__ import annotations

from collections.abc import Iterable

from exporter.artifacts import Arm, Check, ComparisonReport, WorkChange, WorkFigure
from exporter.errors import RegressionError
from exporter.gate.limits import Limits
from exporter.gate.verdicts import CheckedValue, checked

_LIMITS: dict[WorkFigure, str] = {
    "nodes": "max_node_increase",
    "weight_bytes": "max_weight_read_increase",
    "cache_bytes": "max_cache_read_increase",
    "prompt_macs": "max_mac_increase",
    "step_macs": "max_mac_increase",
    "engine_layers": "max_layer_increase",
    "scratch_bytes": "max_scratch_increase",
}
_OF_PROMPTS_TOO = "step_macs"  # of a graph without steps the same limit holds for prompts alone


def work_checks(
    report: ComparisonReport, baseline: ComparisonReport | None, limits: Limits
) -> list[Check]:
    """One check a figure whose limit is set.

    Raises:
        RegressionError: A report doesn't have a figure that a limit is set on.
    """
    after = report.arms.candidate
    before = report.arms.baseline if baseline is None else baseline.arms.candidate
    found = []
    for figure, name in _LIMITS.items():
        limit = getattr(limits, name)
        if limit is not None and not _is_left_out(figure, before, after):
            found.append(_check(figure, name, before, after, limit))
    return found


def _is_left_out(figure: WorkFigure, before: Arm, after: Arm) -> bool:
    """Whether a graph has no steps."""
    return figure == _OF_PROMPTS_TOO and all(
        arm.work is not None and arm.work.step_past is None for arm in (before, after)
    )


def _check(figure: WorkFigure, name: str, before: Arm, after: Arm, limit: float) -> Check:
    old, new = before.counted.get(figure), after.counted.get(figure)
    if old is None or new is None:
        option = f"--{name.replace('_', '-')}"
        raise RegressionError(
            f"{option} is set, but {'the report' if new is None else 'the baseline'} has no "
            f"{figure}.",
            "Measure again with depthcut compare, or leave the limit out: models of PyTorch, GGUF "
            "files, encoder-decoders and arms without engines don't have all figures.",
            code="quantity-missing",
        )
    value = new / old if old else 1.0 if not new else float("inf")
    unit = "bytes" if figure.endswith("bytes") else ""
    return checked(
        CheckedValue(figure, "candidate", unit, before=old, after=new, value=value), 1 + limit
    )


def work_changes(report: ComparisonReport, baseline: ComparisonReport | None) -> list[WorkChange]:
    """The figures that differ from an earlier report's; none against the own unpruned arm."""
    if baseline is None:
        return []
    before, after = baseline.arms.candidate, report.arms.candidate
    old, new, kinds = before.counted, after.counted, _kinds(before, after)
    found = [
        WorkChange(figure=figure, before=old[figure], after=value)
        for figure, value in new.items()
        if figure != "nodes" and figure in old and old[figure] != value
    ]
    if kinds:
        nodes = WorkChange(figure="nodes", before=old["nodes"], after=new["nodes"], kinds=kinds)
        found.insert(0, nodes)
    return found


def _kinds(before: Arm, after: Arm) -> dict[str, int]:
    """By operator, how many nodes more."""
    if before.work is None or after.work is None:
        return {}
    old, new = before.work.nodes, after.work.nodes
    more = {kind: new.get(kind, 0) - old.get(kind, 0) for kind in sorted({*old, *new})}
    return {kind: count for kind, count in more.items() if count}


def work_notes(
    report: ComparisonReport, baseline: ComparisonReport | None, checks: Iterable[Check]
) -> list[str]:
    """A change of time without one of the graph, and the other way round."""
    if baseline is None:
        return []
    before, after = baseline.arms.candidate.work, report.arms.candidate.work
    if before is None or after is None:
        return []
    times = [one for one in checks if one.quantity == "time"]
    if (before.nodes, before.figures) != (after.nodes, after.figures):
        still = times and all(one.verdict == "within_limit" for one in times)
        return ["The graph has changed, and no time has left its limit."] if still else []
    return [_same_graph(one) for one in times if one.verdict in ("regressed", "improved")]


def _same_graph(one: Check) -> str:
    slower = one.value > 1
    percent = 100 * (one.value - 1 if slower else 1 - one.value)
    return (
        f"{one.subject}: {'slower' if slower else 'faster'} by {percent:.1f} %, though the graph "
        "does the same work: look at the machine, the runtime's version or the built engine."
    )
