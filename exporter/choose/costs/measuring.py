"""Foretells what cutting sublayers saves: by their work, and a few runs of the whole model."""

from __future__ import annotations

import math
import secrets
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from scipy.optimize import nnls

from exporter.artifacts import LatencyRow, PlannedDeletion, Speedup, library_versions
from exporter.artifacts.latency import Shape
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.store import Store
from exporter.choose.costs.table import CostTable, RequestShape, SublayerCost, Variant
from exporter.choose.costs.weighing import CacheSize, GraphSizes, Work, module_sizes, sizes
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.kinds import ArmName, open_arm, open_file_arm, torch_arm
from exporter.compare.options import CompareOptions
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.row import MeasuredRow
from exporter.compare.timing.statistics import SpeedupEstimate, estimate_between
from exporter.compare.timing.subjects import Clock, TimedArm, little_garbage
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build.engine_set import find_builds
from exporter.engines.decoding.verify import source_of
from exporter.engines.environment import default_threads, environment
from exporter.engines.runners.base import Runner
from exporter.engines.runners.registry import ONNX, RUNNERS, open_runner
from exporter.errors import CostError, SurgeryError, UsageError
from exporter.files import scratch_folder
from exporter.models.loading.model_source import load_model
from exporter.models.model_folder import find_onnx, image_patches, longest_sequence
from exporter.optional import require
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_OPERATOR_BYTES = 80_000
"""A rule of thumb for ONNX Runtime on a CPU; other engines fuse operators, or start them beside."""


@dataclass
class CostRunner:
    """A model on an engine, beside which cut ones can be loaded."""

    sizes: GraphSizes
    whole: ComparedArm
    cut: Callable[[LoadedPlan], AbstractContextManager[Runner]] | None = None  # None: none is made
    threads: int = 1  # CPU threads that all are given

    @contextmanager
    def beside(self, runners: Mapping[str, Runner]) -> Iterator[Mapping[str, TimedArm]]:
        """The whole model and others, all loaded while the block runs."""
        arms = {"baseline": self.whole.runner, **runners}
        for runner in arms.values():
            runner.threads = self.threads
        comparison = Comparison({n: replace(self.whole, builds=(run,)) for n, run in arms.items()})
        with comparison.running():
            yield comparison.timed()


def graph_runner(
    onnx: Path, folder: Path, provider: str = "cpu", runs_on: str = ONNX
) -> CostRunner:
    """An ONNX file on ONNX Runtime, or on another backend for such files."""
    options = CompareOptions(provider=provider)  # type: ignore[arg-type]
    arm = open_file_arm(onnx, options, threads=1, backend=runs_on)
    on_cpu = (arm.runner.backend, arm.runner.provider) == ("onnxruntime", "CPUExecutionProvider")
    weighed = replace(sizes(onnx), operator_bytes=_OPERATOR_BYTES if on_cpu else 0)

    @contextmanager
    def cut(plan: LoadedPlan) -> Iterator[Runner]:
        with cut_for_a_while(onnx, folder, plan) as graph:
            yield open_runner(runs_on, graph, provider=provider, threads=1)

    return CostRunner(weighed, arm, cut)


def torch_runner(loaded: LoadedModel, device: str = "cpu", *, compiled: bool = False) -> CostRunner:
    """A loaded model on PyTorch."""
    from exporter.engines.runners.pytorch import TorchRunner
    from exporter.models.onnx_interface import interface_of

    model: Any = loaded.model
    interface, config = interface_of(model), model.config.get_text_config().to_dict()
    weighed = module_sizes(loaded)
    own = dict(weighed.sublayers)
    for slot in interface.cache:
        name = SublayerRef(slot.layer, "attention")
        per_token = (slot.heads * size * interface.dtype.itemsize for _, size in slot.parts)
        own[name] = replace(own[name], caches=tuple(map(CacheSize, per_token)))
    longest = longest_sequence(config) if interface.image is None else image_patches(config)
    running = TorchRunner(model, interface=interface, compiled=compiled, provider=device, threads=1)
    whole = torch_arm(loaded, loaded.path, running, "torch:")
    return CostRunner(replace(weighed, sublayers=own, longest=longest), whole)


