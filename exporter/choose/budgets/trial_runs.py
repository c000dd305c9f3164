"""Heals cuts one after the other and holds each against limits on quality, on held-out text."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from scipy import stats

from exporter.artifacts import CalibrationRef, HealingReport, PruningPlan, Speedup, TriedCut
from exporter.artifacts.base import nouns_of
from exporter.artifacts.healing import HealedText, Healing
from exporter.artifacts.loaded_plan import ChangedWeight, LoadedPlan
from exporter.artifacts.plan_figures import LIMITED
from exporter.artifacts.store import Store
from exporter.choose.budgets.budget import USUAL_FLOORS, Floors
from exporter.choose.budgets.by_scores import SEARCH_S
from exporter.choose.budgets.figures import Outcome, elsewhere, size_figures
from exporter.choose.budgets.inputs import Judges, PlanInputs
from exporter.choose.budgets.limits import (
    QualityLimits,
    Rung,
    damage_figures,
    ends_of,
    held_figures,
    is_hopeless,
    least_share,
    rung_of,
)
from exporter.choose.budgets.options import Goal, PlanCandidate, Step, Unit, words_of
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.errors import CalibrationError, HealingError, UndecidedGoalError, UnmetGoalError
from exporter.heal.automatic import USUAL_TIME_S, operations_per_second, settled, without_training
from exporter.heal.healed import Healed, heal
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import FOLDER_PLAN, FOLDER_REPORT
from exporter.heal.texts import HealingTexts, healing_texts, on_text_of
from exporter.models.ablation.damage import AnyDamage
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText, specs_of
from exporter.models.texts.self_text import SELF
from exporter.models.texts.sources import PYDOC
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import remove_tree
from graph_passes.replacements import array_of
from graph_passes.types import Replacement

SHARES = {"distill": 0.25, "fold": 0.4, "best": 0.5}
"""What is expected to remain of a bare cut's cost after each kind of healing."""
TRIALS = 3
_FITTED_S = 60.0
"""For the search for cuts that nothing is trained for."""
_LEAST = 1e-6
_CAUTION = 0.1
"""After each cut that failed the next has to leave so much more room: few may be tried."""


class Ladder:
    """Ever larger cuts, of which some are tried."""

    def __init__(self, costs: Sequence[float], share: float) -> None:
        self._costs = list(accumulate((max(_LEAST, cost) for cost in costs), max))
        self._share = share
        self.tried: list[Rung] = []

    @property
    def best(self) -> Rung | None:
        """The largest cut that holds; None where none did."""
        return max((r for r in self.tried if r.holds), key=lambda r: r.number, default=None)

    @property
    def next(self) -> int | None:
        """The cut to try next; None where no other is worth it."""
        low = -1 if self.best is None else self.best.number
        failed = [rung.number for rung in self.tried if not rung.holds and rung.number > low]
        open_ = range(low + 1, min(failed, default=len(self._costs)))
        if not open_ or len(self.tried) >= TRIALS:
            return None
        room = 1 / (1 + _CAUTION * sum(not rung.holds for rung in self.tried))
        likely = [number for number in open_ if self.expected(number) <= room]
        if likely:
            return likely[-1]
        return None if self.best is not None else open_[0]

    def expected(self, number: int) -> float:
        """The upper end of a cut's cost after healing, by the nearest one that was tried."""
        if not self.tried:
            return self._share * self._costs[number]
        near = min(self.tried, key=lambda rung: abs(rung.number - number))
        remaining = max(0.0, near.cost) / self._costs[near.number]
        return remaining * self._costs[number] + (near.high - near.cost)


FEWEST_SEEN = 4
"""Samples on which a healed cut may be given up."""


def on_all_samples(rung: Rung, seen: int, whole: int, degrees: float) -> Rung:
    """A cut that was given up after some samples, with about the interval that all would give."""
    all_of_them = (degrees + 1) * whole / seen - 1
    narrower = float(np.divide(*stats.t.ppf(0.975, [all_of_them, degrees])))
    share = math.sqrt(seen / whole) * narrower
    return replace(rung, high=rung.cost + share * (rung.high - rung.cost))


