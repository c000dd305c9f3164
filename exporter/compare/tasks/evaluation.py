"""One model's scores of tasks, from its path to a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from exporter.artifacts import EvaluationReport, TaskScore
from exporter.artifacts.latency import Shape
from exporter.compare.agreement import LOGITS, predicts_next_token
from exporter.compare.options import TaskOptions
from exporter.compare.tasks.choosing import evaluate, local_tasks, score_tasks, task_requests
from exporter.compare.tasks.items import Item, TaskItems, TaskScores
from exporter.compare.tasks.likelihood import ContinuationRequest, LikelihoodScorer
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.inputs import make_inputs, random_tokens, whole_phase
from exporter.engines.runners.base import Runner, tell_notes
from exporter.engines.runners.registry import open_model
from exporter.errors import BackendError, TaskError
from exporter.files import sha256_bytes, sha256_file
from exporter.models.model_folder import ModelFolder
from exporter.progress import QUIET, Progress

_CHOICES = 4
_WORDS = (
    *("apple", "bird", "boat", "book", "bread", "bridge", "chair", "cloud", "coat", "corn"),
    *("door", "dream", "farm", "field", "fire", "fish", "floor", "flower", "forest", "garden"),
    *("glass", "gold", "grass", "hand", "hat", "hill", "horse", "house", "king", "lake"),
    *("lamp", "leaf", "milk", "moon", "mountain", "mouse", "night", "ocean", "paper", "park"),
    *("river", "road", "rock", "roof", "room", "rose", "salt", "sand", "ship", "shoe"),
    *("sky", "snow", "soap", "song", "star", "stone", "storm", "sugar", "sun", "table"),
    *("train", "tree", "wall", "water", "wheel", "wind", "window", "wood"),
)
_SUMS = "3 + 4 = 7\n12 + 5 = 17\n8 + 6 = 14\n47 + 2 = 49\n"
_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
_NESTED = "( [ ] )\n{ ( < > ) }\n[ { } ( ) ]\n"
_COPIED = 8
_KEYS = 4

Draw = np.random.Generator


def make_probes(number: int, *, seed: int = 0) -> list[TaskItems]:
    """All probes."""
    return [_probe(name, make, number, seed) for name, make in PROBES.items()]


def _probe(name: str, make: Callable[[Draw], Item], number: int, seed: int) -> TaskItems:
    draw = np.random.default_rng(seed)
    items = tuple(make(draw) for _ in range(number))
    content = json.dumps([asdict(item) for item in items])
    digest = sha256_bytes(content.encode())
    return TaskItems(name, f"made from the seed {seed}", items, ("acc", "log_prob"), digest)


def _arithmetic(draw: Draw) -> Item:
    """A sum of two numbers of one or two digits; wrong answers differ in the last digit alone."""
    first = int(draw.integers(1, 10) if draw.random() < 0.5 else draw.integers(10, 100))
    second = int(draw.integers(1, 10))
    right = str(first + second)
    wrong = [right[:-1] + digit for digit in "0123456789" if digit != right[-1]]
    return _item(draw, f"{_SUMS}{first} + {second} =", right, wrong)


def _brackets(draw: Draw) -> Item:
    """Nested brackets; the right one closes the last that is open."""
    length = int(draw.integers(4, 9))
    text: list[str] = []
    unclosed: list[str] = []
    while len(text) < length or not unclosed:
        if unclosed and draw.random() < 0.4:
            text.append(unclosed.pop())
        else:
            text.append(str(draw.choice([*_CLOSING])))
            unclosed.append(_CLOSING[text[-1]])
    wrong = [closing for closing in _CLOSING.values() if closing != unclosed[-1]]
    return _item(draw, _NESTED + " ".join(text), unclosed[-1], wrong)


def _copy(draw: Draw) -> Item:
    """A list of words that begins anew; wrong answers stand elsewhere in it."""
    words = _words(draw, _COPIED)
    place = int(draw.integers(3, _COPIED - 1))
    wrong = [word for number, word in enumerate(words) if number not in (place - 1, place)]
    context = f"{' '.join(words)}.\n{' '.join(words[:place])}"
    return _item(draw, context, words[place], wrong)


def _lookup(draw: Draw) -> Item:
    """Keys with their values, then one of the keys; wrong answers are the other values."""
    words = _words(draw, 2 * _KEYS)
    table = dict(zip(words[:_KEYS], words[_KEYS:], strict=True))
    key = words[int(draw.integers(_KEYS))]
    lines = "".join(f"{each}: {value}\n" for each, value in table.items())
    wrong = [value for value in table.values() if value != table[key]]
    return _item(draw, f"{lines}{key}:", table[key], wrong)


def _words(draw: Draw, number: int) -> list[str]:
    return [str(word) for word in draw.choice(_WORDS, number, replace=False)]


def _item(draw: Draw, context: str, right: str, wrong: Sequence[str]) -> Item:
    """The right answer among wrong ones, anywhere."""
    chosen = [str(each) for each in draw.choice(wrong, _CHOICES - 1, replace=False)]
    gold = int(draw.integers(_CHOICES))
    choices = [*chosen[:gold], right, *chosen[gold:]]
    pairs = tuple((context, f" {choice}") for choice in choices)
    return Item(pairs, tuple(map(len, choices)), gold)


PROBES: dict[str, Callable[[Draw], Item]] = {
    "arithmetic": _arithmetic,
    "brackets": _brackets,
    "copy": _copy,
    "lookup": _lookup,
}
"""By name, what draws an item."""


def why_unaskable(
    probes: Sequence[TaskItems], runner: Runner, folder: ModelFolder, *, causal: bool
) -> str:
    """What keeps a model from being asked; empty where nothing does."""
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
    """Scores one arm that can be asked."""
    text_model = TextModel.of(folder.onnx, folder.tokenizer)
    scorer = LikelihoodScorer.of(runner, folder, vocabulary=vocabulary)
    found = []
    for probe in probes:
        progress.say(f"probe {probe.name}: {len(probe.items)} items")
        found.append(evaluate(probe, scorer, text_model, progress=progress))
    return found


def evaluate_model(
    model: Path | str,
    tasks: TaskOptions,
    *,
    provider: str = "cpu",
    threads: int | None = None,  # CPU threads; None takes all physical cores
    progress: Progress = QUIET,
) -> EvaluationReport:
    """Scores one model."""
    local_tasks(tasks)  # what can't be read is told before a model is loaded
    folder, runner = open_model(model, provider=provider, threads=threads)
    with runner:
        tell_notes([runner.capabilities], progress)
        scores = score_tasks(tasks, runner, folder, progress=progress) if tasks.tasks else []
        if tasks.probes:
            scores += _probes(tasks, runner, folder, progress)
        return EvaluationReport(
            made_from={"model": sha256_file(folder.onnx)},
            model=str(folder.onnx),
            backend=runner.backend,
            provider=runner.provider,
            threads=runner.threads,
            scores=[score for found in scores for score in _records(found)],
        )


def _probes(
    tasks: TaskOptions, runner: Runner, folder: ModelFolder, progress: Progress
) -> list[TaskScores]:
    probes = make_probes(tasks.probes)
    causal = predicts_next_token(runner, folder)
    why = why_unaskable(probes, runner, folder, causal=causal)
    if why and not tasks.tasks:
        raise TaskError(f"There is nothing to score: {why}.", code="no-probes")
    if why:
        progress.say(f"probes: left out, {why}")
        return []
    return score_probes(probes, runner, folder, progress=progress)


def _records(scores: TaskScores) -> list[TaskScore]:
    return [
        TaskScore(
            task=scores.task,
            metric=metric,
            value=float(values.mean()),
            source=scores.source,
            items=values.tolist(),
            higher_is_better=metric not in scores.lower_is_better,
        )
        for metric, values in scores.metrics.items()
    ]
