"""Runs an encoder-decoder's three graphs: single steps, whole targets, and greedy generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.latency import Phase, Shape
from exporter.engines.decoding.decoder import IDS, LOGITS, Decoder
from exporter.engines.runners.base import Array, BoundCall, Capabilities, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import TensorSpec, random_tokens
from exporter.errors import BackendError
from exporter.models.decoding_rules import DecodingRules, greedy, rules_in
from exporter.models.model_folder import ENCODER, FIRST_STEP, GRAPHS, NEXT_STEP, Graph, graph_file

STATES = "encoder_hidden_states"
_MASK, ENCODER_MASK = "attention_mask", "encoder_attention_mask"


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


_GRAPH_OF: Mapping[Phase, Graph] = {
    "encode": ENCODER, "prefill": FIRST_STEP, "decode": NEXT_STEP
}  # fmt: skip


class EncoderDecoderRunner(Runner):
    """An encoder-decoder on ONNX Runtime: the phase says which of its three graphs runs."""

    backend = OnnxRuntimeRunner.backend

    def __init__(
        self,
        folder: Path,
        *,
        provider: str = "cpu",
        threads: int,
        brief: bool = False,
        example: Mapping[str, Array] | None = None,  # what the encoder reads when it is timed
    ) -> None:
        missing = [graph for graph in GRAPHS if not graph_file(folder, graph).is_file()]
        if missing:
            raise BackendError(
                f"{folder} lacks {missing[0]}.onnx, a part of an encoder-decoder.",
                "Export all of it: depthcut export MODEL.",
                code="file-missing",
            )
        self.folder, self.name, self.example = folder, str(folder), example or {}
        self.graphs: dict[Graph, Runner] = {
            graph: OnnxRuntimeRunner(
                graph_file(folder, graph), provider=provider, threads=threads, brief=brief
            )
            for graph in GRAPHS
        }
        self.provider = self.graphs[ENCODER].provider

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

    @cached_property
    def rules(self) -> DecodingRules:
        """How its targets begin and end, as its configs say."""
        return rules_in(self.folder)

    @property
    def threads(self) -> int:
        """CPU threads for one operator, of each graph, from when they are entered on."""
        return self.graphs[ENCODER].threads

    @threads.setter
    def threads(self, number: int) -> None:
        for runner in self.graphs.values():
            runner.threads = number

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """What its graphs can do and take together, and what its answers don't heed."""
        every = [runner.capabilities for runner in self.graphs.values()]
        memory = [able.gpu_memory_bytes for able in every if able.gpu_memory_bytes is not None]
        ignored = ", ".join(self.rules.ignored)
        return replace(
            every[0],
            gpu_memory_bytes=sum(memory) if memory else None,
            widened=any(able.widened for able in every),
            notes=(f"its answers are greedy, without {ignored}",) if ignored else (),
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What its encoder reads."""
        return self.graphs[ENCODER].inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What its decoder gives."""
        return self.graphs[FIRST_STEP].outputs

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Phase | None = None,
    ) -> dict[str, Array]:
        """Runs one graph on those of some values that it takes."""
        runner = self.graphs[_GRAPH_OF[phase or "encode"]]
        wanted = {spec.name for spec in runner.inputs}
        return runner.run({name: inputs[name] for name in inputs if name in wanted}, outputs)

    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        """Binds one graph."""
        runner = self.graphs[_GRAPH_OF[phase or "encode"]]
        return runner.prepare({spec.name: inputs[spec.name] for spec in runner.inputs})

    def inputs_of(self, shape: Shape, vocabulary: int) -> dict[str, Array]:
        """The example, of text as many tokens as are asked for; to a decoder what is before it."""
        if shape.phase == "encode":
            return self.batched(random_tokens(shape, vocabulary))
        encoded = self.encode(self._repeated(shape.batch))
        tokens = np.tile(np.array(self.rules.prompt, np.int64), (shape.batch, 1))
        if shape.phase == "decode":
            past = replace(shape, sequence_length=shape.past_length)
            _, encoded = self.step(encoded, random_tokens(past, vocabulary))
            tokens = random_tokens(shape, vocabulary)
        return {**encoded.given, **encoded.caches, IDS: tokens}

    def batched(self, token_ids: NDArray[np.int64]) -> dict[str, Array]:
        """Texts for the encoder; of a model of recordings the example as often as there are."""
        if IDS not in self.example:
            return self._repeated(len(token_ids))
        return {IDS: token_ids, _MASK: np.ones_like(token_ids)}

    def _repeated(self, batch: int) -> dict[str, Array]:
        return {name: np.repeat(array, batch, axis=0) for name, array in self.example.items()}

    def encode(self, source: Mapping[str, Array]) -> Encoded:
        """Runs the encoder."""
        states = self.run(source, phase="encode")["last_hidden_state"]
        mask = {ENCODER_MASK: source[_MASK]} if _MASK in source else {}
        return Encoded({STATES: states, **mask}, {})

    def step(self, encoded: Encoded, token_ids: NDArray[np.int64]) -> tuple[Array, Encoded]:
        """Runs the decoder on further tokens.

        The logits ``[batch, tokens, vocabulary]``, and what the next step reads.

        token_ids: `[batch, tokens]`.
        """
        values = {IDS: token_ids, **encoded.given, **encoded.caches}
        arrays = self.run(values, phase="decode" if encoded.caches else "prefill")
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


class StackDecoder(Decoder):
    """Generates with an encoder-decoder: a prompt is what its encoder reads."""

    backend = EncoderDecoderRunner.backend

    def __init__(self, runner: EncoderDecoderRunner) -> None:
        self._runner = runner
        self._state = Encoded({}, {})

    def __enter__(self) -> Self:
        """Loads all three graphs."""
        self._runner.__enter__()
        self.capabilities = self._runner.capabilities
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees them."""
        self._runner.__exit__(*exc_info)

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Its caches grow."""

    def prefill(self, token_ids: NDArray[np.int64], *, context: int | None = None) -> Array:
        """Runs the encoder on texts, or on as many recordings, and the decoder's first step."""
        self._state = self._runner.encode(self._runner.batched(token_ids))
        prompt = np.array(self._runner.rules.prompt, np.int64)
        return self.step(np.tile(prompt, (len(token_ids), 1)))

    def step(self, token_ids: NDArray[np.int64]) -> Array:
        """Runs the decoder on."""
        logits, self._state = self._runner.step(self._state, token_ids)
        return logits[:, -1]