def figures_of(healing: Healing) -> tuple[dict[str, float], dict[str, float]]:
    """What a cut costs on held-out text of the domains that were fitted on, bare and healed.

    Of the healed one also the ends of each 95 % interval, such as
    ``log_perplexity_increase_high`` or ``cosine_low``.
    """
    held_out = held_out_of(healing)
    return _figures(held_out, "dropped"), _figures(held_out, "healed") | _ends(held_out)


def held_out_of(healing: Healing) -> HealedText:
    """What was measured on text like that which was fitted on."""
    held_out = healing.of_role("calibration")
    assert held_out is not None  # texts without any are refused
    return held_out


def degrees_of(measured: HealedText) -> float:
    """Of freedom, of the intervals: Satterthwaite's, or by the number of documents."""
    known = measured.degrees
    return measured.text.clusters - 1 if known is None else known


def is_lost(measured: HealedText, floors: Floors, looks: int = 1) -> bool:
    """Whether all of the interval is beyond a limit, on a few samples at least."""
    samples = measured.text.clusters
    if samples < FEWEST_SEEN:
        return False
    figures = _figures(measured, "healed")
    wider = float(np.divide(*stats.t.ppf([1 - 0.025 / looks, 0.975], degrees_of(measured))))
    ends = _ends(measured)
    best = {
        end: figures[key] + wider * (ends[end] - figures[key])
        for key, figure in LIMITED.items()
        if (end := figure.better_end) in ends
    }
    return rung_of(0, figures | best, floors).is_beyond


def _figures(measured: HealedText, of: Literal["dropped", "healed"]) -> dict[str, float]:
    """As a plan has them in ``predicted``, of the bare cut or of the healed one."""
    return {key: float(getattr(figure, of)) for key, figure in measured.figures.items()}


def _ends(measured: HealedText) -> dict[str, float]:
    figures = measured.figures.items()
    return ends_of({key: one.ci95 for key, one in figures if one.ci95 is not None})


JUDGED = 16
"""Samples of each text that judge, at most, beside those that a healing holds out anyway."""
_FEWEST_OF_PAIRS = 3  # texts: two make a single pair, and a single sample has no interval
_SHORTEST_S = 30.0
"""Of a training that was asked for by name."""
FIRST_SHARE = 0.4
"""Of the time for choosing and healing, for the first training: checks take time, too."""
_GAINED_NOTHING = "healing-gained-nothing"
_USUAL_TEXTS = ((SELF,), (PYDOC,))


@dataclass(frozen=True)
class HealedCut:
    """A cut that was healed."""

    tried: TriedCut
    plan: LoadedPlan
    report: HealingReport


def trial_options(
    options: HealOptions, ref: CalibrationRef, calibration: Sequence[str]
) -> HealOptions:
    """How cuts are healed: on the text that was named, else on the usual mixture.

    What the model samples for it is sampled anew, not what the scores rest on.
    """
    if calibration or specs_of(ref) not in _USUAL_TEXTS:
        return on_text_of(options, ref, calibration)
    return replace(options, seed=options.seed + 1)


def time_of(options: HealOptions) -> float:
    """For choosing, healing and checking together, in seconds."""
    return options.time_s or USUAL_TIME_S


