"""Measures what each sublayer costs: variants of the graph, timed against the whole one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import LatencyRow
from exporter.choose.costs.at import At
from exporter.choose.costs.benches import Bench
from exporter.choose.costs.conditions import MODEL, Conditions, conditions, refuse_too_long
from exporter.choose.costs.estimates import RequestEstimate, of_rows
from exporter.choose.costs.grouping import Treatment, groups_of, treatments
from exporter.choose.costs.opening import open_bench
from exporter.choose.costs.table import CostGroup, CostTable, Trial
from exporter.choose.costs.timing import Effort, time_request
from exporter.errors import ArtifactError, CostError, SurgeryError, UsageError
from exporter.progress import QUIET, Progress
from exporter.scratch import scratch_folder
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerRef

if TYPE_CHECKING:
    from exporter.engines.build.libraries import Backend
    from exporter.engines.inputs import Shape

_LEAST = 0.002
"""Of the request's time: what is saved less than this need not be known any better."""


def measure_costs(
    model: Path | str,
    names: Collection[SublayerRef] | None = None,
    at: At | None = None,
    *,
    provider: str = "cpu",
    engine: Backend | None = None,
    threads: int | None = None,
    replacements: Sequence[Replacement] = ("none", "bias", "linear"),
    rank: int | None = None,
    precision: float = 0.05,
    effort: Effort | None = None,
    kept: Path | None = None,
    may_replace: bool = True,
    folder: Path | None = None,
    progress: Progress = QUIET,
) -> CostTable:
    """Measures on an engine what a request saves by each sublayer that is cut.

    Sublayers of one kind, shape and window cost the same. So of each such group about half are
    cut, once with each replacement (of random numbers), and the variant is timed against the whole
    graph in turns; the difference is shared among them. At most two models are loaded at a time.

    Args:
        model: An ONNX file in any form, or a folder with one; or ``torch:DIR``, which PyTorch runs.
        names: The sublayers whose costs are wanted, by layer and kind; all attentions and MLPs
            when None.
        at: The request.
        provider: Where ONNX Runtime or PyTorch runs: ``cpu`` or ``cuda``.
        engine: The library that builds engines of the graph, and of each variant, and runs them
            instead.
        threads: CPU threads; None finds what makes the graph's step fastest.
        replacements: What may take a sublayer's place; ``none`` is always measured.
        rank: Of linear maps in two factors; None for full ones.
        precision: A variant's timing ends where the standard error of what it saves is below this
            share of it, or below 0.2 % of the request's time.
        effort: How long each variant is timed at most.
        kept: A file for the table. What an earlier run, under the same conditions, has left there
            is not measured again; it is written after each variant.
        may_replace: Whether a table there that was measured under other conditions is replaced;
            else it is refused.
        folder: Where variants are written for a while; weights are shared with the graph's where
            that is on the same file system. By default the system's folder for such files.
        progress: Hears what goes on.

    Raises:
        CostError: The graph has no such sublayer, can't serve such a request, or ``kept`` holds
            something else.
        BackendError: A run fails.
        OnnxFileError: The graph can't be read.
    """
    with _workplace(folder) as place:
        request = at or At()
        bench = open_bench(
            model, place, request, provider=provider, engine=engine, rank=rank, progress=progress
        )
        return measure_on(
            bench,
            names,
            request,
            threads=threads,
            replacements=replacements,
            precision=precision,
            effort=effort,
            kept=kept,
            may_replace=may_replace,
            progress=progress,
        )


