"""How far the candidate's answers are from the baseline's, on the evaluation text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.artifacts import Accuracy
from exporter.compare.arms import Pair
from exporter.compare.continuations import generation_agreement, long_contexts
from exporter.compare.embeddings import embedding_accuracy
from exporter.compare.tasks import check_questions, task_results

if TYPE_CHECKING:
    from exporter.measure.evaluation import EvaluationTokens
    from exporter.texts import TextSource


def accuracy(pair: Pair, texts: TextSource) -> Accuracy | None:
    """Judges both arms on the same tokens; None for models with neither logits nor embeddings.

    Raises:
        ComparisonError: For a text that is too short or of other tokens, and for logits that
            aren't finite.
        TaskError: A task is not known, or its items can't be read.
        BackendError: A run fails.
    """
    from exporter.measure.inputs import has_cache
    from exporter.measure.quality.agreement import check_tokens, compare_predictions
    from exporter.measure.quality.predictions import LOGITS

    check_questions(pair)
    baseline = pair.baseline
    if LOGITS not in {spec.name for spec in baseline.runner.outputs}:
        found_embeddings = embedding_accuracy(pair, texts)
        if found_embeddings is None:
            pair.progress.say("accuracy: left out, the models have no output called logits")
        return found_embeddings
    tokens = _tokens(pair, texts)
    check_tokens(int(tokens.token_ids.max()), pair.vocabulary())
    pair.progress.say(f"accuracy: on {tokens.source}, {tokens.token_ids.size} tokens")
    causal = has_cache(baseline.runner.inputs) or baseline.folder.predicts_next_token
    found = compare_predictions(
        *pair.runners,
        tokens.token_ids,
        causal=causal and tokens.is_text,
        overlap=tokens.overlap,
        progress=pair.progress,
    )
    return Accuracy(
        text_source=tokens.source,
        text_sha256=tokens.sha256,
        stride=pair.options.quality.stride,
        generation=generation_agreement(pair, tokens),
        long_context=long_contexts(pair, texts),
        tasks=task_results(pair),
        **vars(found),
    )


def _tokens(pair: Pair, texts: TextSource) -> EvaluationTokens:
    from exporter.measure.evaluation import random_ids, tokenize

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