class TrialRuns:
    """The healing of several cuts of one model, in one time, on one text."""

    def __init__(
        self,
        loaded: LoadedModel,
        options: HealOptions,
        floors: Floors,
        work: Path,
        chosen_on: Sequence[CalibrationRef] = (),
        progress: Progress = QUIET,
    ) -> None:
        self._loaded, self._options, self._floors = loaded, options, floors
        self._work, self._chosen_on, self._progress = work, chosen_on, progress
        self._whole_s = time_of(options)
        self._beside_s = 0.0
        self.cuts: list[HealedCut] = []
        self.begin(0.0)

    def begin(self, spent_s: float) -> None:
        """Their time begins; choosing has taken some of it, of which half is left for healing."""
        self._ends = time.monotonic() + self._whole_s - min(spent_s, self._whole_s / 2)

    @property
    def has_time(self) -> bool:
        """Whether one more cut can be healed and checked, if need be without a training."""
        least = _SHORTEST_S if self._options.kind == "distill" else 0.0
        return not self.cuts or self._left_s > least

    @property
    def _left_s(self) -> float:
        """For a training, before the checks that come after it."""
        return self._ends - time.monotonic() - self._beside_s

    @property
    def _check_s(self) -> float:
        """About what the checks of a cut take that is not given up: three runs."""
        other = self.texts.other
        tokens = sum(text.ref.tokens for text in (self.judging, other) if text is not None)
        operations = 3 * 2 * self._loaded.model.num_parameters() * tokens
        return float(operations / operations_per_second())

    @cached_property
    def first(self) -> HealOptions:
        """How the first cut is healed: by a training of a part of the time, if that is enough.

        It doesn't hang on what choosing has taken: a later call takes the same samples.
        """
        return settled(replace(self._options, time_s=self._time_s()), self._loaded, self._progress)

    @cached_property
    def texts(self) -> HealingTexts:
        """What is fitted on, stopped by and judged on: the same for all cuts."""
        judged = min(JUDGED, self._options.samples or JUDGED)
        judges = Judges.of(self._floors, self._loaded.model)
        result = healing_texts(
            self._loaded,
            self.first,
            self._progress,
            chosen_on=self._chosen_on,
            judging=judges.usual or judged,
            fewest=judges.fewest,
        )
        judging = result.halves[1]
        read = nouns_of(type(self._loaded.model).__name__)
        chosen = {ref.sha256 for ref in self._chosen_on}
        is_own = chosen.isdisjoint(ref.sha256 for ref in result.sources)
        judges.refuse_fewer(len(judging.input_ids), judging.ref.source, read, healing_text=is_own)
        fewest = 2 if self._floors.similarity is None else _FEWEST_OF_PAIRS
        if len(judging.input_ids) < fewest:
            raise CalibrationError(
                f"{counted(len(judging.input_ids), 'sample')} of {judging.ref.source} would judge "
                f"the healed cut, and its limits take {fewest} or more.",
                f"Give more {result.fitting.read.much} (--calibration).",
                code="too-few-samples",
            )
        return result

    @property
    def judging(self) -> CalibrationText:
        """What cuts are judged on."""
        return self.texts.halves[1]

    def run(self, number: int, plan: PruningPlan) -> Rung:
        """Heals a cut and measures it, or takes what an earlier call has left."""
        began = time.monotonic()
        cut = self._found(plan)
        if cut is not None:
            self._ends -= cut.tried.training_seconds
            self._beside_s = max(self._beside_s, self._check_s)
        else:
            cut = self._healed(plan)
            taken = time.monotonic() - began - cut.tried.training_seconds
            self._beside_s = max(taken, self._check_s)
        self.cuts.append(cut)
        held_out = held_out_of(cut.report.healing)
        seen, whole = held_out.text.clusters, self.judging.ref.clusters
        rung = rung_of(number, cut.tried.healed, self._floors)
        return rung if seen >= whole else on_all_samples(rung, seen, whole, degrees_of(held_out))

    def noted(self, cut: HealedCut, figures: Mapping[str, float]) -> PruningPlan:
        """The plan of a cut, with what was tried and on what it was held against the limits."""
        plan = cut.plan.plan
        return plan.model_copy(
            update={
                "predicted": {**plan.predicted, **figures},
                "predicted_on": "checked",
                "stopped_on": [*plan.stopped_on, *self.judging.parts],
                "tried": [healed_cut.tried for healed_cut in self.cuts],
            }
        )

    def _time_s(self) -> float | None:
        """For the next training: a part of the time, then what is left."""
        if not self._options.trains:
            return None
        return max(1.0, self._left_s) if self.cuts else FIRST_SHARE * self._whole_s

    def _healed(self, plan: PruningPlan) -> HealedCut:
        """Heals and keeps a cut."""
        options = replace(self._options, time_s=self._time_s())
        if self.first.trains:
            options = replace(options, tokens=self.first.tokens)
        try:
            healed = self._heal(plan, options)
        except HealingError as error:
            if error.code != _GAINED_NOTHING:
                raise
            self._progress.say(f"heal: {error.message} Replacements are fitted to this cut.")
            healed = self._heal(plan, without_training(options, "best"))
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        healed.write(folder)
        files = [path for path in folder.iterdir() if path.is_file()]
        self._store.keep(plan.describe(), folder.name, files=files)
        remove_tree(self._work / "healing")
        return self._read(folder)

    def _heal(self, plan: PruningPlan, options: HealOptions) -> Healed:
        return heal(
            self._loaded,
            plan,
            options,
            made_from=plan.made_from,
            work=self._work / "healing",
            texts=self.texts,
            lost=self._is_lost,
            progress=self._progress,
        )

    def _is_lost(self, measured: HealedText) -> bool:
        """Whether a cut is given up, which is asked after each batch."""
        looks = math.ceil(len(self.judging.input_ids) / self._options.batch_size)
        return is_lost(measured, self._floors, looks)

    def _found(self, plan: PruningPlan) -> HealedCut | None:
        """What an earlier call has left, unless it gave the cut up under stricter limits."""
        folder = self._folder
        if self._store.find(plan.describe()) != folder.name:
            return None
        cut = self._read(folder)
        held_out = held_out_of(cut.report.healing)
        whole = len(self.judging.input_ids)
        if held_out.text.samples < whole and not self._is_lost(held_out):
            return None
        self._progress.say(f"heal: {plan.describe()}: as an earlier call left it")
        return cut

    def _read(self, folder: Path) -> HealedCut:
        loaded = LoadedPlan.read(folder / FOLDER_PLAN)
        report = HealingReport.read(folder / FOLDER_REPORT)
        bare, healed = figures_of(report.healing)
        training = report.healing.training
        tried = TriedCut(
            deletions=loaded.plan.deletions,
            healed_by=report.healing.asked,
            changed_weights=report.healing.changed_weights,
            training_seconds=0.0 if training is None else training.seconds,
            bare=bare,
            healed=healed,
            holds=rung_of(0, healed, self._floors).holds,
        )
        return HealedCut(tried, loaded, report)

    @cached_property
    def _store(self) -> Store:
        made_from = {
            **self._loaded.identity(),
            "options": asdict(self._options),
            "fitting": self.texts.fitting.ids_sha256,
            "held_out": self.texts.held_out.ids_sha256,
            "judging": self.judging.ids_sha256,
        }
        return Store(self._work / "trials.jsonl", made_from)

    @property
    def _folder(self) -> Path:
        return self._work / f"trial-{len(self.cuts)}"


