"""llama-cpp-python where it isn't installed: its C interface on tiny GGUF files, in numpy."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from exporter.errors import DepthcutError
from tests.tiny_gguf import VOCABULARY, llama_cpp_logits


@functools.cache
def _logits(model: Path, tokens: tuple[int, ...]) -> Any:
    """Of all tokens; what is timed asks for the same again and again."""
    return llama_cpp_logits(model, list(tokens))


@dataclass
class _Context:
    model: Path
    positions: int
    sequences: int
    held: dict[int, list[int]] = field(default_factory=dict)
    logits: Any = None


@dataclass
class LlamaCpp:
    """The module."""

    alive: dict[int, Any] = field(default_factory=dict)
    run_tokens: int = 0
    threads: int = 0
    takes_back: bool = True
    no_memory: bool = False
    tokenizer_room: int = 0
    trained_positions: int = 4096
    contexts: list[int] = field(default_factory=list)
    __version__: str = "stand-in"

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self._log: Any = lambda *_: None
        self.llama_log_callback = lambda function: function
        self.llama_backend_init = lambda: None
        self.llama_vocab_n_tokens = lambda _vocabulary: VOCABULARY
        self.llama_model_default_params = partial(SimpleNamespace, n_gpu_layers=99, vocab_only=0)
        self.llama_context_default_params = partial(
            SimpleNamespace, n_ctx=512, n_seq_max=1, n_batch=2048, n_threads=4
        )

    def llama_log_set(self, callback: Any, _user: Any) -> None:
        self._log = callback

    def llama_model_load_from_file(self, path: bytes, params: Any) -> int | None:
        file = Path(os.fsdecode(path))
        try:
            if not params.vocab_only:
                llama_cpp_logits(file, [0])
        except (DepthcutError, AssertionError, KeyError, IndexError) as error:
            self._log(4, b"llama_model_load: error loading model: " + repr(error).encode(), None)
            return None
        return self._keep(file)

    def llama_free(self, number: int) -> None:
        del self.alive[number]

    llama_model_free = llama_free

    def llama_synchronize(self, number: int) -> int:
        assert number in self.alive
        return number

    llama_model_get_vocab = llama_synchronize

    def llama_init_from_model(self, model: int, params: Any) -> int | None:
        self._log(3, b"llama_context: n_ctx_seq is not n_ctx_train\n", None)
        if self.no_memory:
            self._log(4, b"llama_init_from_model: failed to allocate\n", None)
            return None
        self.threads = params.n_threads
        positions = params.n_ctx // params.n_seq_max
        self.contexts.append(positions)
        return self._keep(_Context(self.alive[model], positions, params.n_seq_max))

    def llama_model_n_ctx_train(self, model: int) -> int:
        assert model in self.alive
        return self.trained_positions

    def llama_get_memory(self, context: int) -> Any:
        return self.alive[context]

    def llama_memory_seq_rm(self, memory: _Context, sequence: int, start: int, _end: int) -> bool:
        held = memory.held.setdefault(sequence, [])
        if 0 < start < len(held) and not self.takes_back:
            return False
        del held[max(start, 0) :]
        return True

    def llama_batch_init(self, count: int, _embd: int, _sequences: int) -> Any:
        zeros = {name: [0] * count for name in ("token", "pos", "n_seq_id", "logits")}
        batch = SimpleNamespace(seq_id=[[0] for _ in range(count)], **zeros)
        batch.number = self._keep(batch)
        return batch

    def llama_batch_free(self, batch: Any) -> None:
        del self.alive[batch.number]

    def llama_decode(self, context: int, batch: Any) -> int:
        known: _Context = self.alive[context]
        wanted = []
        for place in range(batch.n_tokens):
            (sequence,) = batch.seq_id[place]
            held = known.held.setdefault(sequence, [])
            if sequence >= known.sequences or batch.pos[place] != len(held):
                self._log(4, b"decode: the positions don't go on\n", None)
                return -1
            if len(held) >= known.positions:
                return 1
            held.append(batch.token[place])
            self.run_tokens += 1
            if batch.logits[place]:
                wanted.append((sequence, len(held) - 1))
        logits = {n: _logits(known.model, tuple(known.held[n])) for n, _ in wanted}
        known.logits = np.array([logits[n][at] for n, at in wanted], np.float32)
        return 0

    def llama_get_logits(self, context: int) -> Any:
        known: _Context = self.alive[context]
        return known.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_tokenize(
        self, _vocab: int, text: bytes, _size: int, tokens: Any, room: int, _own: bool, _parse: bool
    ) -> int:
        """A word or a sign is a token."""
        words = re.findall(rb"\w+|[^\w\s]", text)
        if len(words) > room - self.tokenizer_room:
            return -len(words) - self.tokenizer_room
        for place, word in enumerate(words):
            tokens[place] = sum(word) % VOCABULARY
        return len(words)

    def llama_detokenize(
        self, _vocab: int, tokens: Any, count: int, text: Any, room: int, _own: bool, _names: bool
    ) -> int:
        data = "".join(f" t{token}" for token in tokens[:count]).encode()
        if len(data) > room:
            return -len(data)
        ctypes.memmove(text, data, len(data))
        return len(data)

    def _keep(self, thing: Any) -> int:
        number = next(self._numbers)
        self.alive[number] = thing
        return number
