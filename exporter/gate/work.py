"""Counted figures beside times: of a graph, exact on every machine, and of its engine.

An engine's builder chooses by times and by the card: its figures can differ with the same graph. A
change is told whether it is limited or not, and so is a change of time without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from exporter.artifacts import Arm, Check, ComparisonReport, GraphWork, WorkChange, WorkFigure
from exporter.errors import RegressionError
from exporter.gate.limits import Limits
from exporter.gate.verdicts import CheckedValue, checked
from exporter.report.words import WORK

_LIMITS: dict[WorkFigure, str] = {
    "nodes": "max_node_increase",
    "weight_bytes": "max_weight_read_increase",
    "cache_bytes": "max_cache_read_increase",
    "prompt_macs": "max_mac_increase",
    "step_macs": "max_mac_increase",
    "engine_layers": "max_layer_increase",
    "scratch_bytes": "max_scratch_increase",
}
_SUMS: tuple[WorkFigure, ...] = ("weight_bytes", "cache_bytes", "prompt_macs", "step_macs")
"""What lacks the share of nodes that aren't counted."""
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
            "files and arms without engines don't have all figures.",
            code="quantity-missing",
        )
    value = new / old if old else 1.0 if not new else float("inf")
    unit = "bytes" if figure.endswith("bytes") else ""
    found = checked(
        CheckedValue(figure, "candidate", unit, before=old, after=new, value=value), 1 + limit
    )
    return _doubted(found, _uncounted(before, after)) if figure in _SUMS else found


def _doubted(found: Check, uncounted: dict[str, tuple[int, int]]) -> Check:
    """A sum may have grown, or shrunk, by nodes that only one of the two reports counts."""
    grown = found.verdict == "regressed"
    if not any((new < old) if grown else (new > old) for old, new in uncounted.values()):
        return found
    reason = f"Other nodes are not counted than before: {_uncounted_words(uncounted)}."
    return found.model_copy(update={"verdict": "inconclusive", "reason": reason})


def _uncounted(before: Arm, after: Arm) -> dict[str, tuple[int, int]]:
    """By operator, how many nodes weren't counted and aren't now, where that differs."""
    if before.work is None or after.work is None:
        return {}
    old, new = before.work.uncounted, after.work.uncounted
    pairs = {kind: (old.get(kind, 0), new.get(kind, 0)) for kind in sorted({*old, *new})}
    return {kind: pair for kind, pair in pairs.items() if pair[0] != pair[1]}


def _uncounted_words(uncounted: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{kind} {old} before, {new} now" for kind, (old, new) in uncounted.items())


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
    """What can't be compared, and a change of time without one of the graph or the reverse."""
    if baseline is None:
        return []
    before, after = baseline.arms.candidate, report.arms.candidate
    return [*_not_compared(before, after), *_times_beside(before.work, after.work, checks)]


def _not_compared(before: Arm, after: Arm) -> Iterator[str]:
    """Figures that one report lacks, and nodes that are in the sums of one report alone."""
    old, new = before.counted, after.counted
    for owner, mine, other in (("the baseline", old, new), ("this report", new, old)):
        if names := [WORK[figure] for figure in mine if figure not in other]:
            yield f"Only {owner} has figures for: {', '.join(names)}."
    if uncounted := _uncounted(before, after):
        yield f"Not counted, so in no sum: {_uncounted_words(uncounted)}."


def _times_beside(
    before: GraphWork | None, after: GraphWork | None, checks: Iterable[Check]
) -> list[str]:
    """A change of time without one of the graph, and the other way round."""
    if before is None or after is None:
        return []
    times = [one for one in checks if one.quantity == "time"]
    old, new = ((work.nodes, work.figures, work.uncounted) for work in (before, after))
    if old != new:
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
