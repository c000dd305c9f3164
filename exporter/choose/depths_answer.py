"""How much may be dropped: what a cut gains in speed, what it costs in two domains, and healed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from exporter.artifacts import (
    DepthCell,
    DepthDamage,
    DepthsInt8,
    DepthsReport,
    DropAnswer,
    LatencyRow,
    Record,
    Way,
)
from exporter.artifacts.plan_figures import LIMITED
from exporter.artifacts.store import Store
from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.limits import is_hopeless, rung_of
from exporter.choose.costs.cost_runners import OnnxCostRunner
from exporter.choose.costs.measuring import CostSettings, measure_beside, measure_on
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort, of_rows
from exporter.choose.selection.meters import RememberingMeter
from exporter.compare.agreement import prefill_logits
from exporter.compare.intervals import mean_interval
from exporter.engines.environment import default_threads, processor_name
from exporter.engines.runners.base import Runner
from exporter.engines.runners.registry import ONNX, open_runner
from exporter.errors import BackendError, CalibrationError, CostError, DepthcutError, HealingError
from exporter.export.forms.targets import write_form
from exporter.files import scratch_folder
from exporter.heal.fitting import Fitting
from exporter.heal.folded import folded_values
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import Damage, ratio
from exporter.models.ablation.meter import CutMeter
from exporter.models.changed_weights import OwnValue, swapped
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.loading.model_source import LoadedModel
from exporter.models.tasks import Tokens
from exporter.models.texts.calibration import CalibrationText, calibration_text
from exporter.models.texts.mixtures import text_of_report
from exporter.models.texts.self_text import SAMPLED, SELF
from exporter.models.texts.sources import refuse_same_text
from exporter.processes import available_bytes
from exporter.progress import Progress
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import data_files, load_model
from graph_passes.types import SublayerRef

Place = tuple[Way, int]


@dataclass(frozen=True)
class Judged:
    """A text, and what the whole model makes of it."""

    text: CalibrationText
    meter: CutMeter[Damage]
    whole: Damage


@dataclass(frozen=True)
class Question:
    """What is asked, and what it is judged on."""

    loaded: LoadedModel
    judged: Judged
    reported: CalibrationText | None  # None where there is none
    looks: int
    other_text: str | None  # the other domain's, as the user names it; None: what the model samples
    request: RequestShape
    most_increase: float  # the share by which the perplexity may rise
    own_numbers: bool
    batch_size: int
    kept: Path | None  # None keeps nothing
    progress: Progress

    def place(self, name: str) -> Path | None:
        """A file that is kept."""
        return None if self.kept is None else self.kept / name

    def about(self, *texts: CalibrationText) -> dict[str, object]:
        """What figures on some texts depend on."""
        return {**self.loaded.identity(), "ids": [text.ids_sha256 for text in texts]}


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
    """What was timed."""

    table: CostTable | None  # what sublayers cost; None where that can't be measured here
    int8: DepthsInt8 | None = None  # the whole model in int8; None where there is no graph
    no_int8: str = ""


def measured_speeds(asked: Question, other: Judged, names: Collection[SublayerRef]) -> Speeds:
    """Times what cutting sublayers saves, and the whole model in int8."""
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


def _no_graph(question: Question) -> str:
    """Why no graph is written; empty: one is."""
    if find_spec("onnxruntime_genai") is None:
        return "the extra genai is not installed"
    model: Any = question.loaded.model
    needed, free = _BESIDE * sum(item.nbytes for item in model.parameters()), available_bytes()
    if free is not None and needed > free:
        return f"that needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
    return ""


def _on_graph(question: Question, other: Judged, names: Collection[SublayerRef]) -> Speeds:
    store = Store(
        question.place("speeds.jsonl"),
        {
            **question.about(question.judged.text, other.text),
            "request": str(question.request),
            "machine": [processor_name(), default_threads()],
        },
    )
    timed = store.once(str(sorted(names)), _TIMED, lambda: _timed(question, other, names))
    return Speeds(timed.table, timed.int8)


def _timed(question: Question, other: Judged, names: Collection[SublayerRef]) -> _Timed:
    """Writes the graphs for a while, times them, and reads both texts with the one in int8."""
    settings = CostSettings(question.request, effort=_TOGETHER)
    with scratch_folder("depths") as place:
        whole, int8 = place / "whole", place / "int8" / "model.onnx"
        for folder in (whole, int8.parent):
            folder.mkdir()
        save_pretrained_files(question.loaded, whole)
        graph, _ = write_form(
            question.loaded, whole, target="onnxruntime-cpu", progress=question.progress
        )
        quantize_file(graph, int8, QuantizeSettings(scheme="int8"), progress=question.progress)
        runner = OnnxCostRunner(graph, place)
        others = {"int8": int8}
        table, rows = measure_beside(runner, settings, names, others, question.progress)
        question.progress.say("depths: the whole model in int8, on both texts")
        with open_runner(ONNX, int8, threads=runner.threads) as reading:
            here, there = (_ratio(reading, judged) for judged in (question.judged, other))
        saved = 1 - _bytes(int8) / _bytes(graph)
    counts = [count for _, count in question.request.cells(cached=runner.sizes.has_cache)]
    return _Timed(
        table=table,
        int8=DepthsInt8(
            bytes_removed=saved,
            perplexity_ratio=here,
            other_perplexity_ratio=there,
            speedups=_speedups(rows["int8"], counts),
        ),
    )


def _in_torch(question: Question, names: Collection[SublayerRef]) -> CostTable | None:
    from exporter.choose.costs.torch_cost_runner import TorchCostRunner

    try:
        return measure_on(
            TorchCostRunner(question.loaded), _settings(question), names, question.progress
        )
    except (BackendError, CostError) as error:
        question.progress.say(f"depths: no speeds: {error.message}")
        return None


def _settings(question: Question) -> CostSettings:
    return CostSettings(
        question.request,
        replacements=("none",),
        effort=Effort(seconds=_TIMED_SECONDS, reload=False),
        kept=question.place("costs.json"),
    )


def _speedups(rows: Sequence[LatencyRow], counts: Sequence[float]) -> dict[str, float]:
    phases = dict(zip(("prefill", "decode"), ([row] for row in rows), strict=False))
    parts = {phase: of_rows(own, [1.0]) for phase, own in phases.items()}
    parts["request"] = of_rows(rows, counts)
    return {phase: part.speedup.ratio for phase, part in parts.items()}


def _ratio(runner: Runner, judged: Judged) -> float:
    """The runner's perplexity over the whole model's."""
    losses = np.array([_loss(runner, ids) for ids in judged.text.input_ids])
    return math.exp(ratio(losses - judged.whole.baseline_nll_sums, judged.whole.positions))


def _loss(runner: Runner, ids: Any) -> float:
    """The negative log-likelihood of a sample's tokens but the first, in nats."""
    import torch

    logits = torch.from_numpy(prefill_logits(runner, ids)[:-1]).float()
    result = logits.logsumexp(-1) - logits[range(len(ids) - 1), ids[1:]]
    return float(result.double().sum())