def measure_on(
    bench: Bench,
    names: Collection[SublayerRef] | None = None,
    at: At | None = None,
    *,
    threads: int | None = None,
    replacements: Sequence[Replacement] = ("none", "bias", "linear"),
    precision: float = 0.05,
    effort: Effort | None = None,
    kept: Path | None = None,
    may_replace: bool = True,
    progress: Progress = QUIET,
) -> CostTable:
    """Measures on any engine; see :func:`measure_costs`.

    Args:
        bench: The model on its engine.
        names: As there.
        at: As there.
        threads: As there.
        replacements: As there.
        precision: As there.
        effort: As there.
        kept: As there.
        may_replace: As there.
        progress: As there.

    Raises:
        CostError: As there.
        BackendError: As there.
    """
    asked = _Asked(at or At(), tuple(replacements), precision, effort or Effort())
    _refuse_rank(bench.rank, bench.sizes.hidden)
    refuse_too_long(bench.sizes.name, bench.sizes.longest, asked.at)
    cells = asked.at.cells(cached=bench.sizes.has_cache)
    has_linear = "linear" in asked.replacements
    here = conditions(bench, asked.at, threads, has_linear=has_linear)
    earlier = _usable(kept, here, may_replace, progress)
    if threads is not None:
        bench.threads = threads
    elif earlier is not None:
        bench.threads = earlier.environment.threads
    else:
        bench.choose_threads(cells[min(1, len(cells) - 1)][0], progress)
    if earlier is not None and not has_linear:
        bench.rank = earlier.rank  # that of the maps that are there
    return _Session(bench, asked, cells, kept, progress).measure(names, earlier)


def read_costs(
    path: Path,
    model: Path | str,
    at: At,
    *,
    provider: str = "cpu",
    engine: Backend | None = None,
    threads: int | None = None,
    rank: int | None = None,
) -> CostTable:
    """Reads costs that were measured before.

    Args:
        path: costs.json.
        model: The model that they must be of, as :func:`measure_costs` takes it.
        at: The request that they must be of.
        provider: Where ONNX Runtime or PyTorch runs: ``cpu`` or ``cuda``.
        engine: The library that runs engines instead.
        threads: CPU threads; None takes those of the table.
        rank: Of linear maps; None for full ones.

    Raises:
        ArtifactError: The file is no table of costs.
        CostError: It is one of another graph, request, engine or machine.
    """
    table = CostTable.read(path)
    with _workplace(None) as place:
        bench = open_bench(model, place, at, provider=provider, engine=engine, rank=rank)
        conditions(bench, at, threads).refuse_other(table, str(path))
    return table


@dataclass(frozen=True)
class _Asked:
    at: At
    replacements: tuple[Replacement, ...]
    precision: float
    effort: Effort

    def __post_init__(self) -> None:
        if not 0 < self.precision <= 1:
            raise UsageError(
                f"A precision of {self.precision} is none.", "It lies between 0 and 1: 0.05 is 5 %."
            )

    def is_known(self, estimate: RequestEstimate) -> bool:
        """Whether what a variant saves is known well enough."""
        wanted = max(self.precision * abs(estimate.saved_ms), _LEAST * estimate.baseline_ms)
        return estimate.std_error_ms <= wanted


