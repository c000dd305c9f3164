"""Both arms' scores of the tasks that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from exporter.artifacts import Accuracy, TaskResult
from exporter.artifacts.latency import Shape
from exporter.compare.agreement import LOGITS
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.encoder_quality import compare_classes, log_probabilities_of
from exporter.compare.evaluation import questions
from exporter.compare.kept import AccuracyCache
from exporter.compare.tasks.choosing import (
    only_for_encoders,
    refuse_missing_tasks,
    score_tasks,
)
from exporter.compare.tasks.items import TaskScores, compare_scores
from exporter.engines.inputs import make_inputs
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Floats
from exporter.models.ablation.embeddings import MULTI_LABEL
from exporter.models.model_folder import PIXELS, ModelFolder
from exporter.models.texts.images import IMAGES, ImageReader, Images, Picture
from graph_passes.types import number_in


def check_questions(pair: Pair) -> None:
    """Refuses prompts and tasks that are no such, before anything is measured."""
    quality, runner = pair.options.quality, pair.baseline.runner
    questions(quality.prompts)
    gives_logits = LOGITS in {spec.name for spec in runner.outputs}
    if quality.prompts is not None and not gives_logits:
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} embeds texts, so it can't answer {quality.prompts}.",
            "Leave --prompts out.",
            code="prompts-unanswered",
        )
    if not quality.tasks:
        return
    if not gives_logits and not only_for_encoders(quality):
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} has no output called logits, so it can't choose answers.",
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


def task_results(pair: Pair, answers: AccuracyCache) -> list[TaskResult]:
    """Scores both arms on the same items; nothing where no task was asked for."""
    if not pair.options.quality.tasks:
        return []

    def scored(arm: ComparedArm) -> list[TaskScores]:
        folders = (arm.folder, pair.baseline.folder, pair.candidate.folder)
        folder = next((item for item in folders if item.tokenizer), arm.folder)
        return score_tasks(
            pair.options.quality,
            arm.runner,
            folder,
            vocabulary=pair.vocabulary(),
            progress=pair.progress,
        )

    both = [
        answers.found(f"tasks of the {name}", TypeAdapter(list[TaskScores]), partial(scored, arm))
        for name, arm in (("baseline", pair.baseline), ("candidate", pair.candidate))
    ]
    return [result for two in zip(*both, strict=True) for result in compare_scores(*two)]


TASK = "image classes"
_FEW = 5


def refuse_without_config(pair: Pair) -> None:
    """Refuses arms that read images where no config says what they are."""
    if pair.reads_images and not pair.baseline.folder.classifies_images:
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} reads images, and no config.json beside it names a class "
            "that ends with ForImageClassification.",
            "Put the model's config.json and preprocessor_config.json next to it.",
            code="no-image-config",
        )


def judge_images(pair: Pair, images: Images) -> dict[tuple[str, str], Accuracy]:
    """Runs all judged arms on the same images; each image is read once.

    By what is held against what; the pair's own has the labels' scores, too.
    """
    labelled = images.has_labels
    right = _classes_of(images.pictures, pair.baseline.folder) if labelled else None
    said = _said(pair, images)
    some = next(iter(said.values()))
    progress = pair.progress
    progress.say(f"accuracy: classes of {len(some):,} images from {images.source}")
    if images.is_random:
        progress.say("accuracy: on noise, since --eval-text names no images")
    if len(images.pictures) < images.there:
        progress.say(f"accuracy: these are the first of {images.there:,}, of all classes")
    agreement = {
        names: compare_classes(
            *(said[name] for name in names), source=images.source, sha256=images.content_sha256
        ).model_copy(update={"images": len(some)})
        for names in pair.held_against
    }
    if right is not None:
        own = ("baseline", "candidate")
        scores = [label_scores(said[name], right, images.source) for name in own]
        result = {"tasks": compare_scores(scores[0], scores[1])}
        agreement[own] = agreement[own].model_copy(update=result)
    return agreement


def _said(pair: Pair, images: Images) -> dict[str, list[Floats]]:
    """Each arm's log-probabilities, ``[1, classes]`` for each image."""
    reader, arrays = _reader(pair), {name: list[Floats]() for name in pair.judged}
    number = IMAGES if images.is_random else len(images.pictures)
    noise = reader.noise(number, "evaluation") if images.is_random else None
    with pair.progress.task("classes of images", total=number, unit="images") as task:
        for place in range(number):
            pixels = (
                reader.pixels([images.pictures[place]])
                if noise is None
                else noise[place : place + 1]
            )
            for name, arm in pair.judged.items():
                arrays[name].append(_answer(arm, name, pixels, place))
            task.advance()
    return arrays


def _reader(pair: Pair) -> ImageReader:
    folder = pair.baseline.folder
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
    result = _told(config)
    names = [name for name, _ in result]
    firsts = [name.partition(",")[0].strip() for name in names]
    numbers = [number for _, number in result]
    outcome = {str(number): number for number in numbers}
    for called in (firsts, names):
        pairs = zip(called, numbers, strict=True)
        outcome |= {name: number for name, number in pairs if called.count(name) == 1}
    return outcome


def _told(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The names of the classes, each with its number; none where the config tells none."""
    value = config.get("id2label")
    entries = value.items() if isinstance(value, dict) else ()
    numbered = ((str(name), number_in(str(number))) for number, name in entries)
    return [(name, number) for name, number in numbered if number is not None]


def _some(config: Mapping[str, Any]) -> str:
    names = [name for name, _ in _told(config)]
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
