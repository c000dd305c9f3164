"""An encoder-decoder as an arm: its files, its graphs, and how they are timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from exporter.artifacts import (
    FORM_KEY,
    RUN_IN_FP32,
    Arm,
    FormRecord,
    PlannedDeletion,
)
from exporter.artifacts.base import RECORDINGS
from exporter.artifacts.latency import Shape
from exporter.artifacts.stacks import Stacks
from exporter.artifacts.store import Store
from exporter.compare.arms import noted_plan
from exporter.compare.kept import store_of
from exporter.compare.latency import Timed, TimingSession
from exporter.compare.options import CompareOptions
from exporter.compare.timing.subjects import CallProbe, Clock, Probe, Sample
from exporter.engines.decoding.encoder_decoder import Encoded, EncoderDecoderRunner
from exporter.engines.runners.base import Array
from exporter.errors import ComparisonError
from exporter.files import sha256_bytes
from exporter.models.decoding_rules import DecodingRules, target_positions
from exporter.models.graph_facts import GraphFacts, read_facts
from exporter.models.model_folder import (
    ENCODER,
    FIRST_STEP,
    GRAPHS,
    NEXT_STEP,
    Graph,
    graph_file,
    read_object,
)
from exporter.progress import Progress

_GRAPH_OF: Mapping[str, Graph] = {
    "encode": ENCODER, "prefill": FIRST_STEP, "decode": NEXT_STEP
}  # fmt: skip


@dataclass(frozen=True)
class StackFolder:
    """An exported encoder-decoder on disk."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        result = read_object(self.path / "config.json")
        if not result:
            raise ComparisonError(
                f"{self.path} has no config.json.",
                "Give a folder that depthcut export has written.",
                code="no-config",
            )
        return result

    @cached_property
    def rules(self) -> DecodingRules:
        """How its targets begin and end."""
        return DecodingRules.of(self.config, read_object(self.path / "generation_config.json"))

    @cached_property
    def stacks(self) -> Stacks:
        """How many layers the encoder and the decoder had, before any was cut."""
        return Stacks.of(SimpleNamespace(**self.config))

    @property
    def longest_target(self) -> int | None:
        """Positions that the decoder knows; None where there is no limit."""
        return target_positions(self.config)

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        number = self.config.get("vocab_size")
        if not isinstance(number, int) or number < 1:
            raise ComparisonError(
                f"{self.path / 'config.json'} doesn't say how many tokens the vocabulary has.",
                "Take the file that belongs to the model.",
                code="no-vocabulary",
            )
        return number

    @cached_property
    def facts(self) -> dict[Graph, GraphFacts]:
        """What each graph tells of itself."""
        return {graph: read_facts(graph_file(self.path, graph)) for graph in GRAPHS}

    def dropped(self) -> list[PlannedDeletion]:
        """What its graphs note that was cut, by the numbers of both stacks."""
        first = self.stacks.encoder
        return [
            deletion.model_copy(update={"layer": deletion.layer + offset})
            for graph, offset in ((ENCODER, 0), (NEXT_STEP, first))
            for deletion in noted_plan(self.facts[graph], str(graph_file(self.path, graph)))
        ]

    def record(self, runner: EncoderDecoderRunner) -> Arm:
        """What the report says of it; parameters count the decoder once."""
        facts, own, able = self.facts, runner.graphs[ENCODER], runner.capabilities
        note = facts[ENCODER].metadata.get(FORM_KEY)
        widened = RUN_IN_FP32 if any(capabilities.widened for capabilities in able) else ""
        return Arm(
            backend=own.backend,
            provider=own.provider,
            precision=f"{facts[FIRST_STEP].precision}{widened}",
            path=str(self.path),
            sha256=self.sha256,
            file_bytes=sum(fact.file_bytes for fact in facts.values()),
            parameters=facts[ENCODER].parameters + facts[FIRST_STEP].parameters,
            nodes=sum(fact.nodes for fact in facts.values()),
            kv_cache_bytes_per_token=_bytes_per_token(runner),
            layers=self.stacks.layers,
            form=None if note is None else FormRecord.model_validate_json(note),
            device_memory_bytes=_together(capabilities.gpu_memory_bytes for capabilities in able),
            notes=self._told(),
        )

    def _told(self) -> list[str]:
        """What its answers don't heed."""
        ignored = self.rules.ignored
        return [f"its answers are greedy, without {', '.join(ignored)}"] if ignored else []

    @property
    def sha256(self) -> str:
        """Of all three graphs with their weights."""
        return sha256_bytes("\n".join(fact.sha256 for fact in self.facts.values()).encode())


