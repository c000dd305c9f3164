"""Both arms' scores of the tasks that were asked for, and of the probes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from exporter.artifacts import TaskResult
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.kept import AccuracyCache
from exporter.compare.prompts import questions
from exporter.compare.quality.agreement import LOGITS, predicts_next_token
from exporter.compare.tasks.choosing import (
    only_for_encoders,
    refuse_missing_tasks,
    score_tasks,
)
from exporter.compare.tasks.encoder_items import made_ranking, made_retrieval
from exporter.compare.tasks.encoding import TaskEncoder, score_encoder_task
from exporter.compare.tasks.probes import make_probes
from exporter.compare.tasks.probing import score_probes, why_unaskable
from exporter.compare.tasks.scores import TaskScores, compare_scores
from exporter.engines.runners.base import Runner
from exporter.errors import ComparisonError
from exporter.models.model_folder import ModelFolder
from exporter.models.texts.sources import TextSource


def check_questions(pair: Pair) -> None:
    """Refuses prompts, tasks and long contexts that are no such, before anything is measured.

    Raises:
        TextSourceError: The user's prompts can't be read.
        TaskError: A local task is not there, or a line is broken.
        ComparisonError: The models have no logits, or are compiled anew for each length.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
    """
    quality, runner = pair.options.quality, pair.baseline.runner
    questions(quality.prompts)
    if not (quality.tasks or quality.long_context):
        return
    for_encoders = not quality.long_context and only_for_encoders(quality)
    if not for_encoders and LOGITS not in {spec.name for spec in runner.outputs}:
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} has no output called logits, so it can't choose answers.",
            "Leave --tasks and --long-context out. Encoders have mteb's tasks, --tasks mteb:NAME, "
            "and tasks of your own in --task-data.",
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
    """Scores both arms on the same items; nothing where no task was asked for.

    Args:
        pair: Running arms.
        answers: Keeps each arm's scores as soon as they are there.

    Raises:
        TaskError: A task is not known, or its items can't be read.
        ComparisonError: Logits aren't finite, or the tokenizer is another model's.
        BackendError: A run fails.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
    """
    quality = pair.options.quality
    return _compared(pair, answers, "tasks", partial(score_tasks, quality)) if quality.tasks else []


def why_no_probes(pair: Pair) -> str:
    """What keeps the arms from being asked the probes; empty where nothing does.

    Raises:
        ComparisonError: A config is no JSON object.
    """
    if not pair.options.quality.probes:
        return "none was asked for"
    probes, first = make_probes(pair.options.quality.probes), pair.baseline
    causal = predicts_next_token(first.runner, first.folder)
    found = (
        why_unaskable(probes, arm.runner, _with_tokenizer(pair, arm), causal=causal)
        for arm in (first, pair.candidate)
    )
    why = next(filter(None, found), "")
    if why:
        pair.progress.say(f"probes: left out, {why}")
    return why


def probe_results(pair: Pair, answers: AccuracyCache) -> list[TaskResult]:
    """Scores both arms on the same probes.

    Args:
        pair: Running arms, of which :func:`why_no_probes` had nothing to say.
        answers: Keeps each arm's scores as soon as they are there.

    Raises:
        ComparisonError: Logits aren't finite, or the tokenizer is another model's.
        BackendError: A run fails.
    """
    probes = make_probes(pair.options.quality.probes)
    return _compared(pair, answers, "probes", partial(score_probes, probes))


def encoder_probes(
    pair: Pair, texts: TextSource, answers: AccuracyCache, *, ranks: bool = False
) -> tuple[list[TaskResult], str]:
    """Both arms' scores of a retrieval, or of a ranking, that is made of the evaluation text.

    Args:
        pair: Running arms, which embed texts or rank them.
        texts: The evaluation text.
        answers: Keeps each arm's scores as soon as they are there.
        ranks: Whether they are rerankers, which read query and passage together.

    Returns:
        The results; or none, and why.

    Raises:
        ComparisonError: An embedding isn't finite, or the tokenizer is another model's.
        BackendError: A run fails.
    """
    number = pair.options.quality.probes
    make = made_ranking if ranks else made_retrieval
    task = make(texts, number) if number else None
    if not number:
        why = "none was asked for"
    elif pair.baseline.runner.capabilities.shapes == "compiled":
        why = f"{pair.baseline.runner.backend} would compile the model anew for each length"
    elif _with_tokenizer(pair, pair.baseline).tokenizer is None:
        why = "there is no tokenizer.json next to the models"
    else:
        why = "the evaluation text has no passages of several sentences" if task is None else ""
    if task is None or why:
        pair.progress.say(f"probes: left out, {why}")
        return [], why

    def score(runner: Runner, folder: ModelFolder, **asked: Any) -> list[TaskScores]:
        return [score_encoder_task(task, TaskEncoder(runner, folder, **asked))]

    return _compared(pair, answers, "probes", score), ""


def _compared(
    pair: Pair, answers: AccuracyCache, what: str, score: Callable[..., list[TaskScores]]
) -> list[TaskResult]:
    def scored(arm: ComparedArm) -> list[TaskScores]:
        return score(
            arm.runner,
            _with_tokenizer(pair, arm),
            vocabulary=pair.vocabulary(),
            progress=pair.progress,
        )

    both = [
        answers.found(f"{what} of the {name}", TypeAdapter(list[TaskScores]), partial(scored, arm))
        for name, arm in (("baseline", pair.baseline), ("candidate", pair.candidate))
    ]
    return [result for two in zip(*both, strict=True) for result in compare_scores(*two)]


def _with_tokenizer(pair: Pair, arm: ComparedArm) -> ModelFolder:
    """The arm's folder, or that of the other where it alone has a tokenizer."""
    folders = (arm.folder, pair.baseline.folder, pair.candidate.folder)
    return next((folder for folder in folders if folder.tokenizer), arm.folder)
