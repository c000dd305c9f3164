"""What sublayers cost, of variants that are timed in the same rounds; other graphs beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from exporter.artifacts import Environment, LatencyRow, Record, Speedup
from exporter.choose.costs.cost_runners import OnnxCostRunner
from exporter.choose.costs.measuring import (
    CostRun,
    CostSettings,
    conditions,
    refuse_too_long,
    usable,
    wanted_names,
)
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable, groups_of, variants
from exporter.choose.costs.timing import Effort, RequestEstimate, of_rows, time_request
from exporter.choose.costs.weighing import longest_text
from exporter.compare.arms import Pair
from exporter.compare.kinds import open_pair
from exporter.compare.options import CompareOptions
from exporter.compare.timing.statistics import speedup_between
from exporter.compare.timing.subjects import RunnerArm
from exporter.engines.environment import default_threads, environment
from exporter.engines.inputs import has_cache
from exporter.errors import CostError, UsageError
from exporter.processes import available_bytes
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

_LOADED = 1.5
"""Times a graph's weights: ONNX Runtime keeps some of them in another order as well."""
NOTHING: Mapping[str, Path] = MappingProxyType({})


def fit_together(cost_runner: OnnxCostRunner) -> bool:
    """Whether memory holds the whole graph and a variant of each group."""
    sizes, free = cost_runner.sizes, available_bytes()
    groups = groups_of(sizes, wanted_names(sizes, None))
    return free is None or _LOADED * (1 + len(groups)) * sizes.weight_bytes <= free


def measure_together(
    cost_runner: OnnxCostRunner,
    settings: CostSettings,
    names: Collection[SublayerRef] | None = None,  # all attentions and MLPs when None
    beside: Mapping[str, Path] = NOTHING,
    progress: Progress = QUIET,
) -> tuple[CostTable, dict[str, list[LatencyRow]]]:
    """Measures one variant of each group, and other graphs beside them, in the same rounds.

    All are loaded once and warm up together: less time than one after the other, more memory.
    """
    sizes = cost_runner.sizes
    refuse_too_long(sizes.name, sizes.longest, settings.at)
    cost_runner.threads = settings.threads or default_threads()
    here = conditions(cost_runner, settings.at, settings.threads, has_linear=False)
    earlier = usable(settings, here, progress)
    wanted = wanted_names(sizes, names)
    if earlier is not None and not beside and {*wanted} <= {*earlier.names}:
        return earlier, {}
    cells = settings.at.cells(cached=sizes.has_cache)
    groups = groups_of(sizes, wanted)
    run = CostRun(cost_runner, settings, cells, progress)
    run.recall(earlier)
    run.groups |= {group.signature: group for group in groups}
    chosen = {str(v): v for g in groups for v in variants(g, sizes, ("none",))[:1]}
    with cost_runner.arms_of(chosen, beside) as arms:
        effort = replace(settings.effort, reload=False)
        found = time_request(arms, cells, effort, lambda _: False, progress)
    run.rows |= {variant: [_against(row, arm) for row in found] for arm, variant in chosen.items()}
    table = run.table()
    _tell(table, progress)
    if settings.kept is not None:
        table.write(settings.kept)
    return table, {name: [_against(row, name) for row in found] for name in beside}


def _against(row: LatencyRow, arm: str) -> LatencyRow:
    """A row of several arms as one of the baseline and another one."""
    samples = row.references.get(arm, row.candidate)
    second = arm if arm in row.references else "candidate"
    told = {"candidate": samples, "speedup": speedup_between(row, second=second), "references": {}}
    return row.model_copy(update=told)


def _tell(table: CostTable, progress: Progress) -> None:
    each = ", ".join(
        f"{group.members[0].kind} {trial.saved_ms_each:.3g} ms"
        for group in table.groups
        for trial in group.trials
    )
    progress.say(
        f"costs: of a request's {table.baseline_ms:,.0f} ms, each one that is dropped saves about: "
        f"{each}"
    )