def _together(bytes_: Iterable[int | None]) -> int | None:
    known = [number for number in bytes_ if number is not None]
    return sum(known) if known else None


def _bytes_per_token(runner: EncoderDecoderRunner) -> int:
    """What one token of a target adds to the caches; those of cross-attention don't grow."""
    return sum(
        int(np.prod([size for size in spec.shape if isinstance(size, int)])) * spec.dtype.itemsize
        for spec in runner.graphs[NEXT_STEP].inputs
        if ".decoder." in spec.name
    )


class StackArm:
    """An encoder-decoder as :class:`~exporter.compare.timing.subjects.TimedArm`; one build."""

    builds = 1

    def __init__(
        self,
        runner: EncoderDecoderRunner,
        rules: DecodingRules,
        source: Mapping[str, Array],  # what the encoder reads, `[1, ...]`, by its inputs' names
        vocabulary: int,
    ) -> None:
        self._runner, self._rules, self._vocabulary = runner, rules, vocabulary
        self._source = source

    def load(self) -> None:
        """Loads all three graphs."""
        self._runner.__enter__()

    def unload(self) -> None:
        """Frees them."""
        self._runner.__exit__(None, None, None)

    def use_build(self, number: int) -> None:
        """There is one."""

    def probe(self, cell: Shape) -> Probe:
        """Binds one graph to a shape, or a whole generation."""
        source = self._batched(cell)
        if cell.new_tokens:
            return _Generation(self._runner, source, self._tokens(cell), cell.new_tokens)
        graph = _GRAPH_OF[cell.phase]
        values = dict(source)
        if graph != ENCODER:
            encoded, tokens = self._runner.encode(source), self._tokens(cell)
            if graph == NEXT_STEP:
                _, encoded = self._runner.step(encoded, self._random(cell.batch, cell.past_length))
            values = {**encoded.given, **encoded.caches, "input_ids": tokens}
        runner = self._runner.graphs[graph]
        wanted = {spec.name: values[spec.name] for spec in runner.inputs}
        return CallProbe(runner.prepare(wanted, phase=cell.phase))

    def _batched(self, cell: Shape) -> dict[str, Array]:
        """The source as often as the cell has rows; of text as many tokens as are asked for."""
        own = {name: np.repeat(array, cell.batch, axis=0) for name, array in self._source.items()}
        if (cell.new_tokens or cell.phase == "encode") and "input_ids" in own:
            size = (cell.batch, cell.sequence_length)
            return {"input_ids": self._random(*size), "attention_mask": np.ones(size, np.int64)}
        return own

    def _tokens(self, cell: Shape) -> Array:
        if cell.phase == "decode":
            return self._random(cell.batch, 1)
        return np.tile(np.array(self._rules.prompt, np.int64), (cell.batch, 1))

    def _random(self, batch: int, length: int) -> Array:
        rng = np.random.default_rng(0)
        return rng.integers(0, self._vocabulary, (batch, length), dtype=np.int64)


@dataclass(frozen=True)
class _Generation:
    """A source from the encoder to its last token, each time anew."""

    runner: EncoderDecoderRunner
    source: Mapping[str, Array]
    prompt: Array
    new_tokens: int

    def sample(self, clock: Clock) -> Sample:
        """Generates once: to the first token, each later one, all of it."""
        begin = clock()
        logits, state = self.runner.step(self.runner.encode(self.source), self.prompt)
        first = clock()
        for _ in range(self.new_tokens - 1):
            logits, state = self._next(logits, state)
        end = clock()
        later = (end - first) / max(1, self.new_tokens - 1)
        return ((first - begin) / 1e6, later / 1e6, (end - begin) / 1e6)

    def _next(self, logits: Array, state: Encoded) -> tuple[Array, Encoded]:
        token = logits[:, -1].argmax(axis=-1).astype(np.int64)[:, None]
        return self.runner.step(state, token)


