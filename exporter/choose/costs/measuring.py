"""Measures what each sublayer costs: variants of the graph, timed against the whole one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.artifacts import Environment, LatencyRow, library_versions
from exporter.artifacts.latency import Shape
from exporter.choose.costs.cost_runners import CostRunner, EngineCostRunner, OnnxCostRunner
from exporter.choose.costs.graph_sizes import GraphSizes
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
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerRef

MODEL = "model"
"""The role of the model's hash in ``made_from``."""
_MACHINE = ("machine", "processor", "cpu_count", "gpu", "affinity")
_LIBRARIES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
)


Conditions = dict[str, Any]
"""Under what costs are measured; without the threads where those don't matter."""


def conditions(cost_runner: CostRunner, at: RequestShape, threads: int | None) -> Conditions:
    """What costs are measured under on a cost_runner, here and now."""
    here = environment(threads=threads or cost_runner.threads, gpu=cost_runner.on_gpu)
    model, engine = cost_runner.sha256, (cost_runner.backend, cost_runner.provider)
    result = _conditions(model, at, engine, here, library_versions())
    return result | ({} if threads is None else {"threads": threads})


def _conditions(
    model: str | None,
    at: RequestShape,
    engine: tuple[str, str],
    machine: Environment,
    versions: Mapping[str, str],
) -> Conditions:
    return {
        "model": model,
        "request": str(at),
        **dict(zip(("backend", "provider"), engine, strict=True)),
        **{name: getattr(machine, name) for name in _MACHINE},
        **{name: versions.get(name) for name in _LIBRARIES if _decides(name, engine[0])},
    }


def _differences(here: Conditions, table: CostTable) -> list[tuple[str, Any, Any]]:
    """Where a table was measured under other conditions: what differs, there and here."""
    engine = table.backend, table.provider
    there = _conditions(
        table.made_from.get(MODEL), table.at, engine, table.environment, table.versions
    )
    there["threads"] = table.environment.threads
    return [(n, there.get(n), value) for n, value in here.items() if there.get(n) != value]


def _refuse_other(here: Conditions, table: CostTable, name: str) -> None:
    """Refuses costs that say nothing of this model here."""
    for what, there, value in _differences(here, table):
        if what == "model":
            raise CostError(
                f"{name} holds the costs of another model: its SHA-256 is {there}, and that of "
                f"the model here {value}.",
                "Measure this model's: depthcut costs.",
                code="another-model",
            )
        raise CostError(
            f"{name} was measured under other conditions: {what} {there}, and here {value}.",
            "Measure again: depthcut costs; or ask for what was measured.",
            code="other-conditions",
        )


def _decides(library: str, backend: str) -> bool:
    """Whether a library's version decides how fast a backend is."""
    if backend.startswith(("pytorch", "torch")):
        return library in ("torch", "transformers")
    return library.removesuffix("-gpu") == backend


def refuse_too_long(name: str, longest: int | None, at: RequestShape) -> None:
    """Refuses a request that reaches more positions than a model has."""
    if longest is not None and at.longest > longest:
        raise CostError(
            f"{name} ends at {longest} positions; the request {at} reaches {at.longest}.",
            "Ask for a shorter prompt or fewer new tokens.",
            code="context-too-long",
        )


_LATE = 1.5
"""Of its time a variant may take so much before that is told."""
_LEAST = 0.002
"""Of the request's time: what is saved less than this need not be known any better."""


@dataclass(frozen=True)
class CostSettings:
    """What is measured, and how well."""

    at: RequestShape = field(default_factory=RequestShape)
    threads: int | None = None  # CPU threads; None takes all physical cores
    replacements: tuple[Replacement, ...] = ("none", "bias", "linear")
    precision: float = 0.05
    effort: Effort = field(default_factory=Effort)  # how long each variant is timed at most
    kept: Path | None = None
    may_replace: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.precision <= 1:
            raise UsageError(
                f"A precision of {self.precision} is not valid.",
                "It must be between 0 and 1: 0.05 is 5 %.",
                code="precision-out-of-range",
            )

    def is_known(self, estimate: RequestEstimate) -> bool:
        """Whether what a variant saves is known well enough."""
        wanted = max(self.precision * abs(estimate.saved_ms), _LEAST * estimate.baseline_ms)
        return estimate.std_error_ms <= wanted


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
        cost_runner = open_cost_runner(
            model,
            place,
            settings.at,
            provider=provider,
            engine=engine,
            progress=progress,
        )
        return measure_on(cost_runner, settings, names, progress)


