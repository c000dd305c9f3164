"""A context of llama.cpp: the KV caches of some sequences, and batches of tokens to run on them.

llama.cpp keeps its caches to itself. What is called here is its C interface, as llama-cpp-python
has it; one context has room for one number of sequences, of one length.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from exporter.engines.runners.base import Array
from exporter.errors import BackendError
from exporter.models.gguf.llama_library import forget_said, said

BATCH_TOKENS = 2048
"""Tokens of one call, the usual number of llama.cpp's own programs; it parts them further."""

_STEP = 256  # contexts are as long as a multiple of this


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence.

    Attributes:
        sequence: Its number.
        start: The position of the first one.
        tokens: The tokens.
    """

    sequence: int
    start: int
    tokens: Sequence[int]


class LlamaContext:
    """One context of a loaded model.

    Args:
        library: The module ``llama_cpp``.
        model: What it has loaded.
        sequences: How many there is room for.
        positions: How long each may get.
        threads: CPU threads.

    Raises:
        BackendError: llama.cpp makes none, as for want of memory.
    """

    def __init__(
        self, library: Any, model: Any, *, sequences: int, positions: int, threads: int
    ) -> None:
        self._library = library
        self.positions = -(-positions // _STEP) * _STEP
        params = library.llama_context_default_params()
        params.n_ctx = sequences * self.positions
        params.n_seq_max = sequences
        params.n_batch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        forget_said()
        self._context = library.llama_init_from_model(model, params)
        if not self._context:
            raise BackendError(
                f"llama.cpp can't make a context of {params.n_ctx} tokens{said()}.",
                "Ask for shorter texts or a smaller batch.",
                code="no-context",
            )
        self._memory = library.llama_get_memory(self._context)
        self._batches: list[Any] = []
        self._released = weakref.finalize(self, _release, library, self._context, self._batches)
        self._released.atexit = False  # the model may be gone by then
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def forget(self, sequence: int, start: int) -> bool:
        """Drops what a sequence has from a position on; False where it can be dropped whole only.

        It is then dropped whole.
        """
        removed = self._library.llama_memory_seq_rm(self._memory, sequence, start, -1)
        if not removed:
            self._library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return bool(removed)

    def batches(self, pieces: Sequence[Piece], logits: Literal["all", "last"]) -> list[Any]:
        """Batches for :meth:`run`, which stay good until the context is closed.

        Args:
            pieces: The tokens.
            logits: Of all tokens, or of the last one of each piece.
        """
        rows = [
            (token, piece.start + place, piece.sequence, logits == "all" or place == last)
            for piece in pieces
            for last in [len(piece.tokens) - 1]
            for place, token in enumerate(piece.tokens)
        ]
        found = []
        remaining = iter(rows)
        while part := list(islice(remaining, BATCH_TOKENS)):
            found.append(self._batch(part))
        self._batches += found
        return found

    def run(self, batches: Sequence[Any]) -> None:
        """Runs batches, one after the other, and waits.

        Raises:
            BackendError: llama.cpp can't.
        """
        for batch in batches:
            self._decode(batch)
        self._library.llama_synchronize(self._context)

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Runs tokens once, whose logits nobody wants.

        Raises:
            BackendError: llama.cpp can't.
        """
        batches = self.batches(pieces, "last")
        self.run(batches)
        self._free(batches)

    def logits(self, pieces: Sequence[Piece], which: Literal["all", "last"] = "all") -> Array:
        """Runs tokens once: the logits of each, ``[tokens, vocabulary]``, float32.

        Args:
            pieces: The tokens.
            which: Of all tokens, or of the last one of each piece.

        Raises:
            BackendError: llama.cpp can't.
        """
        batches, found = self.batches(pieces, which), []
        for batch in batches:
            self._decode(batch)
            count = sum(map(bool, batch.logits[: batch.n_tokens]))
            if count:
                pointer = self._library.llama_get_logits(self._context)
                found.append(np.ctypeslib.as_array(pointer, (count, self._vocabulary)).copy())
        self._free(batches)
        return np.concatenate(found)

    def close(self) -> None:
        """Gives the memory back; does nothing the second time."""
        self._released()

    def _decode(self, batch: Any) -> None:
        forget_said()
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise BackendError(f"llama.cpp fails with {code}{said()}.", code="run-failed")

    def _free(self, batches: Sequence[Any]) -> None:
        for batch in batches:
            self._batches.remove(batch)
            self._library.llama_batch_free(batch)

    def _batch(self, rows: Sequence[tuple[int, int, int, bool]]) -> Any:
        batch = self._library.llama_batch_init(len(rows), 0, 1)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = wanted
        batch.n_tokens = len(rows)
        return batch


def _release(library: Any, context: Any, batches: list[Any]) -> None:
    for batch in batches:
        library.llama_batch_free(batch)
    batches.clear()
    library.llama_free(context)