@contextmanager
def cut_for_a_while(onnx: Path, folder: Path, plan: LoadedPlan) -> Iterator[Path]:
    """Cuts a graph into a folder of its own, which is gone after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".costs.", dir=folder) as name:
        target = Path(name) / f"{onnx.stem}.variant.onnx"
        options = CutOptions(
            verify="none", weights="compact", companions=False, genai_config="none"
        )
        prune_file(onnx, target, plan, options)
        yield target


@dataclass(frozen=True)
class RequestEstimate:
    """Both arms' time of a request.

    The baseline's counts as known: what the two arms' rounds have in common, a busy machine for
    one, slows both, and it is the ratios that are measured.
    """

    baseline_ms: float
    variant_ms: float
    std_error_ms: float
    degrees: float

    @classmethod
    def of(
        cls,
        counts: Sequence[float],
        baselines_ms: Sequence[float],
        ratios: Sequence[SpeedupEstimate],
    ) -> RequestEstimate:
        """Sums up cells that were timed apart; degrees of freedom by Welch and Satterthwaite."""
        before = [count * ms for count, ms in zip(counts, baselines_ms, strict=True)]
        after = [ms * math.exp(-r.log_ratio) for ms, r in zip(before, ratios, strict=True)]
        squares = [(ms * r.std_error) ** 2 for ms, r in zip(after, ratios, strict=True)]
        variance = sum(squares)
        lost = sum(v**2 / r.degrees for v, r in zip(squares, ratios, strict=True) if v)
        degrees = variance**2 / lost if lost else min(ratio.degrees for ratio in ratios)
        return cls(sum(before), sum(after), math.sqrt(variance), degrees)

    @property
    def saved_ms(self) -> float:
        """What the variant takes less."""
        return self.baseline_ms - self.variant_ms

    @property
    def saved_ci95(self) -> tuple[float, float]:
        """The ends of its 95 % interval."""
        low, high = self.speedup.ci95
        return self.baseline_ms * (1 - 1 / low), self.baseline_ms * (1 - 1 / high)

    @property
    def speedup(self) -> Speedup:
        """How many times faster the variant is, with a 95 % interval."""
        ratio = math.log(self.baseline_ms / self.variant_ms)
        return SpeedupEstimate(ratio, self.std_error_ms / self.variant_ms, self.degrees).speedup()


def of_rows(
    rows: Sequence[LatencyRow],
    counts: Sequence[float],
    arm: str = "candidate",
) -> RequestEstimate:
    """What saved rows say of an arm."""
    known = [row.baseline.median_ms for row in rows]
    ratios = [estimate_between(row, second=arm) for row in rows]
    return RequestEstimate.of(counts, known, ratios)


_WARM_UP_SECONDS = 10.0
_RELOADED_SECONDS = 20.0  # with less time loading anew would leave none for rounds
_FEWEST_PARTS = 6  # between loads: an interval of fewer says nothing


@dataclass(frozen=True)
class Effort:
    """How long a request is timed."""

    seconds: float = 60.0
    rounds: int | None = None
    reload: bool = True
    clock: Clock = time.perf_counter_ns
    seed: int = field(default_factory=lambda: secrets.randbits(32))


def time_request(
    arms: Mapping[str, TimedArm],
    cells: Sequence[tuple[Shape, float]],
    effort: Effort,
    known: Callable[[RequestEstimate], bool],
    progress: Progress = QUIET,
) -> list[LatencyRow]:
    """Times all cells of a request."""
    counts = [count for _, count in cells]

    def enough(rows: Sequence[MeasuredRow]) -> bool:
        if any(len(row.chunks) < _FEWEST_PARTS for row in rows):
            return False
        medians = [float(np.median(row.times()[0])) for row in rows]
        return known(RequestEstimate.of(counts, medians, [row.estimate() for row in rows]))

    seconds = effort.seconds / len(cells)
    sampling = TimingBudget(
        seconds=seconds,
        wall_seconds=None if effort.rounds is not None else effort.seconds,
        rounds=effort.rounds,
        warmup_seconds=min(_WARM_UP_SECONDS, seconds),
        reload=effort.reload and (effort.rounds is not None or effort.seconds > _RELOADED_SECONDS),
        seed=effort.seed,
    )
    return measure_rows(
        arms,
        [shape for shape, _ in cells],
        sampling,
        clock=effort.clock,
        enough=None if effort.rounds is not None else enough,
        progress=progress,
    )


MODEL = "model"
"""The role of the model's hash in ``made_from``."""
_MACHINE = ("machine", "processor", "cpu_count", "gpu", "affinity", "threads")
_TABLE = TypeAdapter(CostTable)
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
    kept: Path | None = None  # where what was foretold is found again; None keeps nothing
    clock: Clock = time.perf_counter_ns


