"""What both arms do beyond the next token: greedy continuations, and long contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.artifacts import GenerationAgreement, LongContext
from exporter.compare.arms import Pair
from exporter.errors import BackendError, ComparisonError

if TYPE_CHECKING:
    from exporter.measure.evaluation import EvaluationTokens
    from exporter.texts import TextSource

_PROMPT_TOKENS = 64
_LONG_SAMPLES = 2


def generation_agreement(pair: Pair, tokens: EvaluationTokens) -> GenerationAgreement | None:
    """Continues beginnings of the evaluation text; None for random tokens or without a cache.

    Raises:
        BackendError: A run fails.
    """
    from exporter.generation.agreement import compare_continuations
    from exporter.generation.open_decoder import decoder_on
    from exporter.generation.text_model import TextModel
    from exporter.measure.inputs import has_cache
    from exporter.tasks.choosing import batch_size, takes_any_shape

    quality, folder = pair.options.quality, pair.baseline.folder
    runners = pair.runners
    if not quality.agreement_prompts or not (tokens.is_text and has_cache(runners[0].inputs)):
        return None
    if not takes_any_shape(runners[0]):
        pair.progress.say("generation: left out, torch.compile would compile each of its steps")
        return None
    prompt = min(_PROMPT_TOKENS, tokens.token_ids.shape[1])
    longest = folder.longest_sequence
    if longest is not None and prompt + quality.agreement_tokens > longest:
        pair.progress.say(f"generation: left out, the model ends at {longest} positions")
        return None
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    with decoder_on(runners[0]) as baseline, decoder_on(runners[1]) as candidate:
        try:
            for decoder in (baseline, candidate):
                decoder.refuse_unfit(1, prompt, quality.agreement_tokens)
        except BackendError as error:
            pair.progress.say(f"generation: left out, {error.message}")
            return None
        return compare_continuations(
            baseline,
            candidate,
            tokens.token_ids[: quality.agreement_prompts, :prompt],
            new_tokens=quality.agreement_tokens,
            stop_ids=TextModel.of(folder.onnx, tokenizer).stop_ids,
            batch_size=batch_size(runners[0]),
            progress=pair.progress,
        )


def long_contexts(pair: Pair, texts: TextSource) -> list[LongContext]:
    """Needles and perplexity at each length that was asked for.

    Raises:
        ComparisonError: The text or the model is too short for a length, or there is no tokenizer.
        BackendError: A run fails.
    """
    lengths = pair.options.quality.long_context
    return [_long_context(pair, texts, length) for length in lengths]


def _long_context(pair: Pair, texts: TextSource, length: int) -> LongContext:
    from exporter.measure.evaluation import tokenize
    from exporter.tasks.choosing import make_scorer
    from exporter.tasks.encoding import TextCodec
    from exporter.tasks.long_context import ANSWER_TOKENS, compare_long_context

    folder = pair.baseline.folder if pair.baseline.folder.tokenizer else pair.candidate.folder
    codec = TextCodec(folder)
    assert folder.tokenizer is not None  # or TextCodec had refused it
    longest = folder.longest_sequence
    if longest is not None and length + ANSWER_TOKENS > longest:
        raise ComparisonError(
            f"A context of {length} tokens and its answer don't fit the model's {longest} "
            "positions.",
            "Ask for a shorter --long-context.",
        )
    tokens = tokenize(
        texts,
        folder.tokenizer,
        sequence_length=length,
        tokens=_LONG_SAMPLES * length,
        separator_id=folder.end_of_text,
    )
    first, second = (
        make_scorer(runner, folder, vocabulary=pair.vocabulary()) for runner in pair.runners
    )
    return compare_long_context(
        (first, second), codec, tokens.token_ids, opening=tokens.opening, progress=pair.progress
    )
