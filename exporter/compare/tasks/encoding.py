"""Text to tokens and back, as lm-eval's Hugging Face backend does it."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.compare.tasks.likelihood import ContinuationRequest
from exporter.engines.decoding.text_model import TextModel
from exporter.errors import TaskError
from exporter.models.model_folder import ModelFolder
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
