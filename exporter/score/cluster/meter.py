"""Measures what cuts do to a model's answers on several workers at once."""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.errors import ClusterError, ModelSourceError
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacements
from exporter.models.ablation.damage import AnyDamage, D, joined
from exporter.models.ablation.embeddings import meter_here
from exporter.models.ablation.meter import CutMeter
from exporter.models.loading.model_source import LoadedModel, load_model
from exporter.progress import QUIET, Progress
from exporter.score import CalibrationText
from exporter.score.cluster.pool import Pool, WorkerGroup
from graph_passes.types import SublayerRef


@dataclass(frozen=True)
class ModelAddress:
    """What a worker loads."""

    source: str
    sha256: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedModel, options: Mapping[str, Any] | None = None) -> ModelAddress:
        """Where a loaded model came from."""
        source = loaded.ref.source
        if Path(source).expanduser().exists():
            source = str(loaded.path.resolve())
        return cls(source, loaded.ref.sha256, dict(options or {}))

    def load(self) -> LoadedModel:
        """Loads it, in the worker."""
        host = socket.gethostname()
        try:
            loaded = load_model(self.source, **self.options)
        except ModelSourceError as error:
            raise ClusterError(
                f"On {host}: {error.message}",
                "The model has to lie under the same path on all machines, such as a shared "
                "folder, or be a hub id that all can fetch.",
                code="model-missing",
            ) from error
        if loaded.ref.sha256 != self.sha256:
            raise ClusterError(
                f"On {host}, {self.source} is another model (sha256 {loaded.ref.sha256[:12]}) "
                f"than where the command was given (sha256 {self.sha256[:12]}).",
                "Give all machines the same files.",
                code="another-model",
            )
        return loaded


_FEWEST_CUTS = 4
"""So few share a run of what they begin from; fewer would mostly run that."""

Names = tuple[SublayerRef, ...]


@dataclass(frozen=True)
class CutJob:
    """Some cuts on one batch."""

    start: int
    cut: Names
    others: tuple[Names, ...]

    def __str__(self) -> str:
        return f"{len(self.others) + 1} cuts on the samples from {self.start} on"


@contextlib.contextmanager
def cluster_meter(
    pool: Pool,
    model: ModelAddress,
    text: CalibrationText,
    *,
    num_layers: int,
    batch_size: int = 4,
    positions: int = 1,
    embeds: bool | None = None,  # None: where the model predicts no next token
) -> Iterator[ClusterMeter]:
    """Workers with the model that measure until the block ends."""

    def setup() -> CutMeter[Any]:
        return meter_here(model.load(), text, batch_size, positions, embeds)

    with pool.group(setup) as group:
        yield ClusterMeter(group, num_layers)


class ClusterMeter:
    """A :class:`exporter.choose.selection.meters.Meter` whose runs are spread."""

    def __init__(self, group: WorkerGroup[CutMeter[Any]], num_layers: int) -> None:
        self._group, self._num_layers = group, num_layers

    @cached_property
    def _starts(self) -> list[int]:
        """Where the workers' batches begin, which the model decides with the batch size."""
        ((_, starts),) = self._group.run(starts_of, [CutJob(0, (), ())])
        return starts

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self._num_layers

    def measure_many(
        self,
        cut: BranchReplacements,
        others: Sequence[BranchReplacements],
        progress: Progress = QUIET,
    ) -> list[AnyDamage]:
        """The damage of a cut, and of several others."""
        jobs = cut_jobs(self._starts, self._group.workers, _names(cut), list(map(_names, others)))
        results: list[list[AnyDamage]] = [[] for _ in jobs]
        runs = sum(len(job.others) + 1 for job in jobs)
        with progress.task("run with cuts", runs, "batches") as task:
            for number, damages in self._group.run(measured, jobs):
                results[number] = damages
                task.advance(len(damages))
        return joined_damages(jobs, results)


def cut_jobs(
    starts: Sequence[int], workers: int, cut: Names, others: Sequence[Names]
) -> list[CutJob]:
    """The pieces, in the order of the text: as few as keep all workers busy to the end."""
    wanted = workers // math.gcd(len(starts), workers)
    parts = max(1, min(wanted, len(others) // _FEWEST_CUTS))
    bounds = [len(others) * part // parts for part in range(parts + 1)]
    return [
        CutJob(start, cut, tuple(others[first:end]))
        for start in starts
        for first, end in itertools.pairwise(bounds)
    ]


def joined_damages(jobs: Sequence[CutJob], found: Sequence[Sequence[D]]) -> list[D]:
    """Over all samples: of the cut itself, then of each other in their order."""
    whole: dict[int, D] = {}
    rest: dict[int, list[D]] = {}
    for job, (first, *others) in zip(jobs, found, strict=True):
        whole.setdefault(job.start, first)  # each part of a batch has run it
        rest.setdefault(job.start, []).extend(others)
    return [joined(list(whole.values())), *map(joined, map(list, zip(*rest.values(), strict=True)))]


def starts_of(meter: CutMeter[Any], _job: CutJob) -> list[int]:
    """The first sample of each batch; in the worker."""
    return meter.starts


def measured(meter: CutMeter[D], job: CutJob) -> list[D]:
    """What one piece costs: its cut, then each other; in the worker."""
    cut = dict.fromkeys(job.cut, NOTHING)
    others = [dict.fromkeys(names, NOTHING) for names in job.others]
    return list(meter.measure_batch(job.start, cut, others))


def _names(cut: BranchReplacements) -> Names:
    """What a cut leaves out; names, since a worker's replacements are other objects."""
    if any(what is not NOTHING for what in cut.values()):
        raise ClusterError(
            "Replacements are not measured on a cluster.", "Run the command without --ray."
        )
    return tuple(sorted(cut))