def _tensor(numbers: object) -> object:
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(array_of(numbers), np.float32))  # type: ignore[arg-type]


_REPLACED: dict[Replacement, str] = {"linear": "linear map", "bias": "mean"}


def healed_words(tried: TriedCut) -> str:
    """What healed a cut: ``folded weights, 2 linear maps``."""
    counts = Counter(deletion.replacement for deletion in tried.deletions)
    replaced = [counted(counts[kind], noun) for kind, noun in _REPLACED.items() if counts[kind]]
    changed = "trained weights" if tried.healed_by == "distill" else "folded weights"
    return ", ".join([*([changed] if tried.changed_weights else []), *replaced]) or "nothing put in"


Candidate = tuple[PlanCandidate, AnyDamage]
"""A cut that may be healed, and what it costs bare."""


def cost_of(damage: AnyDamage, floors: Floors) -> float:
    """The share of the limits that a bare cut uses up."""
    return floors.used_up(damage_figures(damage))


def held_after_healing(
    inputs: PlanInputs,
    reaching: Callable[[], tuple[PlanCandidate, Speedup | None]],  # the cut for the goals
    plan_of: Callable[[PlanCandidate], PruningPlan],
) -> Outcome:
    """The cut that reaches the goals, or the largest, that keeps the limits once healed."""
    heal, calibration, loaded = inputs.settings.heal, inputs.report.calibration, inputs.loaded
    assert heal is not None
    runs = TrialRuns(
        loaded,
        trial_options(heal, calibration, inputs.settings.calibration),
        inputs.floors,
        inputs.work / "trials",
        [*calibration.texts, *inputs.measured_text.parts],
        inputs.progress,
    )
    if Judges.of(inputs.floors, loaded.model).fewest:  # too few are told before a search
        inputs.progress.detail(f"plan: judged on {runs.judging.part.describe()}")
    speedup, goals, search = None, inputs.goals, inputs.search
    if goals:
        candidate, speedup = reaching()
        candidates = [(candidate, search.damage(candidate))]
    else:
        candidates = ever_larger(inputs)
    if not candidates[0][0].options:
        search.refuse_nothing(inputs.used_up)
    usual = inputs.budget.floors == USUAL_FLOORS
    limits = QualityLimits(inputs.floors, nouns_of(loaded.ref.architecture), usual)
    if heal.time_s is None and _is_hopeless(inputs, candidates[0][1]):
        _end_early(inputs, limits, candidates[0])
    runs.begin(time.monotonic() - inputs.began)
    ladder = largest_within(candidates, limits, runs, plan_of, inputs.progress)
    if ladder.best is None:
        tried = [candidates[rung.number][0] for rung in ladder.tried]
        refuse_all(
            [healed_cut.tried for healed_cut in runs.cuts],
            limits,
            goals,
            _in_reach(inputs, _remaining(inputs, candidates[0], ladder.tried[0])) if goals else "",
            min(rung.number for rung in ladder.tried) > 0,
            [inputs.used_up.words(candidate.gain(inputs.used_up)) for candidate in tried],
        )
    candidate, _ = candidates[ladder.best.number]
    cut = runs.cuts[ladder.tried.index(ladder.best)]
    figures = size_figures(inputs, candidate, speedup)
    replacements, changed = cut.plan.replacements, cut.plan.changed_weights.items()
    return Outcome(
        runs.noted(cut, figures | elsewhere(cut.report)),
        branch_replacements_of(cut.plan.plan.deletions, replacements, loaded.model),
        speedup=speedup,
        healing=cut.report,
        weights={n: ChangedWeight(tuple(map(_tensor, one.numbers))) for n, one in changed},  # type: ignore[arg-type]
    )


