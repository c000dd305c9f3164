"""Speed, accuracy and size at a glance: rows for every table of both arms."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from exporter.artifacts import (
    Accuracy,
    Answer,
    Arm,
    ComparisonReport,
    Interval,
    SampleAnswers,
    TaskResult,
)
from exporter.artifacts.accuracy import Compared
from exporter.printable import counted, milliseconds, one_line, percent, significant
from exporter.report.sections.blocks import Block, Grid, Note, Section
from exporter.report.sections.verdict import headline
from exporter.report.words import (
    PHASES,
    interval_words,
    or_dash,
    relative_change,
    short_shape,
    speedup_words,
)

SummaryRow = tuple[str, str, str, str, str]
"""What, baseline, candidate, change, verdict."""

SAME: Mapping[Compared, str] = {
    "tokens": "top-1 token",
    "classes": "top-1 class",
    "order": "order of two texts",
}
"""What is the same in both arms, by what is compared."""
COUNTED: Mapping[Compared, str] = {
    "tokens": "tokens",
    "classes": "answers",
    "order": "comparisons of two texts",
}
"""What the number of an evaluation text's tokens counts, by what is compared."""

HEADER: SummaryRow = ("", "baseline", "candidate", "change", "verdict")


def latency_rows(report: ComparisonReport) -> list[SummaryRow]:
    """Median times of both arms, the speedup with its interval, and the verdict."""
    return [
        (
            f"{short_shape(row)}, ms",
            milliseconds(row.baseline.median_ms),
            milliseconds(row.candidate.median_ms),
            speedup_words(row.speedup.ratio, row.speedup.ci95, digits=2),
            row.verdict,
        )
        for row in report.latency
    ]


def accuracy_rows(report: ComparisonReport) -> list[SummaryRow]:
    """Perplexity, KL divergence, agreement, embeddings; what was not measured is left out."""
    accuracy = report.accuracy
    rows: list[SummaryRow] = []
    if accuracy is None:
        return rows
    other = accuracy.other
    pairs = {"perplexity": accuracy.perplexity}
    if other is not None:
        pairs[f"on {other.name}"] = other.perplexity
    for what, pair in pairs.items():
        if pair is not None:
            before, after = significant(pair.baseline), significant(pair.candidate)
            rows.append((what, before, after, relative_change(pair.baseline, pair.candidate), ""))
    if accuracy.kl_divergence is not None:
        rows.append(("KL divergence, nats", "", significant(accuracy.kl_divergence, 3), "", ""))
    if accuracy.top1_agreement is not None:
        rows.append((same_words(accuracy), "", percent(accuracy.top1_agreement), "", ""))
    if accuracy.images is not None and accuracy.top5_agreement is not None:
        rows.append(("same of top-5 classes", "", percent(accuracy.top5_agreement), "", ""))
    if (generation := accuracy.generation) is not None:
        what = f"same continuation of {counted(generation.prompts, 'prompt')}"
        rows.append((what, "", percent(generation.exact_match), "", ""))
    if (texts := accuracy.embeddings) is not None:
        cosines = {
            "cosine of embeddings, mean": (texts.cosine, texts.cosine_interval),
            "cosine of embeddings, lowest": (texts.lowest_cosine, None),
            "same ranking of pairs, Spearman": (texts.rank_agreement, texts.rank_interval),
        }
        rows += [
            (what, "", f"{value:.4f}", "" if interval is None else _bounds(interval), "")
            for what, (value, interval) in cosines.items()
        ]
    return rows


def same_words(accuracy: Accuracy) -> str:
    """What is the same in both arms where they agree."""
    return f"same {'top-1 class' if accuracy.images is not None else SAME[accuracy.compared]}"


def _bounds(interval: Interval) -> str:
    return f"[{', '.join(f'{bound:.4f}' for bound in interval.ci95)}]"


def task_rows(report: ComparisonReport) -> list[SummaryRow]:
    """The score of each task, and the difference with its interval: in points of shares."""
    tasks = report.accuracy.tasks if report.accuracy else []
    return [_task(task) for task in tasks]


def _task(task: TaskResult) -> SummaryRow:
    name, before, after = f"{task.task}, {task.metric}", task.baseline, task.candidate
    if min(before, after) >= 0 and max(before, after) <= 1:
        return name, percent(before), percent(after), _points(task.difference), ""
    change = f"{significant(task.difference.value, 3)} {interval_words(task.difference.ci95)}"
    return name, significant(before), significant(after), change, ""


def _points(difference: Interval) -> str:
    value, low, high = (100 * item for item in (difference.value, *difference.ci95))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def size_rows(report: ComparisonReport) -> list[SummaryRow]:
    """Bytes on disk, parameters, nodes, and KV cache per token; what is none is left out."""

    def sizes(arm: Arm) -> dict[str, tuple[float, int]]:
        return {
            "files, MB": (arm.file_bytes / 1e6, 1),
            "parameters, million": (arm.parameters / 1e6, 2),
            "graph nodes": (arm.nodes, 0),
            "KV bytes per token": (arm.kv_cache_bytes_per_token, 0),
        }

    after = sizes(report.arms.candidate)
    return [
        (
            what,
            f"{before:,.{digits}f}",
            f"{after[what][0]:,.{digits}f}",
            relative_change(before, after[what][0]),
            "",
        )
        for what, (before, digits) in sizes(report.arms.baseline).items()
        if before or after[what][0]
    ]


