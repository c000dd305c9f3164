"""What `depthcut export` is going to do, in which order, and about how long each stage takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.ladder import TRIALS
from exporter.choose.selection.affordable import SEARCH_S, USUAL_DROPS, search_runs
from exporter.heal.automatic import USUAL_TIME_S, operations_per_second
from exporter.models.texts.self_text import SELF
from exporter.pipeline.pace import Pace, time_words
from exporter.pipeline.planning import variant_s
from exporter.pipeline.request import ExportRequest
from exporter.pipeline.run import HEALING, Run

_USUAL_TOKENS = 10_000
_VARIANTS, _BARE_VARIANTS = 8, 4
"""Graphs that are timed to find what sublayers cost, with replacements and without, at most."""
_BYTES_PER_S = 1e10
"""Read from memory; each sampled token reads all weights."""
_EXPORT_S, _EXPORTED_PER_S = 15.0, 2e7
"""An export's own time, and the parameters that it writes and checks in a second."""
_ROW_SHARE = 1.5
"""Of the time budget of a row: loading and warming up come on top."""


@dataclass(frozen=True)
class Machine:
    """What the times depend on.

    Attributes:
        parameters: Of the model.
        layers: Likewise.
        bytes: Of its weights.
        operations_per_s: Of the machine.
    """

    parameters: int
    layers: int
    bytes: int
    operations_per_s: float

    def run_s(self, tokens: float) -> float:
        """Of a run over so many tokens."""
        return 2 * self.parameters * tokens / self.operations_per_s


def expected_s(request: ExportRequest, machine: Machine) -> dict[str, float]:
    """About how many seconds each stage takes, in their order.

    Args:
        request: What is asked for.
        machine: On what.
    """
    score = request.score
    tokens = (score.samples or _USUAL_TOKENS // score.sequence_length) * score.sequence_length
    sampled = not score.calibration or SELF in score.calibration
    found = {"score": machine.run_s(tokens)}
    if sampled:
        found["score"] += score.sequence_length * machine.bytes / _BYTES_PER_S
    if request.drops.budget is not None and request.drops.budget.at is not None:
        found["time the sublayers"] = _timed_s(request, request.drops.budget)
    if request.drops.budget is not None and request.search.by_damage:
        found["choose"] = _search_s(request, machine)
    heal = request.heal
    if heal is not None:
        limit = heal.time_s or USUAL_TIME_S
        if not request.heals_plan:  # choosing and healing share the time
            chosen = sum(found.get(name, 0.0) for name in ("time the sublayers", "choose"))
            limit -= min(chosen, limit / 2)
        found["heal"] = limit if heal.trains else TRIALS * 4 * machine.run_s(tokens)
    found["export and cut"] = 2 * (_EXPORT_S + machine.parameters / _EXPORTED_PER_S)
    if request.compared:
        found["measure"] = _measure_s(request, machine)
    return found


def _timed_s(request: ExportRequest, budget: Budget) -> float:
    weighed = request.plan_settings.for_budget(budget).weighs_replacements
    return variant_s(request, budget) * (_VARIANTS if weighed else _BARE_VARIANTS)


def _search_s(request: ExportRequest, machine: Machine) -> float:
    budget = request.drops.budget
    drops = sum(budget.counts.values()) if budget is not None else 0
    runs = search_runs(2 * machine.layers, drops or USUAL_DROPS, request.search.shortlist)
    found = runs * machine.run_s(request.search.tokens)
    return min(found, SEARCH_S) if request.search.search == "auto" else found


def _measure_s(request: ExportRequest, machine: Machine) -> float:
    compare = request.compare
    lengths = (*compare.prefill_lengths, *compare.decode_past_lengths)
    rows = len(lengths) * len(compare.batches) + len(compare.timing.generate)
    evaluated = 2 * machine.run_s(compare.eval_tokens)
    return rows * compare.timing.time_budget_s * _ROW_SHARE + evaluated


def by_stage(request: ExportRequest, expected: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The parts that :func:`expected_s` tells, by the stages that a run goes through."""
    planned = ["time the sublayers", "choose", *([] if request.heals_plan else ["heal"])]
    parts = {"score": ["score"], "plan": planned, "measure": ["measure"]}
    if request.heals_plan:
        parts[HEALING] = ["heal"]
    half = {"export and cut": expected["export and cut"] / 2}
    return {"export": half, "prune": half} | {
        stage: {name: expected[name] for name in names if name in expected}
        for stage, names in parts.items()
    }


def say_outlook(run: Run) -> None:
    """Tells the stages and their times before the first of them begins."""
    request, model = run.request, run.choosing.model
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    machine = Machine(
        model.num_parameters(), run.choosing.ref.num_layers, size, operations_per_second()
    )
    expected = expected_s(request, machine)
    told = ", ".join(f"{name} {time_words(seconds)}" for name, seconds in expected.items())
    run.progress.say(
        f"export: about {time_words(sum(expected.values()))} on a quiet machine: {told}"
    )
    if request.heal is not None and request.heal.trains:
        run.progress.say(
            "export: a longer training (--time) recovers more, so that more can be dropped; "
            "--quick trains nothing"
        )
    run.pace = Pace(by_stage(request, expected))
