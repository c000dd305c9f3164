"""Foretells what cutting sublayers saves: by their work, and a few runs of the whole model."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.optimize import nnls

from exporter.artifacts import Environment, PlannedDeletion, library_versions
from exporter.artifacts.latency import Shape
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.choose.costs.cost_runners import CostRunner, engine_runner, graph_runner, torch_runner
from exporter.choose.costs.graph_sizes import GraphSizes, Work
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable, SublayerCost, Variant
from exporter.choose.costs.timing import Effort, RequestEstimate, of_rows, time_request
from exporter.compare.kinds import ArmName
from exporter.compare.timing.subjects import Clock, little_garbage
from exporter.engines.build.libraries import Backend
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.registry import ONNX, RUNNERS
from exporter.errors import ArtifactError, CostError, SurgeryError, UsageError
from exporter.files import scratch_folder
from exporter.models.loading.model_source import load_model
from exporter.models.model_folder import find_onnx
from exporter.optional import require
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef

MODEL = "model"
"""The role of the model's hash in ``made_from``."""
_MACHINE = ("machine", "processor", "cpu_count", "gpu", "affinity")
_REPLACEMENTS: tuple[Replacement, ...] = ("none", "bias", "linear")
_MOST_ROUNDS = 20
_PRECISION = 0.05
"""Of what a variant saves: so well it need be known."""
_LEAST = 0.002
"""Of the request's time: what is saved less than this need not be known any better."""


@dataclass(frozen=True)
class CostSettings:
    """What is foretold, and by how much measuring."""

    at: RequestShape = field(default_factory=RequestShape)
    threads: int | None = None  # CPU threads; None takes all physical cores
    seconds: float = 10.0  # for single runs of the whole model; two of each length at least
    variants: Effort | None = None  # None times no variant; else how long each is timed at most
    kept: Path | None = None
    may_replace: bool = True
    clock: Clock = time.perf_counter_ns


def measure_costs(
    model: Path | str,
    settings: CostSettings | None = None,
    *,
    provider: str = "cpu",
    engine: Backend | None = None,
    folder: Path | None = None,
    progress: Progress = QUIET,
) -> CostTable:
    """Foretells what a request saves by each sublayer that is cut, on an engine.

    The whole model is loaded once and run at a few lengths, which gives the time of a
    multiplication and of a byte. Variants, if asked for, have half of the sublayers of one size
    cut, and are timed in turns with the whole model.
    """
    settings = settings or CostSettings()
    with scratch_folder("costs") if folder is None else nullcontext(folder) as place:
        runner = _opened(ArmName.of(model), place, settings.at, provider, engine, progress)
        return measure_on(runner, settings, progress)


def measure_on(runner: CostRunner, settings: CostSettings, progress: Progress = QUIET) -> CostTable:
    """Foretells on any engine; see :func:`measure_costs`."""
    sizes, at = runner.sizes, settings.at
    if sizes.longest is not None and at.longest > sizes.longest:
        raise CostError(
            f"{sizes.name} ends at {sizes.longest} positions; the request {at} reaches "
            f"{at.longest}.",
            "Ask for a shorter prompt or fewer new tokens.",
            code="context-too-long",
        )
    if settings.variants and runner.cut is None:
        raise UsageError(
            f"No variants of {sizes.name} can be made, which --time-budget times.",
            "Name the exported ONNX graph, or leave --time-budget out.",
            code="no-variants",
        )
    cells = at.cells(cached=sizes.has_cache)
    if settings.threads is not None:
        runner.threads = settings.threads
    elif not runner.on_gpu:
        runner.threads = default_threads()
    earlier = _usable(settings, runner, progress)
    if earlier is not None and (earlier.variants or settings.variants is None):
        return earlier
    runs = _whole_runs(runner, cells, settings, progress)
    variants = _variants(runner, cells, settings.variants, progress) if settings.variants else []
    rates = fitted_rates([sizes.work(cell) for cell in runs], list(runs.values()))
    taken = [count * runs[cell] for cell, count in cells]
    table = CostTable(
        made_from={MODEL: runner.sha256},
        at=at,
        backend=runner.backend,
        provider=runner.provider,
        environment=environment(threads=runner.threads, gpu=runner.on_gpu),
        baseline_ms=math.fsum(taken),
        runs={str(cell): ms for cell, ms in runs.items()},
        rates=rates._asdict(),
        sublayers=_costs(sizes, rates, cells, taken, variants),
        variants=variants,
    )
    if settings.kept is not None:
        table.write(settings.kept)
    return table


