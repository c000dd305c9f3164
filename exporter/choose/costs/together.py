"""What sublayers cost, of variants that are timed in the same rounds; other graphs beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from exporter.artifacts import LatencyRow
from exporter.choose.costs.cost_runners import OnnxCostRunner
from exporter.choose.costs.measuring import (
    CostRun,
    CostSettings,
    conditions,
    refuse_too_long,
    usable,
    wanted_names,
)
from exporter.choose.costs.table import CostTable, groups_of, variants
from exporter.choose.costs.timing import time_request
from exporter.compare.timing.statistics import estimate_between
from exporter.engines.environment import default_threads
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
    here = conditions(cost_runner, settings.at, settings.threads)
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
        latency_rows = time_request(arms, cells, effort, lambda _: False, progress)
    run.rows |= {
        variant: [_against(row, arm) for row in latency_rows] for arm, variant in chosen.items()
    }
    table = run.table()
    _tell(table, progress)
    if settings.kept is not None:
        table.write(settings.kept)
    return table, {name: [_against(row, name) for row in latency_rows] for name in beside}


def _against(row: LatencyRow, arm: str) -> LatencyRow:
    """A row of several arms as one of the baseline and another one."""
    samples = row.references.get(arm, row.candidate)
    second = arm if arm in row.references else "candidate"
    result = {
        "candidate": samples,
        "speedup": estimate_between(row, second=second).speedup(),
        "references": {},
    }
    return row.model_copy(update=result)


def _tell(table: CostTable, progress: Progress) -> None:
    text = ", ".join(
        f"{group.members[0].kind} {trial.saved_ms_each:.3g} ms"
        for group in table.groups
        for trial in group.trials
    )
    progress.say(
        f"costs: of a request's {table.baseline_ms:,.0f} ms, each one that is dropped saves about: "
        f"{text}"
    )
