"""Models whole and cut: the speed of a small one, and that of large ones at their largest batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from exporter.artifacts import GpuLargest, GpuTime, PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build.driver import ask_driver
from exporter.engines.build.engine_set import EngineSet, find_engines
from exporter.engines.build.profiles import Ranges, Span
from exporter.errors import OUT_OF_MEMORY, DepthcutError, EngineError
from exporter.pipeline.gpu.largest import largest_fit
from exporter.pipeline.gpu.llama_shaped import LlamaShape
from exporter.pipeline.gpu.sizes import Sizes
from exporter.pipeline.gpu.timing import opened, prefill_time, step_time, stepping
from exporter.pipeline.gpu.workplace import Workplace
from exporter.processes import available_bytes

ARMS = ("whole", "cut")
_ROOM_TO_GROW = 1.25  # of the reckoned batch, for the engine
# Of what there is, what the weights of a slice may take: of the card, so that caches have the rest
# (8B whole on 24 GB); of the disk, for a model and one engine; of the machine's memory, of which a
# builder took three times the weights (TensorRT-RTX 1.7).
_CARD_SHARE, _DISK_SHARE, _BUILDER_SHARE = 0.7, 0.3, 0.25


def time_small_model(place: Workplace) -> None:
    """SmolLM2's shape: a prompt and a decode step, whole and without half of its attentions."""
    case, shape = place.case, place.case.small
    longest = max(case.lengths)
    ranges = Ranges(batch=Span(1, 1, 1), prompt=Span(1, longest, longest))

    def timed(arm: str) -> list[GpuTime]:
        onnx = _model(place, "small", shape, arm)
        engines = place.engines(onnx, f"small-{arm}", ("prefill", "decode"), ranges)
        facts = {"subject": "SmolLM2-135M", "arm": arm}
        sizes = Sizes.of(shape, dropped=_dropped(shape, arm))
        rows = [prefill_time(engines, place, 1, length, **facts) for length in case.lengths]
        with opened(engines) as decoder:
            steps = [
                step_time(decoder, place, 1, n, sizes.step_bytes(1, n), **facts)
                for n in case.lengths
            ]
        return rows + steps

    for arm in ARMS:
        place.rows(f"SmolLM2's shape, {arm}", GpuTime, partial(timed, arm))


def time_large_model(place: Workplace, name: str) -> None:
    """A large shape at the largest batch that fits, whole and without half of its attentions."""
    whole = place.case.large[name]
    layers = place.kept(f"{name}, layers", partial(_layers_that_fit, place, whole))
    if layers < whole.layers:
        place.found.notes.append(
            f"{name}: {layers} of {whole.layers} layers were run; more don't fit the card, the "
            "disk or the memory that a builder takes."
        )
    shape = replace(whole, layers=layers)
    for arm in ARMS:
        measured = _Arm(place, name, shape, whole.layers, arm)
        measured.measure()
    place.drop("large")