def _bytes(graph: Path) -> int:
    return sum(path.stat().st_size for path in (graph, *data_files(load_model(graph))))


_MOST_LOG = 700.0


def depth_damage(damage: Damage, text: CalibrationText, looks: int = 1) -> DepthDamage:
    """A cut's damage with 95 % intervals."""
    increase, documents = damage.nll_sums - damage.baseline_nll_sums, text.clusters
    rise = mean_interval(increase, damage.positions, documents)
    corrected = mean_interval(increase, damage.positions, documents, looks=looks)
    kl = mean_interval(damage.kl_sums, damage.positions, documents, positive=True)
    return DepthDamage(
        perplexity=damage.perplexity,
        perplexity_ratio=_exp(damage.log_perplexity_increase),
        perplexity_ratio_ci95=None if rise is None else (_exp(rise.ci95[0]), _exp(rise.ci95[1])),
        perplexity_ratio_most=None if corrected is None else _exp(corrected.ci95[1]),
        kl=damage.kl,
        kl_ci95=None if kl is None else (max(0.0, kl.ci95[0]), kl.ci95[1]),
        top1_agreement=damage.top1_agreement,
    )


def limit_figures(damage: DepthDamage) -> dict[str, float]:
    """What limits on quality are held against, as a plan has it in ``predicted``.

    Without an interval, of a single sample, nothing is certain.
    """
    rise = next(figure for figure in LIMITED.values() if figure.is_log)
    return {
        rise.key: math.log(damage.perplexity_ratio),
        rise.worse_end: math.log(damage.perplexity_ratio_most or math.inf),
    }


def _exp(value: float) -> float:
    return math.exp(max(-_MOST_LOG, min(_MOST_LOG, value)))