def accuracy_grid(report: ComparisonReport, caption: str) -> Grid:
    """The rows of accuracy as a table."""
    return Grid(caption, HEADER[:4], [row[:4] for row in accuracy_rows(report)], right=(1, 2, 3))


def size_grid(report: ComparisonReport, caption: str) -> Grid:
    """The rows of sizes as a table."""
    return Grid(caption, HEADER[:4], [row[:4] for row in size_rows(report)], right=(1, 2, 3))


_BRIEFLY = 5
"""Prompts on a terminal; the page has all."""
_BRIEF_CHARACTERS = 250
_CUT = "…"


def answers_section(report: ComparisonReport) -> Section | None:
    """Sample answers, or why there are none."""
    blocks = list(_blocks(report))
    return Section("answers", "What the models say", blocks, stays_open=True) if blocks else None


def answer_grids(report: ComparisonReport, *, brief: bool = False) -> Iterator[Grid]:
    """The same as a table alone."""
    accuracy = report.accuracy and report.accuracy.answers
    if accuracy and accuracy.answers:
        yield _answers(accuracy, brief)


def _blocks(report: ComparisonReport) -> Iterator[Block]:
    yield from answer_grids(report)
    accuracy = report.accuracy and report.accuracy.answers
    if accuracy and accuracy.left_out:
        yield Note(f"{one_line(accuracy.left_out)}.", lead="Left out:")
    if accuracy and accuracy.answers:
        yield Note(_how_answered(accuracy))


def _how_answered(answers: SampleAnswers) -> str:
    text = "asked in the model's chat template" if answers.chat else "continued as they are"
    return (
        f"Prompts ({one_line(answers.source)}) were {text}, with the likeliest token each time, "
        f"for at most {answers.new_tokens} tokens; {_CUT} marks an answer that was cut there. A "
        "few answers show what a loss looks like; they don't measure it."
    )


def _answers(answers: SampleAnswers, brief: bool) -> Grid:
    rows: list[Sequence[str]] = []
    for answer in answers.answers[: _BRIEFLY if brief else None]:
        rows += [[]] if brief and rows else []
        rows.append(
            [_shown(answer.prompt, brief), *_pair(answer.baseline, answer.candidate, brief)]
        )
    template = ", in the chat template" if answers.chat else ""
    header = ["prompt", "baseline", "candidate"]
    return Grid(f"Sample answers{template}", header, rows, is_prose=True)


def _pair(baseline: Answer, candidate: Answer, brief: bool) -> tuple[str, str]:
    first, second = (
        _shown(answer.text, brief) + ("" if answer.ended else f" {_CUT}")
        for answer in (baseline, candidate)
    )
    return first, second


def _shown(text: str, brief: bool) -> str:
    """A text on one line; what is empty is told, since an empty cell goes on with the one above."""
    line = one_line(" ".join(text.split())) or "(nothing)"
    return textwrap.shorten(line, _BRIEF_CHARACTERS, placeholder=f" {_CUT}") if brief else line


def letter(index: int) -> str:
    """A candidate's letter: A to Z, then A1 and so on."""
    round_, place = divmod(index, 26)
    return chr(ord("A") + place) + (str(round_) if round_ else "")


def overview_section(reports: Mapping[str, ComparisonReport]) -> Section:
    """Several reports side by side: what each dropped, and what that did."""
    phases = list(dict.fromkeys(row.phase for r in reports.values() for row in r.latency))
    header = [
        "candidate", "report", "what", *(f"{PHASES.get(p, p)}, speedup" for p in phases),
        "perplexity", "KL, nats", "parameters",
    ]  # fmt: skip
    rows = [
        [letter(index), name, *_overview(report, phases)]
        for index, (name, report) in enumerate(reports.items())
    ]
    grid = Grid("All candidates", header, rows, right=range(3, len(header)))
    note = "A phase of several shapes has the geometric mean of their speedups."
    return Section("overview", "All candidates", [grid, Note(note)], stays_open=True)


def _overview(report: ComparisonReport, phases: Sequence[str]) -> list[str]:
    accuracy, arms, logs = report.accuracy, report.arms, dict[str, list[float]]()
    pair = accuracy.perplexity if accuracy else None
    kl_divergence = accuracy.kl_divergence if accuracy else None
    for row in report.latency:
        logs.setdefault(row.phase, []).append(math.log(row.speedup.ratio))
    return [
        headline(report),
        *(or_dash(logs.get(p), lambda ratios: f"{math.exp(fmean(ratios)):.3f}x") for p in phases),
        or_dash(pair, lambda both: relative_change(both.baseline, both.candidate)),
        or_dash(kl_divergence, lambda kl: significant(kl, 3)),
        relative_change(arms.baseline.parameters, arms.candidate.parameters),
    ]
