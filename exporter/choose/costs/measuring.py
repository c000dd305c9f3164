"""Measures what each sublayer costs: variants of the graph, timed against the whole one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.artifacts import Environment, LatencyRow, library_versions
from exporter.artifacts.latency import Shape
from exporter.choose.costs.cost_runners import CostRunner, engine_runner, graph_runner
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostGroup, CostTable, Trial, Variant, groups_of, variants
from exporter.choose.costs.timing import Effort, RequestEstimate, of_rows, time_request
from exporter.compare.kinds import ArmName
from exporter.compare.timing.statistics import estimate_between, times_of, verdict_of_interval
from exporter.engines.build.libraries import Backend
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.registry import ONNX, RUNNERS
from exporter.errors import ArtifactError, CostError, SurgeryError, UsageError
from exporter.files import scratch_folder
from exporter.models.loading.model_source import load_model
from exporter.models.model_folder import find_onnx
from exporter.optional import require
from exporter.processes import available_bytes
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef

MODEL = "model"
"""The role of the model's hash in ``made_from``."""
_MACHINE = ("machine", "processor", "cpu_count", "gpu", "affinity")


def _conditions(
    sha256: str | None,
    at: RequestShape,
    engine: tuple[str, str],
    machine: Environment,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Under what costs are measured; of libraries those that decide how fast a backend is."""
    backend, in_torch = engine[0], engine[0].startswith(("pytorch", "torch"))
    libraries = ("torch", "transformers") if in_torch else (backend, f"{backend}-gpu")
    return {
        "model": sha256,
        "request": str(at),
        **dict(zip(("backend", "provider"), engine, strict=True)),
        **{name: getattr(machine, name) for name in _MACHINE},
        **{name: versions.get(name) for name in libraries},
    }


def refuse_too_long(name: str, longest: int | None, at: RequestShape) -> None:
    """Refuses a request that reaches more positions than a model has."""
    if longest is not None and at.longest > longest:
        raise CostError(
            f"{name} ends at {longest} positions; the request {at} reaches {at.longest}.",
            "Ask for a shorter prompt or fewer new tokens.",
            code="context-too-long",
        )


_PRECISION = 0.05
"""Of what a variant saves: so well it need be known."""
_LEAST = 0.002
"""Of the request's time: what is saved less than this need not be known any better."""
_LATE = 1.5  # times as long as a variant should take


@dataclass(frozen=True)
class CostSettings:
    """What is measured, and how well."""

    at: RequestShape = field(default_factory=RequestShape)
    threads: int | None = None  # CPU threads; None takes all physical cores
    replacements: tuple[Replacement, ...] = ("none", "bias", "linear")
    effort: Effort = field(default_factory=Effort)  # how long each variant is timed at most
    kept: Path | None = None
    may_replace: bool = True


def measure_costs(
    model: Path | str,
    settings: CostSettings | None = None,
    names: Collection[SublayerRef] | None = None,  # all attentions and MLPs when None
    *,
    provider: str = "cpu",
    engine: Backend | None = None,
    folder: Path | None = None,
    progress: Progress = QUIET,
) -> CostTable:
    """Measures on an engine what a request saves by each sublayer that is cut.

    Sublayers of one kind, shape and window cost the same. So of each such group about half are
    cut, once with each replacement (of random numbers), and the variant is timed against the whole
    graph in turns; the difference is shared among them. At most two models are loaded at a time.
    """
    settings = settings or CostSettings()
    with scratch_folder("costs") if folder is None else nullcontext(folder) as place:
        runner = _opened(ArmName.of(model), place, settings.at, provider, engine, progress)
        return measure_on(runner, settings, names, progress)


def measure_on(
    runner: CostRunner,
    settings: CostSettings,
    names: Collection[SublayerRef] | None = None,
    progress: Progress = QUIET,
    *,
    together: bool = False,
) -> CostTable:
    """Measures on any engine; see :func:`measure_costs`.

    With ``together`` one variant of each group, in the same rounds: all are loaded once and warm up
    together, which takes less time than one after the other, and more memory.
    """
    sizes = runner.sizes
    refuse_too_long(sizes.name, sizes.longest, settings.at)
    cells = settings.at.cells(cached=sizes.has_cache)
    earlier = _usable(settings, runner, progress)
    if settings.threads is not None:
        runner.threads = settings.threads
    elif earlier is not None:
        runner.threads = earlier.environment.threads
    elif not runner.on_gpu:
        runner.threads = default_threads()
    if together:
        effort = replace(settings.effort, reload=False)
        settings = replace(settings, replacements=("none",), effort=effort)
    return _CostRun(runner, settings, cells, progress, together).measure(names, earlier)


@dataclass
class _CostRun:
    """One table in the making."""

    runner: CostRunner
    settings: CostSettings
    cells: Sequence[tuple[Shape, float]]
    progress: Progress
    together: bool
    rows: dict[Variant, list[LatencyRow]] = field(default_factory=dict)
    groups: dict[str, CostGroup] = field(default_factory=dict)

    def measure(
        self, names: Collection[SublayerRef] | None, earlier: CostTable | None
    ) -> CostTable:
        """Times what no earlier run has timed: one variant after the other, or all together."""
        sizes = self.runner.sizes
        self.recall(earlier)
        groups = groups_of(sizes, names)
        self.groups |= {group.signature: group for group in groups}
        replacements, most = self.settings.replacements, 1 if self.together else None
        planned = [v for g in groups for v in variants(g, sizes, replacements)[:most]]
        left = [variant for variant in planned if variant not in self.rows]
        if left and self.rows:
            self.progress.say(f"costs: {len(self.rows)} variants were timed by an earlier run")
        batches = [left] if left and self.together else [[variant] for variant in left]
        with self.progress.task("time variants", total=len(batches), unit="variants") as task:
            for batch in batches:
                self._time({str(variant): variant for variant in batch})
                task.advance()
        if not self.rows:
            raise CostError(
                "The cost of no sublayer could be measured.",
                "See the messages above.",
                code="nothing-measured",
            )
        return self.table()

    def _time(self, batch: Mapping[str, Variant]) -> None:
        """Adds variants to the table, or says why they can't be timed."""
        self.progress.detail(f"costs: without {', '.join(batch)}")

        def known(estimate: RequestEstimate) -> bool:
            wanted = max(_PRECISION * abs(estimate.saved_ms), _LEAST * estimate.baseline_ms)
            return not self.together and estimate.std_error_ms <= wanted

        effort = self.settings.effort
        begin = effort.clock()
        try:
            with self.runner.arms(batch) as arms:
                timed = time_request(arms, self.cells, effort, known, self.progress)
        except SurgeryError as error:
            if self.together:
                raise
            self.progress.say(f"costs: {', '.join(batch)} can't be measured: {error.message}")
            return
        seconds = (effort.clock() - begin) / 1e9
        if not self.together and effort.rounds is None and seconds > _LATE * effort.seconds:
            self.progress.say(
                f"costs: a variant took {seconds:.0f} s, not {effort.seconds:.0f} s: loading the "
                "models and two rounds take that long, so its figure is rough"
            )
        for name, variant in batch.items():
            self.rows[variant] = [_against(row, name) for row in timed]
        table = self.table()
        trials = {group.signature: group.trials for group in table.groups}
        for name, variant in batch.items():
            trial = trials[variant.group][-1]
            self.progress.say(
                f"costs: without {name}: {trial.saved_ms_each:.3g} ± "
                f"{trial.std_error_ms / trial.work:.1g} ms each, of {table.baseline_ms:.4g} ms"
            )
        if self.settings.kept is not None:
            table.write(self.settings.kept)

    def recall(self, earlier: CostTable | None) -> None:
        """Takes over all that an earlier run has measured, asked for now or not."""
        for group in earlier.groups if earlier is not None else ():
            self.groups[group.signature] = group
            for trial in group.trials:
                variant = Variant(group.signature, trial.replacement, tuple(trial.treated))
                if len(trial.rows) == len(self.cells):
                    self.rows[variant] = list(trial.rows)

    def table(self) -> CostTable:
        """Of what was timed so far."""
        counts = [count for _, count in self.cells]
        baselines = [
            statistics.median(rows[n].baseline.median_ms for rows in self.rows.values())
            for n in range(len(counts))
        ]
        trials: dict[str, list[Trial]] = {signature: [] for signature in self.groups}
        for variant, rows in self.rows.items():
            estimate = of_rows(rows, counts, baselines)
            trial = Trial(
                replacement=variant.replacement,
                treated=list(variant.members),
                saved_ms=estimate.saved_ms,
                std_error_ms=estimate.std_error_ms,
                rows=rows,
            )
            trials[variant.group].append(trial)
        runner = self.runner
        return CostTable(
            made_from={MODEL: runner.sha256},
            at=self.settings.at,
            backend=runner.backend,
            provider=runner.provider,
            environment=environment(threads=runner.threads, gpu=runner.on_gpu),
            baseline_ms=math.fsum(c * ms for c, ms in zip(counts, baselines, strict=True)),
            groups=[
                group.model_copy(update={"trials": trials[signature]})
                for signature, group in self.groups.items()
            ],
        )


def _usable(settings: CostSettings, runner: CostRunner, progress: Progress) -> CostTable | None:
    """What an earlier run has left, where it was measured under the same conditions."""
    kept, threads = settings.kept, settings.threads
    if kept is None or not kept.exists():
        return None
    try:
        table = CostTable.read(kept)
    except ArtifactError as error:
        raise CostError(
            f"{kept} is there already and is no table of costs: {error.message}",
            "Name another file for the costs.",
            code="not-ours",
        ) from error
    machine = environment(threads=runner.threads, gpu=runner.on_gpu)
    engine = runner.backend, runner.provider
    here = _conditions(runner.sha256, settings.at, engine, machine, library_versions())
    there = _conditions(
        table.made_from.get(MODEL),
        table.at,
        (table.backend, table.provider),
        table.environment,
        table.versions,
    )
    here["threads"], there["threads"] = threads, threads and table.environment.threads
    what = next((name for name, value in here.items() if there.get(name) != value), None)
    if what is None:
        return table
    if not settings.may_replace:
        raise CostError(
            f"{kept} was measured under other conditions: {what} {there.get(what)}, and here "
            f"{here[what]}.",
            "Measure again: depthcut costs; or ask for what was measured.",
            code="another-model" if what == "model" else "other-conditions",
        )
    progress.say(f"costs: {kept} was measured with another {what}, so all is measured again")
    return None


def _opened(
    name: ArmName,
    folder: Path,
    at: RequestShape,
    provider: str,
    engine: Backend | None,
    progress: Progress,
) -> CostRunner:
    """What runs a model."""
    if name.kind == "torch-compile":
        raise UsageError(
            f"{name} would be compiled again for each variant.", f"Measure torch:{name.path}."
        )
    if name.is_torch and engine is None:
        require("torch", extra="torch")
        from exporter.choose.costs.torch_cost_runner import torch_runner

        if not name.path.exists():
            raise CostError(
                f"{name.path} does not exist.", "Give a Hugging Face folder after torch:."
            )
        return torch_runner(load_model(str(name.path)), provider)
    runs_on = RUNNERS.get(name.kind)
    if runs_on is None or runs_on.gguf or (engine is not None and name.kind != ONNX):
        raise CostError(
            f"No variants of {name} can be made.",
            "Name the ONNX file, and for engines of it the library: --engine.",
        )
    onnx = find_onnx(name.path)
    if engine is None:
        return graph_runner(onnx, folder, provider, name.kind)
    return engine_runner(onnx, folder, at, engine, progress)


_LOADED = 1.5
"""Times a graph's weights: ONNX Runtime keeps some of them in another order as well."""


def fit_together(runner: CostRunner) -> bool:
    """Whether memory holds the whole graph and a variant of each group."""
    sizes, free = runner.sizes, available_bytes()
    groups = groups_of(sizes, None)
    return free is None or _LOADED * (1 + len(groups)) * sizes.weight_bytes <= free


def _against(row: LatencyRow, arm: str) -> LatencyRow:
    """A row of several arms as one of the baseline and another one."""
    if not row.references:
        return row
    second = arm if arm in row.references else "candidate"
    estimate = estimate_between(row, second=second)
    interval = estimate.interval()
    return row.model_copy(
        update={
            "candidate": times_of(row)[second],
            "references": {},
            "speedup": estimate.speedup(),
            "verdict": verdict_of_interval(interval, row.rounds, row.threshold),
            "verdict_interval": interval,
        }
    )