_FITTED_TOKENS = 2048
_SAMPLED_LENGTH, _SAMPLED_TOKENS = 128, 1024
_SEED = 1  # scores rest on what the model samples with another one
_TOO_FAR = "cuts that lose so much that no healing is expected to bring them within the limit."
_LEAST_SPEEDUP = 1.01
"""A cut that gains less isn't worth its loss."""


class _HealedCell(Record):
    """What healing gave in both domains, or why it gave nothing."""

    healed: DepthDamage | None = None
    other_healed: DepthDamage | None = None
    not_healed: str = ""


_HEALED = TypeAdapter(_HealedCell)


def answered(
    asked: Question, report: DepthsReport, cuts: Mapping[Place, BranchReplacements]
) -> DepthsReport:
    """Adds to a report what its cells gain and cost further, and which one is recommended."""
    text = _other_domain(asked, report)
    fitted = text_of_report(asked.loaded, report.calibration, progress=asked.progress)
    fitted = fitted.first_tokens(_FITTED_TOKENS)
    other, others = _in_other_domain(asked, text, cuts)
    hopeless = _hopeless(asked, report)
    promising = {place: cut for place, cut in cuts.items() if place not in hopeless}
    healed = dict.fromkeys(hopeless, _HealedCell(not_healed=_TOO_FAR))
    healed |= _healed(asked, other, fitted, promising)
    names = {name for cut in cuts.values() for name in cut}
    speeds = measured_speeds(asked, other, names)
    table = speeds.table
    cells = [
        cell.model_copy(
            update={
                "other": others[place],
                **dict(healed[place]),
                "speedups": {} if table is None else speedups(table, cuts[place]),
            }
        )
        if (place := (cell.way, cell.number)) in cuts
        else cell
        for cell in report.cells
    ]
    best = recommended(cells, asked.most_increase)
    reported = None if best is None else _reported(asked, best, cuts, fitted)
    answer = DropAnswer(
        other_text=text.ref,
        other_baseline_perplexity=other.whole.baseline_perplexity,
        fitted_on=fitted.ref,
        most_increase=asked.most_increase,
        request="" if table is None else str(table.at),
        backend="" if table is None else table.backend,
        threads=None if table is None else table.environment.threads,
        int8=speeds.int8,
        no_int8=speeds.no_int8,
        way=None if best is None else best.way,
        number=None if best is None else best.number,
        looks=asked.looks,
        reported_text=None if reported is None or asked.reported is None else asked.reported.ref,
        reported=reported,
    )
    return report.model_copy(update={"cells": cells, "answer": answer})


def _hopeless(question: Question, report: DepthsReport) -> list[Place]:
    """The cuts that lose too much for any healing."""
    limit = Floors(question.most_increase)
    return [
        (cell.way, cell.number)
        for cell in report.cells
        if question.own_numbers and cell.damage is not None
        if is_hopeless(limit_figures(cell.damage), limit)
    ]


def recommended(cells: Sequence[DepthCell], most_increase: float) -> DepthCell | None:
    """The fastest cell that keeps the limit on held-out text, healed or not.

    By the rule of a budget's limits: all of the interval is within, which is as much wider as the
    number of cells takes. Where no speed was measured, the one that removes most parameters.
    """
    limit = Floors(most_increase)
    fitting = [cell for cell in cells if _holds(cell, limit) and _gain(cell) > _LEAST_SPEEDUP]
    return max(fitting, key=lambda cell: (_gain(cell), -least_ratio(cell)), default=None)


def _holds(cell: DepthCell, limit: Floors) -> bool:
    damages = [damage for damage in (cell.damage, cell.healed) if damage is not None]
    return any(rung_of(0, limit_figures(damage), limit).holds for damage in damages)


def _reported(
    question: Question,
    best: DepthCell,
    cuts: Mapping[Place, BranchReplacements],
    fitted: CalibrationText,
) -> DepthDamage | None:
    """What the recommended cut costs on text that chose nothing, healed where that was better."""
    if (text := question.reported) is None:
        return None
    question.progress.say("depths: the recommended cut, on text that has chosen nothing")
    cut = cuts[best.way, best.number]
    meter = Tokens(question.loaded.model).meter(
        text.input_ids, text.mask, batch_size=question.batch_size
    )
    bare, healed = best.damage, best.healed
    if healed is None or (bare is not None and bare.perplexity_ratio <= healed.perplexity_ratio):
        return depth_damage(meter.measure(cut, question.progress), text)
    return _Healer(question, {meter: text}, fitted).damages(cut)[0]


