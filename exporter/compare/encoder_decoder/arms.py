"""An encoder-decoder as an arm: its three graphs as one model, and which lengths are timed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from exporter.artifacts.base import RECORDINGS
from exporter.artifacts.latency import Shape
from exporter.artifacts.stacks import Stacks
from exporter.compare.arms import ComparedArm, noted_plan
from exporter.compare.options import CompareOptions
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.engines.runners.base import Array
from exporter.files import sha256_bytes
from exporter.models.decoding_rules import target_positions
from exporter.models.graph_facts import GraphFacts, read_facts
from exporter.models.model_folder import (
    ENCODER,
    FIRST_STEP,
    GRAPHS,
    NEXT_STEP,
    ModelFolder,
    graph_file,
    read_config,
)
from graph_passes.files.storage import load_model
from graph_passes.plan_record import PLAN_KEY


def open_stack_arm(
    path: Path, options: CompareOptions, *, threads: int, example: Mapping[str, Array]
) -> ComparedArm:
    """The folder of an exported encoder-decoder; what its encoder reads is an example."""
    runner = EncoderDecoderRunner(path, provider=options.provider, threads=threads, example=example)
    config = read_config(path)
    stacks = Stacks.of(SimpleNamespace(**config))
    folder = ModelFolder.beside(path, path, {**config, "num_hidden_layers": stacks.layers})
    return ComparedArm((runner,), folder, _facts(path, stacks), timed_on=hash_of(example))


def hash_of(example: Mapping[str, Array]) -> str:
    """What tells examples apart."""
    read = [
        f"{name} {array.dtype} {array.shape} {sha256_bytes(array.tobytes())}"
        for name, array in sorted(example.items())
    ]
    return sha256_bytes("\n".join(read).encode())


def _facts(path: Path, stacks: Stacks) -> GraphFacts:
    """Of all three graphs; parameters count the decoder once, a plan numbers both stacks."""
    facts = {graph: read_facts(graph_file(path, graph)) for graph in GRAPHS}
    every = facts.values()
    plan = [
        {**deletion.model_dump(), "layer": deletion.layer + offset}
        for graph, offset in ((ENCODER, 0), (NEXT_STEP, stacks.encoder))
        for deletion in noted_plan(facts[graph], str(graph_file(path, graph)))
    ]
    notes = {**facts[NEXT_STEP].metadata, **facts[ENCODER].metadata}
    return GraphFacts(
        file_bytes=sum(fact.file_bytes for fact in every),
        sha256=sha256_bytes("\n".join(fact.sha256 for fact in every).encode()),
        parameters=facts[ENCODER].parameters + facts[FIRST_STEP].parameters,
        nodes=sum(fact.nodes for fact in every),
        precision=facts[FIRST_STEP].precision,
        kv_cache_bytes_per_token=_bytes_per_token(graph_file(path, NEXT_STEP)),
        vocabulary=None,
        metadata={**notes, PLAN_KEY: json.dumps(plan)},
    )


def _bytes_per_token(graph: Path) -> int:
    """What one token of a target adds to the caches; those of cross-attention don't grow."""
    return sum(
        math.prod(size for size in value.shape if isinstance(size, int)) * int(value.dtype.itemsize)
        for value in load_model(graph).graph.inputs
        if value.shape is not None and value.dtype and ".decoder." in (value.name or "")
    )


@dataclass(frozen=True)
class Cells:
    """What is timed: each graph at each batch, and whole generations.

    A cache is never longer than the decoder reaches, nor a text than its encoder does.
    """

    options: CompareOptions
    prompt: int  # tokens that begin a target
    longest: int | None  # positions that the decoder knows; None where there is no limit
    frames: int | None  # of a recording, which all have one length; None of a text

    @classmethod
    def of(cls, arm: ComparedArm, options: CompareOptions) -> Cells:
        """Those of an arm."""
        runner = arm.runner
        assert isinstance(runner, EncoderDecoderRunner)
        features = runner.example.get("input_features")
        frames = None if features is None else features.shape[-1]
        longest = target_positions(arm.folder.config)
        return cls(options, len(runner.rules.prompt), longest, frames)

    def runs(self) -> list[Shape]:
        """Single runs, graph by graph of each batch."""
        most = None if self.longest is None else self.longest - 1
        lengths = _within(self.options.prompt_lengths, self.longest)
        pasts, cells = _within(self.options.decode_past_lengths, most), list[Shape]()
        for batch in self.options.batches:
            if self.frames is not None:
                cells.append(Shape("encode", batch, self.frames, counts=RECORDINGS.parts))
            else:
                cells += [Shape("encode", batch, length) for length in lengths]
            cells.append(Shape("prefill", batch, self.prompt))
            cells += [Shape("decode", batch, 1, past) for past in pasts]
        return cells

    def generations(self) -> list[Shape]:
        """By the source's tokens, of a recording by the prompt's, and by new tokens."""
        cells = [cell for batch in self.options.batches for cell in self._generations(batch)]
        return [cell for cell in cells if not self._is_too_long(cell)]

    def shortened(self) -> Iterator[str]:
        """In words, what is asked for and the model doesn't reach."""
        longest = self.longest
        if longest is None:
            return
        for past in self.options.decode_past_lengths:
            if past > longest - 1:
                yield f"decode: a cache of {longest - 1} for {past}, the decoder ends there"
        for length in self.options.prompt_lengths if self.frames is None else ():
            if length > longest:
                yield f"encode: {longest} tokens for {length}, the encoder ends there"
        for cell in self._generations(1):
            if self._is_too_long(cell):
                yield f"{cell}: left out, the decoder ends at {longest} positions"

    def _generations(self, batch: int) -> list[Shape]:
        return [
            Shape(
                "prefill",
                batch,
                self.prompt if self.frames is not None else source,
                new_tokens=new,
            )
            for source, new in self.options.timing.generate
        ]

    def _is_too_long(self, cell: Shape) -> bool:
        source = 0 if self.frames is not None else cell.sequence_length
        reached = max(source, self.prompt + cell.new_tokens)
        return self.longest is not None and reached > self.longest


def _within(lengths: tuple[int, ...], most: int | None) -> list[int]:
    return sorted({length if most is None else min(length, most) for length in lengths})
