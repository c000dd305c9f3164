"""Runs an encoder-decoder's three graphs: single steps, whole targets, and greedy generation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from exporter.engines.decoding.decoder import LOGITS
from exporter.engines.runners.base import Array, Capabilities, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError
from exporter.models.decoding_rules import DecodingRules, greedy
from exporter.models.model_folder import (
    ENCODER,
    FIRST_STEP,
    GRAPHS,
    NEXT_STEP,
    Graph,
    graph_file,
)

STATES = "encoder_hidden_states"
_MASK, _ENCODER_MASK = "attention_mask", "encoder_attention_mask"


@dataclass(frozen=True)
class Encoded:
    """What the decoder reads of the encoder, and both caches."""

    given: Mapping[str, Array]
    caches: Mapping[str, Array]

    def after(self, outputs: Mapping[str, Array]) -> Encoded:
        """The same after a step; caches that it doesn't return stay."""
        new = {
            name.replace("present", "past_key_values", 1): value
            for name, value in outputs.items()
            if name.startswith("present")
        }
        return Encoded(self.given, {**self.caches, **new})


class EncoderDecoderRunner:
    """An encoder-decoder between ``__enter__`` and ``__exit__``, on ONNX Runtime."""

    def __init__(
        self, folder: Path, *, provider: str = "cpu", threads: int, brief: bool = False
    ) -> None:
        missing = [graph for graph in GRAPHS if not graph_file(folder, graph).is_file()]
        if missing:
            raise BackendError(
                f"{folder} lacks {missing[0]}.onnx, a part of an encoder-decoder.",
                "Export all of it: depthcut export MODEL.",
                code="graph-missing",
            )
        self.folder = folder
        self.graphs: dict[Graph, Runner] = {
            graph: OnnxRuntimeRunner(
                graph_file(folder, graph), provider=provider, threads=threads, brief=brief
            )
            for graph in GRAPHS
        }

    def __enter__(self) -> Self:
        """Loads all three."""
        with ExitStack() as stack:
            for runner in self.graphs.values():
                stack.enter_context(runner)
            stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees them."""
        for runner in self.graphs.values():
            runner.__exit__(*exc_info)

    @property
    def threads(self) -> int:
        """CPU threads for one operator, of each graph, from when they are entered on."""
        return self.graphs[ENCODER].threads

    @threads.setter
    def threads(self, number: int) -> None:
        for runner in self.graphs.values():
            runner.threads = number

    @property
    def capabilities(self) -> list[Capabilities]:
        """What each graph can do and what it takes."""
        return [runner.capabilities for runner in self.graphs.values()]

    def run(self, graph: Graph, values: Mapping[str, Array]) -> dict[str, Array]:
        """Runs one graph on those of some values that it takes."""
        runner = self.graphs[graph]
        wanted = {spec.name for spec in runner.inputs}
        return runner.run({name: value for name, value in values.items() if name in wanted})

    def encode(self, source: Mapping[str, Array]) -> Encoded:
        """Runs the encoder."""
        states = self.run(ENCODER, source)["last_hidden_state"]
        mask = {_ENCODER_MASK: source[_MASK]} if _MASK in source else {}
        return Encoded({STATES: states, **mask}, {})

    def step(self, encoded: Encoded, token_ids: NDArray[np.int64]) -> tuple[Array, Encoded]:
        """Runs the decoder on further tokens.

        The logits ``[batch, tokens, vocabulary]``, and what the next step reads.

        token_ids: `[batch, tokens]`.
        """
        graph = NEXT_STEP if encoded.caches else FIRST_STEP
        arrays = self.run(graph, {"input_ids": token_ids, **encoded.given, **encoded.caches})
        return arrays[LOGITS], encoded.after(arrays)

    def logits(
        self, source: Mapping[str, Array], token_ids: NDArray[np.int64]
    ) -> NDArray[np.floating]:
        """The logits of whole targets, teacher-forced: ``[batch, tokens, vocabulary]``."""
        return self.step(self.encode(source), token_ids)[0]

    def generate(
        self, source: Mapping[str, Array], rules: DecodingRules, new_tokens: int
    ) -> NDArray[np.int64]:
        """Greedy generation; see :func:`exporter.models.decoding_rules.greedy`."""
        return self.answer(self.encode(source), rules, new_tokens)

    def answer(self, encoded: Encoded, rules: DecodingRules, new_tokens: int) -> NDArray[np.int64]:
        """The same of what the encoder gave."""

        def step(state: Encoded, tokens: NDArray[np.int64]) -> tuple[Array, Encoded]:
            logits, after = self.step(state, tokens)
            return logits[:, -1], after

        return greedy(step, encoded, rules, len(encoded.given[STATES]), new_tokens)