def _costs(
    sizes: GraphSizes,
    rates: Work,
    cells: Sequence[tuple[Shape, float]],
    taken_ms: Sequence[float],
    variants: Sequence[Variant],
) -> list[SublayerCost]:
    """By work, as much as makes the whole model's own time right; by variants where they tell."""
    whole = foretold_ms(sizes, rates, cells)
    right = np.array(taken_ms) / np.where(whole > 0, whole, 1.0)

    def saved(name: SublayerRef, how: Replacement) -> float:
        return float(right @ (whole - foretold_ms(sizes, rates, cells, {name: how})))

    table = {
        name: {how: saved(name, how) for how in _REPLACEMENTS if _takes(sizes, name, how)}
        for name in sorted(sizes.sublayers)
    }
    factors = {}
    for variant in variants:
        own = math.fsum(table[name]["none"] for name in variant.sublayers)
        if variant.is_resolved and own > 0:
            factors[_alike(sizes, variant.sublayers[0])] = variant.saved_ms / own
    for name, by_replacement in table.items():
        more = (factors.get(_alike(sizes, name), 1.0) - 1.0) * by_replacement["none"]
        table[name] = {how: ms + more for how, ms in by_replacement.items()}
    return [SublayerCost(layer=name[0], kind=name[1], saved_ms=own) for name, own in table.items()]


def _takes(sizes: GraphSizes, name: SublayerRef, how: Replacement) -> bool:
    known = sizes.hidden is not None and (how == "bias" or sizes[name].takes_linear)
    return how == "none" or known


def _alike(sizes: GraphSizes, name: SublayerRef) -> tuple[object, ...]:
    """What sublayers of one cost have in common."""
    own = sizes[name]
    return name[1], own.parameters, own.weight_bytes, own.caches


_PULL = 0.002
"""How far what single runs don't tell apart is drawn to what is likely."""


def fitted_rates(works: Sequence[Work], taken_ms: Sequence[float]) -> Work:
    """Milliseconds for each part of the work, none below 0, by least squares of relative errors.

    Where a few lengths don't tell two parts apart, a multiplication costs the same wherever it is
    done, a byte likewise, and weights are read beside the multiplications.
    """
    rows = np.array(works) / np.array(taken_ms)[:, None]
    scale = np.where(rows.max(axis=0) > 0, rows.max(axis=0), 1.0)
    products, _, weights, caches = scale
    pulls = _PULL * np.array(
        [[-products, products, 0, 0], [0, 0, -caches, caches], [0, 0, weights, 0]]
    )
    wanted = np.concatenate([np.ones(len(rows)), np.zeros(len(pulls))])
    result, _ = nnls(np.concatenate([rows, pulls]) / scale, wanted)
    return Work(*(result / scale))


def foretold_ms(
    sizes: GraphSizes,
    rates: Work,
    cells: Sequence[tuple[Shape, float]],
    choices: Mapping[Any, Replacement] | None = None,
) -> NDArray[np.float64]:
    """What the runs of a request take by their work, where some sublayers are cut."""
    works = np.array([sizes.work(cell, choices) for cell, _ in cells])
    taken: NDArray[np.float64] = works @ np.array(rates) * [count for _, count in cells]
    return taken


def _whole_runs(
    runner: CostRunner,
    cells: Sequence[tuple[Shape, float]],
    settings: CostSettings,
    progress: Progress,
) -> dict[Shape, float]:
    """Milliseconds of single runs of one loaded model: of the request's, and of shorter ones."""
    shapes = [cell for cell, _ in cells]
    if not runner.whole.folder.classifies_images:  # images have one length
        shapes = list(dict.fromkeys([*shapes, *_shorter(shapes)]))
        shapes.sort(key=lambda cell: cell.total_length)
    begin, rounds = settings.clock(), list[list[float]]()
    with runner.beside({}) as arms, little_garbage(), progress.task("time whole runs"):
        while not rounds or (
            len(rounds) < _MOST_ROUNDS and settings.clock() - begin < 1e9 * settings.seconds
        ):
            probes = map(arms["baseline"].probe, shapes)
            # The first run of two is cold.
            rounds.append([min(p.sample(settings.clock)[0] for _ in range(2)) for p in probes])
    logs = np.log(rounds)  # what slows a round down slows all of its runs
    slower = np.median(logs - np.median(logs, axis=0), axis=1, keepdims=True)
    results = dict(zip(shapes, np.exp(np.median(logs - slower, axis=0)).tolist(), strict=True))
    progress.say("costs: " + "; ".join(f"{shape}: {ms:.4g} ms" for shape, ms in results.items()))
    return results