def measure_on(
    cost_runner: CostRunner,
    settings: CostSettings | None = None,
    names: Collection[SublayerRef] | None = None,
    progress: Progress = QUIET,
    *,
    together: bool = False,
) -> CostTable:
    """Measures on any engine; see :func:`measure_costs` and :func:`measure_beside`."""
    settings = settings or CostSettings()
    return measure_beside(cost_runner, settings, names, {}, progress, together=together)[0]


def measure_beside(
    cost_runner: CostRunner,
    settings: CostSettings,
    names: Collection[SublayerRef] | None,  # all attentions and MLPs when None
    others: Mapping[str, Path],
    progress: Progress = QUIET,
    *,
    together: bool = True,
) -> tuple[CostTable, dict[str, list[LatencyRow]]]:
    """Measures one variant of each group, and other graphs beside them, in the same rounds.

    All are loaded once and warm up together: less time than one after the other, more memory.
    """
    sizes, threads = cost_runner.sizes, settings.threads
    refuse_too_long(sizes.name, sizes.longest, settings.at)
    cells = settings.at.cells(cached=sizes.has_cache)
    here = conditions(cost_runner, settings.at, threads)
    earlier = usable(settings, here, progress)
    if threads is not None:
        cost_runner.threads = threads
    elif earlier is not None:
        cost_runner.threads = earlier.environment.threads
    elif not cost_runner.on_gpu:
        cost_runner.threads = default_threads()
    if together:
        effort = replace(settings.effort, reload=False)
        settings = replace(settings, replacements=("none",), effort=effort)
    run = CostRun(cost_runner, settings, cells, progress, together)
    return run.measure(names, earlier, others)


def wanted_names(sizes: GraphSizes, names: Collection[SublayerRef] | None) -> list[SublayerRef]:
    """Those that were named; all attentions and MLPs where none were."""
    wanted = [n for n in sizes.sublayers if n[1] in BLOCK_KINDS] if names is None else [*names]
    if not wanted:
        raise CostError("No sublayer to measure is given.", code="nothing-asked")
    return wanted


@dataclass
class CostRun:
    """One table in the making."""

    cost_runner: CostRunner
    settings: CostSettings
    cells: Sequence[tuple[Shape, float]]
    progress: Progress
    together: bool = False
    rows: dict[Variant, list[LatencyRow]] = field(default_factory=dict)
    groups: dict[str, CostGroup] = field(default_factory=dict)

    def measure(
        self,
        names: Collection[SublayerRef] | None,
        earlier: CostTable | None,
        others: Mapping[str, Path],
    ) -> tuple[CostTable, dict[str, list[LatencyRow]]]:
        """Times what no earlier run has timed: one variant after the other, or all together."""
        sizes = self.cost_runner.sizes
        self.recall(earlier)
        groups = groups_of(sizes, wanted_names(sizes, names))
        self.groups |= {group.signature: group for group in groups}
        replacements, most = self.settings.replacements, 1 if self.together else None
        planned = [v for g in groups for v in variants(g, sizes, replacements)[:most]]
        left = [variant for variant in planned if variant not in self.rows]
        if left and self.rows:
            self.progress.say(f"costs: {len(self.rows)} variants were timed by an earlier run")
        beside: dict[str, list[LatencyRow]] = {}
        if self.together and (left or others):
            beside, left = self._measure(left, others), []
        with self.progress.task("time variants", total=len(left), unit="variants") as task:
            for number, variant in enumerate(left, start=1):
                begin = time.monotonic()
                self._measure([variant], {})
                self._tell_time(time.monotonic() - begin, len(left) - number, first=number == 1)
                task.advance()
        if not self.rows:
            raise CostError(
                "The cost of no sublayer could be measured.",
                "See the messages above.",
                code="nothing-measured",
            )
        return self.table(), beside

    def _measure(
        self, chosen: Sequence[Variant], others: Mapping[str, Path]
    ) -> dict[str, list[LatencyRow]]:
        """Adds variants to the table, or says why they can't be timed; the others' rows."""
        names = {str(variant): variant for variant in chosen}
        self.progress.detail(f"costs: without {', '.join(names)}")
        effort, together = self.settings.effort, self.together

        def known(estimate: RequestEstimate) -> bool:
            return not together and self.settings.is_known(estimate)

        try:
            with self.cost_runner.arms(names, others) as arms:
                timed = time_request(arms, self.cells, effort, known, self.progress)
        except SurgeryError as error:
            if together:
                raise
            self.progress.say(f"costs: {', '.join(names)} can't be measured: {error.message}")
            return {}
        rows = {name: [_against(row, name) for row in timed] for name in (*names, *others)}
        self.rows |= {variant: rows[name] for name, variant in names.items()}
        table = self.table()
        for variant in chosen:
            self._tell(table, variant)
        if self.settings.kept is not None:
            table.write(self.settings.kept)
        return {name: rows[name] for name in others}

    def _tell_time(self, seconds: float, left: int, *, first: bool) -> None:
        """What a variant took, where that is more than it should, and what is still to come."""
        effort = self.settings.effort
        if effort.rounds is None and seconds > _LATE * effort.seconds:
            self.progress.say(
                f"costs: a variant took {seconds:.0f} s, not {effort.seconds:.0f} s: loading the "
                "models and two rounds take that long. It was stopped there, so its figure is rough"
            )
        if first and left:
            minutes = seconds * left / 60
            self.progress.say(f"costs: {left} more variants take about {minutes:.1f} min")

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
            trials[variant.group].append(_trial(variant, rows, counts, baselines))
        runner = self.cost_runner
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

    def _tell(self, table: CostTable, variant: Variant) -> None:
        group = next(item for item in table.groups if item.signature == variant.group)
        trial = group.trials[-1]
        self.progress.say(
            f"costs: without {variant}: {trial.saved_ms_each:.3g} ± "
            f"{trial.std_error_ms / trial.work:.1g} ms each, of {table.baseline_ms:.4g} ms"
        )