def ever_larger(inputs: PlanInputs) -> list[Candidate]:
    """Ever larger cuts.

    Each of these saves most for its damage. Where that begins with a large sublayer, the one of
    least damage is put before it: it may hold where no other does.
    """
    assert inputs.settings.heal is not None
    search, unit, floors = inputs.search, inputs.used_up, inputs.floors
    heal = inputs.settings.heal
    until = inputs.began + time_of(heal) / 2 if heal.trains else time.monotonic() + _FITTED_S
    path = _path(inputs, unit, until)
    if not path:
        smallest = search.smallest(unit)
        path = [(smallest, search.damage(smallest))]
    gentlest = search.gentlest(unit)
    return [gentlest, *path] if cost_of(gentlest[1], floors) < cost_of(path[0][1], floors) else path


def _path(inputs: PlanInputs, unit: Unit, until: float) -> list[Candidate]:
    """Ever larger cuts, as long as healing may bring them within the limits, and until then."""

    def ends(step: Step) -> bool:
        late = time.monotonic() > until
        if late:
            inputs.progress.say("plan: the search ends here; more time may find larger cuts")
        return late or _is_hopeless(inputs, step.damage)

    with inputs.progress.task("search for ever larger cuts"):
        return inputs.search.path(unit, ends)


def _is_hopeless(inputs: PlanInputs, damage: AnyDamage) -> bool:
    return is_hopeless(held_figures(damage), inputs.floors, _least_share(inputs))


def _least_share(inputs: PlanInputs) -> float:
    heal = inputs.settings.heal
    return least_share(heal is not None and heal.trains)


def _remaining(inputs: PlanInputs, reached: Candidate, rung: Rung) -> Callable[[float], float]:
    """The upper end of what is left of a bare cut's cost, by what healing made of another one."""
    share = max(0.0, rung.cost) / max(_LEAST, cost_of(reached[1], inputs.floors))
    return lambda cost: cost * share + rung.high - rung.cost


