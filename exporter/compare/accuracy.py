"""How far the candidate's answers are from the baseline's, on the evaluation text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from exporter.artifacts import (
    FLOAT_BASELINE,
    FLOAT_CANDIDATE,
    Accuracy,
    Corner,
    Interval,
    LatencyRow,
    OtherText,
    VerdictWord,
)
from exporter.artifacts.store import Store
from exporter.compare.agreement import (
    LOGITS,
    check_tokens,
    compare_predictions,
    predicts_next_token,
)
from exporter.compare.answers import (
    check_questions,
    generation_agreements,
    judge_images,
    refuse_without_config,
    sample_answers,
    task_results,
)
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.encoder_decoder.answers import JudgedPairs, judge_pairs
from exporter.compare.encoder_quality import (
    class_log_probabilities,
    compare_classes,
    compare_embeddings,
    embed,
    embedding_output,
    in_pairs,
    refuse_few_texts,
)
from exporter.compare.evaluation import (
    EvaluationTokens,
    random_ids,
    tokenize,
    tokenize_pairs,
    tokenize_passages,
)
from exporter.compare.intervals import MOST_JUDGED
from exporter.compare.kept import answered_by
from exporter.compare.timing.statistics import estimate_between, times_of, verdict_of_interval
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Clusters
from exporter.models.residual_stream import classes_of_texts, ranks_pairs
from exporter.models.sentence_folder import pooling_of, why_not_whole
from exporter.models.tasks import MULTI_LABEL
from exporter.models.texts.images import Images
from exporter.models.texts.passages import LONGEST_PAIR, LONGEST_PASSAGE, pairs_of
from exporter.models.texts.sources import TextSource

_ALIKE = (
    *("scheme", "method", "block_size", "symmetric", "accuracy_level"),
    *("embedding_bits", "head_bits"),
)
"""What both quantised models must have in common; how many products there are they can't."""


GridAccuracy = dict[str, float | Interval | None]
"""How good one arm's answers are, held against the whole model in float; by fields of a Corner."""


def quantization_grid(
    comparison: Comparison, rows: Sequence[LatencyRow], answers: Mapping[str, GridAccuracy]
) -> list[Corner]:
    """All of them, the whole model in float first; none for a pair alone."""
    return [
        Corner(
            arm=name,
            whole=whole,
            pruned=comparison.arms[name].is_pruned,
            quantized=comparison.arms[name].is_quantized,
            file_bytes=comparison.arms[name].facts.file_bytes,
            speedups=_speedups(rows, comparison.reference, name),
            over_whole={} if whole is None else _speedups(rows, whole, name),
            verdicts={} if whole is None else _verdicts(rows, (whole, name), comparison.pair),
        ).model_copy(update=answers.get(name, {}))
        for name, whole in wholes_alike(comparison).items()
    ]


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
    arms = comparison.arms
    if FLOAT_BASELINE not in arms:
        return
    for name in (FLOAT_BASELINE, FLOAT_CANDIDATE):
        if record := arms[name].quantization:
            raise ComparisonError(
                f"The {name} {arms[name].folder.onnx} is quantised ({record.scheme}).",
                "Give the model that it was quantised from.",
                code="baseline-quantized",
            )
    for name, of in zip(comparison.pair, (FLOAT_BASELINE, FLOAT_CANDIDATE), strict=True):
        quantized, original = arms[name], arms[of]
        if quantized.facts.sha256 == original.facts.sha256:
            raise ComparisonError(
                f"The {name} {quantized.folder.onnx} and its float form are the same file.",
                "Name the quantised models first, and what they were quantised from behind "
                "--float.",
                code="same-file",
            )
        if quantized.plan() != original.plan():
            raise ComparisonError(
                f"The {name} {quantized.folder.onnx} and its float form {original.folder.onnx} "
                "lack different sublayers, by their own metadata.",
                "Give the model that it was quantised from.",
                code="other-sublayers",
            )
    records = [arms[name].quantization for name in comparison.pair]
    for field in _ALIKE if all(records) else ():
        first, second = (getattr(record, field) for record in records)
        if first != second:
            raise ComparisonError(
                f"The baseline and the candidate are quantised in different ways: {field} is "
                f"{first} and {second}.",
                "Quantise both alike, or leave --float out.",
                code="quantized-differently",
            )


