"""What both arms say: how long greedy texts agree, and answers to prompts, for a reader to see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import (
    Answer,
    GenerationAgreement,
    SampleAnswer,
    SampleAnswers,
)
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.evaluation import EvaluationTokens, Prompts, questions
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import agreement, continuations, generate
from exporter.engines.decoding.open_decoder import decoder_on
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.inputs import has_cache
from exporter.errors import BackendError, ComparisonError
from exporter.printable import counted

_PROMPT_TOKENS = 64


def generation_agreements(
    pair: Pair, tokens: EvaluationTokens
) -> dict[tuple[str, str], GenerationAgreement]:
    """Continues beginnings of the evaluation text with every arm that is judged."""
    quality = pair.options.quality
    if not quality.agreement_prompts or not (
        tokens.is_text and has_cache(pair.baseline.runner.inputs)
    ):
        return {}
    prompt = min(_PROMPT_TOKENS, tokens.token_ids.shape[1])
    try:
        refuse_steps(pair, pair.judged, prompt + quality.agreement_tokens)
        texts = _continued(pair, tokens.token_ids[: quality.agreement_prompts, :prompt])
    except LeftOutError as reason:
        pair.progress.say(f"generation: left out, {reason}")
        return {}
    return {names: agreement(*(texts[name] for name in names)) for names in pair.held_against}


class LeftOutError(Exception):
    """Why nothing is generated."""


def refuse_steps(pair: Pair, arms: Mapping[str, ComparedArm], positions: int) -> None:
    """Refuses to generate where that can't be, before anything runs."""
    if not has_cache(pair.baseline.runner.inputs):
        raise LeftOutError("the models have no KV cache")
    for name, arm in arms.items():
        if not has_cache(arm.runner.inputs):
            raise LeftOutError(f"the {name} has no attention left, so it has no cache")
    if pair.baseline.runner.capabilities.shapes == "compiled":
        raise LeftOutError("torch.compile would compile each of its steps")
    longest = pair.baseline.folder.longest_sequence
    if longest is not None and positions > longest:
        raise LeftOutError(f"the model ends at {longest} positions, and {positions} are needed")


@contextmanager
def decoder_of(arm: ComparedArm, prompt: int, new_tokens: int) -> Iterator[Decoder]:
    """What generates with a running arm."""
    try:
        made = decoder_on(arm.runner)
    except BackendError as error:
        raise LeftOutError(error.message) from error
    with made as decoder:
        try:
            decoder.refuse_unfit(1, prompt, new_tokens)
        except BackendError as error:
            raise LeftOutError(error.message) from error
        yield decoder


def _continued(pair: Pair, prompts: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Every judged arm's greedy texts, one arm at a time."""
    folder, new_tokens = pair.baseline.folder, pair.options.quality.agreement_tokens
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    stop_ids = TextModel.of(folder.onnx, tokenizer).stop_ids
    texts = {}
    for name, arm in pair.judged.items():
        with decoder_of(arm, prompts.shape[1], new_tokens) as decoder:
            texts[name] = continuations(
                decoder,
                prompts,
                new_tokens=new_tokens,
                stop_ids=stop_ids,
                batch_size=arm.runner.capabilities.batch_size,
                arm=name,
                progress=pair.progress,
            )
    return texts


_NO_TOKENIZER = "there is no tokenizer.json next to the models"


def sample_answers(pair: Pair) -> SampleAnswers | None:
    """What both arms say to the same prompts, by the likeliest token each time."""
    quality = pair.options.quality
    if not quality.answer_tokens:
        return None
    try:
        return _answered(pair, questions(quality.prompts))
    except LeftOutError as reason:
        if quality.prompts is not None:
            raise ComparisonError(
                f"The prompts of {quality.prompts} can't be answered: {reason}.",
                "Leave --prompts out, or shorten them if they are too long.",
                code="prompts-unanswered",
            ) from reason
        pair.progress.say(f"sample answers: left out, {reason}")
        return SampleAnswers(left_out=str(reason))


def _answered(pair: Pair, prompts: Prompts) -> SampleAnswers:
    arms = {"baseline": pair.baseline, "candidate": pair.candidate}
    tokenizer = pair.baseline.folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        raise LeftOutError(_NO_TOKENIZER)
    new_tokens = pair.options.quality.answer_tokens
    model = TextModel.of(pair.baseline.folder.onnx, tokenizer)
    shown, ids = _encoded(model, prompts, pair.options.quality.chat)
    if max(map(max, ids)) >= pair.vocabulary():
        raise LeftOutError("the tokenizer has tokens that the model doesn't know")
    refuse_steps(pair, arms, max(map(len, ids)) + new_tokens)
    pair.progress.say(
        f"sample answers: {counted(len(ids), 'prompt')}, at most {new_tokens} tokens each"
    )
    said = [_said(pair, name, arm, model, ids) for name, arm in arms.items()]
    answers = [
        SampleAnswer(prompt=prompt, baseline=first, candidate=second)
        for prompt, first, second in zip(shown, *said, strict=True)
    ]
    chat = pair.options.quality.chat
    return SampleAnswers(source=prompts.source, chat=chat, new_tokens=new_tokens, answers=answers)


def _encoded(
    model: TextModel, prompts: Prompts, chat: bool
) -> tuple[Sequence[str], list[list[int]]]:
    """The prompts as the report shows them, and their tokens."""
    shown = prompts.texts if chat else prompts.openings
    try:
        # A model that thinks first would not come to its answer.
        ids = (
            model.encode_chats(shown, enable_thinking=False)
            if chat
            else [model.encode(text) for text in shown]
        )
    except BackendError as error:
        raise LeftOutError(error.message.rstrip(".")) from error
    if not all(ids):
        raise LeftOutError(f"prompt {ids.index([]) + 1} has no tokens")
    return shown, ids


def _said(
    pair: Pair, name: str, arm: ComparedArm, model: TextModel, prompts: Sequence[list[int]]
) -> list[Answer]:
    """One arm's answers."""
    new_tokens, answers = pair.options.quality.answer_tokens, []
    with (
        decoder_of(arm, max(map(len, prompts)), new_tokens) as decoder,
        pair.progress.task(f"sample answers, {name}", total=len(prompts), unit="prompts") as task,
    ):
        for ids in prompts:
            made = generate(decoder, ids, new_tokens=new_tokens, stop_ids=model.stop_ids)
            answers.append(Answer(text=model.decode(made.token_ids), ended=made.ended))
            task.advance()
    return answers
