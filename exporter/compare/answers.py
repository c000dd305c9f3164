"""What both arms say: greedy texts, answers to prompts, tasks, and the classes of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import (
    Accuracy,
    Answer,
    GenerationAgreement,
    SampleAnswer,
    SampleAnswers,
    TaskResult,
)
from exporter.artifacts.latency import Shape
from exporter.compare.agreement import LOGITS
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.encoder_quality import compare_classes, log_probabilities_of
from exporter.compare.evaluation import EvaluationTokens, Prompts, questions
from exporter.compare.tasks.choosing import (
    only_for_encoders,
    refuse_missing_tasks,
    score_tasks,
)
from exporter.compare.tasks.encoding import labels_in
from exporter.compare.tasks.items import TaskScores, compare_scores
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import agreement, continuations, decoder_on, generate
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.tensors import has_cache, make_inputs
from exporter.errors import BackendError, ComparisonError
from exporter.models.ablation.damage import Floats
from exporter.models.model_folder import PIXELS, ModelFolder
from exporter.models.tasks import MULTI_LABEL
from exporter.models.texts.images import IMAGES, ImageReader, Images, Picture
from exporter.printable import counted

_PROMPT_TOKENS = 64


def generation_agreements(
    comparison: Comparison, tokens: EvaluationTokens
) -> dict[tuple[str, str], GenerationAgreement]:
    """Continues beginnings of the evaluation text with every arm that is judged."""
    quality = comparison.options.quality
    if not quality.agreement_prompts or not (
        tokens.is_text and has_cache(comparison.whole.runner.inputs)
    ):
        return {}
    prompt = min(_PROMPT_TOKENS, tokens.token_ids.shape[1])
    try:
        refuse_steps(comparison, comparison.judged, prompt + quality.agreement_tokens)
        texts = _continued(comparison, tokens.token_ids[: quality.agreement_prompts, :prompt])
    except LeftOutError as reason:
        comparison.progress.say(f"generation: left out, {reason}")
        return {}
    return {names: agreement(*(texts[name] for name in names)) for names in comparison.held_against}


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
    shown, ids = _encoded(model, prompts, comparison.options.quality.chat)
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
    chat = comparison.options.quality.chat
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
    comparison: Comparison,
    name: str,
    arm: ComparedArm,
    model: TextModel,
    prompts: Sequence[list[int]],
) -> list[Answer]:
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
            answers.append(Answer(text=model.decode(made.token_ids), ended=made.ended))
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
            "Encoders have mteb's tasks, --tasks mteb:NAME, and tasks of your own in --task-data.",
            code="no-logits",
        )
    if runner.capabilities.shapes == "compiled":
        raise ComparisonError(
            f"{runner.backend} would compile the model anew for each length of a question.",
            "Ask PyTorch without compilation (torch:DIR); the answers are the same.",
            code="recompiles",
        )
    refuse_missing_tasks(quality)


def task_results(comparison: Comparison) -> list[TaskResult]:
    """Scores both arms on the same items; nothing where no task was asked for."""
    if not comparison.options.quality.tasks:
        return []

    def scored(arm: ComparedArm) -> list[TaskScores]:
        folders = (arm.folder, *(comparison.arms[name].folder for name in comparison.pair))
        folder = next((item for item in folders if item.tokenizer), arm.folder)
        return score_tasks(
            comparison.options.quality,
            arm.runner,
            folder,
            vocabulary=comparison.vocabulary(),
            progress=comparison.progress,
        )

    both = [scored(comparison.arms[name]) for name in comparison.pair]
    return [result for two in zip(*both, strict=True) for result in compare_scores(*two)]


TASK = "image classes"
_FEW = 5


def refuse_without_config(comparison: Comparison) -> None:
    """Refuses arms that read images where no config says what they are."""
    if comparison.reads_images and not comparison.whole.folder.classifies_images:
        raise ComparisonError(
            f"{comparison.whole.folder.onnx} reads images, and no config.json beside it names a "
            "class that ends with ForImageClassification.",
            "Put the model's config.json and preprocessor_config.json next to it.",
            code="no-image-config",
        )


def judge_images(comparison: Comparison, images: Images) -> dict[tuple[str, str], Accuracy]:
    """Runs all judged arms on the same images; each image is read once.

    By what is held against what; the pair's own has the labels' scores, too.
    """
    labelled = images.has_labels
    right = _classes_of(images.pictures, comparison.whole.folder) if labelled else None
    said = _classes_said(comparison, images)
    some = next(iter(said.values()))
    progress = comparison.progress
    progress.say(f"accuracy: classes of {len(some):,} images from {images.source}")
    if images.is_random:
        progress.say("accuracy: on noise, since --eval-text names no images")
    if len(images.pictures) < images.there:
        progress.say(f"accuracy: these are the first of {images.there:,}, of all classes")
    agreement = {
        names: compare_classes(
            *(said[name] for name in names), source=images.source, sha256=images.content_sha256
        ).model_copy(update={"images": len(some)})
        for names in comparison.held_against
    }
    if right is not None:
        scores = [label_scores(said[name], right, images.source) for name in comparison.pair]
        result = {"tasks": compare_scores(scores[0], scores[1])}
        agreement[comparison.pair] = agreement[comparison.pair].model_copy(update=result)
    return agreement


def _classes_said(comparison: Comparison, images: Images) -> dict[str, list[Floats]]:
    """Each arm's log-probabilities, ``[1, classes]`` for each image."""
    reader, arrays = _reader(comparison), {name: list[Floats]() for name in comparison.judged}
    number = IMAGES if images.is_random else len(images.pictures)
    noise = reader.noise(number, "evaluation") if images.is_random else None
    with comparison.progress.task("classes of images", total=number, unit="images") as task:
        for place in range(number):
            pixels = (
                reader.pixels([images.pictures[place]])
                if noise is None
                else noise[place : place + 1]
            )
            for name, arm in comparison.judged.items():
                arrays[name].append(_answer(arm, name, pixels, place))
            task.advance()
    return arrays


