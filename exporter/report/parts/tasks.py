"""What the arms do with the model: tasks, generation, long context, embeddings."""

from __future__ import annotations

from exporter.artifacts import ComparisonReport, EmbeddingAgreement, LongContext, TaskResult
from exporter.report.parts.part import Grid, Note, Part
from exporter.report.words import significant


def tasks_part(report: ComparisonReport) -> Part | None:
    """Each task's score of both arms, and their paired difference; None without tasks."""
    tasks = report.accuracy.tasks if report.accuracy else []
    if not tasks:
        return None
    header = [
        "task", "metric", "items", "baseline", "candidate", "difference", "only baseline right",
        "only candidate right", "McNemar p",
    ]  # fmt: skip
    grid = Grid("Tasks on the same items", header, [_task(t) for t in tasks], right=range(2, 9))
    note = Note(
        "The difference is candidate minus baseline; in brackets its 95 % interval, from a paired "
        "bootstrap over items. McNemar's exact test looks at the items that only one arm gets "
        "right."
    )
    sources = dict.fromkeys(f"{task.task}: {task.source}" for task in tasks if task.source)
    notes = [Note(f"{'; '.join(sources)}.", lead="Items from:")] if sources else []
    return Part("tasks", "Tasks", [grid, note, *notes])


def _task(task: TaskResult) -> list[str]:
    low, high = task.difference.ci95
    counts = (task.only_baseline_right, task.only_candidate_right)
    return [
        task.task,
        task.metric if task.higher_is_better else f"{task.metric} (lower is better)",
        f"{task.items:,}",
        f"{task.baseline:.4f}",
        f"{task.candidate:.4f}",
        f"{task.difference.value:+.4f} [{low:+.4f}, {high:+.4f}]",
        *("-" if count is None else f"{count:,}" for count in counts),
        "-" if task.mcnemar_p is None else significant(task.mcnemar_p, 2),
    ]


def generation_part(report: ComparisonReport) -> Part | None:
    """How long greedy continuations stay the same; None where none were made."""
    found = report.accuracy.generation if report.accuracy else None
    if found is None:
        return None
    same = sorted(found.first_divergence)
    rows = [
        ["prompts", f"{found.prompts:,}, of {found.prompt_tokens:,} tokens"],
        ["tokens generated for each", f"{found.new_tokens:,}"],
        ["the whole continuation is the same", f"{100 * found.exact_match:.1f} % of prompts"],
    ]
    if same:
        middle = (same[(len(same) - 1) // 2] + same[len(same) // 2]) / 2
        rows.append(["same tokens before the first that differs, median", f"{middle:g}"])
    grid = Grid("Greedy continuations of the same prompts", ["what", "value"], rows)
    return Part("generation", "Generation agreement", [grid])


def long_context_part(report: ComparisonReport) -> Part | None:
    """Needles and long-range perplexity by length; None where not measured."""
    lengths = report.accuracy.long_context if report.accuracy else []
    if not lengths:
        return None
    header = [
        "context, tokens", "needles", "found by baseline", "found by candidate",
        "baseline perplexity", "candidate perplexity",
    ]  # fmt: skip
    rows = [_length(entry) for entry in lengths]
    grid = Grid("Long context", header, rows, right=range(6))
    note = Note("Perplexity is that of the last tokens of samples that long; lower is better.")
    return Part("long-context", "Long context", [grid, note])


def _length(entry: LongContext) -> list[str]:
    shares = (entry.needle_baseline, entry.needle_candidate)
    pair = entry.perplexity
    perplexities = (None, None) if pair is None else (pair.baseline, pair.candidate)
    return [
        f"{entry.context_length:,}",
        f"{entry.needles:,}" if entry.needles else "-",
        *("-" if share is None else f"{100 * share:.0f} %" for share in shares),
        *("-" if value is None else significant(value) for value in perplexities),
    ]


def embeddings_part(report: ComparisonReport) -> Part | None:
    """How near both arms' sentence embeddings are; None for models that give none."""
    found = report.accuracy.embeddings if report.accuracy else None
    if found is None:
        return None
    rows = [
        ["texts", f"{found.texts:,}"],
        ["cosine of both arms, mean", f"{found.cosine:.4f}"],
        *_interval_row(found),
        ["cosine of both arms, lowest", f"{found.lowest_cosine:.4f}"],
        ["agreement in the ranking of pairs (Spearman)", f"{found.rank_agreement:.4f}"],
    ]
    grid = Grid("Sentence embeddings of the same texts", ["what", "value"], rows, right=(1,))
    return Part("embeddings", "Embeddings", [grid])


def _interval_row(found: EmbeddingAgreement) -> list[list[str]]:
    if found.cosine_interval is None:
        return []
    low, high = found.cosine_interval.ci95
    return [["its 95 % interval over texts", f"[{low:.4f}, {high:.4f}]"]]
