"""What arms generate: greedy texts, and answers to prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import CUT, SampleAnswer, SampleAnswers
from exporter.compare.agreement import LOGITS
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.evaluation import EvaluationTokens, Prompts, questions
from exporter.compare.tasks.choosing import local_tasks, only_for_encoders
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import continuations, decoder_on, generate
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.tensors import has_cache
from exporter.errors import BackendError, ComparisonError, DepthcutError
from exporter.printable import counted

_PROMPT_TOKENS = 64


def generation_agreements(
    comparison: Comparison, tokens: EvaluationTokens
) -> dict[tuple[str, str], dict[str, Any]]:
    """Continues beginnings of the text with all judged arms: what accuracies of pairs then have."""
    quality = comparison.options.quality
    if not quality.agreement_prompts or not (
        tokens.is_text and has_cache(comparison.whole.runner.inputs)
    ):
        return {}
    prompts = np.stack([ids[:_PROMPT_TOKENS] for ids in tokens.ids[: quality.agreement_prompts]])
    try:
        refuse_steps(comparison, comparison.judged, prompts.shape[1] + quality.agreement_tokens)
        texts = _continued(comparison, prompts)
    except LeftOutError as reason:
        comparison.progress.say(f"generation: left out, {reason}")
        return {}
    return {
        (first, second): {
            "prompts": len(prompts),
            "figures": {"exact_match": float((texts[first] == texts[second]).all(axis=1).mean())},
        }
        for first, second in comparison.held_against
    }


class LeftOutError(Exception):
    """Why nothing is generated."""


def refuse_steps(comparison: Comparison, arms: Mapping[str, ComparedArm], positions: int) -> None:
    """Refuses to generate where that can't be, before anything runs."""
    if not has_cache(comparison.whole.runner.inputs):
        raise LeftOutError("the models have no KV cache")
    for name, arm in arms.items():
        if not has_cache(arm.runner.inputs):
            raise LeftOutError(f"the {name} has no attention left, so it has no cache")
    if comparison.whole.runner.capabilities.shapes == "compiled":
        raise LeftOutError("torch.compile would compile each of its steps")
    longest = comparison.whole.folder.longest_sequence
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


def _continued(comparison: Comparison, prompts: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Every judged arm's greedy texts, one arm at a time."""
    new_tokens = comparison.options.quality.agreement_tokens
    stop_ids = TextModel.of(comparison.whole.folder.onnx, comparison.tokenizer).stop_ids
    texts = {}
    for name, arm in comparison.judged.items():
        with decoder_of(arm, prompts.shape[1], new_tokens) as decoder:
            texts[name] = continuations(
                decoder,
                prompts,
                new_tokens=new_tokens,
                stop_ids=stop_ids,
                batch_size=arm.runner.capabilities.batch_size,
                arm=name,
                progress=comparison.progress,
            )
    return texts


_NO_TOKENIZER = "there is no tokenizer.json next to the models"


def sample_answers(comparison: Comparison) -> SampleAnswers | None:
    """What both arms say to the same prompts, by the likeliest token each time."""
    quality = comparison.options.quality
    if not quality.answer_tokens:
        return None
    try:
        return _answered(comparison, questions(quality.prompts))
    except LeftOutError as reason:
        if quality.prompts is not None:
            raise ComparisonError(
                f"The prompts of {quality.prompts} can't be answered: {reason}.",
                "Leave --prompts out, or shorten them if they are too long.",
                code="prompts-unanswered",
            ) from reason
        comparison.progress.say(f"sample answers: left out, {reason}")
        return SampleAnswers(left_out=str(reason))


def _answered(comparison: Comparison, prompts: Prompts) -> SampleAnswers:
    arms = {name: comparison.arms[name] for name in comparison.pair}
    if comparison.tokenizer is None:
        raise LeftOutError(_NO_TOKENIZER)
    new_tokens = comparison.options.quality.answer_tokens
    model = TextModel.of(comparison.whole.folder.onnx, comparison.tokenizer)
    shown, ids, chat = _encoded(model, prompts, comparison.options.quality.chat)
    if max(map(max, ids)) >= comparison.vocabulary():
        raise LeftOutError("the tokenizer has tokens that the model doesn't know")
    refuse_steps(comparison, arms, max(map(len, ids)) + new_tokens)
    comparison.progress.say(
        f"sample answers: {counted(len(ids), 'prompt')}, at most {new_tokens} tokens each"
    )
    said = [_said(comparison, name, arm, model, ids) for name, arm in arms.items()]
    answers = [
        SampleAnswer(prompt=prompt, baseline=first, candidate=second)
        for prompt, first, second in zip(shown, *said, strict=True)
    ]
    return SampleAnswers(source=prompts.source, chat=chat, new_tokens=new_tokens, answers=answers)


def _encoded(
    model: TextModel, prompts: Prompts, chat: bool | None
) -> tuple[Sequence[str], list[list[int]], bool]:
    """The prompts as the report shows them, their tokens, and whether a chat template made them."""
    if chat is None:
        with suppress(LeftOutError, DepthcutError):
            return _encoded(model, prompts, model.chat is not None)
        chat = False
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
    return shown, ids, chat


def _said(
    comparison: Comparison,
    name: str,
    arm: ComparedArm,
    model: TextModel,
    prompts: Sequence[list[int]],
) -> list[str]:
    """One arm's answers."""
    new_tokens, answers = comparison.options.quality.answer_tokens, []
    with (
        decoder_of(arm, max(map(len, prompts)), new_tokens) as decoder,
        comparison.progress.task(
            f"sample answers, {name}", total=len(prompts), unit="prompts"
        ) as task,
    ):
        for ids in prompts:
            made = generate(decoder, ids, new_tokens=new_tokens, stop_ids=model.stop_ids)
            answers.append(model.decode(made.token_ids) + ("" if made.ended else CUT))
            task.advance()
    return answers


def check_questions(comparison: Comparison) -> None:
    """Refuses prompts and tasks that are no such, before anything is measured."""
    quality, runner = comparison.options.quality, comparison.whole.runner
    questions(quality.prompts)
    gives_logits = LOGITS in {spec.name for spec in runner.outputs}
    if quality.prompts is not None and not gives_logits:
        raise ComparisonError(
            f"{comparison.whole.folder.onnx} embeds texts, so it can't answer {quality.prompts}.",
            "Leave --prompts out.",
            code="prompts-unanswered",
        )
    if not quality.tasks:
        return
    if not gives_logits and not only_for_encoders(quality):
        raise ComparisonError(
            f"{comparison.whole.folder.onnx} has no output called logits: it can't choose answers.",
            "Encoders have tasks of your own in --task-data.",
            code="task-for-another-model",
        )
    if runner.capabilities.shapes == "compiled":
        raise ComparisonError(
            f"{runner.backend} would compile the model anew for each length of a question.",
            "Ask PyTorch without compilation (torch:DIR); the answers are the same.",
            code="recompiles",
        )
    local_tasks(quality)