def _trial(
    variant: Variant,
    rows: list[LatencyRow],
    counts: Sequence[float],
    baselines_ms: Sequence[float],
) -> Trial:
    estimate = of_rows(rows, counts, baselines_ms)
    return Trial(
        replacement=variant.replacement,
        treated=list(variant.members),
        saved_ms=estimate.saved_ms,
        std_error_ms=estimate.std_error_ms,
        rows=rows,
    )


def usable(settings: CostSettings, here: Conditions, progress: Progress) -> CostTable | None:
    """What an earlier run has left, where it was measured under the same conditions."""
    kept = settings.kept
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
    if not settings.may_replace:
        _refuse_other(here, table, str(kept))
    for what, _, _ in _differences(here, table):
        progress.say(
            f"costs: {kept} was measured with another {what}, so everything is measured again"
        )
        return None
    return table


def open_cost_runner(
    model: Path | str,
    folder: Path,
    at: RequestShape,
    *,
    provider: str = "cpu",
    engine: Backend | None = None,
    progress: Progress = QUIET,
) -> CostRunner:
    """Finds what runs a model."""
    name = ArmName.of(model)
    if name.is_torch and engine is None:
        return _torch(name, provider)
    runs_on = RUNNERS.get(name.kind)
    if runs_on is None or runs_on.gguf or (engine is not None and name.kind != ONNX):
        raise CostError(
            f"No variants of {name} can be made.",
            "Name the ONNX file, and for engines of it the library: --engine.",
        )
    onnx = find_onnx(name.path)
    if engine is None:
        return OnnxCostRunner(onnx, folder, provider, runs_on=name.kind)

    return EngineCostRunner(onnx, folder, at=at, library=engine, progress=progress)


def _torch(name: ArmName, provider: str) -> CostRunner:
    if name.kind == "torch-compile":
        raise UsageError(
            f"{name} would be compiled again for each variant.", f"Measure torch:{name.path}."
        )
    require("torch", extra="torch")
    from exporter.choose.costs.torch_cost_runner import TorchCostRunner

    if not name.path.exists():
        raise CostError(f"{name.path} does not exist.", "Give a Hugging Face folder after torch:.")
    return TorchCostRunner(load_model(str(name.path)), provider)


_LOADED = 1.5
"""Times a graph's weights: ONNX Runtime keeps some of them in another order as well."""


def fit_together(cost_runner: OnnxCostRunner) -> bool:
    """Whether memory holds the whole graph and a variant of each group."""
    sizes, free = cost_runner.sizes, available_bytes()
    groups = groups_of(sizes, wanted_names(sizes, None))
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
