"""Holds engines against ONNX Runtime on the graph that they were built from, in each phase."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np

from exporter.artifacts import EngineCheck
from exporter.artifacts.latency import Shape
from exporter.engines.build.engine_set import (
    EngineRecord,
    EngineSet,
    Slot,
    refuse_wrong,
    sidecar_path,
)
from exporter.engines.build.libraries import ask_driver
from exporter.engines.build.profiles import Span
from exporter.engines.build.settings import End
from exporter.engines.decoding.decoder import LOGITS, LOGITS_AXES, cache_pairs
from exporter.engines.decoding.encoder_decoder import ENCODER_MASK
from exporter.engines.decoding.runner_decoder import RunnerDecoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Array, Runner
from exporter.engines.runners.cache_form import IDS, MASK
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.engines.tensors import (
    TOKEN_INPUTS,
    TensorSpec,
    byte_count,
    make_inputs,
    random_tokens,
    row_error,
    tolerance_of,
)
from exporter.errors import DepthcutError, EngineError, UsageError
from exporter.files import sha256_file, sha256_files, staged_directory
from exporter.models.graph_facts import read_facts
from exporter.optional import require
from exporter.progress import QUIET, Progress
from graph_passes.files import storage

_SHORT_PROMPT = 64  # tokens of a prompt, but for one of the usual length: the CPU takes long
_MOST_BYTES = 1 << 28  # of caches, or of logits: batches and prompts are made smaller
_OWN_CACHE = re.compile(r"past_key_values\.\d+\.(decoder\.)?(key|value)")
_UNCHECKED: dict[tuple[str, ...], str] = {}  # by card, source and engines: why not, so far
_SHARP = 8.0  # how large keys are: with small ones all attentions are alike, whatever their scale
_GARBAGE = 30.0  # how much larger the values are that lie behind what is filled
_SIDES = ("inputs", "engine", "onnxruntime")
Sizes = Mapping[str, tuple[int, ...]]
_STEPS, _TEXT_STEPS = 2, 5  # the second step of a text is captured as a graph, where graphs are


@dataclass(frozen=True)
class Difference:
    """How far one output of one run was from ONNX Runtime's; infinite without numbers."""

    run: str
    tensor: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return self.error <= self.tolerance


def believed(engines: EngineSet, onnx: Path | None = None, progress: Progress = QUIET) -> EngineSet:
    """The same engines with the check on their records; those that differ are refused.

    It is made now where it wasn't made on this card. Where it can't be, that is said.
    """
    card = _this_card()
    if card and any(r.check is None or r.check.card != card for r in engines.records):
        source = onnx or source_of(engines)
        key = (card, str(source), *(record.engine_sha256 for record in engines.records))
        reason = _UNCHECKED.get(key) if source else "the ONNX file behind them is not beside them"
        if source is not None and reason is None:
            try:
                engines = verify_engines(engines, source, progress=progress)[0]
            except (DepthcutError, OSError) as error:
                reason = _UNCHECKED[key] = str(error)
        if reason is not None:
            progress.say(f"{engines.name}: not checked against ONNX Runtime: {reason}")
            engines = replace(engines, records=tuple(_of_card(r, card) for r in engines.records))
    refuse_wrong(engines.records)
    return engines


def _of_card(record: EngineRecord, card: str) -> EngineRecord:
    """Without a check that was passed on another card, which says nothing of this one."""
    stays = record.check is None or record.check.card == card or not record.check.passed
    return record if stays else record.model_copy(update={"check": None})


def source_of(engines: EngineSet) -> Path | None:
    """The ONNX file that engines were built from, told by its hash; None where it isn't near."""
    folder = engines.paths[0].absolute().parent
    # depthcut export has engines/baseline beside baseline/model.onnx.
    places = dict.fromkeys((folder, folder.parent, folder.parent.parent / folder.name))
    files = [file for place in places for file in place.glob("*.onnx") if file.is_file()]
    for file in sorted(files, key=lambda file: file.name != "model.onnx"):
        with contextlib.suppress(DepthcutError, OSError):  # what can't be read isn't it
            if _is_source(file, engines):
                return file
    return None


