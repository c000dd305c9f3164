"""What runs of both graphs do, counted: it doesn't depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.artifacts import Arm, ComparisonReport, GraphWork
from exporter.report.sections.blocks import Block, Grid, Note, Section
from exporter.report.words import WORK, relative_change


def work_section(report: ComparisonReport) -> Section | None:
    """Counted figures and nodes by operator of both arms; None where no graph was counted."""
    before, after = report.arms.baseline, report.arms.candidate
    if before.work is None or after.work is None:
        return None
    blocks: list[Block] = [_figures(before, after), Note(_of_what(after.work))]
    kinds = list(_kinds(before.work, after.work))
    if kinds:
        header = ["operator", "baseline", "candidate"]
        blocks.append(Grid("Operators with other numbers of nodes", header, kinds, right=(1, 2)))
    blocks += [Note(told, lead="Not counted:") for told in _uncounted(after.work)]
    return Section("work", "Work of a run", blocks)


def _figures(before: Arm, after: Arm) -> Grid:
    old, new = before.counted, after.counted
    rows = [
        [_named(figure), f"{old[figure]:,}", f"{value:,}", relative_change(old[figure], value)]
        for figure, value in new.items()
        if figure in old
    ]
    header = ["", "baseline", "candidate", "change"]
    return Grid("Counted from graph and engine", header, rows, right=(1, 2, 3))


def _named(figure: str) -> str:
    return WORK[figure] + ", bytes" * figure.endswith("bytes")


def _of_what(work: GraphWork) -> str:
    if work.has_encoder:
        tokens = work.prompt_tokens
        source = "recording" if tokens is None else f"source of {tokens} tokens"
        return (
            f"A prompt is a {source} through the encoder and the decoder's first step; a step is "
            f"one of the decoder behind a cache of {work.step_past}, and bytes are those that it "
            "reads. Nodes are those of all three graphs. Counted from the graphs, without a run."
        )
    prompt = f"A prompt has {work.prompt_tokens} tokens"
    if work.prompt_tokens is None:
        prompt = "A prompt is one input of the graph"
    if work.step_past is None:
        return f"{prompt}; weights are those that it reads. Counted from the graph, without a run."
    return (
        f"{prompt}, a step is one token behind a cache of {work.step_past}; bytes are those that a "
        "step reads. Counted from the graph, without a run."
    )


def _kinds(before: GraphWork, after: GraphWork) -> Iterator[list[str]]:
    for kind in sorted({*before.nodes, *after.nodes}):
        old, new = before.nodes.get(kind, 0), after.nodes.get(kind, 0)
        if old != new:
            yield [kind, f"{old:,}", f"{new:,}"]


def _uncounted(work: GraphWork) -> Iterator[str]:
    if work.uncounted:
        yield ", ".join(f"{count} {kind}" for kind, count in work.uncounted.items())
