"""A conversation with one model: what was said so far, and its next answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import Generation, generate, open_decoder, refuse_too_long
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.registry import RUNNERS, named_backend
from exporter.errors import BackendError
from exporter.progress import QUIET, Progress


def text_model_of(model: Path | str, tokenizer: Path | None = None) -> TextModel:
    """The tokenizer of a model that may name its backend, such as ``openvino:DIR``."""
    backend, path = named_backend(model)
    return TextModel.of(path if backend is None else RUNNERS[backend].folder(path).onnx, tokenizer)


class Conversation:
    """What a user and a model say in turn; a model without a chat template continues each line."""

    def __init__(self, texts: TextModel, decoder: Decoder) -> None:
        self.texts, self.decoder = texts, decoder
        self.turns: list[str] = []
        self.forgotten = 0  # turns that had no room any more

    @classmethod
    def open(
        cls, model: str, *, provider: str = "cpu", threads: int | None = None, log: Progress = QUIET
    ) -> Conversation:
        """With a model that is not loaded yet."""
        decoder = open_decoder(model, provider=provider, threads=threads, progress=log)
        return cls(text_model_of(model), decoder)

    def ask(self, said: str, *, new_tokens: int, write: Callable[[str], object]) -> Generation:
        """Writes the answer while it comes; what was written is remembered when it is stopped."""
        self.turns.append(said)
        written: list[str] = []

        def put(piece: str) -> None:
            written.append(piece)
            write(piece)

        stream = self.texts.stream(put)
        try:
            answer = generate(
                self.decoder,
                self._prompt(new_tokens),
                new_tokens=new_tokens,
                stop_ids=self.texts.stop_ids,
                on_token=stream.add,
            )
            stream.finish(answer.token_ids)
        except BackendError:
            self.turns.pop()
            raise
        finally:
            if len(self.turns) % 2:
                self.turns.append("".join(written))
        return answer

    def _prompt(self, new_tokens: int) -> list[int]:
        """The tokens of all that fits, from the last turns back."""
        if self.texts.chat is None:
            return self.texts.encode(self.turns[-1])
        while True:
            (token_ids,) = self.texts.encode_chats([self.turns])
            try:
                refuse_too_long(self.decoder, len(token_ids), new_tokens, self.texts.positions)
            except BackendError:
                if len(self.turns) == 1:
                    raise
                del self.turns[:2]
                self.forgotten += 2
            else:
                return token_ids
