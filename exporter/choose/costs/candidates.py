"""By how much a finished candidate serves a request faster, as measured."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import Environment, LatencyRow, Record, Speedup
from exporter.choose.costs.conditions import refuse_too_long
from exporter.choose.costs.estimates import RequestEstimate, of_rows
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.timing import Effort, time_request
from exporter.choose.costs.weighing import longest_text
from exporter.compare.arms import Pair
from exporter.compare.kinds import open_pair
from exporter.compare.options import CompareOptions
from exporter.compare.timing.subjects import RunnerArm
from exporter.engines.environment import default_threads, environment
from exporter.engines.inputs import has_cache
from exporter.errors import CostError, UsageError
from exporter.progress import QUIET, Progress


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
    threads: int | None = None,
    width: float = 0.01,
    effort: Effort | None = None,
    progress: Progress = QUIET,
) -> MeasuredSpeedup:
    """Times a request with both models in turns.

    Args:
        baseline: The whole model, in any form that :func:`exporter.compare.session.compare` takes:
            an ONNX file or a folder with one, ``torch:DIR``, or engines where there is a GPU.
        candidate: The pruned one, of the same kind.
        at: The request.
        provider: Where ONNX Runtime or PyTorch runs both: ``cpu`` or ``cuda``.
        threads: CPU threads; None takes all physical cores.
        width: Ends once the 95 % interval reaches no further than this share from the speedup, to
            either side.
        effort: How long the rounds take at most; two minutes by default.
        progress: Hears what goes on.

    Raises:
        ComparisonError: They are of different kinds, or no forms of one model.
        CostError: The model can't serve such a request.
        EngineError: There is no engine, or no GPU to run it.
        BackendError: A run fails.
    """
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