def _is_source(onnx: Path, engines: EngineSet) -> bool:
    made_from = engines.records[0].made_from
    if sha256_file(onnx) != made_from.get("model"):
        return False
    weights = storage.data_files(storage.load_model(onnx))
    return (sha256_files(weights, onnx.parent) if weights else None) == made_from.get("weights")


def refuse_other_source(onnx: Path, engines: EngineSet) -> None:
    """Refuses a file that engines were not built from."""
    if not _is_source(onnx, engines):
        raise EngineError(
            f"{engines.name} was not built from {onnx}: their hashes differ.",
            "Name the ONNX file that was given to depthcut build, or build the engine again.",
            code="not-built-from",
        )


def verify_engines(
    engines: EngineSet,
    onnx: Path,
    *,
    folder: Path | None = None,
    threads: int | None = None,
    progress: Progress = QUIET,
) -> tuple[EngineSet, list[Difference]]:
    """Holds each output of engines against ONNX Runtime's on the same inputs; puts it on record.

    Each profile runs at a batch of 1 and at its usual one: a prompt; steps at several fills of the
    caches with garbage behind the fill, each followed by one that reads what it wrote; and texts,
    whose caches stay on the card. ``folder`` takes the run that is furthest off, for Polygraphy.
    A check that breaks off after a difference is one that failed.
    """
    if folder is not None:
        require("polygraphy", extra="gpu")
        _refuse_in_use(folder)
    refuse_other_source(onnx, engines)
    fresh = replace(
        engines, records=tuple(r.model_copy(update={"check": None}) for r in engines.records)
    )
    tolerance = tolerance_of(engines.records[0].precision)
    reference = OnnxRuntimeRunner(onnx, threads=threads or default_threads(), brief=True)
    furthest = None if folder is None else _Furthest()
    results: list[Difference] = []
    try:
        with (
            progress.task("check against ONNX Runtime"),
            reference,
            TensorRtRunner(fresh) as runner,
        ):
            vocabulary = read_facts(onnx).vocabulary or 2
            held = _Held(fresh, runner, reference, vocabulary, tolerance, furthest)
            for result in chain(held.phases(), held.texts()):
                results.append(result)
    except DepthcutError:
        if all(result.passed for result in results):
            raise
    engines = _recorded(engines, results)
    if folder is not None and furthest is not None:
        furthest.write(folder)
    return engines, results


def _refuse_in_use(folder: Path) -> None:
    """Refuses a folder with something else in it: it is exchanged as a whole."""
    own = {f"{name}.json" for name in _SIDES}
    if folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= own):
        raise UsageError(
            f"{folder} holds other files, which would be replaced.",
            "Name a folder that does not exist.",
            code="not-ours",
        )


def _this_card() -> str:
    """The card and the driver; empty where there is none."""
    driver = ask_driver()
    return f"{driver.devices[0].name}, CUDA {driver.cuda_version}" if driver.devices else ""


def _recorded(engines: EngineSet, results: Sequence[Difference]) -> EngineSet:
    worst = max(results, key=lambda item: item.error / item.tolerance)
    check = EngineCheck(
        card=_this_card(),
        worst=f"{worst.tensor} ({worst.run})",
        error=worst.error,
        tolerance=worst.tolerance,
    )
    records = tuple(record.model_copy(update={"check": check}) for record in engines.records)
    for path, record in zip(engines.paths, records, strict=True):
        with contextlib.suppress(OSError, DepthcutError):  # it is made anew next time
            record.write(sidecar_path(path))
    return replace(engines, records=records)


@dataclass
class _Furthest:
    """The run that is furthest off: its inputs, and the outputs of both sides."""

    error: float = -1.0
    arrays: dict[str, dict[str, Array]] = field(default_factory=dict)

    def hold(self, error: float, *arrays: dict[str, Array]) -> None:
        """Takes a run that is further off than the one that it has."""
        if error > self.error:
            self.error = error
            self.arrays = dict(zip(_SIDES, arrays, strict=True))

    def write(self, folder: Path) -> None:
        """In the form that ``polygraphy run`` loads, which has float32 in bfloat16's place."""
        from polygraphy.comparator import RunResults
        from polygraphy.json import save_json

        plain = {
            name: {
                key: np.ascontiguousarray(array, np.float32 if array.dtype.kind == "V" else None)
                for key, array in arrays.items()
            }
            for name, arrays in self.arrays.items()
        }
        with staged_directory(folder) as stage, contextlib.redirect_stdout(sys.stderr):
            save_json([plain.pop("inputs")], str(stage / "inputs.json"))
            for name, outputs in plain.items():
                results = RunResults()
                results.add([outputs], runner_name=name)
                results.save(str(stage / f"{name}.json"))


