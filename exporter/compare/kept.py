"""What a comparison has measured so far: a run that is killed goes on from there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.artifacts import CalibrationRef, PlanParts, library_versions
from exporter.artifacts.plans import CONTENT, noted_texts
from exporter.artifacts.store import FOLDER, Store
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.evaluation import questions
from exporter.compare.options import CompareOptions
from exporter.compare.tasks.choosing import task_versions
from exporter.engines.environment import default_threads, environment
from exporter.errors import ComparisonError
from exporter.files import sha256_file
from exporter.models.model_folder import holds_stacks
from exporter.models.sentence_folder import settings_hashes
from exporter.models.texts.chat_template import ChatTemplate
from exporter.models.texts.images import read_images
from exporter.models.texts.sources import Part, TextSource, read_texts, refuse_same_text

_NAME = "comparison.jsonl"


def open_store(comparison: Comparison, folder: Path | None) -> Store:
    """What an earlier run of the same comparison has left in a folder, or a new store."""
    if folder is None:
        return Store(None)
    options = comparison.options
    threads = options.threads or default_threads()
    machine = environment(threads=threads, gpu=comparison.on_gpu)
    same = ("machine", "processor", "cpu_count", "threads", "python", "gpu", "affinity")
    made_from: dict[str, Any] = {
        "arms": {name: _identity(arm) for name, arm in comparison.arms.items()},
        "options": [options.rounds, options.timing.kept],
        "versions": library_versions(),
        "machine": {name: getattr(machine, name) for name in same},
    }
    store = Store(folder / FOLDER / _NAME, made_from)
    if store.count:
        comparison.progress.say(
            f"time: going on with {store.count} parts that an earlier run timed"
        )
    return store


def _identity(arm: ComparedArm) -> list[str]:
    engines = [engine.sha256 for engine in arm.engines]
    return [arm.runner.backend, arm.runner.provider, arm.facts.sha256, arm.timed_on, *engines]


def forget(folder: Path) -> None:
    """Removes what was kept: the report is written."""
    (folder / FOLDER / _NAME).unlink(missing_ok=True)


def answered_by(comparison: Comparison, texts: Sequence[TextSource]) -> dict[str, Any]:
    """Everything that answers depend on, beside what times do."""
    options = comparison.options
    return {
        "texts": [[text.source, _hash_of(text)] for text in texts],
        "samples": [options.eval_tokens, options.eval_sequence_length],
        "quality": vars(options.quality),
        "tasks": task_versions(options.quality),
        "prompts": questions(options.quality.prompts).texts,
        "folders": {name: _beside(arm) for name, arm in comparison.judged.items()},
    }


def _hash_of(texts: TextSource) -> str:
    """Of all that is asked; labels and targets count."""
    content: str = getattr(texts, "content_sha256", texts.sha256)
    return content


def _beside(arm: ComparedArm) -> list[Any]:
    tokenizer, onnx = arm.folder.tokenizer, arm.folder.onnx
    home = onnx if onnx.is_dir() else arm.folder.home  # a PyTorch model is its folder
    known = [arm.folder.config, settings_hashes(home, whole=holds_stacks(home))]
    if tokenizer is None:
        return known
    return [*known, sha256_file(tokenizer), ChatTemplate.beside(tokenizer)]


def evaluation_texts(
    options: CompareOptions,
    decided: Mapping[str, Iterable[TextSource | CalibrationRef]],
    *,
    images: bool = False,
) -> list[TextSource]:
    """The texts that the arms are judged on, which are never such that anything was decided by."""
    if images and options.other_text is not None:
        raise ComparisonError(
            "There is no perplexity of images, which --other-text is for.",
            "Leave it out.",
            code="no-perplexity",
        )
    judged = [read_source(spec, part="evaluation", images=images) for spec in options.texts]
    refuse_deciding(judged, decided)
    for other in judged[1:]:
        hint = "Name another text with --other-text."
        refuse_same_text(other, judged[:1], "what both models are judged on already", hint)
    return judged


def refuse_deciding(
    judged: Sequence[TextSource], decided: Mapping[str, Iterable[TextSource | CalibrationRef]]
) -> None:
    """Refuses to judge on what anything was decided by."""
    for text, option in zip(judged, ("--eval-text", "--other-text"), strict=False):
        for what, others in decided.items():
            refuse_same_text(text, others, what, f"Name another text with {option}.")


def read_source(spec: str, *, part: Part, images: bool) -> TextSource:
    """Reads a text, or finds images."""
    return read_images(spec, part=part) if images else read_texts(spec, part=part)


def decided_on(parts: PlanParts) -> dict[str, list[CalibrationRef]]:
    """The texts that a plan was made by, for :func:`evaluation_texts`."""
    return {f"what the plan was {role} on": refs for role, refs in parts.decided.items()}


def noted_by(arms: Mapping[str, ComparedArm]) -> dict[str, list[CalibrationRef]]:
    """The texts, or what is known of them, that arms were made by, as their graphs note."""
    return {
        f"what the {name} was {role} on, or shares much of it, as its file notes": [
            CalibrationRef.model_construct(source="", sha256=item, content="")
            if not item.startswith(CONTENT)
            else CalibrationRef.model_construct(
                source="a text", sha256="", content=item.removeprefix(CONTENT)
            )
            for item in known
        ]
        for name, arm in arms.items()
        for role, known in noted_texts(arm.facts.metadata).items()
    }