def time_stacks(
    folders: Mapping[str, StackFolder],
    runners: Mapping[str, EncoderDecoderRunner],  # entered
    source: Mapping[str, Array],  # what the encoder reads, `[1, ...]`, by its inputs' names
    options: CompareOptions,
    store: Store,
    progress: Progress,
) -> Timed:
    """A row for each graph and shape, and the machine meanwhile."""
    whole = folders["baseline"]
    cells = Cells(whole, source, options)
    for words in cells.shortened():
        progress.say(words)
    arms = {
        name: StackArm(runner, whole.rules, source, whole.vocabulary)
        for name, runner in runners.items()
    }
    threads, on_gpu = runners["baseline"].threads, options.provider == "cuda"
    with TimingSession(options, threads, on_gpu=on_gpu, store=store, progress=progress) as session:
        session.measure(arms, cells.all())
    return session.timed


def open_stack_store(
    folders: Mapping[str, StackFolder],
    source: Mapping[str, Array],
    options: CompareOptions,
    resume: Path | None,  # the output folder; None keeps nothing
    progress: Progress,
) -> Store:
    """What an earlier run of the same comparison has left in a folder, or a new store."""
    provider = options.provider
    read = [
        f"{name} {array.dtype} {array.shape} {sha256_bytes(array.tobytes())}"
        for name, array in sorted(source.items())
    ]
    arms = {name: [provider, folder.sha256, *read] for name, folder in folders.items()}
    return store_of(arms, options, resume, gpu=provider == "cuda", progress=progress)


@dataclass(frozen=True)
class Cells:
    """What is timed: each graph at each batch, and whole generations.

    A cache is never longer than the decoder reaches, nor a text than its encoder does.
    """

    folder: StackFolder
    source: Mapping[str, Array]  # what the encoder reads, `[1, ...]`, by its inputs' names
    options: CompareOptions

    def all(self) -> list[Shape]:
        """Graph by graph of each batch."""
        cells: list[Shape] = []
        for batch in self.options.batches:
            cells += self._sources(batch)
            cells.append(Shape("prefill", batch, self._prompt))
            cells += [Shape("decode", batch, 1, past) for past in self._pasts()]
            cells += [cell for cell in self._generations(batch) if not self._is_too_long(cell)]
        return cells

    def shortened(self) -> Iterator[str]:
        """In words, what is asked for and the model doesn't reach."""
        longest = self.folder.longest_target
        if longest is None:
            return
        for past in self.options.decode_past_lengths:
            if past > longest - 1:
                yield f"decode: a cache of {longest - 1} for {past}, the decoder ends there"
        for length in self.options.prompt_lengths if self._frames is None else ():
            if length > longest:
                yield f"encode: {longest} tokens for {length}, the encoder ends there"
        for cell in self._generations(1):
            if self._is_too_long(cell):
                yield f"{cell}: left out, the decoder ends at {longest} positions"

    @property
    def _prompt(self) -> int:
        return len(self.folder.rules.prompt)

    @property
    def _frames(self) -> int | None:
        """Of a recording's features, which have one length; None of a text."""
        features = self.source.get("input_features")
        return None if features is None else features.shape[-1]

    def _sources(self, batch: int) -> list[Shape]:
        if self._frames is not None:
            return [Shape("encode", batch, self._frames, counts=RECORDINGS.parts)]
        lengths = self._within(self.options.prompt_lengths, self.folder.longest_target)
        return [Shape("encode", batch, length) for length in lengths]

    def _pasts(self) -> list[int]:
        longest = self.folder.longest_target
        most = None if longest is None else longest - 1
        return self._within(self.options.decode_past_lengths, most)

    def _generations(self, batch: int) -> list[Shape]:
        """By the source's tokens, of a recording by the prompt's, and by new tokens."""
        return [
            Shape(
                "prefill",
                batch,
                self._prompt if self._frames is not None else source,
                new_tokens=new,
            )
            for source, new in self.options.timing.generate
        ]

    def _is_too_long(self, cell: Shape) -> bool:
        longest = self.folder.longest_target
        source = 0 if self._frames is not None else cell.sequence_length
        return longest is not None and max(source, self._prompt + cell.new_tokens) > longest

    @staticmethod
    def _within(lengths: tuple[int, ...], most: int | None) -> list[int]:
        return sorted({length if most is None else min(length, most) for length in lengths})