def measure_costs(
    model: Path | str,
    settings: CostSettings | None = None,
    *,
    provider: str = "cpu",
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
        runner = _opened(ArmName.of(model), place, provider, progress)
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
    cells, whole = at.cells(cached=sizes.has_cache), runner.whole
    on_gpu = whole.runner.capabilities.device == "gpu"
    if settings.threads is not None:
        runner.threads = settings.threads
    elif not on_gpu:
        runner.threads = default_threads()
    machine = environment(threads=runner.threads, gpu=on_gpu)

    def foretold() -> CostTable:
        runs = _whole_runs(runner, cells, settings, progress)
        efforts = settings.variants
        variants = _variants(runner, cells, efforts, progress) if efforts else []
        rates = fitted_rates([sizes.work(cell) for cell in runs], list(runs.values()))
        taken = [count * runs[cell] for cell, count in cells]
        return CostTable(
            made_from={MODEL: whole.facts.sha256},
            at=at,
            backend=whole.runner.backend,
            provider=whole.runner.provider,
            environment=machine,
            baseline_ms=math.fsum(taken),
            runs={str(cell): ms for cell, ms in runs.items()},
            rates=rates._asdict(),
            sublayers=_costs(sizes, rates, cells, taken, variants),
            variants=variants,
        )

    about = {
        "model": whole.facts.sha256,
        "at": str(at),
        "on": [whole.runner.backend, whole.runner.provider],
        "variants": settings.variants is not None,
        "versions": library_versions(),
        **{name: getattr(machine, name) for name in _MACHINE},
    }
    return Store(settings.kept, about).once("costs", _TABLE, foretold)


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
                with runner.cut(plan) as cut, runner.beside({"cut": cut}) as arms:
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


def _opened(name: ArmName, folder: Path, provider: str, progress: Progress) -> CostRunner:
    """What runs a model."""
    if name.is_torch:
        require("torch", extra="torch")
        if not name.path.exists():
            raise CostError(
                f"{name.path} does not exist.", "Give a Hugging Face folder after torch:."
            )
        compiled = name.kind == "torch-compile"
        return torch_runner(load_model(str(name.path)), provider, compiled=compiled)
    runs_on = RUNNERS.get(name.kind)
    source = None if runs_on else source_of(find_builds(name.path)[0])
    if source is not None:  # an engine beside the graph that it was built from
        return CostRunner(sizes(source), open_arm(name, CompareOptions(), progress))
    if runs_on is None or runs_on.gguf:
        raise CostError(
            f"No sublayers of {name} can be told apart.",
            "Name the ONNX file, or engines beside the one that they were built from.",
        )
    return graph_runner(find_onnx(name.path), folder, provider, name.kind)