def _reader(comparison: Comparison) -> ImageReader:
    folder = comparison.whole.folder
    home = folder.onnx if folder.onnx.is_dir() else folder.onnx.parent
    return ImageReader(str(folder.onnx), home, folder.config)


def _answer(arm: ComparedArm, name: str, pixels: NDArray[np.float32], number: int) -> Floats:
    runner = arm.runner
    inputs = make_inputs(runner.inputs, Shape("encode", 1, 1), np.zeros((1, 1), np.int64))
    inputs[PIXELS] = pixels.astype(inputs[PIXELS].dtype)
    logits = runner.run(inputs, [LOGITS], phase="encode")[LOGITS]
    separate = arm.folder.config.get("problem_type") == MULTI_LABEL
    return log_probabilities_of(logits, f"The {name}'s logits of image {number}", separate=separate)


def _classes_of(pictures: Sequence[Picture], folder: ModelFolder) -> NDArray[np.int64]:
    """The class of each image, ``[images]``."""
    numbers = label_numbers(folder.config)
    result = []
    for picture in pictures:
        number = numbers.get(str(picture.label))
        if number is None:
            raise ComparisonError(
                f"{picture.name} has the label {picture.label!r}; the model's "
                f"{len(set(numbers.values()))} classes are called {_some(folder.config)}.",
                "Name the folders as id2label in config.json has the classes, or by their numbers.",
                code="labels-mismatch",
            )
        result.append(number)
    return np.array(result, np.int64)


def label_numbers(config: Mapping[str, Any]) -> dict[str, int]:
    """The class that each label stands for: by name, by number, by the first of several names.

    ImageNet's classes have several names, parted by commas; one that two classes have, or begin
    with, counts for neither.
    """
    result = labels_in(config)
    names = [name for name, _ in result]
    firsts = [name.partition(",")[0].strip() for name in names]
    numbers = [number for _, number in result]
    outcome = {str(number): number for number in numbers}
    for called in (firsts, names):
        pairs = zip(called, numbers, strict=True)
        outcome |= {name: number for name, number in pairs if called.count(name) == 1}
    return outcome


def _some(config: Mapping[str, Any]) -> str:
    names = [name for name, _ in labels_in(config)]
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")


def label_scores(said: Sequence[Floats], right: NDArray[np.int64], source: str) -> TaskScores:
    """One arm's answers against the labels.

    said: log-probabilities of each image, `[1, classes]`.
    right: the class of each, `[images]`.
    """
    rows = np.concatenate(said)
    if right.max(initial=0) >= rows.shape[1]:
        raise ComparisonError(
            f"The config names a class {right.max()}, and the model gives {rows.shape[1]}.",
            "Put the config next to it that belongs to the model.",
            code="labels-mismatch",
        )
    order = np.argsort(-rows, axis=1, kind="stable")
    metrics = {"top1": order[:, 0] == right}
    if rows.shape[1] > _FEW:
        metrics["top5"] = (order[:, :_FEW] == right[:, None]).any(axis=1)
    hits = {name: values.astype(np.float64) for name, values in metrics.items()}
    return TaskScores(TASK, source, hits)
