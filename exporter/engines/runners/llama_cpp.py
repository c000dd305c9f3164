"""llama.cpp on the CPU, by llama-cpp-python: a GGUF file behind a graph's inputs and outputs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from exporter.artifacts.latency import Phase
from exporter.engines.runners.base import Array, BoundCall, Capabilities, Runner, refuse_cuda
from exporter.engines.runners.cache_form import IDS, MASK
from exporter.engines.tensors import TensorSpec
from exporter.errors import OUT_OF_MEMORY, BackendError
from exporter.models.texts.tokenizer import forget_said, llama_library, said

BATCH_TOKENS = 2048
"""Tokens of one call, the usual number of llama.cpp's own programs; it parts them further."""

_STEP = 256  # contexts are as long as a multiple of this


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence."""

    sequence: int
    start: int
    tokens: Sequence[int]


class LlamaContext:
    """One context of a loaded model."""

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
                code=OUT_OF_MEMORY,
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
        """Batches for :meth:`run`, which stay good until the context is closed."""
        rows = [
            (token, piece.start + place, piece.sequence, logits == "all" or place == last)
            for piece in pieces
            for last in [len(piece.tokens) - 1]
            for place, token in enumerate(piece.tokens)
        ]
        results = []
        remaining = iter(rows)
        while part := list(islice(remaining, BATCH_TOKENS)):
            results.append(self._batch(part))
        self._batches += results
        return results

    def run(self, batches: Sequence[Any]) -> None:
        """Runs batches, one after the other, and waits."""
        for batch in batches:
            self._decode(batch)
        self._library.llama_synchronize(self._context)

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Runs tokens once, whose logits nobody wants."""
        batches = self.batches(pieces, "last")
        self.run(batches)
        self._free(batches)

    def logits(self, pieces: Sequence[Piece], which: Literal["all", "last"] = "all") -> Array:
        """Runs tokens once: the logits of each, ``[tokens, vocabulary]``, float32."""
        batches, arrays = self.batches(pieces, which), []
        for batch in batches:
            self._decode(batch)
            count = sum(map(bool, batch.logits[: batch.n_tokens]))
            if count:
                pointer = self._library.llama_get_logits(self._context)
                arrays.append(np.ctypeslib.as_array(pointer, (count, self._vocabulary)).copy())
        self._free(batches)
        return np.concatenate(arrays)

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


PAST, PRESENT, LOGITS = "past_key_values.0.key", "present.0.key", "logits"
_INT, _FLOAT = np.dtype(np.int64), np.dtype(np.float32)