def least_ratio(cell: DepthCell) -> float:
    """The cut model's perplexity over the whole one's, healed where that helps; else ``inf``."""
    perplexity_ratios = [
        damage.perplexity_ratio for damage in (cell.damage, cell.healed) if damage is not None
    ]
    return min(perplexity_ratios, default=math.inf)


def _gain(cell: DepthCell) -> float:
    if cell.speedups:
        return cell.speedups["request"]
    return 1 / (1 - (cell.parameters_removed or 0.0))


def _other_domain(question: Question, report: DepthsReport) -> CalibrationText:
    spec = question.other_text or SELF
    length = int(question.judged.text.input_ids.shape[1])
    length = min(length, _SAMPLED_LENGTH) if spec in SAMPLED else length
    tokens = question.judged.text.input_ids.size
    tokens = min(tokens, _SAMPLED_TOKENS) if spec in SAMPLED else tokens
    result = calibration_text(
        question.loaded,
        spec,
        samples=math.ceil(tokens / length),
        sequence_length=length,
        seed=_SEED,
        part="evaluation",
        progress=question.progress,
    )
    used = [question.judged.text.ref, *report.calibration.texts]
    what = "the held-out text, or that of the scores, and no other domain"
    refuse_same_text(result.ref, used, what, "Give --other-text another text.", CalibrationError)
    return result


def _in_other_domain(
    question: Question, text: CalibrationText, cuts: Mapping[Place, BranchReplacements]
) -> tuple[Judged, dict[Place, DepthDamage]]:
    """The text with what the whole model makes of it, and the damage of all cuts."""
    meter = Tokens(question.loaded.model).meter(
        text.input_ids, text.mask, batch_size=question.batch_size
    )
    kept = RememberingMeter(meter, question.place("other-damages.jsonl"), question.about(text))
    question.progress.say(f"depths: in another domain, {text.ref.source}")
    whole, *result = kept.measure_many({}, list(cuts.values()), question.progress)
    damages = dict(zip(cuts, (depth_damage(damage, text) for damage in result), strict=True))
    return Judged(text, meter, whole), damages


def _healed(
    question: Question,
    other: Judged,
    fitted: CalibrationText,
    cuts: Mapping[Place, BranchReplacements],
) -> dict[Place, _HealedCell]:
    """What folded weights leave of each cut's damage in both domains."""
    about = question.about(question.judged.text, other.text, fitted)
    store = Store(question.place("healed.jsonl"), about)
    texts = {judged.meter: judged.text for judged in (question.judged, other)}
    healer = _Healer(question, texts, fitted)
    cells = {}
    for (way, number), cut in cuts.items():
        question.progress.say(f"depths: {way} at {number}, healed by folded weights")
        name = f"{way} {number}: {', '.join(f'{kind} {layer}' for layer, kind in sorted(cut))}"
        try:
            cells[way, number] = store.once(name, _HEALED, lambda cut=cut: healer.cell(cut))  # type: ignore[misc]
        except HealingError as error:  # memory is short now: the next call tries again
            cells[way, number] = _HealedCell(not_healed=error.message)
    return cells


class _Healer:
    """Folds for one cut after the other, and holds the healed models against the whole one.

    The whole model's answers are kept in between.
    """

    def __init__(
        self,
        asked: Question,
        texts: Mapping[CutMeter[Damage], CalibrationText],
        fitted: CalibrationText,
    ) -> None:
        self._asked, self._fitted = asked, fitted
        self._values: list[OwnValue] = []
        self._texts = {meter.inside(lambda: swapped(self._values)): texts[meter] for meter in texts}

    def cell(self, cut: BranchReplacements) -> _HealedCell:
        """What is left of a cut's damage, or why nothing could be healed."""
        try:
            here, there = self.damages(cut)
        except HealingError as error:
            if error.code == "out-of-memory":
                raise
            return _HealedCell(not_healed=error.message)
        return _HealedCell(healed=here, other_healed=there)

    def damages(self, cut: BranchReplacements) -> list[DepthDamage]:
        """What is left of a cut's damage on each text."""
        result = self._asked
        texts = HealingTexts(self._fitted, (self._fitted.ref,), (), None)
        options = HealOptions(kind="fold", batch_size=result.batch_size)
        fitting = Fitting(result.loaded, texts, sorted(cut), options, None, result.progress)
        self._values = folded_values(fitting, self._fitted)
        if not self._values:
            raise HealingError("no weight that is kept could make up for it.")
        return [
            depth_damage(meter.measure(cut, result.progress), text, result.looks)
            for meter, text in self._texts.items()
        ]