def _layers_that_fit(place: Workplace, shape: LlamaShape) -> int:
    """As many layers as card, disk and builder hold, an even number so that half can be cut."""
    limits = [
        _CARD_SHARE * ask_driver().devices[0].memory_bytes,
        _DISK_SHARE * place.free_disk_bytes(),
        _BUILDER_SHARE * (available_bytes() or float("inf")),
    ]
    ends = replace(shape, layers=0)
    outside = Sizes.of(ends).weights + Sizes.of(ends).embedding
    each = (Sizes.of(shape).weights + Sizes.of(shape).embedding - outside) / shape.layers
    layers = min(shape.layers, int((min(limits) - outside) // each)) // 2 * 2
    if layers < 2:
        raise EngineError(
            f"Not even two of {shape.layers} layers fit the card, the disk or the memory.",
            "Free some space, or run the session on a larger machine.",
            code="nothing-fits",
        )
    return layers


def _dropped(shape: LlamaShape, arm: str) -> int:
    return shape.layers // 2 if arm == "cut" else 0


def _model(place: Workplace, name: str, shape: LlamaShape, arm: str) -> Path:
    """The model, or the same without every second attention; both share the file of weights."""
    whole = place.model(name, shape)
    if arm == "whole":
        return whole
    cut = whole.with_name("cut.onnx")
    if not cut.is_file():
        plan = [
            PlannedDeletion(layer=layer, kind="attention") for layer in range(1, shape.layers, 2)
        ]
        prune_file(whole, cut, plan, CutOptions(verify="none", weights="share", companions=False))
    return cut


@dataclass(frozen=True)
class _Arm:
    """One arm of a large model. Its engines for prefill and decode are loaded in turns."""

    place: Workplace
    name: str
    shape: LlamaShape
    of_layers: int
    arm: str

    @cached_property
    def _sizes(self) -> Sizes:
        return Sizes.of(self.shape, dropped=_dropped(self.shape, self.arm))

    @property
    def _facts(self) -> Mapping[str, str]:
        return {"subject": self.name, "arm": self.arm}

    @property
    def _told(self) -> str:
        return f"{self.name}, {self.arm}"

    def measure(self) -> None:
        """A prompt; the largest batch; all steps there; steps at batch 1 and there."""
        place = self.place
        (prompt,) = place.rows(f"{self._told}, a prompt", GpuTime, self._prompt)
        place.rows(f"{self._told}, largest batch", GpuLargest, partial(self._largest, prompt))
        (largest,) = (row for row in place.found.largest if self._is_own(row))
        steps = partial(self._steps, largest.batch)
        place.rows(f"{self._told}, decode steps", GpuTime, steps)
        place.drop("decode")

    def _is_own(self, row: GpuLargest) -> bool:
        return (row.subject, row.arm) == (self.name, self.arm)

    def _onnx(self) -> Path:
        return _model(self.place, "large", self.shape, self.arm)

    def _prompt(self) -> list[GpuTime]:
        place, prompt = self.place, self.place.case.prompt
        ranges = Ranges(batch=Span(1, 1, 1), prompt=Span(prompt, prompt, prompt))
        engines = place.engines(self._onnx(), "prefill", ("prefill",), ranges)
        row = prefill_time(engines, place, 1, prompt, **self._facts)
        place.drop("prefill")
        return [row]

    def _reckon(self, *, copies: int) -> int:
        memory = ask_driver().devices[0].memory_bytes
        return self._sizes.largest_batch(memory, self.place.case.room, copies=copies)

    @cached_property
    def _reckoned(self) -> int:
        return max(1, self._reckon(copies=1))

    @property
    def _high(self) -> int:
        return int(self._reckoned * _ROOM_TO_GROW) + 1

    @cached_property
    def _decode(self) -> EngineSet:
        """One build serves every batch; it is tuned for the one that is reckoned to be largest."""
        ranges = Ranges(batch=Span(1, self._reckoned, self._high))
        return find_engines(self.place.engines(self._onnx(), "decode", ("decode",), ranges))

    def _largest(self, prompt: GpuTime) -> list[GpuLargest]:
        case = self.place.case
        engines = self._decode  # a builder that runs out of memory says nothing of a batch
        batch, fits_not = largest_fit(self._fits, self._reckoned, self._high)
        if not batch:
            raise EngineError(
                f"{self._told}: not one sequence of {case.room} positions fits the card.",
                "Stop other programs on the GPU.",
                code="nothing-fits",
            )
        decode_s = self._decode_s(batch)
        prefill_s = batch * prompt.median_ms / 1e3
        return [
            GpuLargest(
                layers=self.shape.layers, of_layers=self.of_layers, batch=batch, fits_not=fits_not,
                batch_with_both=min(batch, self._reckon(copies=2)),
                prompt=case.prompt, new=case.new, prefill_s=prefill_s, decode_s=decode_s,
                tokens_per_s=batch * case.new / (prefill_s + decode_s),
                weights_bytes=engines.records[0].engine_bytes,
                cache_bytes=batch * case.room * self._sizes.cache_per_token, **self._facts,
            )
        ]  # fmt: skip

    def _fits(self, batch: int) -> bool:
        """Whether a step at the end of the caches runs."""
        try:
            with stepping(self._decode, batch) as decoder:
                decoder.begin_at(batch, self.place.case.room - 1)
                decoder.advance(np.ones((batch, 1), np.int64))
        except DepthcutError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            self.place.progress.say(f"{self._told}: batch {batch} doesn't fit")
            return False
        self.place.progress.say(f"{self._told}: batch {batch} fits")
        return True

    def _decode_s(self, batch: int) -> float:
        """Seconds of all steps but the first token, which the prompt gives."""
        case, token = self.place.case, np.ones((batch, 1), np.int64)
        with stepping(self._decode, batch) as decoder:
            decoder.begin_at(batch, case.prompt)
            decoder.advance(token)  # warm
            decoder.begin_at(batch, case.prompt)
            begin = time.perf_counter()
            for _ in range(case.new - 1):
                decoder.advance(token)
            return time.perf_counter() - begin

    def _steps(self, largest: int) -> list[GpuTime]:
        past = self.place.case.prompt
        with stepping(self._decode, largest) as decoder:
            return [
                step_time(
                    decoder,
                    self.place,
                    batch,
                    past,
                    self._sizes.step_bytes(batch, past),
                    **self._facts,
                )
                for batch in dict.fromkeys((1, largest))
            ]
