"""An encoder-decoder's graphs and whole generations, timed; the machine is watched meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.artifacts.base import RECORDINGS
from exporter.artifacts.latency import Shape
from exporter.artifacts.store import Store
from exporter.compare.encoder_decoder.arms import StackArm, StackFolder
from exporter.compare.kept import store_of
from exporter.compare.latency import GenerationCell, Timed, TimingSession
from exporter.compare.options import CompareOptions
from exporter.compare.timing.subjects import TimedCell
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.engines.runners.base import Array
from exporter.files import sha256_bytes
from exporter.progress import Progress


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

    def all(self) -> list[TimedCell]:
        """Graph by graph of each batch."""
        cells: list[TimedCell] = []
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

    def _generations(self, batch: int) -> list[GenerationCell]:
        """By the source's tokens, of a recording by the prompt's, and by new tokens."""
        return [
            GenerationCell(batch, self._prompt if self._frames is not None else source, new)
            for source, new in self.options.timing.generate
        ]

    def _is_too_long(self, cell: GenerationCell) -> bool:
        longest = self.folder.longest_target
        source = 0 if self._frames is not None else cell.sequence_length
        return longest is not None and max(source, self._prompt + cell.new_tokens) > longest

    @staticmethod
    def _within(lengths: tuple[int, ...], most: int | None) -> list[int]:
        return sorted({length if most is None else min(length, most) for length in lengths})
