"""From a path to what scores it: a model, and its tokenizer as lm-eval uses it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from exporter.compare.tasks.likelihood import LikelihoodScorer
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.registry import open_model
from exporter.errors import TaskError
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.loading.model_source import LoadedModel
from exporter.models.model_folder import ModelFolder


def saved_folder(loaded: LoadedModel, place: Path) -> ModelFolder:
    """A loaded model's config and tokenizer as files, which a GGUF file doesn't have beside it."""
    save_pretrained_files(loaded, place)
    return ModelFolder.beside(place / "model", place)


def task_texts(folder: ModelFolder) -> TextModel:
    """The tokenizer beside a model, for tasks: the begin token, else the end token, as prefix."""
    if folder.tokenizer is None:
        raise TaskError(
            f"There is no tokenizer.json next to {folder.onnx}, and tasks need one.",
            "Copy the model's tokenizer there.",
            code="no-tokenizer",
        )
    begin = folder.config.get("bos_token_id")
    first = begin if isinstance(begin, int) else folder.end_of_text
    if first is None:
        raise TaskError(
            f"The config next to {folder.onnx} has neither a begin nor an end token.",
            "Copy the model's config.json there.",
            code="no-opening-token",
        )
    return replace(TextModel.of(folder.onnx, folder.tokenizer), prefix_id=first)


def open_scorer(
    model: Path | str,
    stack: ExitStack,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int | None = None,
    longest: int | None = None,
) -> tuple[LikelihoodScorer, TextModel]:
    """Loads a model and its tokenizer.

    Args:
        model: An ONNX file with its tokenizer beside it, their folder, or an engine; or a backend
            and the path of its model, as in ``llama.cpp:FILE``.
        stack: Frees the model when it is closed.
        provider: ``cpu`` or ``cuda``.
        threads: CPU threads; None for all physical cores.
        batch_size: Sequences in one run; None for what suits the backend.
        longest: Positions, where the config tells none.
    """
    folder, runner = open_model(model, provider=provider, threads=threads)
    text_model = task_texts(folder)
    stack.enter_context(runner)
    return LikelihoodScorer.of(runner, folder, rows=batch_size, longest=longest), text_model