class LlamaCppRunner(Runner):
    """One GGUF file, loaded by llama.cpp.

    Weights stay in the file, mapped into memory; keys and values are float16, and flash attention
    is used where llama.cpp has it: its own defaults.
    """

    backend = "llama.cpp"
    capabilities = Capabilities(one_text=True)

    def __init__(
        self, model: Path, *, provider: str = "cpu", threads: int, last_logits: bool = False
    ) -> None:
        refuse_cuda(self.backend, provider)
        self.model, self.name = model, str(model)
        self.provider, self.threads = "CPU", threads
        self._last_logits = last_logits
        self._model: Any = None
        self._contexts: weakref.WeakSet[LlamaContext] = weakref.WeakSet()
        self._context: LlamaContext | None = None
        self._held: list[int] = []

    def __enter__(self) -> Self:
        """Loads the model."""
        library = self._library = llama_library()
        if not self.model.is_file():
            raise BackendError(f"The GGUF file {self.model} does not exist.", code="file-missing")
        params = library.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(os.fsencode(self.model), params)
        if not self._model:
            raise BackendError(
                f"llama.cpp (llama-cpp-python {library.__version__}) can't load {self.model}"
                f"{said()}.",
                "A newer llama-cpp-python may know its architecture; depthcut gguf tells what "
                "of a cut llama.cpp loads.",
                code="load-failed",
            )
        vocabulary = library.llama_model_get_vocab(self._model)
        self._vocabulary = library.llama_vocab_n_tokens(vocabulary)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees the model and its contexts."""
        for context in list(self._contexts):
            context.close()
        self._contexts.clear()
        self._context, self._held = None, []
        if self._model:
            self._library.llama_model_free(self._model)
        self._model = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Tokens, the mask, and the tokens that stand for the cache."""
        self._loaded()
        return (
            TensorSpec(IDS, _INT, ("batch", "sequence")),
            TensorSpec(MASK, _INT, ("batch", "total")),
            TensorSpec(PAST, _INT, ("batch", 1, "past", 1)),
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Logits, and the tokens that stand for the cache."""
        self._loaded()
        length: int | str = 1 if self._last_logits else "sequence"
        return (
            TensorSpec(LOGITS, _FLOAT, ("batch", length, self._vocabulary)),
            TensorSpec(PRESENT, _INT, ("batch", 1, "total", 1)),
        )

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Phase | None = None,
    ) -> dict[str, Array]:
        """Runs one row after the other; masked positions are no tokens, and their logits are 0."""
        past, new, mask = self._tokens(inputs)
        wanted = {LOGITS, PRESENT} if outputs is None else set(outputs)
        arrays: dict[str, Array] = {}
        if PRESENT in wanted:
            arrays[PRESENT] = np.concatenate([past, new], axis=1)[:, None, :, None]
        if LOGITS in wanted:
            rows = [self._row(*pair) for pair in zip(past, new, mask, strict=True)]
            arrays[LOGITS] = np.stack(rows)
        return arrays

    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        """Fills the caches of a context of its own; a call runs the new tokens of all rows.

        Each call gives the logits of the last position alone, which is what a server asks for, and
        begins by dropping what the call before has put into the caches.
        """
        past, new, mask = self._tokens(inputs)
        if not mask.all():
            raise BackendError(f"{self.name} is timed on rows without padding.", code="no-padding")
        context = self._new_context(len(new), mask.shape[1])
        length, rows = past.shape[1], range(len(new))
        if length:
            context.fill([Piece(n, 0, past[n].tolist()) for n in rows])
        batches = context.batches([Piece(n, length, new[n].tolist()) for n in rows], "last")

        def call() -> None:
            kept = [context.forget(number, length) for number in rows]
            if length and not all(kept):
                raise BackendError(
                    f"{self.name} keeps a state that can't be taken back, so its steps can't be "
                    "timed one by one.",
                    "Time whole generations: --generate.",
                    code="state-not-kept",
                )
            context.run(batches)

        call()
        return BoundCall(call)

    def _tokens(self, inputs: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """The past's tokens, the new ones and the mask, each ``[batch, ...]``.

        A cache of random numbers, as timings have it, is one of some tokens.
        """
        self.refuse_missing(inputs)
        new, mask = (np.asarray(inputs[name]).astype(np.int64) for name in (IDS, MASK))
        past = np.abs(np.asarray(inputs[PAST]).astype(np.int64))[:, 0, :, 0]
        every = np.concatenate([past, new], axis=1)
        if every.shape != mask.shape:
            raise BackendError(
                f"The attention mask has {mask.shape[1]} positions; {past.shape[1]} in the cache "
                f"and {new.shape[1]} new tokens make another number.",
                code="wrong-shape",
            )
        if every.size and not 0 <= every.min() <= every.max() < self._vocabulary:
            raise BackendError(
                f"{self.name} knows {self._vocabulary} tokens; {every.max()} is none of them.",
                code="token-out-of-range",
            )
        return past, new, mask.astype(bool)

    def _row(self, past: Array, new: Array, mask: Array) -> Array:
        """One row's logits, ``[new, vocabulary]``, or ``[1, vocabulary]`` of the last position."""
        real = mask[len(past) :]
        before, tokens = past[mask[: len(past)]].tolist(), new[real].tolist()
        length = 1 if self._last_logits else len(new)
        tensor = np.zeros((length, self._vocabulary), np.float32)
        if tokens:
            tensor[real[-length:]] = self._continued(before, tokens)
        return tensor

    def _continued(self, before: list[int], tokens: list[int]) -> Array:
        """The logits of tokens behind others, of which the context may hold the first ones."""
        context = self._with_room(len(before) + len(tokens))
        same = _common(self._held, before)
        if not context.forget(0, same):
            same = 0
        self._held = []  # should the run fail
        if same < len(before):
            context.fill([Piece(0, same, before[same:])])
        which: Literal["all", "last"] = "last" if self._last_logits else "all"
        logits = context.logits([Piece(0, len(before), tokens)], which)
        self._held = [*before, *tokens]
        return logits

    def _with_room(self, positions: int) -> LlamaContext:
        context = self._context
        if context is None or context.positions < positions:
            if context is not None:  # twice as long, so that a growing text is seldom run again
                longest = self._library.llama_model_n_ctx_train(self._loaded())
                positions = max(positions, min(2 * context.positions, longest))
                context.close()
            context = self._context = self._new_context(1, positions)
            self._held = []
        return context

    def _new_context(self, sequences: int, positions: int) -> LlamaContext:
        context = LlamaContext(
            self._library,
            self._loaded(),
            sequences=sequences,
            positions=positions,
            threads=self.threads,
        )
        self._contexts.add(context)
        return context

    def _loaded(self) -> Any:
        if not self._model:
            raise self.not_entered()
        return self._model


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
