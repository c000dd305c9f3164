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
    GenerationAgreement,
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
from exporter.compare.arms import ComparedArm, Pair
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
from exporter.compare.kept import judged_once
from exporter.compare.timing.statistics import estimate_between, times_of, verdict_of_interval
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Clusters
from exporter.models.ablation.embeddings import MULTI_LABEL
from exporter.models.residual_stream import classes_of_texts, ranks_pairs
from exporter.models.sentence_folder import pooling_of, why_not_whole
from exporter.models.texts.images import Images
from exporter.models.texts.passages import LONGEST_PAIR, LONGEST_PASSAGE, pairs_of
from exporter.models.texts.sources import TextSource

_PRUNED = ("candidate", FLOAT_CANDIDATE)
_ALIKE = (
    *("scheme", "method", "block_size", "symmetric", "accuracy_level"),
    *("embedding_bits", "head_bits"),
)
"""What both quantised models must have in common; how many products there are they can't."""


GridAccuracy = dict[str, float | Interval | None]
"""How good one arm's answers are, held against the whole model in float; by fields of a Corner."""


def quantization_grid(
    pair: Pair, rows: Sequence[LatencyRow], answers: Mapping[str, GridAccuracy]
) -> list[Corner]:
    """All of them, the whole model in float first; none for a pair alone."""
    return [
        Corner(
            arm=name,
            whole=whole,
            pruned=_is_pruned(pair, name),
            quantized=_is_quantized(pair, name),
            file_bytes=pair.judged[name].facts.file_bytes,
            speedups=_speedups(rows, pair.whole, name),
            over_whole={} if whole is None else _speedups(rows, whole, name),
            verdicts={} if whole is None else _verdicts(rows, whole, name),
        ).model_copy(update=answers.get(name, {}))
        for name, whole in wholes_alike(pair).items()
    ]


def wholes_alike(pair: Pair) -> dict[str, str | None]:
    """By arm the whole model in the same form, if that is another arm."""
    wholes = [name for name in pair.grid if not _is_pruned(pair, name)]
    return {name: _alike(pair, wholes, name) for name in pair.grid}


def _is_pruned(pair: Pair, name: str) -> bool:
    """By the arm's place among the usual four; a further one says so itself."""
    return bool(pair.references[name].plan()) if name in pair.also else name in _PRUNED


def _is_quantized(pair: Pair, name: str) -> bool:
    """Likewise."""
    if pair.has_floats and name not in pair.also:
        return name not in (FLOAT_BASELINE, FLOAT_CANDIDATE)
    return pair.judged[name].quantization is not None


def _alike(pair: Pair, wholes: Sequence[str], name: str) -> str | None:
    """The whole model in the same form as a cut one, if it is among the arms.

    The arms of a pair are of one form, also where their graphs don't say how they were quantised.
    """
    if name == "candidate":
        return "baseline"
    own = _form(pair.judged[name])
    result = (whole for whole in wholes if _form(pair.judged[whole]) == own)
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


def _verdicts(rows: Sequence[LatencyRow], whole: str, name: str) -> dict[str, VerdictWord]:
    """The row's own of its two arms; of others that of the interval."""
    return {
        row.shape_name: row.verdict
        if (whole, name) == ("baseline", "candidate")
        else verdict_of_interval(estimate_between(row, whole, name).interval(), row.rounds)
        for row in rows
        if {name, whole} <= times_of(row).keys()
    }


def refuse_no_grid(pair: Pair) -> None:
    """Refuses arms that aren't one model, whole and cut, in float and quantised alike.

    What a graph doesn't note of itself can't be held against it.
    """
    if not pair.has_floats:
        return
    arms = pair.judged
    for name in (FLOAT_BASELINE, FLOAT_CANDIDATE):
        if record := arms[name].quantization:
            raise ComparisonError(
                f"The {name} {arms[name].folder.onnx} is quantised ({record.scheme}).",
                "Give the model that it was quantised from.",
                code="baseline-quantized",
            )
    for name, of in (("baseline", FLOAT_BASELINE), ("candidate", FLOAT_CANDIDATE)):
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
    records = [pair.baseline.quantization, pair.candidate.quantization]
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
    pair: Pair,
    texts: TextSource,
    other: TextSource | None = None,
    *,
    store: Store | None = None,
) -> AccuracyResult:
    """Judges all arms that are judged on the same tokens; each reads them once."""
    check_questions(pair)
    refuse_without_config(pair)
    every = [texts, *([] if other is None else [other])]
    return judged_once(
        pair, every, store, TypeAdapter(AccuracyResult), lambda: _judged(pair, texts, other)
    )


