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

from exporter.artifacts import DepthsInt8, LatencyRow
from exporter.artifacts.store import Store
from exporter.choose.costs.cost_runners import OnnxCostRunner, subjects
from exporter.choose.costs.estimates import of_rows
from exporter.choose.costs.measuring import CostSettings, measure_on
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort, time_request
from exporter.choose.studies.question import Question
from exporter.compare.quality.agreement import prefill_logits
from exporter.engines.runners.base import Runner
from exporter.engines.runners.registry import ONNX, open_runner
from exporter.errors import BackendError, CostError, DepthcutError
from exporter.export.forms.write import write_form
from exporter.files import scratch_folder
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.ratios import ratio
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.texts.calibration import CalibrationText
from exporter.processes import available_bytes
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import data_files, load_model
from graph_passes.types import SublayerRef

_TIMED_SECONDS = 8.0
_BESIDE = 3
"""Times the weights: the graph is built, and then loaded with a variant of it."""
_INT8 = TypeAdapter(DepthsInt8)


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


@dataclass(frozen=True)
class Judged:
    """A text, and the whole model's losses on it."""

    text: CalibrationText
    whole: Damage


def measured_speeds(asked: Question, other: Judged, names: Collection[SublayerRef]) -> Speeds:
    """Times what cutting sublayers saves, and the whole model in int8.

    Args:
        asked: What is asked.
        other: The other domain.
        names: The sublayers that some cut drops.
    """
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
    with scratch_folder("depths") as place:
        whole = place / "whole"
        whole.mkdir()
        save_pretrained_files(asked.loaded, whole)
        graph, _ = write_form(
            asked.loaded, whole, target="onnxruntime-cpu", progress=asked.progress
        )
        runner = OnnxCostRunner(graph, place)
        table = measure_on(runner, _settings(asked), names, asked.progress) if names else None
        store = Store(asked.place("int8.jsonl"), asked.about(asked.text, other.text))
        int8 = store.once("int8", _INT8, lambda: _int8(asked, other, runner))
    return Speeds(table, int8)


def _in_torch(asked: Question, names: Collection[SublayerRef]) -> CostTable | None:
    from exporter.choose.costs.torch_cost_runner import TorchCostRunner

    if not names:
        return None
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


def _int8(asked: Question, other: Judged, whole: OnnxCostRunner) -> DepthsInt8:
    """Quantises the graph, and holds it against the float one."""
    graph = whole.folder / "int8" / whole.onnx.name
    graph.parent.mkdir()
    asked.progress.say("depths: the whole model in int8")
    quantize_file(whole.onnx, graph, QuantizeSettings(scheme="int8"), progress=asked.progress)
    runners = {
        name: open_runner(ONNX, path, threads=whole.threads)
        for name, path in (("baseline", whole.onnx), ("candidate", graph))
    }
    with subjects(runners, whole.vocabulary) as arms:
        settings, cells = _settings(asked), asked.request.cells(cached=whole.sizes.has_cache)
        rows = time_request(arms, cells, settings.effort, settings.is_known, asked.progress)
        texts = [Judged(asked.text, asked.whole), other]
        here, there = (_ratio(runners["candidate"], each) for each in texts)
    return DepthsInt8(
        bytes_removed=1 - _bytes(graph) / _bytes(whole.onnx),
        perplexity_ratio=here,
        other_perplexity_ratio=there,
        speedups=_speedups(rows, [count for _, count in cells]),
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