def _end_early(inputs: PlanInputs, limits: QualityLimits, reached: Candidate) -> NoReturn:
    """Refuses a cut that no healing is expected to bring within the limits, before one is tried."""
    candidate, damage = reached
    goals, dropped = inputs.goals, PruningPlan(deletions=candidate.deletions).describe()
    lead = f"With {words_of(goals)}" if goals else "Nothing is worth cutting:"
    reach = _in_reach(inputs, lambda cost: cost * _least_share(inputs)) if goals else ""
    figures, heal = held_figures(damage), inputs.settings.heal
    more = "a training may leave less: --heal distill, or without --quick."
    if heal is not None and heal.trains:
        more = "healing would need less; with --time it is tried."
    raise UnmetGoalError(
        f"{lead} too much quality is lost to be healed: without {dropped}, "
        f"{limits.outcome(figures)} before healing, which is not expected to leave less than "
        f"{_least_share(inputs):.0%} of a cut's cost.",
        f"{reach}{limits.allowing(figures)}{more}",
        code="goals-beyond-limits" if goals else "nothing-within-limits",
    )


def _in_reach(inputs: PlanInputs, left: Callable[[float], float]) -> str:
    """What of the goals the limits allow, by what healing leaves of a bare cut's cost."""
    goals, floors = inputs.goals, inputs.floors
    allowed = [
        candidate
        for candidate, damage in _path(inputs, goals[0].unit, time.monotonic() + SEARCH_S)
        if left(cost_of(damage, floors)) <= 1
    ]
    if not allowed:
        return "Within the limits on quality nothing is in reach. "
    largest = max(allowed, key=lambda item: item.gain(goals[0].unit))
    return f"Within the limits on quality, {words_of(goals, largest.gain)} may be in reach. "


def largest_within(
    candidates: Sequence[Candidate],  # the cuts, from small to large; one at least
    limits: QualityLimits,
    runs: TrialRuns,
    plan_of: Callable[[PlanCandidate], PruningPlan],
    progress: Progress = QUIET,
) -> Ladder:
    """Heals some of ever larger cuts, and takes the largest that keeps the limits."""
    costs = [cost_of(damage, limits.floors) for _, damage in candidates]
    ladder = Ladder(costs, SHARES.get(runs.first.decided, 0.5))
    while (number := ladder.next) is not None:
        if not runs.has_time:
            progress.say(f"plan: no time is left for the cut {number + 1}")
            break
        candidate, bare = candidates[number]
        plan = plan_of(candidate)
        progress.say(
            f"plan: try the cut {number + 1} of {len(candidates)}: without {plan.describe()} "
            f"(bare: {bare.words})"
        )
        ladder.tried.append(runs.run(number, plan))
        tried = runs.cuts[-1].tried
        outcome = limits.outcome(tried.healed, healed_words(tried))
        progress.say(f"plan: {'holds' if tried.holds else 'fails'}: {outcome}")
    return ladder


def refuse_all(
    tried: Sequence[TriedCut],
    limits: QualityLimits,
    goals: Sequence[Goal] = (),
    reach: str = "",
    smaller: bool = False,
    gained: Sequence[str] = (),
) -> NoReturn:
    """Says that nothing is worth cutting, or that the goals cost too much, and how much."""
    rungs = [rung_of(0, cut.healed, limits.floors) for cut in tried]
    costs = [rung.cost for rung in rungs]
    least = tried[costs.index(min(costs))]
    dropped = PruningPlan(deletions=least.deletions).describe()
    dropped += f" ({gained[costs.index(min(costs))]})" if gained else ""
    wanted = words_of(goals)
    lead = f"With {wanted} too much quality is lost" if goals else "Nothing is worth cutting"
    code = "goals-beyond-limits" if goals else "nothing-within-limits"
    kind: type[UnmetGoalError] = UnmetGoalError
    if smaller or not all(rung.is_beyond for rung in rungs):
        kind, code = UndecidedGoalError, f"undecided-{code}"
        lead = f"It isn't shown that {wanted} keeps" if goals else "It isn't shown that a cut keeps"
        lead += " the limits on quality"
    recovering = "a training may recover more: --heal distill, or without --quick."
    if least.healed_by == "distill":
        recovering = f"more --time or more {limits.read.several} may recover more."
    raise kind(
        f"{lead}: without {dropped}, {limits.outcome(least.healed, healed_words(least))}.",
        f"{reach}{limits.allowing(least.healed)}{recovering}",
        code=code,
    )