class MeasuredSpeedup(Record):
    """How many times faster a candidate serves a request.

    ``speedup`` comes with its 95 % interval; ``is_narrow`` says whether that got as narrow as it
    was wanted before the time was up. ``sha256`` are the models' hashes, by arm, ``rows`` the raw
    times, a row for each of the request's cells.
    """

    at: RequestShape
    speedup: Speedup
    is_narrow: bool
    baseline_ms: float
    candidate_ms: float
    backend: str
    provider: str
    environment: Environment
    sha256: dict[str, str]
    rows: list[LatencyRow]

    @property
    def ratio(self) -> float:
        """The speedup alone."""
        return self.speedup.ratio


def measure_speedup(
    baseline: Path | str,
    candidate: Path | str,
    at: RequestShape,
    *,
    provider: str = "cpu",
    threads: int | None = None,  # CPU threads; None takes all physical cores
    width: float = 0.01,
    effort: Effort | None = None,  # how long the rounds take at most; two minutes by default
    progress: Progress = QUIET,
) -> MeasuredSpeedup:
    """Times a request with both models in turns."""
    if not 0 < width < 1:
        raise UsageError(
            f"A width of {width} is not valid.",
            "It must be between 0 and 1: 0.01 is 1 % to either side.",
            code="width-out-of-range",
        )
    options = CompareOptions(
        provider=provider,  # type: ignore[arg-type]  # held against its type there
        threads=threads,
        prefill_lengths=(at.prompt,),
        decode_past_lengths=(at.prompt,) if at.new else (),
        batches=(at.batch,),
    )
    pair = _opened(baseline, candidate, options, progress)
    _refuse_too_long(pair, at)
    with pair.running():
        pair.refuse_other_interface()
        return _measured(pair, at, width, effort or Effort(seconds=120.0))


def _opened(
    baseline: Path | str, candidate: Path | str, options: CompareOptions, progress: Progress
) -> Pair:
    """Both models, which can be run here."""
    threads = options.threads or default_threads()
    first, second = open_pair(baseline, candidate, options, threads=threads)
    pair = Pair(options, first, second, progress)
    if not pair.runs or first.not_run or second.not_run:
        why = first.not_run or second.not_run or "there is no way to run it"
        raise CostError(f"{baseline} can't be timed here: {why}.")
    return pair


def _refuse_too_long(pair: Pair, at: RequestShape) -> None:
    folder = pair.baseline.folder
    graph = folder.onnx.suffix == ".onnx"
    longest = longest_text(folder.onnx) if graph else folder.longest_sequence
    refuse_too_long(str(folder.onnx), longest, at)


def _measured(pair: Pair, at: RequestShape, width: float, effort: Effort) -> MeasuredSpeedup:
    cells = at.cells(cached=has_cache(pair.baseline.runner.inputs))
    vocabulary = pair.vocabulary()
    arms = {name: RunnerArm(arm.builds, vocabulary) for name, arm in pair.arms.items()}
    runner = pair.baseline.runner
    machine = environment(threads=runner.threads, gpu=pair.on_gpu)
    rows = time_request(
        arms, cells, effort, lambda so_far: _is_narrow(so_far, width), pair.progress
    )
    found = of_rows(rows, [count for _, count in cells])
    return MeasuredSpeedup(
        at=at,
        speedup=found.speedup,
        is_narrow=_is_narrow(found, width),
        baseline_ms=found.baseline_ms,
        candidate_ms=found.variant_ms,
        backend=runner.backend,
        provider=runner.provider,
        environment=machine,
        sha256={name: arm.facts.sha256 for name, arm in pair.arms.items()},
        rows=rows,
    )


def _is_narrow(estimate: RequestEstimate, width: float) -> bool:
    ratio, (low, high) = estimate.speedup.ratio, estimate.speedup.ci95
    return max(high / ratio, ratio / low) <= 1 + width