def _judged(pair: Pair, texts: TextSource, other: TextSource | None) -> AccuracyResult:
    if isinstance(texts, Images):
        return _of_images(pair, texts)
    outputs = {spec.name: spec.shape for spec in pair.baseline.runner.outputs}
    per_text = len(outputs.get(LOGITS, ())) == 2
    if LOGITS in outputs and not (per_text or pair.baseline.folder.classifies):
        return _of_text(pair, texts, other)
    if other is not None:
        pair.progress.say(f"accuracy: {other.source} is left out, there is no perplexity")
    if LOGITS in outputs:
        return _of_classes(pair, texts)
    embedded = _of_embeddings(pair, texts)
    if embedded is None:
        pair.progress.say("accuracy: left out, the models have no output called logits")
    return embedded or AccuracyResult()


def _of_text(pair: Pair, texts: TextSource, other: TextSource | None) -> AccuracyResult:
    """For models that predict tokens."""
    tokens = _tokens(pair, texts)
    accuracies = _predictions(pair, tokens)
    there = {} if other is None else _predictions(pair, _tokens(pair, other))
    generated = generation_agreements(pair, tokens)
    more = {
        "other": _other(there[pair.held_against[0]]) if there else None,
        "generation": generated.get(("baseline", "candidate")),
        "answers": sample_answers(pair),
        "tasks": task_results(pair),
    }
    own = accuracies["baseline", "candidate"].model_copy(update=more)
    grid = _grid(pair.whole, wholes_alike(pair), accuracies, generated, there) if pair.grid else ()
    return AccuracyResult(own, dict(grid))


def _other(accuracy: Accuracy) -> OtherText:
    return OtherText(**{name: getattr(accuracy, name) for name in OtherText.model_fields})


def _predictions(pair: Pair, tokens: EvaluationTokens) -> dict[tuple[str, str], Accuracy]:
    """All that one pass over a text tells, by what is held against what."""
    check_tokens(int(tokens.token_ids.max()), pair.vocabulary())
    pair.progress.say(f"accuracy: on {tokens.source}, {tokens.token_ids.size} tokens")
    alike = ((whole, name) for name, whole in wholes_alike(pair).items() if whole)
    pairs = list(dict.fromkeys([*pair.held_against, *alike]))
    causal = predicts_next_token(pair.baseline.runner, pair.baseline.folder)
    accuracies = compare_predictions(
        {name: arm.runner for name, arm in pair.judged.items()},
        pairs,
        tokens,
        causal=causal and tokens.is_text,
        progress=pair.progress,
    )
    return dict(zip(pairs, accuracies, strict=True))


def _grid(
    whole: str,
    alike: Mapping[str, str | None],
    predictions: Mapping[tuple[str, str], Accuracy],
    texts: Mapping[tuple[str, str], GenerationAgreement],
    there: Mapping[tuple[str, str], Accuracy],
) -> Iterator[tuple[str, GridAccuracy]]:
    """What was found against the whole model in float, whose own is its perplexity alone."""
    for names, prediction in predictions.items():
        if names[0] != whole:
            continue
        pair, text = prediction.perplexity, texts.get(names)
        other = there[names].perplexity if there else None
        form = alike.get(names[1]) or ""
        own: GridAccuracy = {
            "perplexity": pair.candidate if pair else None,
            "other_perplexity": other.candidate if other else None,
            "log_perplexity_increase": _increase(predictions, (form, names[1])),
            "other_log_perplexity_increase": _increase(there, (form, names[1])),
            "kl_divergence": prediction.kl_divergence,
            "top1_agreement": prediction.top1_agreement,
            "exact_match": text.exact_match if text else None,
        }
        perplexities = {"perplexity": pair, "other_perplexity": other}
        yield whole, {name: two.baseline for name, two in perplexities.items() if two}
        yield names[1], own


def _increase(
    predictions: Mapping[tuple[str, str], Accuracy], names: tuple[str, str]
) -> Interval | None:
    return predictions[names].log_perplexity_increase if names in predictions else None


def _tokens(pair: Pair, texts: TextSource) -> EvaluationTokens:
    options, folder = pair.options, pair.baseline.folder
    longest = folder.longest_sequence or options.eval_sequence_length
    length = min(options.eval_sequence_length, options.eval_tokens, longest)
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        return random_ids(
            pair.vocabulary(),
            sequence_length=length,
            tokens=options.eval_tokens,
        )
    return tokenize(
        texts,
        tokenizer,
        sequence_length=length,
        tokens=options.eval_tokens,
        separator_id=folder.end_of_text,
    )


def _of_classes(pair: Pair, texts: TextSource) -> AccuracyResult:
    """For classifiers of texts or of their tokens, on passages of the text or on pairs."""
    most = _EMBEDDED_TEXTS if _classes(pair.baseline) is None else MOST_JUDGED
    passages = _pairs(pair, texts) or _passages(pair, texts, most)
    what = "texts" if passages.types is None else "pairs of texts"
    pair.progress.say(f"accuracy: classes of {len(passages.ids)} {what} from {passages.source}")
    said = {name: _classes_of(arm, name, passages, pair) for name, arm in pair.judged.items()}
    accuracies = {
        names: compare_classes(
            *(said[name] for name in names),
            source=passages.source,
            sha256=passages.sha256,
            clusters=passages.clusters(in_pairs=_classes(pair.baseline) == 1),
            orders=_classes(pair.baseline) == 1,
        )
        for names in pair.held_against
    }
    more = {"tasks": task_results(pair)}
    own = accuracies["baseline", "candidate"].model_copy(update=more)
    grid = _grid(pair.whole, {}, accuracies, {}, {}) if pair.grid else ()
    return AccuracyResult(own, dict(grid))