@dataclass(frozen=True)
class _Held:
    """Engines beside ONNX Runtime, both loaded."""

    engines: EngineSet
    runner: TensorRtRunner
    reference: Runner
    vocabulary: int
    tolerance: float
    furthest: _Furthest | None  # of first steps: later ones have caches of each side's own

    def phases(self) -> Iterator[Difference]:
        """Each profile at two batches and several fills; one prompt is as long as usual."""
        for slot in self.engines.slots:
            low, usual = (self.engines.shapes(slot, end) for end in ("low", "usual"))
            first = IDS if IDS in usual else next(iter(usual))
            lengths = [1, 1]
            if first == IDS:
                short = max(low[IDS][1], min(usual[IDS][1], _SHORT_PROMPT))
                fits = usual[IDS][1] * self.vocabulary * 4 <= _MOST_BYTES  # of logits
                lengths = [usual[IDS][1] if fits else short, short]
            fills = self._fills(slot)
            for fill in sorted({fills.low, fills.usual, fills.high}):
                most = max(low[first][0], self._most_rows(fill + lengths[-1]))
                batches = sorted({max(1, low[first][0]), min(usual[first][0], most)})
                for rows, new in zip(batches, lengths, strict=False):
                    shape = Shape(slot.profile.phase, rows, new, fill)
                    yield from self._steps(shape, fills.high, usual)

    def _caches(self) -> dict[str, TensorSpec]:
        """Those that a step continues: of an encoder-decoder the decoder's own."""
        specs = (tensor.spec for tensor in self.engines.inputs)
        return {spec.name: spec for spec in specs if _OWN_CACHE.fullmatch(spec.name)}

    def _fills(self, slot: Slot) -> Span:
        """What may be filled before a run of a profile."""
        caches = self._caches()
        if slot.profile.phase != "decode" or not caches:
            return Span(0, 0, 0)
        name, spec = next(iter(caches.items()))
        if isinstance(room := spec.shape[2], int):
            return Span(1, max(1, room // 2), max(1, room - 1))
        ends: tuple[End, ...] = ("low", "usual", "high")
        low, usual, high = (self.engines.shapes(slot, end)[name][2] for end in ends)
        return Span(*(max(min(1, high), size) for size in (low, usual, high)))

    def _reads_room(self) -> bool:
        """Whether prompts are run with padding before their tokens."""
        return all(record.attention == "room" for record in self.engines.records)

    def _most_rows(self, positions: int) -> int:
        row = 0
        for spec in self._caches().values():
            sizes = spec.shape[1], spec.shape[2] or positions, spec.shape[3]
            row += byte_count(spec.dtype, [size for size in sizes if isinstance(size, int)])
        return max(1, _MOST_BYTES // max(1, row))

    def _steps(self, shape: Shape, last: int, sizes: Sizes) -> Iterator[Difference]:
        """One run; where it is a step of decode, another on the caches that each side wrote."""
        names = [spec.name for spec in self.runner.outputs]
        pairs = cache_pairs(self._caches(), names)
        given: list[dict[str, Array]] = [{}, {}]
        for step in range(
            min(_STEPS if shape.phase == "decode" else 1, last - shape.past_length + 1)
        ):
            at = replace(shape, past_length=shape.past_length + step)
            inputs = self._inputs(at, sizes)
            sides = [
                runner.run({**inputs, **own}, phase=at.phase)
                for runner, own in zip((self.runner, self.reference), given, strict=True)
            ]
            where = f"{at}, step {step + 1}" if step else str(at)
            parts = (slice(0, at.past_length), slice(at.past_length, at.total_length))
            held = [
                self._difference(where, name, *(side[name][:, :, part] for side in sides))
                if name in pairs.values()
                else self._difference(where, name, *(side[name] for side in sides))
                for name in names
                for part in (parts if name in pairs.values() else parts[:1])
            ]
            if self.furthest is not None and not step:
                self.furthest.hold(max(item.error for item in held), inputs, *sides)
            yield from held
            given = [{past: side[new] for past, new in pairs.items()} for side in sides]

    def _inputs(self, shape: Shape, sizes: Sizes) -> dict[str, Array]:
        """Random ones, of what is no text and no own cache as large as usual.

        Behind what is filled of caches of fixed length lies what must not count.
        """
        rng, caches, given = np.random.default_rng(1), self._caches(), dict[str, Array]()
        for spec in self.runner.inputs:
            size = [shape.batch, *sizes[spec.name][1:]]
            if spec.name in caches:
                size[2] = shape.past_length
            if spec.name == ENCODER_MASK:  # one source is shorter than the others
                given[spec.name] = np.ones(size, spec.dtype)
                given[spec.name][-1, (size[1] + 1) // 2 :] = 0
            elif spec.name not in TOKEN_INPUTS:
                scale = _SHARP if spec.name.endswith(".key") else 1.0
                noise = scale * rng.standard_normal(size, np.float32)
                given[spec.name] = noise.astype(spec.dtype)
        tokens = random_tokens(shape, self.vocabulary)
        inputs = make_inputs(self.runner.inputs, shape, tokens, cache=given)
        if MASK in inputs and shape.phase != "decode":  # a text that is shorter than the others
            half = shape.sequence_length // 2
            if shape.phase == "encode":
                inputs[MASK][-1, shape.sequence_length - half :] = 0
            elif self._reads_room():  # each query sees itself at least, padding too
                inputs[MASK][-1, :half] = 0
        for name, spec in caches.items():
            room, filled = spec.shape[2], inputs[name]
            if not isinstance(room, int):
                continue
            size = [*filled.shape[:2], room, filled.shape[3]]
            scale = _GARBAGE if name.endswith("value") else 1.0
            inputs[name] = (scale * rng.standard_normal(size, np.float32)).astype(spec.dtype)
            inputs[name][:, :, : shape.past_length] = filled
            behind = room - inputs[MASK].shape[1]
            inputs[MASK] = np.pad(inputs[MASK], ((0, 0), (0, behind)))
        return inputs

    def texts(self) -> Iterator[Difference]:
        """Steps behind a prompt, on caches that stay on the card and hold an older text."""
        phases = {slot.profile.phase for slot in self.engines.slots}
        ends = {output.name: len(output.shape) for output in self.engines.outputs}
        if phases != {"prefill", "decode"} or ends.get(LOGITS) != LOGITS_AXES:
            return
        own, other = TensorRtDecoder(self.engines, on=self.runner), RunnerDecoder(self.reference)
        plan = own.plan
        least = max(plan.prompt.low, plan.context.low)
        prompt = min(plan.prompt.high, max(least, min(plan.prompt.usual, _SHORT_PROMPT)))
        steps = min(_TEXT_STEPS, plan.context.high - prompt + 1)
        if prompt < least or steps < 1:
            return
        most = max(plan.batch.low, self._most_rows(prompt + steps))
        with own, other:
            for rows in sorted({plan.batch.low, min(plan.batch.usual, most)}):
                tokens = random_tokens(Shape("prefill", rows, prompt + steps), self.vocabulary)
                own.prefill(tokens[:, : plan.prompt.high])
                sides = [
                    d.prefill(tokens[:, :prompt], context=prompt + steps) for d in (own, other)
                ]
                where = f"a text of {prompt}, batch {rows}"
                yield self._difference(where, LOGITS, *sides)
                for step in range(steps):
                    token = tokens[:, prompt + step : prompt + step + 1]
                    sides = [decoder.step(token) for decoder in (own, other)]
                    yield self._difference(f"{where}, step {step + 1}", LOGITS, *sides)

    def _difference(self, run: str, tensor: str, got: Array, wanted: Array) -> Difference:
        if tensor == LOGITS:  # an engine may give those of the last position alone
            wanted = wanted[:, -got.shape[1] :]
        return Difference(run, tensor, row_error(got, wanted), self.tolerance)
