"""How fast cuts are, and what int8 alone gives beside them.

Both are measured on a graph for ONNX Runtime, which is written for a while, where the builder that
writes one in seconds is installed. Else PyTorch is timed, and there is no int8 model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from exporter.artifacts import DepthsInt8, LatencyRow, Record
from exporter.artifacts.store import Store
from exporter.choose.costs.cost_runners import OnnxCostRunner
from exporter.choose.costs.estimates import of_rows
from exporter.choose.costs.measuring import CostSettings, measure_on
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort
from exporter.choose.costs.together import measure_together
from exporter.choose.studies.question import Judged, Question
from exporter.compare.quality.agreement import prefill_logits
from exporter.engines.environment import default_threads, processor_name
from exporter.engines.runners.base import Runner
from exporter.engines.runners.registry import ONNX, open_runner
from exporter.errors import BackendError, CostError, DepthcutError
from exporter.export.forms.targets import write_form
from exporter.files import scratch_folder
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import ratio
from exporter.models.loading.model_files import save_pretrained_files
from exporter.processes import available_bytes
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import data_files, load_model
from graph_passes.types import SublayerRef

_TIMED_SECONDS = 8.0
_TOGETHER = Effort(seconds=24.0, reload=False)
_BESIDE = 4
"""Times the weights: the graph is loaded beside one without some attentions, one without some MLPs,
and one in int8.
"""


class _Timed(Record):
    """What is kept for a later call."""

    table: CostTable
    int8: DepthsInt8


_TIMED = TypeAdapter(_Timed)


@dataclass(frozen=True)
class Speeds:
    """What was timed.

    Attributes:
        table: What sublayers cost; None where that can't be measured here.
        int8: The whole model in int8; None where there is no graph.
        no_int8: Why not.
    """

    table: CostTable | None
    int8: DepthsInt8 | None = None
    no_int8: str = ""


def measured_speeds(asked: Question, other: Judged, names: Collection[SublayerRef]) -> Speeds:
    """Times what cutting sublayers saves, and the whole model in int8.

    Args:
        asked: What is asked.
        other: The other domain.
        names: The sublayers that some cut drops.
    """
    if not names:
        return Speeds(None, no_int8="nothing could be dropped")
    reason = _no_graph(asked)
    if not reason:
        try:
            return _on_graph(asked, other, names)
        except DepthcutError as error:
            reason = error.message.rstrip(".")
    asked.progress.say(f"depths: timed in PyTorch, without an int8 model: {reason}")
    return Speeds(_in_torch(asked, names), no_int8=reason)


def speedups(table: CostTable, cut: BranchReplacements) -> dict[str, float]:
    """How many times faster a cut is foretold to be; nothing where the costs can't be right."""
    choices: dict[Any, Any] = dict.fromkeys(cut, "none")
    parts = {"prefill": table.of_cell(0), "request": table}
    if table.at.new:
        parts["decode"] = table.of_cell(1)
    try:
        return {phase: part.speedup(choices) for phase, part in parts.items()}
    except CostError:
        return {}


def _no_graph(asked: Question) -> str:
    """Why no graph is written; empty: one is."""
    if find_spec("onnxruntime_genai") is None:
        return "the extra genai is not installed"
    model: Any = asked.loaded.model
    needed, free = _BESIDE * sum(each.nbytes for each in model.parameters()), available_bytes()
    if free is not None and needed > free:
        return f"that needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
    return ""


def _on_graph(asked: Question, other: Judged, names: Collection[SublayerRef]) -> Speeds:
    store = Store(
        asked.place("speeds.jsonl"),
        {
            **asked.about(asked.judged.text, other.text),
            "request": str(asked.request),
            "machine": [processor_name(), default_threads()],
        },
    )
    found = store.once(str(sorted(names)), _TIMED, lambda: _timed(asked, other, names))
    return Speeds(found.table, found.int8)


def _timed(asked: Question, other: Judged, names: Collection[SublayerRef]) -> _Timed:
    """Writes the graphs for a while, times them, and reads both texts with the one in int8."""
    settings = CostSettings(asked.request, effort=_TOGETHER)
    with scratch_folder("depths") as place:
        whole, int8 = place / "whole", place / "int8" / "model.onnx"
        for folder in (whole, int8.parent):
            folder.mkdir()
        save_pretrained_files(asked.loaded, whole)
        graph, _ = write_form(
            asked.loaded, whole, target="onnxruntime-cpu", progress=asked.progress
        )
        quantize_file(graph, int8, QuantizeSettings(scheme="int8"), progress=asked.progress)
        runner = OnnxCostRunner(graph, place)
        table, rows = measure_together(runner, settings, names, {"int8": int8}, asked.progress)
        asked.progress.say("depths: the whole model in int8, on both texts")
        with open_runner(ONNX, int8, threads=runner.threads) as reading:
            here, there = (_ratio(reading, each) for each in (asked.judged, other))
        saved = 1 - _bytes(int8) / _bytes(graph)
    counts = [count for _, count in asked.request.cells(cached=runner.sizes.has_cache)]
    return _Timed(
        table=table,
        int8=DepthsInt8(
            bytes_removed=saved,
            perplexity_ratio=here,
            other_perplexity_ratio=there,
            speedups=_speedups(rows["int8"], counts),
        ),
    )


def _in_torch(asked: Question, names: Collection[SublayerRef]) -> CostTable | None:
    from exporter.choose.costs.torch_cost_runner import TorchCostRunner

    try:
        return measure_on(TorchCostRunner(asked.loaded), _settings(asked), names, asked.progress)
    except (BackendError, CostError) as error:
        asked.progress.say(f"depths: no speeds: {error.message}")
        return None


def _settings(asked: Question) -> CostSettings:
    return CostSettings(
        asked.request,
        replacements=("none",),
        effort=Effort(seconds=_TIMED_SECONDS, reload=False),
        kept=asked.place("costs.json"),
    )


def _speedups(rows: Sequence[LatencyRow], counts: Sequence[float]) -> dict[str, float]:
    phases = dict(zip(("prefill", "decode"), ([row] for row in rows), strict=False))
    parts = {phase: of_rows(own, [1.0]) for phase, own in phases.items()}
    parts["request"] = of_rows(rows, counts)
    return {phase: each.speedup.ratio for phase, each in parts.items()}


def _ratio(runner: Runner, judged: Judged) -> float:
    """The runner's perplexity over the whole model's."""
    losses = np.array([_loss(runner, ids) for ids in judged.text.input_ids])
    return math.exp(ratio(losses - judged.whole.baseline_nll_sums, judged.whole.positions))


def _loss(runner: Runner, ids: Any) -> float:
    """The negative log-likelihood of a sample's tokens but the first, in nats."""
    import torch

    logits = torch.from_numpy(prefill_logits(runner, ids)[:-1]).float()
    found = logits.logsumexp(-1) - logits[range(len(ids) - 1), ids[1:]]
    return float(found.double().sum())


def _bytes(graph: Path) -> int:
    return sum(path.stat().st_size for path in (graph, *data_files(load_model(graph))))
