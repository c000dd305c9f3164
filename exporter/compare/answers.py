"""What both arms say, for a reader to see: answers to prompts, and a sentence's neighbours."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from exporter.artifacts import (
    Answer,
    NearestNeighbours,
    Neighbour,
    QueryNeighbours,
    SampleAnswer,
    SampleAnswers,
)
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.continuations import LeftOutError, decoder_of, refuse_steps
from exporter.compare.prompts import Prompts, questions, sentences
from exporter.compare.quality.agreement import check_tokens
from exporter.compare.quality.embeddings import FEWEST_TEXTS, Floats, embed
from exporter.engines.decoding.generate import generate
from exporter.engines.decoding.text_model import TextModel
from exporter.errors import BackendError, ComparisonError
from exporter.models.sentence_folder import pooling_of
from exporter.models.texts.passages import cut_to
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.printable import counted

_QUERIES = 4
_NEAREST = 2
_NO_TOKENIZER = "there is no tokenizer.json next to the models"


def sample_answers(pair: Pair) -> SampleAnswers | None:
    """What both arms say to the same prompts, by the likeliest token each time.

    Args:
        pair: Running arms, which predict the next token.

    Returns:
        None where nobody asks for them. With the reason in place of answers where the arms can't
        answer the built-in prompts.
    """
    quality = pair.options.quality
    if not quality.answer_tokens:
        return None
    try:
        return _answered(pair, questions(quality.prompts))
    except LeftOutError as reason:
        if quality.prompts is not None:
            raise _unanswered(pair, str(reason)) from reason
        pair.progress.say(f"sample answers: left out, {reason}")
        return SampleAnswers(left_out=str(reason))


def _unanswered(pair: Pair, reason: str) -> ComparisonError:
    return ComparisonError(
        f"The prompts of {pair.options.quality.prompts} can't be answered: {reason}.",
        "Leave --prompts out, or shorten them if they are too long.",
        code="prompts-unanswered",
    )


def _answered(pair: Pair, asked: Prompts) -> SampleAnswers:
    arms = {"baseline": pair.baseline, "candidate": pair.candidate}
    tokenizer = pair.baseline.folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        raise LeftOutError(_NO_TOKENIZER)
    new_tokens = pair.options.quality.answer_tokens
    model = TextModel.of(pair.baseline.folder.onnx, tokenizer)
    shown, ids = _encoded(model, asked, pair.options.quality.chat)
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
    return SampleAnswers(source=asked.source, chat=chat, new_tokens=new_tokens, answers=answers)


def _encoded(model: TextModel, asked: Prompts, chat: bool) -> tuple[Sequence[str], list[list[int]]]:
    """The prompts as the report shows them, and their tokens."""
    shown = asked.texts if chat else asked.openings
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
    new_tokens, found = pair.options.quality.answer_tokens, []
    with (
        decoder_of(arm, max(map(len, prompts)), new_tokens) as decoder,
        pair.progress.task(f"sample answers, {name}", total=len(prompts), unit="prompts") as task,
    ):
        for ids in prompts:
            made = generate(decoder, ids, new_tokens=new_tokens, stop_ids=model.stop_ids)
            found.append(Answer(text=model.decode(made.token_ids), ended=made.ended))
            task.advance()
    return found


def nearest_neighbours(pair: Pair) -> NearestNeighbours | None:
    """Which sentences each arm puts nearest to some of them, by the cosine of their embeddings.

    Args:
        pair: Running arms, which embed texts.

    Returns:
        None where nobody asks for them. With the reason in place of queries where there is no
        tokenizer.
    """
    quality, folder = pair.options.quality, pair.baseline.folder
    if not quality.answer_tokens:
        return None
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        pair.progress.say(f"nearest neighbours: left out, {_NO_TOKENIZER}")
        return NearestNeighbours(left_out=_NO_TOKENIZER)
    asked = sentences(quality.prompts)
    if len(asked.texts) < FEWEST_TEXTS:
        raise ComparisonError(
            f"{asked.source} holds {counted(len(asked.texts), 'sentence')}; {FEWEST_TEXTS} are "
            "needed to tell which are nearest.",
            "Add some, or leave --prompts out.",
            code="too-few-sentences",
        )
    encode, longest = tokenizer_in(tokenizer), folder.longest_sequence or sys.maxsize
    ids = [np.array(cut_to(encode, text, longest), np.int64) for text in asked.texts]
    check_tokens(max(int(each.max()) for each in ids), pair.vocabulary())
    pooling = pooling_of(folder.home)
    first, second = (
        embed(arm.runner, ids, arm=name, pooling=pooling, progress=pair.progress)
        for name, arm in (("baseline", pair.baseline), ("candidate", pair.candidate))
    )
    queries = [
        QueryNeighbours(
            query=asked.texts[row],
            baseline=_nearest(first, row, asked.texts),
            candidate=_nearest(second, row, asked.texts),
        )
        for row in range(min(_QUERIES, len(ids)))
    ]
    return NearestNeighbours(source=asked.source, sentences=len(ids), queries=queries)


def _nearest(vectors: Floats, row: int, texts: Sequence[str]) -> list[Neighbour]:
    """The sentences nearest to one, itself left out.

    Args:
        vectors: Embeddings of length 1, ``[sentences, size]``.
        row: Of the one.
        texts: The sentences.
    """
    cosines = vectors @ vectors[row]
    others = [each for each in np.argsort(-cosines, kind="stable") if each != row]
    return [
        Neighbour(sentence=texts[each], cosine=float(cosines[each])) for each in others[:_NEAREST]
    ]
