"""What `depthcut export` is going to do, in which order, and about how long each stage takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.ladder import TRIALS
from exporter.choose.budgets.trial_runs import FIRST_SHARE
from exporter.choose.selection.affordable import SEARCH_S, USUAL_DROPS, search_runs
from exporter.heal.automatic import USUAL_TIME_S, operations_per_second, settled
from exporter.heal.options import HealOptions
from exporter.models.ablation.meter import predicts_tokens
from exporter.models.sentence_folder import longest_text
from exporter.models.texts.self_text import SELF
from exporter.pipeline.pace import Pace, time_words
from exporter.pipeline.planning import variant_s
from exporter.pipeline.request import ExportRequest
from exporter.pipeline.run import HEALING, Run

_USUAL_TOKENS = 10_000
_VARIANTS, _BARE_VARIANTS = 8, 4
"""Graphs that are timed to find what sublayers cost, with replacements and without, at most."""
_READS, _TOGETHER = 7, 3
"""Of a prompt by each graph that is timed, and the graphs that are timed together."""
_BYTES_PER_S = 1e10
"""Read from memory."""
_SAMPLED = 2.5
"""Times as long as a run with the same operations: products of few tokens are slow."""
_EXPORT_S, _BUILD_S, _EXPORTED_PER_S = 15.0, 5.0, 2e7
"""The own time of PyTorch's exporter and of onnxruntime-genai's builder, and the parameters that
are written and checked in a second."""
_BUILDER = "onnxruntime_genai"
_TRAINED_RUNS, _FOLDED_RUNS = 4, 4
"""Of the model over the text: whole, cut, and backwards like two; the fold's walks and sums."""
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

    def sample_s(self, tokens: float, steps: float) -> float:
        """Of sampling so many tokens: each step reads all weights, for few tokens at a time."""
        return steps * self.bytes / _BYTES_PER_S + _SAMPLED * self.run_s(tokens)


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
        found["score"] += machine.sample_s(tokens, score.sequence_length)
    if request.drops.budget is not None and request.drops.budget.at is not None:
        found["time the sublayers"] = _timed_s(request, machine, request.drops.budget)
    if request.drops.budget is not None and request.search.by_damage:
        found["choose"] = _search_s(request, machine)
    heal = request.heal
    if heal is not None:
        limit = heal.time_s or USUAL_TIME_S
        if not request.heals_plan:  # choosing and healing share the time
            chosen = sum(found.get(name, 0.0) for name in ("time the sublayers", "choose"))
            limit -= min(chosen, limit / 2)
        training = min(limit, _training_s(heal, machine))
        found["heal"] = training if heal.trains else TRIALS * 4 * machine.run_s(tokens)
    built = request.target.startswith("onnxruntime")
    own_s = _BUILD_S if built else _EXPORT_S
    found["export and cut"] = 2 * (own_s + machine.parameters / _EXPORTED_PER_S)
    if request.compared:
        found["measure"] = _measure_s(request, machine)
    return found


def _training_s(heal: HealOptions, machine: Machine) -> float:
    """Of all its tokens, and of the fold that it begins with."""
    tokens = heal.trained_tokens
    folded = min(tokens, _USUAL_TOKENS)
    return _TRAINED_RUNS * machine.run_s(tokens) + _FOLDED_RUNS * machine.run_s(folded)


def _timed_s(request: ExportRequest, machine: Machine, budget: Budget) -> float:
    """An arm reads the prompt at least seven times: three to warm up, and four in two rounds."""
    weighed = request.plan_settings.for_budget(budget).weighs_replacements
    asked, read = variant_s(request, budget), 0.0
    if budget.at is not None:
        read = _READS * machine.run_s(budget.at.batch * budget.at.prompt)
    if budget.target_speedup is None and not weighed:
        return asked + _TOGETHER * read
    return max(asked, 2 * read) * (_VARIANTS if weighed else _BARE_VARIANTS)


def _search_s(request: ExportRequest, machine: Machine) -> float:
    budget = request.drops.budget
    drops = sum(budget.counts.values()) if budget is not None else 0
    runs = search_runs(2 * machine.layers, drops or USUAL_DROPS, request.search.shortlist)
    found = runs * machine.run_s(request.search.tokens)
    return min(found, SEARCH_S) if request.search.search == "auto" else found


def _measure_s(request: ExportRequest, machine: Machine) -> float:
    compare = request.compare
    lengths = (*compare.prompt_lengths, *compare.decode_past_lengths)
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
    """Tells the stages and their times before the first of them begins, and what is missing."""
    request, model = run.request, run.choosing.model
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    machine = Machine(
        model.num_parameters(), run.choosing.ref.num_layers, size, operations_per_second()
    )
    heal = _affordable_healing(run)
    compare = request.compare.for_texts(longest_text(run.choosing.path))
    expected = expected_s(replace(request, heal=heal, compare=compare), machine)
    told = ", ".join(f"{name} {time_words(seconds)}" for name, seconds in expected.items())
    run.progress.say(
        f"export: about {time_words(sum(expected.values()))} on a quiet machine: {told}"
    )
    if heal is not None and heal.trains:
        run.progress.say(
            "export: a longer training (--time) recovers more, so that more can be dropped; "
            "--quick trains nothing"
        )
    if request.target == "portable" and find_spec(_BUILDER) is None:
        run.progress.say(
            "export: the graphs are portable; the extra genai and --target onnxruntime-cpu would "
            "give faster ones"
        )
    run.pace = Pace(by_stage(request, expected))


def _affordable_healing(run: Run) -> HealOptions | None:
    """How the first cut is going to be healed; tells why nothing is trained, if that is so."""
    if run.request.heal is None:
        return None
    heal = run.request.heal.for_model(predicts_tokens=predicts_tokens(run.choosing.model))
    if heal.kind != "auto":
        return heal
    share = 1.0 if run.request.heals_plan else FIRST_SHARE
    asked = replace(heal, time_s=share * (heal.time_s or USUAL_TIME_S))
    found = settled(asked, run.choosing)
    if found.trains:
        return heal
    return settled(asked, run.choosing, run.progress)
