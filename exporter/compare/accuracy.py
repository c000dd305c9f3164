"""How far the candidate's answers are from the baseline's, on the evaluation text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from exporter.artifacts import (
    FLOAT_BASELINE,
    FLOAT_CANDIDATE,
    Accuracy,
    Corner,
    Interval,
    LatencyRow,
    VerdictWord,
)
from exporter.artifacts.figures import FIGURES
from exporter.artifacts.store import Store
from exporter.compare.agreement import embedding_output
from exporter.compare.answers import Answers, Classes, Embeddings, Judgement, Pictures, Tokens
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.generations import check_questions
from exporter.compare.kept import answered_by
from exporter.compare.sequences import Sequences
from exporter.compare.timing.statistics import estimate_between, times_of, verdict_of_interval
from exporter.errors import ComparisonError
from exporter.models.texts.sources import TextSource

_ALIKE = (
    *("scheme", "method", "block_size", "symmetric", "accuracy_level"),
    *("embedding_bits", "head_bits"),
)
"""What both quantised models must have in common; how many products there are they can't."""


def quantization_grid(
    comparison: Comparison, rows: Sequence[LatencyRow], answers: Mapping[str, Corner]
) -> list[Corner]:
    """All of them, the whole model in float first; none for a pair alone."""
    return [
        answers.get(name, _corner(comparison, name, whole)).model_copy(
            update={
                "speedups": _speedups(rows, comparison.reference, name),
                "over_whole": {} if whole is None else _speedups(rows, whole, name),
                "verdicts": {}
                if whole is None
                else _verdicts(rows, (whole, name), comparison.pair),
            }
        )
        for name, whole in wholes_alike(comparison).items()
    ]


def _corner(comparison: Comparison, name: str, whole: str | None, **known: Any) -> Corner:
    arm = comparison.arms[name]
    return Corner(arm=name, whole=whole, pruned=arm.is_pruned, quantized=arm.is_quantized, **known)


def wholes_alike(comparison: Comparison) -> dict[str, str | None]:
    """By arm the whole model in the same form, if that is another arm."""
    wholes = [name for name in comparison.grid if not comparison.arms[name].is_pruned]
    return {name: _alike(comparison, wholes, name) for name in comparison.grid}


def _alike(comparison: Comparison, wholes: Sequence[str], name: str) -> str | None:
    """The whole model in the same form as a cut one, if it is among the arms.

    The arms of a pair are of one form, also where their graphs don't say how they were quantised.
    """
    if name == comparison.pair[1]:
        return comparison.pair[0]
    own = _form(comparison.judged[name])
    result = (whole for whole in wholes if _form(comparison.judged[whole]) == own)
    return None if name in wholes else next(result, None)


def _form(arm: ComparedArm) -> list[object]:
    record = arm.quantization
    return [arm.facts.precision, *(getattr(record, field, None) for field in _ALIKE)]


def _speedups(rows: Sequence[LatencyRow], whole: str, name: str) -> dict[str, Interval]:
    intervals = {}
    for row in rows if whole != name else ():
        if {name, whole} <= times_of(row).keys():
            speedup = estimate_between(row, whole, name).speedup()
            intervals[row.shape_name] = Interval(value=speedup.ratio, ci95=speedup.ci95)
    return intervals


def _verdicts(
    rows: Sequence[LatencyRow], names: tuple[str, str], own: tuple[str, str]
) -> dict[str, VerdictWord]:
    """The row's own of its two arms; of others that of the interval."""
    return {
        row.shape_name: row.verdict
        if names == own
        else verdict_of_interval(estimate_between(row, *names).interval(), row.rounds)
        for row in rows
        if {*names} <= times_of(row).keys()
    }