_EMBEDDED_TEXTS = 64


@dataclass(frozen=True)
class AccuracyResult:
    """The candidate held against the baseline, and all against the whole model in float."""

    accuracy: Accuracy | None = None  # of the pair; None where nothing could be judged
    grid: Mapping[str, GridAccuracy] = dataclasses.field(default_factory=dict)


def measure_accuracy(
    comparison: Comparison,
    texts: TextSource,
    other: TextSource | None = None,
    *,
    store: Store | None = None,
) -> AccuracyResult:
    """Judges all arms that are judged on the same tokens; each reads them once."""
    check_questions(comparison)
    refuse_without_config(comparison)
    every = [texts, *([] if other is None else [other])]
    return (store or Store(None)).once(
        "accuracy",
        TypeAdapter(AccuracyResult),
        lambda: _judged(comparison, texts, other),
        key=answered_by(comparison, every),
        on_found=lambda: comparison.progress.say("accuracy: kept from an earlier run"),
    )


Judgement = dict[tuple[str, str], Accuracy]
"""How far answers differ, by which arm is held against which, the other first."""


def _judged(comparison: Comparison, texts: TextSource, other: TextSource | None) -> AccuracyResult:
    judgement = _held_against(comparison, texts, other)
    own = judgement.get(comparison.pair)
    return AccuracyResult(own, dict(_grid(comparison, judgement)) if comparison.grid else {})


def _held_against(comparison: Comparison, texts: TextSource, other: TextSource | None) -> Judgement:
    if isinstance(texts, JudgedPairs):
        return {comparison.pair: judge_pairs(comparison, texts)}
    if isinstance(texts, Images):
        return judge_images(comparison, texts)
    outputs = {spec.name: spec.shape for spec in comparison.whole.runner.outputs}
    per_text = len(outputs.get(LOGITS, ())) == 2
    if LOGITS in outputs and not (per_text or comparison.whole.folder.classifies):
        judgement = _of_text(comparison, texts, other)
    else:
        if other is not None:
            comparison.progress.say(f"accuracy: {other.source} is left out, there is no perplexity")
        judge = _of_classes if LOGITS in outputs else _of_embeddings
        judgement = judge(comparison, texts)
    if own := judgement.get(comparison.pair):
        tasks = {"tasks": task_results(comparison)}
        return judgement | {comparison.pair: own.model_copy(update=tasks)}
    return judgement


def _of_text(comparison: Comparison, texts: TextSource, other: TextSource | None) -> Judgement:
    """For models that predict tokens."""
    tokens = _tokens(comparison, texts)
    judgement = _predictions(comparison, tokens)
    there = {} if other is None else _predictions(comparison, _tokens(comparison, other))
    generated = generation_agreements(comparison, tokens)
    for names, accuracy in judgement.items():
        more = {"generation": generated.get(names), "other": _other(there.get(names))}
        judgement[names] = accuracy.model_copy(update=more)
    answers = {"answers": sample_answers(comparison)}
    return judgement | {comparison.pair: judgement[comparison.pair].model_copy(update=answers)}


def _other(accuracy: Accuracy | None) -> OtherText | None:
    if accuracy is None:
        return None
    return OtherText(**{name: getattr(accuracy, name) for name in OtherText.model_fields})


