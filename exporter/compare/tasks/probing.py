"""Whether a model can be asked the probes, and its scores of them."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.artifacts.latency import Shape
from exporter.compare.quality.agreement import LOGITS
from exporter.compare.tasks.choosing import evaluate, task_requests
from exporter.compare.tasks.items import TaskItems
from exporter.compare.tasks.likelihood import ContinuationRequest, LikelihoodScorer
from exporter.compare.tasks.scores import TaskScores
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.inputs import make_inputs, random_tokens, whole_phase
from exporter.engines.runners.base import Runner
from exporter.errors import BackendError, TaskError
from exporter.models.model_folder import ModelFolder
from exporter.progress import QUIET, Progress


def why_unaskable(
    probes: Sequence[TaskItems], runner: Runner, folder: ModelFolder, *, causal: bool
) -> str:
    """What keeps a model from being asked; empty where nothing does.

    Args:
        probes: What it would be asked.
        runner: An entered runner.
        folder: Its tokenizer and config.
        causal: Whether it predicts the next token.
    """
    if LOGITS not in {spec.name for spec in runner.outputs}:
        return "the model has no output called logits"
    if not causal:
        return "the model doesn't predict the next token"
    if folder.tokenizer is None:
        return "there is no tokenizer.json next to the model"
    if runner.capabilities.shapes == "compiled":
        return f"{runner.backend} would compile the model anew for each length of a text"
    text_model = TextModel.of(folder.onnx, folder.tokenizer)
    try:
        asked = [each for probe in probes for each in task_requests(probe, text_model)]
    except TaskError as error:
        return error.message.rstrip(".")
    if any(len(set(choices)) < len(choices) for choices in asked):
        return "the tokenizer has the same tokens for different answers"
    return _why_too_long([request for choices in asked for request in choices], runner, folder)


def _why_too_long(
    requests: Sequence[ContinuationRequest], runner: Runner, folder: ModelFolder
) -> str:
    lengths = {len(each.context) + len(each.continuation) - 1 for each in requests}
    longest = folder.longest_sequence
    if longest is not None and max(lengths) > longest:
        return f"the model ends at {longest} positions"
    try:
        for length in (min(lengths), max(lengths)):
            shape = Shape(whole_phase(runner.inputs), 1, length)
            inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 1))
            shapes = {name: array.shape for name, array in inputs.items()}
            runner.refuse_shapes(shapes, phase=shape.phase)
    except BackendError as error:
        return error.message.rstrip(".")
    return ""


def score_probes(
    probes: Sequence[TaskItems],
    runner: Runner,
    folder: ModelFolder,
    *,
    vocabulary: int | None = None,
    progress: Progress = QUIET,
) -> list[TaskScores]:
    """Scores one arm that can be asked.

    Args:
        probes: What it is asked.
        runner: An entered runner with an output ``logits``.
        folder: Its tokenizer and config.
        vocabulary: Tokens that the model knows; by default as the config says.
        progress: Hears of each probe.

    Raises:
        ComparisonError: Logits aren't finite, or the tokenizer is another model's.
        BackendError: A run fails.
    """
    text_model = TextModel.of(folder.onnx, folder.tokenizer)
    scorer = LikelihoodScorer.of(runner, folder, vocabulary=vocabulary)
    found = []
    for probe in probes:
        progress.say(f"probe {probe.name}: {len(probe.items)} items")
        found.append(evaluate(probe, scorer, text_model, progress=progress))
    return found
