"""Scores of models larger than memory: a layer's weights at a time, the whole text through each."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import Score
from exporter.errors import ScoringError, first_line
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacements
from exporter.models.ablation.damage import Damage, joined
from exporter.models.ablation.meter import damage_of
from exporter.models.ablation.streams import (
    CutBranches,
    LayerRunner,
    Streams,
    head_at,
    recorded,
    without_mlp,
)
from exporter.models.architectures import candidate_layers, layer_modules, unknown_layers
from exporter.models.families import FAMILIES
from exporter.models.loading.meta_model import Fetched, MetaModel
from exporter.models.residual_stream import (
    LayerModules,
    ProbeFindings,
    first_tensor,
    probe_inputs,
    tapped,
)
from exporter.models.tasks import Tokens
from exporter.models.texts.samples import Batch
from exporter.processes import available_bytes
from exporter.progress import Progress, Task
from exporter.score.metric import AnswerMetric, Metric, StreamMetric, of_kind
from exporter.score.passes import (
    ANY_METRIC,
    ScoredModel,
    ScoredStack,
    StreamBatch,
    StreamSums,
    answer_units,
    scores_of_damages,
)
from graph_passes.types import DeletionKind, SublayerRef, sublayer_kinds

if TYPE_CHECKING:
    import torch

# Of the memory that is left, activations and the runs' scratch take the other half.
_SHARE = 0.5
_LASTING = Path("/var/tmp")  # noqa: S108 - the file there has no name


class HiddenStates:
    """Keeps a tensor for each stream and batch, all within one in memory or in a file."""

    def __init__(self, kept: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        self._kept, self._shapes = kept, shapes
        self._begins = list(itertools.accumulate(map(math.prod, shapes), initial=0))

    def put(self, stream: int, batch: int, tensor: torch.Tensor) -> None:
        """Copies a tensor, in the place of the last one of this stream and batch."""
        self.get(stream, batch).copy_(tensor)

    def get(self, stream: int, batch: int) -> torch.Tensor:
        """The tensor that was kept; the caller does not change it."""
        start = stream * self._begins[-1]
        begin, end = (start + place for place in self._begins[batch : batch + 2])
        return self._kept[begin:end].view(self._shapes[batch])


def room_for_states(
    folder: Path | None,  # None: in memory, or in the system's folder for such files
    streams: int,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    *,
    weights_bytes: int,
    progress: Progress,
) -> HiddenStates:
    """Keeps them in memory where they fit, else in a file."""
    import torch

    count = streams * sum(map(math.prod, shapes))
    size, free = f"{count * dtype.itemsize / 1e9:.3g} GB", available_bytes()
    if folder is None and (
        free is None or count * dtype.itemsize <= _SHARE * (free - weights_bytes)
    ):
        progress.detail(f"hidden states: {size} in memory")
        return HiddenStates(torch.empty(count, dtype=dtype), shapes)
    if folder is None:  # the one for large files: /tmp is often kept in memory
        lasting = os.environ.get("TMPDIR") is None and os.access(_LASTING, os.W_OK)
        folder = _LASTING if lasting else Path(tempfile.gettempdir())
    progress.say(f"hidden states: {size} in a file in {folder}")
    return HiddenStates(kept_in_file(folder, count, dtype), shapes)


def kept_in_file(folder: Path, count: int, dtype: torch.dtype) -> torch.Tensor:
    """So many numbers in a nameless file, which goes with the tensor."""
    import torch

    nbytes = count * dtype.itemsize
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < nbytes:
            raise OSError(errno.ENOSPC, f"there is no room for {nbytes / 1e9:.3g} GB")
        with tempfile.TemporaryFile(dir=folder, prefix=".depthcut-stream-") as file:
            # All of it now: a disk that fills up later would end the process.
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=dtype)
    except OSError as error:
        raise ScoringError(
            f"The hidden states can't be kept in {folder}: {first_line(error)}.",
            "Name a folder on another disk with --stream-dir or the variable TMPDIR, or take "
            "fewer --samples.",
            code="no-room",
        ) from error
    finally:
        for path in made:  # the file needs none of them any more
            with contextlib.suppress(OSError):
                path.rmdir()


@dataclass(frozen=True)
class Parts:
    """A model's modules and parameters by their dotted names."""

    layers: list[str]  # the layers, in order
    embedding: list[str]
    rest: list[str]
    head: list[str]
    tied: list[str]


