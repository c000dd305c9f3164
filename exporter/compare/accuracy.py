"""How far the candidate's answers are from the baseline's, on the evaluation text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from exporter.artifacts import Accuracy, GenerationAgreement, LongContext
from exporter.artifacts.store import Store
from exporter.compare.arms import FLOAT_BASELINE, Pair
from exporter.compare.continuations import generation_agreements, long_contexts
from exporter.compare.corners import CornerQuality
from exporter.compare.embeddings import embedding_accuracy
from exporter.compare.judgement import Judgement
from exporter.compare.kept import Answers
from exporter.compare.task_answers import check_questions, task_results

if TYPE_CHECKING:
    from exporter.compare.evaluation import EvaluationTokens
    from exporter.compare.quality.agreement import Agreement
    from exporter.models.texts import TextSource


def judge(pair: Pair, texts: TextSource, store: Store | None = None) -> Judgement:
    """Judges all arms that are judged on the same tokens; each reads them once.

    Args:
        pair: Running arms.
        texts: What they are judged on.
        store: What an earlier run had found, and where this one keeps what it finds.

    Raises:
        ComparisonError: For a text that is too short or of other tokens, and for logits that
            aren't finite.
        TaskError: A task is not known, or its items can't be read.
        BackendError: A run fails.
    """
    from exporter.compare.quality.predictions import LOGITS

    check_questions(pair)
    answers = Answers(pair, texts, store)
    if LOGITS in {spec.name for spec in pair.baseline.runner.outputs}:
        return _of_text(pair, texts, answers)
    embedded = answers.found(
        "embeddings", TypeAdapter(Judgement | None), lambda: embedding_accuracy(pair, texts)
    )
    if embedded is None:
        pair.progress.say("accuracy: left out, the models have no output called logits")
    return embedded or Judgement()


def _of_text(pair: Pair, texts: TextSource, answers: Answers) -> Judgement:
    """For models that predict tokens."""
    from exporter.compare.quality.agreement import check_tokens

    tokens = _tokens(pair, texts)
    check_tokens(int(tokens.token_ids.max()), pair.vocabulary())
    pair.progress.say(f"accuracy: on {tokens.source}, {tokens.token_ids.size} tokens")
    told = _predictions(pair, tokens, answers)
    generated = answers.found(
        "generation",
        TypeAdapter(list[tuple[tuple[str, str], GenerationAgreement]]),
        lambda: list(generation_agreements(pair, tokens).items()),
    )
    texts_of = dict(generated)
    own = Accuracy(
        text_source=tokens.source,
        text_sha256=tokens.sha256,
        stride=pair.options.quality.stride,
        generation=texts_of.get(("baseline", "candidate")),
        long_context=answers.found(
            "long contexts", TypeAdapter(list[LongContext]), lambda: long_contexts(pair, texts)
        ),
        tasks=task_results(pair, answers),
        **vars(told["baseline", "candidate"]),
    )
    return Judgement(own, dict(_corners(told, texts_of)))


def _predictions(
    pair: Pair, tokens: EvaluationTokens, answers: Answers
) -> dict[tuple[str, str], Agreement]:
    """All that one pass over the text tells, by what is held against what."""
    from exporter.compare.quality.agreement import Agreement, compare_predictions
    from exporter.engines.inputs import has_cache

    baseline = pair.baseline
    causal = has_cache(baseline.runner.inputs) or baseline.folder.predicts_next_token
    found = answers.found(
        "predictions",
        TypeAdapter(list[Agreement]),
        lambda: compare_predictions(
            {name: arm.runner for name, arm in pair.judged.items()},
            pair.held_against,
            tokens.token_ids,
            causal=causal and tokens.is_text,
            overlap=tokens.overlap,
            progress=pair.progress,
        ),
    )
    return dict(zip(pair.held_against, found, strict=True))


def _corners(
    predictions: Mapping[tuple[str, str], Agreement],
    texts: Mapping[tuple[str, str], GenerationAgreement],
) -> Iterator[tuple[str, CornerQuality]]:
    """What was found against the whole model in float, whose own is its perplexity alone."""
    for names, found in predictions.items():
        if names[0] != FLOAT_BASELINE:
            continue
        pair, text = found.perplexity, texts.get(names)
        own = CornerQuality(
            perplexity=pair.candidate if pair else None,
            kl_divergence=found.kl_divergence,
            top1_agreement=found.top1_agreement,
            exact_match=text.exact_match if text else None,
        )
        yield FLOAT_BASELINE, CornerQuality(perplexity=pair.baseline if pair else None)
        yield names[1], own


def _tokens(pair: Pair, texts: TextSource) -> EvaluationTokens:
    from exporter.compare.evaluation import random_ids, tokenize

    options, folder = pair.options, pair.baseline.folder
    longest = folder.longest_sequence or options.eval_sequence_length
    length = min(options.eval_sequence_length, options.eval_tokens, longest)
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        return random_ids(
            pair.vocabulary(),
            sequence_length=length,
            tokens=options.eval_tokens,
            stride=options.quality.stride,
        )
    return tokenize(
        texts,
        tokenizer,
        sequence_length=length,
        tokens=options.eval_tokens,
        separator_id=folder.end_of_text,
        stride=options.quality.stride,
    )