def _classes(arm: ComparedArm) -> int | str | None:
    """How many classes an arm gives each text; None where it gives them to tokens."""
    return classes_of_texts(next(s.shape for s in arm.runner.outputs if s.name == LOGITS))


def _scores_pairs(arm: ComparedArm) -> bool:
    """Whether an arm is a reranker, as ``scores_pairs``."""
    return ranks_pairs(_classes(arm), arm.folder.config.get("problem_type"))


def _of_images(pair: Pair, images: Images) -> AccuracyResult:
    """For classifiers of images."""
    accuracies = judge_images(pair, images)
    grid = _grid(pair.whole, {}, accuracies, {}, {}) if pair.grid else ()
    return AccuracyResult(accuracies["baseline", "candidate"], dict(grid))


def _classes_of(
    arm: ComparedArm, name: str, texts: _Passages, pair: Pair
) -> list[NDArray[np.float64]]:
    """What an arm says of texts; of a reranker, of each two of them."""
    of_texts = _classes(arm) is not None
    floats = class_log_probabilities(
        arm.runner,
        texts.ids,
        arm=name,
        types=texts.types,
        separate=of_texts and arm.folder.config.get("problem_type") == MULTI_LABEL,
        progress=pair.progress,
    )
    return in_pairs(floats) if _classes(arm) == 1 else floats


def _of_embeddings(pair: Pair, texts: TextSource) -> AccuracyResult | None:
    """For encoders: passages of the text embedded; None for models that embed nothing."""
    runner = pair.baseline.runner
    if embedding_output(runner.outputs) is None:
        return None
    if runner.capabilities.shapes == "compiled":
        pair.progress.say(f"embeddings: left out, {runner.backend} would compile each length")
        return None
    passages = _passages(pair, texts, _EMBEDDED_TEXTS)
    pair.progress.say(f"accuracy: embeddings of {len(passages.ids)} texts from {passages.source}")
    refuse_few_texts(passages.ids)
    home = pair.baseline.folder.home
    pooling = pooling_of(home)
    if why := why_not_whole(home):
        pair.progress.say(f"embeddings: by {' and '.join(pooling.modes)} alone; {why}")
    vectors = {
        name: embed(arm.runner, passages.ids, arm=name, pooling=pooling, progress=pair.progress)
        for name, arm in pair.judged.items()
    }
    agreements = {
        names: compare_embeddings(vectors[names[0]], vectors[names[1]], passages.documents)
        for names in pair.held_against
    }
    own = Accuracy(
        text_source=passages.source,
        text_sha256=passages.sha256,
        tokens=sum(map(len, passages.ids)),
        perplexity=None,
        kl_divergence=None,
        top1_agreement=None,
        embeddings=agreements["baseline", "candidate"],
        tasks=task_results(pair),
    )
    return AccuracyResult(
        own,
        {
            second: {"embedding_cosine": agreement.cosine}
            for (first, second), agreement in agreements.items()
            if pair.grid and first == pair.whole
        },
    )


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


def _pairs(pair: Pair, texts: TextSource) -> _Passages | None:
    """Pairs, as a reranker reads them; None for models and texts without."""
    folder = pair.baseline.folder
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    pairs = pairs_of(texts) if _scores_pairs(pair.baseline) else texts.pairs
    if tokenizer is None or not pairs or _classes(pair.baseline) is None:
        return None
    longest = min(LONGEST_PAIR, folder.longest_sequence or LONGEST_PAIR)
    drawn = tokenize_pairs(texts, tokenizer, most=MOST_JUDGED, longest=longest)
    check_tokens(max(int(array.max()) for array in drawn.ids), pair.vocabulary())
    return _Passages(drawn.ids, texts.source, texts.sha256, drawn.types, drawn.documents)


def _passages(pair: Pair, texts: TextSource, most: int) -> _Passages:
    """Passages of the text; random tokens where neither arm has a tokenizer."""
    folder = pair.baseline.folder
    longest = min(LONGEST_PASSAGE, folder.longest_sequence or LONGEST_PASSAGE)
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        drawn = random_ids(pair.vocabulary(), sequence_length=longest, tokens=most * longest)
        return _Passages([*drawn.token_ids], drawn.source, drawn.sha256)
    ids, _, documents = tokenize_passages(texts, tokenizer, most=most, longest=longest)
    check_tokens(max((int(array.max()) for array in ids), default=0), pair.vocabulary())
    return _Passages(ids, texts.source, texts.sha256, documents=documents)