def parts_of(meta: MetaModel, layers: Sequence[LayerModules]) -> Parts:
    """Sorts a model's parameters."""
    model: Any = meta.model
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = [names[id(modules.layer)] for modules in layers]
    in_layers = {name for prefix in prefixes for name in meta.weights.names(prefix)}
    others = [name for name in meta.weights.names() if name not in in_layers]
    backbone = names[id(model.base_model)]
    needed = [name for name in others if not backbone or name.startswith(f"{backbone}.")]
    embedding = meta.weights.names(names[id(model.get_input_embeddings())])
    tied = {alias for name in embedding for alias in meta.weights.aliases(name)}
    return Parts(
        layers=prefixes,
        embedding=embedding,
        rest=[name for name in needed if name not in embedding],
        head=[name for name in others if name not in needed and name not in tied],
        tied=sorted(tied.difference(embedding)),
    )


def filled_in_turn(meta: MetaModel, prefixes: Sequence[str]) -> Generator[int]:
    """Yields each module's place in the list while it is filled; at most two are in memory.

    Close the generator, so that nothing stays filled when the caller fails.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming: list[Future[Fetched]] = [pool.submit(meta.weights.fetch, prefixes[0], stop)]
        try:
            for number, prefix in enumerate(prefixes):
                # Popped: a future that is kept keeps the tensors, too.
                meta.weights.materialise(prefix, coming.pop().result())
                if number + 1 < len(prefixes):
                    coming.append(pool.submit(meta.weights.fetch, prefixes[number + 1], stop))
                try:
                    yield number
                finally:
                    meta.weights.release(prefix)
        finally:
            stop.set()  # the pool waits for what it reads, and that may be a gigabyte


def layers_of(meta: MetaModel) -> list[LayerModules]:
    """Finds the modules of every layer.

    For a model type that is not in the table the first layer is read and held against every row;
    the walk then looks at the others.
    """
    if meta.model.config.model_type in FAMILIES:
        return layer_modules(meta.model)
    for layers in candidate_layers(meta.model):
        if _first_layer_fits(meta, layers):
            return layers
    raise unknown_layers(meta.model)


def _first_layer_fits(meta: MetaModel, layers: list[LayerModules]) -> bool:
    parts = parts_of(meta, layers)
    with contextlib.ExitStack() as stack:
        for name in (*parts.embedding, *parts.rest, parts.layers[0]):
            stack.enter_context(meta.held(name))
        runner = LayerRunner(meta.model, layers)
        findings, inputs = ProbeFindings(layers), probe_inputs(meta.model)
        with runner.only(0):
            findings.look(layers[:1], partial(runner.run, inputs, None))
    return findings.so_far == "adds_up"


_WHOLE = 0
"""The stream of the whole model; 1, 2, … are those of the cuts."""


def layer_by_layer_scores(
    meta: MetaModel, scored: ScoredModel, metrics: Sequence[Metric], stream_dir: Path | None
) -> dict[str, list[Score]]:
    """The scores by the names of the metrics of stream and answers; others are left out."""
    before = meta.shards.bytes_read
    scores = _LayerWalk(meta, scored, metrics, stream_dir).scores()
    read, whole = meta.shards.bytes_read - before, meta.shards.nbytes
    scored.progress.detail(
        f"weights read: {read / 1e9:.3g} GB, {read / whole:.2f} times what the shards hold"
    )
    return scores


class _LayerWalk:
    """One walk through a model's layers; the arguments are :func:`layer_by_layer_scores`'s."""

    def __init__(
        self, meta: MetaModel, scored: ScoredModel, metrics: Sequence[Metric], folder: Path | None
    ) -> None:
        self._meta, self._scored, self._folder = meta, scored, folder
        self._layers, self._batches = scored.layers, scored.batches
        self._stack = ScoredStack(range(len(self._layers)))
        self._of_stream = of_kind(metrics, StreamMetric)
        self._of_answers = of_kind(metrics, AnswerMetric)
        self._runner = LayerRunner(meta.model, self._layers)
        self._branches = CutBranches(self._layers)
        self._units: list[tuple[int, DeletionKind]] = []  # of which each cut is one
        if self._of_answers:
            Tokens.of(meta.model).refuse_unmeasurable(scored.text.mask, scored.positions)
            self._units = answer_units(len(self._layers), blocks=scored.blocks)
        self._cuts: list[BranchReplacements] = [
            {SublayerRef(layer, branch): NOTHING for branch in sublayer_kinds(kind)}
            for layer, kind in self._units
        ]
        # Metrics of answers alone would not tell in which layer activations become infinite.
        collected = self._of_stream or [ANY_METRIC]
        self._sums = [
            StreamBatch(self._stack, collected, batch.mask_on(), batch.first_sample)
            for batch in self._batches
        ]

    def scores(self) -> dict[str, list[Score]]:
        """Walks, and gives the scores by each metric's name."""
        parts = parts_of(self._meta, self._layers)
        layers, cuts = len(self._layers), len(self._cuts)
        runs = layers + (cuts * (layers + 1) // 2 + cuts + 1 if cuts else 0)
        working = self._scored.progress.task(
            "score, layer by layer", total=len(self._batches) * runs, unit="runs of a layer"
        )
        with contextlib.ExitStack() as stack, working as task:
            for name in parts.rest:
                stack.enter_context(self._meta.held(name))
            states = self._through_layers(parts, stack, task)
            sums = StreamSums(self._stack, self._of_stream)
            for batch in self._sums if self._of_stream else ():
                sums.add(batch.sums, batch.counts)
            result = sums.scores()
            if cuts and states:
                for name in parts.head:
                    stack.enter_context(self._meta.held(name))
                damages = self._damages(states, task)
                result |= scores_of_damages(self._of_answers, self._units, damages)
        return result

    def _through_layers(
        self, parts: Parts, stack: contextlib.ExitStack, task: Task
    ) -> HiddenStates | None:
        states: HiddenStates | None = None
        embedding = stack.enter_context(contextlib.ExitStack())
        for name in parts.embedding:
            embedding.enter_context(self._meta.held(name))
        model, stream = self._meta.model, None
        findings, probed = ProbeFindings(self._layers), probe_inputs(model)
        turns = stack.enter_context(contextlib.closing(filled_in_turn(self._meta, parts.layers)))
        for number in turns:
            with self._runner.only(number):
                run = partial(self._runner.run, probed, stream)
                stream = findings.look([self._layers[number]], run)
                if findings.so_far == "differs":  # before the text, which may take hours
                    raise unknown_layers(model)
                if states is None:
                    states = self._room(parts, stream)
                for batch in self._batches:
                    self._batch(number, batch, states, task)
            # Is it wanted once more: as the head, or by layers that nobody has looked at? What cuts
            # pictures into patches stays as well: it is small, and no table of tokens.
            known = model.config.model_type in FAMILIES and model.main_input_name == "input_ids"
            if not number and known and not (self._cuts and parts.tied):
                embedding.close()
                stack.enter_context(self._runner.without_embedding())
        if findings.verdict == "differs":
            raise unknown_layers(model)
        return states

    def _batch(self, number: int, batch: Batch, states: HiddenStates, task: Task) -> None:
        """One batch through one layer, in the whole model and in all cuts that there are.

        The layer's own cuts begin there, from what was kept of the whole model's run.
        """
        given = states.get(_WHOLE, batch.number) if number else None
        modules = self._layers[number]
        kept = Streams(batch.inputs(), {}, [None] * len(self._layers), {})
        with (
            recorded(modules, kept),
            self._branches.counted(number),
            tapped([modules], self._sums[batch.number]),
        ):
            whole = self._runner.run(batch.inputs(), given)
        task.advance()
        for stream, ((layer, kind), cut) in enumerate(zip(self._units, self._cuts, strict=True), 1):
            if layer > number:
                break
            if layer < number:
                output = self._runner.run(batch.inputs(), states.get(stream, batch.number))
            elif kind == "mlp" and number in kept.attended:
                own = without_mlp(kept.attended[number], NOTHING, kept.outputs[number])
                output = first_tensor(own)
            else:
                with self._branches.cut(cut):
                    output = self._runner.run(batch.inputs(), given)
            states.put(stream, batch.number, output)
            task.advance()
        states.put(_WHOLE, batch.number, whole)

    def _damages(self, states: HiddenStates, task: Task) -> list[Damage]:
        """What each cut does to the answers, when all layers are through and the head is there."""
        model: Any = self._meta.model
        answers, stride = Tokens.of(model), self._scored.positions
        head = model.get_output_embeddings()
        parts: list[list[Damage]] = [[] for _ in self._cuts]
        with self._runner.only(None), head_at(head, lambda hidden: hidden[:, ::stride]):
            for batch in self._batches:
                for stream, cut in enumerate([{}, *self._cuts]):
                    given = states.get(stream, batch.number)
                    logits = self._runner.logits(batch.inputs(), given)
                    if stream == _WHOLE:
                        reference = answers.reference(logits, batch, stride)
                    damage = damage_of(reference, logits, cut, batch.first_sample)
                    if stream != _WHOLE:
                        parts[stream - 1].append(damage)
                    task.advance()
        return [joined(part) for part in parts]

    def _room(self, parts: Parts, stream: torch.Tensor) -> HiddenStates:
        """Where the streams go; their width and dtype are the probe's."""
        weights = self._meta.weights
        others = (*parts.rest, *parts.embedding, *parts.head)
        return room_for_states(
            self._folder,
            1 + len(self._cuts),
            [(*batch.ids.shape, stream.shape[-1]) for batch in self._batches],
            stream.dtype,
            weights_bytes=sum(map(weights.nbytes, others))
            + 2 * max(map(weights.nbytes, parts.layers)),
            progress=self._scored.progress,
        )