def refuse_no_grid(comparison: Comparison) -> None:
    """Refuses arms that aren't one model, whole and cut, in float and quantised alike.

    What a graph doesn't note of itself can't be held against it.
    """
    arms, broken = comparison.arms, dict[str, bool]()
    if FLOAT_BASELINE not in arms:
        return
    for name, of in zip(comparison.pair, (FLOAT_BASELINE, FLOAT_CANDIDATE), strict=True):
        quantized, original = arms[name], arms[of]
        file, record = original.folder.onnx, original.quantization
        same = quantized.facts.sha256 == original.facts.sha256
        broken |= {
            f"The {of} {file} is quantised ({record and record.scheme})": record is not None,
            f"The {name} {quantized.folder.onnx} and its float form are the same file": same,
            f"The {name} {quantized.folder.onnx} and its float form {file} lack different "
            "sublayers, by their own metadata": quantized.plan() != original.plan(),
        }
    records = [arms[name].quantization for name in comparison.pair]
    for field in _ALIKE if all(records) else ():
        first, second = (getattr(record, field) for record in records)
        words = f"The baseline and the candidate differ in how they are quantised: {field}"
        broken[f"{words} is {first} and {second}"] = first != second
    if words := next((words for words, differs in broken.items() if differs), ""):
        raise ComparisonError(
            f"{words}.",
            "Quantise both alike, name these first, and behind --float what they were quantised "
            "from.",
            code="no-grid",
        )


@dataclass(frozen=True)
class AccuracyResult:
    """The candidate held against the baseline, and all against the whole model in float."""

    accuracy: Accuracy | None = None  # of the pair; None where nothing could be judged
    grid: Mapping[str, Corner] = dataclasses.field(default_factory=dict)


KINDS: list[type[Answers]] = [Sequences, Pictures, Tokens, Classes, Embeddings]
"""In the order in which arms are asked whether they answer so."""


def measure_accuracy(
    comparison: Comparison,
    texts: TextSource,
    other: TextSource | None = None,
    *,
    store: Store | None = None,
) -> AccuracyResult:
    """Judges all arms that are judged on the same tokens; each reads them once."""
    check_questions(comparison)
    every = [texts, *([] if other is None else [other])]
    return (store or Store(None)).once(
        "accuracy",
        TypeAdapter(AccuracyResult),
        lambda: _judged(comparison, texts, other),
        key=answered_by(comparison, every),
        on_found=lambda: comparison.progress.say("accuracy: kept from an earlier run"),
    )


def _judged(comparison: Comparison, texts: TextSource, other: TextSource | None) -> AccuracyResult:
    say = comparison.progress.say
    kind = answers_of(comparison, texts)
    if kind is None:
        embeds = embedding_output(comparison.whole.runner.outputs) is not None
        why = (
            "the models would be compiled for the length of each text"
            if embeds
            else "the models have no output called logits and none that embeds texts"
        )
        say(f"accuracy: left out, {why}")
        return AccuracyResult()
    say(f"accuracy: {kind.words}")
    there = None
    if other is not None:
        there = type(kind).of(comparison, other) if kind.has_perplexity else None
        left_out = f"{other.source} is left out, there is no perplexity"
        say(f"accuracy: {there.words if there else left_out}")
    alike = ((whole, name) for name, whole in wholes_alike(comparison).items() if whole)
    judgement = kind.judge(
        comparison, list(dict.fromkeys([*comparison.held_against, *alike])), there
    )
    grid = {one.arm: one for one in _grid(comparison, judgement)} if comparison.grid else {}
    return AccuracyResult(judgement[comparison.pair], grid)


def answers_of(comparison: Comparison, texts: TextSource) -> Answers | None:
    """What arms are judged by on a text; None where they can't be."""
    kinds = (kind.of(comparison, texts) for kind in KINDS)
    return next((kind for kind in kinds if kind is not None), None)


def _grid(comparison: Comparison, judgement: Judgement) -> Iterator[Corner]:
    """What was found against the whole model in float, whose own is its perplexity alone."""
    wholes = wholes_alike(comparison)
    for (first, name), accuracy in judgement.items():
        if first != comparison.reference:
            continue
        alike = judgement.get((wholes[name] or "", name))
        figures = [figure for figure in FIGURES if figure.column]
        own = [(figure.key, one) for figure in figures for one in figure.readings(accuracy)]
        rises = [(figure.key, one) for figure in figures for one in figure.readings(alike)]
        whole = {key: one.before for key, one in own if one.before is not None}
        yield _corner(comparison, first, None, figures=whole)
        changes = {k: one.interval for k, one in rises if one.interval and one.before is not None}
        values = {key: one.value for key, one in own}
        yield _corner(comparison, name, wholes[name], figures=values, rises=changes)