def _predictions(comparison: Comparison, tokens: EvaluationTokens) -> Judgement:
    """All that one pass over a text tells, by what is held against what."""
    check_tokens(int(tokens.token_ids.max()), comparison.vocabulary())
    comparison.progress.say(f"accuracy: on {tokens.source}, {tokens.token_ids.size} tokens")
    alike = ((whole, name) for name, whole in wholes_alike(comparison).items() if whole)
    pairs = list(dict.fromkeys([*comparison.held_against, *alike]))
    causal = predicts_next_token(comparison.whole.runner, comparison.whole.folder)
    accuracies = compare_predictions(
        {name: arm.runner for name, arm in comparison.judged.items()},
        pairs,
        tokens,
        causal=causal and tokens.is_text,
        progress=comparison.progress,
    )
    return dict(zip(pairs, accuracies, strict=True))


def _grid(comparison: Comparison, judgement: Judgement) -> Iterator[tuple[str, GridAccuracy]]:
    """What was found against the whole model in float, whose own is its perplexity alone."""
    wholes = wholes_alike(comparison)
    for (first, name), accuracy in judgement.items():
        if first != comparison.reference:
            continue
        alike = judgement.get((wholes[name] or "", name))
        other, alike_there = accuracy.other, alike.other if alike else None
        perplexities = {
            "perplexity": accuracy.perplexity,
            "other_perplexity": other.perplexity if other else None,
        }
        increases = {"log_perplexity_increase": alike, "other_log_perplexity_increase": alike_there}
        yield first, {key: two.baseline for key, two in perplexities.items() if two}
        yield (
            name,
            {
                **{key: two.candidate for key, two in perplexities.items() if two},
                **{key: of.log_perplexity_increase for key, of in increases.items() if of},
                "kl_divergence": accuracy.kl_divergence,
                "top1_agreement": accuracy.top1_agreement,
                "exact_match": accuracy.generation.exact_match if accuracy.generation else None,
                "embedding_cosine": accuracy.embeddings.cosine if accuracy.embeddings else None,
            },
        )


def _tokens(comparison: Comparison, texts: TextSource) -> EvaluationTokens:
    options, folder = comparison.options, comparison.whole.folder
    longest = folder.longest_sequence or options.eval_sequence_length
    length = min(options.eval_sequence_length, options.eval_tokens, longest)
    if comparison.tokenizer is None:
        return random_ids(
            comparison.vocabulary(),
            sequence_length=length,
            tokens=options.eval_tokens,
        )
    return tokenize(
        texts,
        comparison.tokenizer,
        sequence_length=length,
        tokens=options.eval_tokens,
        separator_id=folder.end_of_text,
    )


def _of_classes(comparison: Comparison, texts: TextSource) -> Judgement:
    """For classifiers of texts or of their tokens, on passages of the text or on pairs."""
    most = _EMBEDDED_TEXTS if _classes(comparison.whole) is None else MOST_JUDGED
    passages = _pairs(comparison, texts) or _passages(comparison, texts, most)
    what = "texts" if passages.types is None else "pairs of texts"
    comparison.progress.say(
        f"accuracy: classes of {len(passages.ids)} {what} from {passages.source}"
    )
    said = {
        name: _classes_of(arm, name, passages, comparison)
        for name, arm in comparison.judged.items()
    }
    return {
        names: compare_classes(
            *(said[name] for name in names),
            source=passages.source,
            sha256=passages.sha256,
            clusters=passages.clusters(in_pairs=_classes(comparison.whole) == 1),
            orders=_classes(comparison.whole) == 1,
        )
        for names in comparison.held_against
    }


def _classes(arm: ComparedArm) -> int | str | None:
    """How many classes an arm gives each text; None where it gives them to tokens."""
    return classes_of_texts(next(s.shape for s in arm.runner.outputs if s.name == LOGITS))


def _scores_pairs(arm: ComparedArm) -> bool:
    """Whether an arm is a reranker, as ``scores_pairs``."""
    return ranks_pairs(_classes(arm), arm.folder.config.get("problem_type"))