def _shorter(shapes: Sequence[Shape]) -> Iterator[Shape]:
    """Runs that tell what grows with the length, and how."""
    longest = max(shapes, key=lambda cell: cell.sequence_length)
    for part in (2, 4):
        yield replace(longest, sequence_length=max(1, longest.sequence_length // part))
    decode = [cell for cell in shapes if cell.phase == "decode"]
    if decode:
        yield replace(decode[0], past_length=max(1, decode[0].past_length // 4))


def _variants(
    runner: CostRunner,
    cells: Sequence[tuple[Shape, float]],
    effort: Effort,
    progress: Progress,
) -> list[Variant]:
    """Times variants: of each size of sublayers about half are cut, evenly spread."""
    assert runner.cut is not None
    groups: dict[tuple[object, ...], list[SublayerRef]] = defaultdict(list)
    for name in sorted(runner.sizes.sublayers):
        groups[_alike(runner.sizes, name)].append(name)
    counts, results = [count for _, count in cells], list[Variant]()

    def known(estimate: RequestEstimate) -> bool:
        wanted = max(_PRECISION * abs(estimate.saved_ms), _LEAST * estimate.baseline_ms)
        return estimate.std_error_ms <= wanted

    with progress.task("time variants", total=len(groups), unit="variants") as task:
        for names in groups.values():
            step = len(names) / (number := max(1, len(names) // 2))
            chosen = [names[int((n + 0.5) * step)] for n in range(number)]
            deletions = [PlannedDeletion(layer=layer, kind=kind) for layer, kind in chosen]
            plan = LoadedPlan.of(deletions)
            try:
                with (
                    runner.cut(partial(_bare, plan)) as cut,
                    runner.beside({"cut": cut}) as arms,
                ):
                    rows = time_request(arms, cells, effort, known, progress)
            except SurgeryError as error:
                progress.say(f"costs: {plan.plan.describe()} can't be timed: {error.message}")
                continue
            estimate = of_rows(rows, counts)
            low, high = ends = estimate.saved_ci95
            results.append(
                Variant(sublayers=chosen, saved_ms=estimate.saved_ms, ci95_ms=ends, rows=rows)
            )
            unused = "" if results[-1].is_resolved else ": within its noise, so it is not used"
            progress.say(
                f"costs: without {plan.plan.describe()}: {estimate.saved_ms:.3g} "
                f"[{low:.3g}, {high:.3g}] ms of {estimate.baseline_ms:.4g}{unused}"
            )
            task.advance()
    return results


def _bare(plan: LoadedPlan, _: Path) -> LoadedPlan:
    return plan


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
        "threads": machine.threads,
        **{name: getattr(machine, name) for name in _MACHINE},
        **{name: versions.get(name) for name in libraries},
    }


def _usable(settings: CostSettings, runner: CostRunner, progress: Progress) -> CostTable | None:
    """What an earlier run has left, where it was measured under the same conditions."""
    kept = settings.kept
    if kept is None or not kept.exists():
        return None
    try:
        table = CostTable.read(kept)
    except ArtifactError as error:
        written_before = isinstance(error.__cause__, ValidationError) and error.code != "wrong-kind"
        if settings.may_replace and written_before:  # a table of costs, as another version has it
            progress.say(f"costs: {kept} is another version's, so all is measured again")
            return None
        raise CostError(
            f"{kept} is there already and is no table of costs: {error.message}",
            "Remove it, or name another file for the costs.",
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
    if name.is_torch and engine is None:
        require("torch", extra="torch")
        if not name.path.exists():
            raise CostError(
                f"{name.path} does not exist.", "Give a Hugging Face folder after torch:."
            )
        compiled = name.kind == "torch-compile"
        return torch_runner(load_model(str(name.path)), provider, compiled=compiled)
    runs_on = RUNNERS.get(name.kind)
    if runs_on is None or runs_on.gguf or (engine is not None and name.kind != ONNX):
        raise CostError(
            f"No sublayers of {name} can be told apart.",
            "Name the ONNX file, and for engines of it the library: --engine.",
        )
    onnx = find_onnx(name.path)
    if engine is None:
        return graph_runner(onnx, folder, provider, name.kind)
    return engine_runner(onnx, folder, at, engine, progress)
