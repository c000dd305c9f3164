"""Counted figures beside times: of a graph, exact on every machine, and of its engine.

An engine's builder chooses by times and by the card: its figures can differ with the same graph. A
change is told whether it is limited or not, and so is a change of time without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from exporter.artifacts import Arm, Check, ComparisonReport, GraphWork, WorkChange
from exporter.gate.limits import LIMIT_ON, Limits
from exporter.gate.verdicts import CheckedValue, checked
from exporter.report.words import WORK


def work_checks(
    report: ComparisonReport, baseline: ComparisonReport | None, limits: Limits
) -> list[Check]:
    """One check a figure whose limit is set, and that both arms have."""
    after = report.arms.candidate
    before = report.arms.baseline if baseline is None else baseline.arms.candidate
    checks = []
    for figure, new in after.counted.items():
        limit = getattr(limits, LIMIT_ON[figure]) if figure in LIMIT_ON else None
        old = before.counted.get(figure)
        if limit is None or old is None:
            continue
        value = new / old if old else 1.0 if not new else float("inf")
        unit = "bytes" if figure.endswith("bytes") else ""
        counted = CheckedValue(figure, "candidate", unit, before=old, after=new, value=value)
        checks.append(checked(counted, 1 + limit))
    return checks


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
    """Figures that one report lacks."""
    old, new = before.counted, after.counted
    for owner, mine, other in (("the baseline", old, new), ("this report", new, old)):
        if names := [WORK[figure] for figure in mine if figure not in other]:
            yield f"Only {owner} has figures for: {', '.join(names)}."


def _times_beside(
    before: GraphWork | None, after: GraphWork | None, checks: Iterable[Check]
) -> list[str]:
    """A change of time without one of the graph, and the other way round."""
    if before is None or after is None:
        return []
    times = [one for one in checks if one.quantity == "time" and one.value is not None]
    old, new = ((work.nodes, work.figures) for work in (before, after))
    if old != new:
        still = times and all(one.verdict == "within_limit" for one in times)
        return ["The graph has changed, and no time has left its limit."] if still else []
    return [_same_graph(one) for one in times if one.verdict in ("regressed", "improved")]


def _same_graph(one: Check) -> str:
    value = one.value or 1.0
    slower = value > 1
    percent = 100 * (value - 1 if slower else 1 - value)
    return (
        f"{one.subject}: {'slower' if slower else 'faster'} by {percent:.1f} %, though the graph "
        "is the same: look at the machine, the runtime's version or the built engine."
    )