def _classes_of(
    arm: ComparedArm, name: str, texts: _Passages, comparison: Comparison
) -> list[NDArray[np.float64]]:
    """What an arm says of texts; of a reranker, of each two of them."""
    of_texts = _classes(arm) is not None
    floats = class_log_probabilities(
        arm.runner,
        texts.ids,
        arm=name,
        types=texts.types,
        separate=of_texts and arm.folder.config.get("problem_type") == MULTI_LABEL,
        progress=comparison.progress,
    )
    return in_pairs(floats) if _classes(arm) == 1 else floats


def _of_embeddings(comparison: Comparison, texts: TextSource) -> Judgement:
    """For encoders: passages of the text embedded; nothing of models that embed nothing."""
    runner = comparison.whole.runner
    if embedding_output(runner.outputs) is None:
        comparison.progress.say("accuracy: left out, the models have no output called logits")
        return {}
    if runner.capabilities.shapes == "compiled":
        comparison.progress.say(f"embeddings: left out, {runner.backend} would compile each length")
        return {}
    passages = _passages(comparison, texts, _EMBEDDED_TEXTS)
    comparison.progress.say(
        f"accuracy: embeddings of {len(passages.ids)} texts from {passages.source}"
    )
    refuse_few_texts(passages.ids)
    home = comparison.whole.folder.home
    pooling = pooling_of(home)
    if why := why_not_whole(home):
        comparison.progress.say(f"embeddings: by {' and '.join(pooling.modes)} alone; {why}")
    vectors = {
        name: embed(
            arm.runner, passages.ids, arm=name, pooling=pooling, progress=comparison.progress
        )
        for name, arm in comparison.judged.items()
    }
    known = Accuracy(
        text_source=passages.source,
        text_sha256=passages.sha256,
        tokens=sum(map(len, passages.ids)),
        perplexity=None,
        kl_divergence=None,
        top1_agreement=None,
    )
    return {
        (one, two): known.model_copy(
            update={
                "embeddings": compare_embeddings(vectors[one], vectors[two], passages.documents)
            }
        )
        for one, two in comparison.held_against
    }


@dataclass(frozen=True)
class _Passages:
    """The tokens of each, ``[length]``, and where they are from; of pairs which text each is of."""

    ids: list[NDArray[np.int64]]
    source: str
    sha256: str
    types: list[NDArray[np.int64]] | None = None
    documents: Clusters = None

    def clusters(self, *, in_pairs: bool) -> Clusters:
        """Of which document each text is, or each two."""
        return self.documents[::2] if in_pairs and self.documents is not None else self.documents


def _pairs(comparison: Comparison, texts: TextSource) -> _Passages | None:
    """Pairs, as a reranker reads them; None for models and texts without."""
    folder = comparison.whole.folder
    pairs = pairs_of(texts) if _scores_pairs(comparison.whole) else texts.pairs
    if comparison.tokenizer is None or not pairs or _classes(comparison.whole) is None:
        return None
    longest = min(LONGEST_PAIR, folder.longest_sequence or LONGEST_PAIR)
    drawn = tokenize_pairs(texts, comparison.tokenizer, most=MOST_JUDGED, longest=longest)
    check_tokens(max(int(array.max()) for array in drawn.ids), comparison.vocabulary())
    return _Passages(drawn.ids, texts.source, texts.sha256, drawn.types, drawn.documents)


def _passages(comparison: Comparison, texts: TextSource, most: int) -> _Passages:
    """Passages of the text; random tokens where neither arm has a tokenizer."""
    folder = comparison.whole.folder
    longest = min(LONGEST_PASSAGE, folder.longest_sequence or LONGEST_PASSAGE)
    if comparison.tokenizer is None:
        drawn = random_ids(comparison.vocabulary(), sequence_length=longest, tokens=most * longest)
        return _Passages([*drawn.token_ids], drawn.source, drawn.sha256)
    ids, _, documents = tokenize_passages(texts, comparison.tokenizer, most=most, longest=longest)
    check_tokens(max((int(array.max()) for array in ids), default=0), comparison.vocabulary())
    return _Passages(ids, texts.source, texts.sha256, documents=documents)