@dataclass
class _Session:
    """One table in the making."""

    bench: Bench
    asked: _Asked
    cells: Sequence[tuple[Shape, float]]
    kept: Path | None
    progress: Progress
    rows: dict[Treatment, list[LatencyRow]] = field(default_factory=dict)
    groups: dict[str, CostGroup] = field(default_factory=dict)

    def measure(
        self, names: Collection[SublayerRef] | None, earlier: CostTable | None
    ) -> CostTable:
        sizes = self.bench.sizes
        wanted = [n for n in sizes.sublayers if n[1] in BLOCK_KINDS] if names is None else names
        if not wanted:
            raise CostError("No sublayer is named whose cost is to be measured.")
        self._recall(earlier)
        groups = groups_of(sizes, wanted)
        self.groups |= {group.signature: group for group in groups}
        planned = [t for g in groups for t in treatments(g, sizes, self.asked.replacements)]
        left = [treatment for treatment in planned if treatment not in self.rows]
        if left and self.rows:
            self.progress.say(f"costs: {len(self.rows)} variants were timed by an earlier run")
        with self.progress.task("time variants", total=len(left)) as task:
            for treatment in left:
                self._measure(treatment)
                task.advance()
        if not self.rows:
            raise CostError("Of no sublayer could the cost be measured.", "See what is said above.")
        return self._table()

    def _measure(self, treatment: Treatment) -> None:
        """Adds a variant to the table, or says why it can't be timed."""
        self.progress.detail(f"costs: without {treatment}")
        try:
            self.rows[treatment] = self._timed(treatment)
        except SurgeryError as error:
            self.progress.say(f"costs: {treatment} can't be measured: {error.message}")
            return
        table = self._table()
        self._tell(table, treatment)
        if self.kept is not None:
            table.write(self.kept)

    def _recall(self, earlier: CostTable | None) -> None:
        """Takes over all that an earlier run has measured, asked for now or not."""
        for group in earlier.groups if earlier is not None else ():
            self.groups[group.signature] = group
            for trial in group.trials:
                treatment = Treatment(group.signature, trial.replacement, tuple(trial.treated))
                if len(trial.rows) == len(self.cells):
                    self.rows[treatment] = list(trial.rows)

    def _timed(self, treatment: Treatment) -> list[LatencyRow]:
        with self.bench.arms(treatment) as arms:
            effort, known = self.asked.effort, self.asked.is_known
            return time_request(arms, self.cells, effort, known, self.progress)

    def _table(self) -> CostTable:
        counts = [count for _, count in self.cells]
        baselines = [
            statistics.median(rows[n].baseline.median_ms for rows in self.rows.values())
            for n in range(len(counts))
        ]
        trials: dict[str, list[Trial]] = {signature: [] for signature in self.groups}
        for treatment, rows in self.rows.items():
            trials[treatment.group].append(_trial(treatment, rows, counts, baselines))
        found = conditions(self.bench, self.asked.at, self.bench.threads)
        return CostTable(
            made_from={MODEL: found.sha256},
            at=found.at,
            backend=found.backend,
            provider=found.provider,
            rank=found.rank,
            environment=found.environment,
            baseline_ms=math.fsum(c * ms for c, ms in zip(counts, baselines, strict=True)),
            groups=[
                group.model_copy(update={"trials": trials[signature]})
                for signature, group in self.groups.items()
            ],
        )

    def _tell(self, table: CostTable, treatment: Treatment) -> None:
        group = next(each for each in table.groups if each.signature == treatment.group)
        trial = group.trials[-1]
        self.progress.say(
            f"costs: without {treatment}: {trial.saved_ms_each:.3g} ± "
            f"{trial.std_error_ms / trial.work:.1g} ms each, of {table.baseline_ms:.4g} ms"
        )


def _trial(
    treatment: Treatment,
    rows: list[LatencyRow],
    counts: Sequence[float],
    baselines_ms: Sequence[float],
) -> Trial:
    found = of_rows(rows, counts, baselines_ms)
    return Trial(
        replacement=treatment.replacement,
        treated=list(treatment.members),
        saved_ms=found.saved_ms,
        std_error_ms=found.std_error_ms,
        rows=rows,
    )


def _refuse_rank(rank: int | None, hidden: int | None) -> None:
    if rank is not None and rank < 1:
        raise UsageError(f"A rank of {rank} is none.", "Ranks begin at 1.")
    if rank is not None and hidden is not None and rank > hidden:
        raise UsageError(
            f"There is no map of rank {rank} here: the stream is {hidden} wide.",
            "Leave the rank away for full maps.",
        )


@contextmanager
def _workplace(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with scratch_folder("costs") as place:
        yield place


def _usable(
    kept: Path | None, here: Conditions, may_replace: bool, progress: Progress
) -> CostTable | None:
    """What an earlier run has left, where it was measured under the same conditions."""
    if kept is None or not kept.exists():
        return None
    try:
        table = CostTable.read(kept)
    except ArtifactError as error:
        raise CostError(
            f"{kept} is there already and is no table of costs: {error.message}",
            "Name another file for the costs.",
        ) from error
    if not may_replace:
        here.refuse_other(table, str(kept))
    for what, _, _ in here.differences(table):
        progress.say(f"costs: {kept} was measured with another {what}, so all is measured anew")
        return None
    return table
