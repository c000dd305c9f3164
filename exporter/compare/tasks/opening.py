"""From a path to what scores it: a model, and its tokenizer as lm-eval uses it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from exporter.compare.tasks.likelihood import ContinuationRequest, LikelihoodScorer
from exporter.engines.build.engine_set import SUFFIXES, find_builds, holds_engines_alone
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.errors import TaskError
from exporter.models.model_folder import ModelFolder, find_model
from exporter.models.texts.tokenizer import read_tokenizer


class TextCodec:
    """The tokenizer beside a model.

    Attributes:
        name: The file's path.
        prefix_id: What stands before a text that has nothing before it: the begin token, else the
            end token.
        stop_ids: Tokens that end a text.

    Raises:
        TaskError: There is no tokenizer, or no token that may stand first.
        ComparisonError: The file is no tokenizer.
    """

    def __init__(self, folder: ModelFolder) -> None:
        if folder.tokenizer is None:
            raise TaskError(
                f"There is no tokenizer.json beside {folder.onnx}: tasks are text.",
                "Copy the model's tokenizer there.",
            )
        self._tokenizer = read_tokenizer(folder.tokenizer)
        begin = folder.config.get("bos_token_id")
        first = begin if isinstance(begin, int) else folder.end_of_text
        if first is None:
            raise TaskError(
                f"The config beside {folder.onnx} names no begin and no end token.",
                "Copy the model's config.json there.",
            )
        self.name = str(folder.tokenizer)
        self.prefix_id: int = first
        self.stop_ids = TextModel.of(folder.onnx, folder.tokenizer).stop_ids

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """A text's tokens, with those that the tokenizer adds by itself or without."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' text, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def request(self, context: str, continuation: str) -> ContinuationRequest:
        """Tokens of a text and what follows; spaces between the two go with the latter."""
        if not context:
            ids = self.encode(continuation, special=False)
            begins = ids[:1] == [self.prefix_id]
            return ContinuationRequest((self.prefix_id,), tuple(ids[1:] if begins else ids))
        kept = context.rstrip()
        whole = self.encode(context + continuation)
        before = self.encode(kept)
        return ContinuationRequest(tuple(before), tuple(whole[len(before) :]))


def open_scorer(
    path: Path,
    stack: ExitStack,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int | None = None,
    longest: int | None = None,
) -> tuple[LikelihoodScorer, TextCodec]:
    """Loads a model and its tokenizer.

    Args:
        path: An ONNX file with its tokenizer beside it, their folder, or an engine.
        stack: Frees the model when it is closed.
        provider: ``cpu`` or ``cuda``.
        threads: CPU threads; None for all physical cores.
        batch_size: Sequences in one run; None for what suits the backend.
        longest: Positions, where the config tells none.

    Raises:
        OnnxFileError: There is no ONNX file, or more than one to choose from.
        TaskError: There is no tokenizer.
        BackendError: The model can't be loaded.
    """
    folder, runner = open_model(path, provider=provider, threads=threads)
    codec = TextCodec(folder)
    stack.enter_context(runner)
    return LikelihoodScorer.of(runner, folder, rows=batch_size, longest=longest), codec


def open_model(
    path: Path, *, provider: str, threads: int | None = None
) -> tuple[ModelFolder, Runner]:
    """A model's files, and its runner, which is not entered yet; of several builds the first.

    Raises:
        OnnxFileError: There is no ONNX file, or more than one to choose from.
        EngineError: An engine is not what its record says.
        BackendError: The provider is not known.
    """
    if path.suffix in SUFFIXES or holds_engines_alone(path):
        home = path if path.is_dir() else path.parent
        return ModelFolder.beside(path, home), TensorRtRunner(find_builds(path)[0])
    folder = find_model(path)
    runner = OnnxRuntimeRunner(folder.onnx, provider=provider, threads=threads or default_threads())
    return folder, runner
