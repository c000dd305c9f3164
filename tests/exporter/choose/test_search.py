"""Searches judged by exhaustive search, on meters that are made of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.budget import Floors, SearchOptions
from exporter.choose.budgets.greedy import Search, greedy
from exporter.choose.budgets.limits import QualityCheck, RememberingMeter, searched_meter
from exporter.choose.budgets.options import (
    Goal,
    Option,
    PlanCandidate,
    numbers_of,
    options_for,
    protected_names,
)
from exporter.errors import PlanError, UsageError
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacement
from exporter.models.ablation.damage import Damage
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import Quiet
from tests.raising import raises

LAYERS, CASES = 3, range(8)
ALL = SearchOptions("greedy", shortlist=0)


def names_of(layers: int = LAYERS) -> list[Any]:
    return list(product(range(layers), ("attention", "mlp")))


NAMES = names_of()
REPLACEMENTS: list[Any] = ["none", "bias", "linear"]


@dataclass
class MadeMeter:
    """Damage is a sum over sublayers of ``alone``, less where they are replaced, and of pairs."""

    alone: Mapping[Any, float]
    together: Mapping[Any, float] = field(default_factory=dict)
    shares: Mapping[BranchReplacement, float] = field(default_factory=dict)
    scale: float = 1.0
    rise: float = 1.0  # of the log of the perplexity with the KL divergence
    measured: list[frozenset[Any]] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return len(self.alone) // 2

    def kl(self, cut: Mapping[Any, BranchReplacement]) -> float:
        share = {name: self.shares.get(what, 1.0) for name, what in cut.items()}
        total = sum(self.alone[name] * share[name] for name in cut)
        for one, other in combinations(sorted(cut), 2):
            total += self.together.get((one, other), 0.0) * share[one] * share[other]
        return self.scale * total

    def bare_kl(self, names: Sequence[Any]) -> float:
        return self.kl(dict.fromkeys(names, NOTHING))

    def measure_many(self, cut: Any, others: Sequence[Any], progress: Any = None) -> list[Damage]:
        self.measured += [frozenset(item) for item in (cut, *others)]
        return [self._damage(self.kl(item)) for item in (cut, *others)]

    def _damage(self, kl: float) -> Damage:
        """The agreement falls by a third of it."""
        counts = np.array([4096.0, 4096.0])
        agreements = counts * max(0.0, 1 - kl / 3)
        return Damage(counts, counts * kl, agreements, counts * (3 + self.rise * kl), 3 * counts)


def made_meter(seed: int, layers: int = LAYERS, pairs: float = 1.0, **more: Any) -> MadeMeter:
    rng, names = np.random.default_rng(seed), names_of(layers)
    alone = dict(zip(names, rng.random(len(names)).tolist(), strict=True))
    together = {pair: float(rng.normal()) * pairs for pair in combinations(names, 2)}
    return MadeMeter(alone, together, **more)


@dataclass(frozen=True)
class MadeUnit:
    """A unit with gains of one's own."""

    gains: Mapping[Any, float]
    is_blocks: bool = False

    def gain(self, names: Sequence[Any], replacement: Any) -> float:
        return sum(self.gains[name, replacement] for name in names)

    def of(self, options: Sequence[Option]) -> float:
        return sum(self.gain(option.names, option.replacement) for option in options)

    def words(self, gain: float) -> str:
        return f"{gain:.1f} of it"


def made_case(seed: int) -> tuple[MadeMeter, list[Option], MadeUnit]:
    """A meter, options for every sublayer and replacement, and a unit."""
    rng = np.random.default_rng(seed)
    made = {(n, r): BranchReplacement() for n in NAMES for r in REPLACEMENTS[1:]}
    shares = {s: float(rng.uniform(0.1, 0.9)) for s in made.values()}
    alone = {name: float(rng.exponential(0.2)) for name in NAMES}
    pairs = {pair: float(rng.exponential(0.05)) for pair in combinations(sorted(NAMES), 2)}
    options = [
        Option((n,), replacement=r, branch_replacements={n: made[n, r]} if r != "none" else {})
        for n in NAMES for r in REPLACEMENTS
    ]  # fmt: skip
    whole = {name: float(rng.uniform(2, 10)) for name in NAMES}
    kept = {"none": 1.0, "bias": 0.98, "linear": 0.7}
    gains = {(n, r): whole[n] * kept[r] for n in NAMES for r in REPLACEMENTS}
    return MadeMeter(alone, pairs, shares), options, MadeUnit(gains)


def every_walk(options: Sequence[Option]) -> Iterator[list[Option]]:
    """Every way of treating some sublayers, but not all of them."""
    by_name: dict[Any, list[Any]] = {}
    for option in options:
        by_name.setdefault(option.names, []).append(option)
    for picked in product(*([None, *own] for own in by_name.values())):
        result = [option for option in picked if option is not None]
        if 0 < len(result) < len(NAMES):
            yield result


def made_search(seed: int, floors: Floors | None = None) -> tuple[Any, ...]:
    """A search, its meter, that of other tokens on which all costs a tenth more, options, unit."""
    meter, options, unit = made_case(seed)
    held_out = MadeMeter(meter.alone, meter.together, meter.shares, scale=1.1)
    search = Search(meter, QualityCheck(held_out, floors or Floors()), options, ALL)
    return search, meter, held_out, options, unit


@pytest.mark.parametrize("seed", CASES)
def test_few_plans_that_reach_the_goal_cost_less(seed: int) -> None:
    search, meter, _, options, unit = made_search(seed)
    candidate = search.solve([Goal(unit, 18.0)], unit)
    assert candidate.gain(unit) >= 18.0
    best = min(
        meter.kl(PlanCandidate(tuple(item)).cut)
        for item in every_walk(options)
        if unit.of(item) >= 18.0
    )
    # The worst of these cases is 1.43 times as bad as the best of all choices.
    assert best * (1 - 1e-9) <= meter.kl(candidate.cut) <= 1.5 * best


@pytest.mark.parametrize("seed", CASES)
def test_floors_are_used_up_but_kept_on_other_tokens(seed: int) -> None:
    search, _, held_out, options, unit = made_search(seed, Floors(perplexity_increase=0.2))
    candidate = search.solve([], unit)
    assert held_out.kl(candidate.cut) <= math.log(1.2)
    most = max(
        unit.of(item)
        for item in every_walk(options)
        if held_out.kl(PlanCandidate(tuple(item)).cut) <= math.log(1.2)
    )
    # A greedy way of filling a knapsack: the worst of these cases reaches 0.899 of the most.
    assert 0.85 * most <= candidate.gain(unit) <= most * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rises", "agreements", "holds", "beyond"),
    [
        ([0.03, 0.03, 0.03, 0.03], [0.95] * 4, True, False),
        ([0.00, 0.06, 0.01, 0.05], [0.95] * 4, False, False),  # 0.03 ± 0.047
        ([0.02, 0.09, 0.04, 0.06], [0.95] * 4, False, False),  # the estimate is beyond, too
        ([0.03] * 4, [1.0, 0.86, 0.97, 0.97], False, False),  # 0.95 ± 0.098
        ([0.00, 0.06, 0.01, 0.05], [1.0, 0.86, 0.97, 0.97], False, False),
        ([0.06] * 4, [0.85] * 4, False, True),
        ([0.03] * 4, [0.83, 0.84, 0.83, 0.84], False, True),
        ([0.06], [0.85], False, False),
        ([0.00, math.nan, 0.00, 0.00], [0.95] * 4, False, True),
    ],
)
def test_a_floor_is_kept_or_broken_where_all_of_the_interval_is_on_one_side(
    rises: list[float], agreements: list[float], holds: bool, beyond: bool
) -> None:
    checker = QualityCheck(made_meter(0), Floors(perplexity_increase=0.05, top1_agreement=0.9))
    count = np.full(len(rises), 100.0)
    rung = checker.rung_with(Damage(count, 0 * count, count * agreements, count * rises, 0 * count))
    assert (rung.holds, rung.is_beyond) == (holds, beyond)


@pytest.mark.parametrize("seed", range(16))
def test_nothing_idle_is_dropped_and_no_sublayer_is_better_treated_in_another_way(
    seed: int,
) -> None:
    search, meter, _, options, unit = made_search(seed)
    candidate = search.solve([Goal(unit, 18.0)], unit)
    assert all(candidate.without(option).gain(unit) < 18.0 for option in candidate.options)
    own = {option.names for option in candidate.options}
    others = [candidate.plus(option) for option in options if option.names in own]
    within = [meter.kl(other.cut) for other in others if other.gain(unit) >= 18.0]
    # Sums of the same damages in another order.
    assert meter.kl(candidate.cut) <= min(within) * (1 + 1e-12)


def test_two_goals_hold_together() -> None:
    search, *_, unit = made_search(2)
    attentions = numbers_of(("attention",), "attention")
    candidate = search.solve([Goal(unit, 12.0), Goal(attentions, 2)], unit)
    assert candidate.gain(unit) >= 12.0
    assert candidate.gain(attentions) >= 2
    alone = search.solve([Goal(unit, 12.0)], unit)
    assert alone.gain(attentions) < 2, "the second goal asks for nothing here"


def test_an_unreachable_goal_says_what_is_reachable() -> None:
    search, *_, options, unit = made_search(4)
    gains = [unit.of([option]) for option in options if option.replacement == "none"]
    most = sum(gains) - min(gains)
    assert search.solve([Goal(unit, most - 1e-6)], unit).gain(unit) == pytest.approx(most)
    with raises(PlanError, "out-of-reach", f"{most:.1f}", 1000.0):
        search.solve([Goal(unit, 1000.0)], unit)


def test_a_goal_beyond_the_floors_says_what_is_within_them() -> None:
    search, _, held_out, _, unit = made_search(5, Floors(perplexity_increase=0.1))
    most = search.solve([], unit)
    gain, kl = most.gain(unit), held_out.kl(most.cut)
    assert search.solve([Goal(unit, gain * 0.9)], unit).options
    with raises(PlanError, "beyond-floors", "10.0%", f"{gain:.1f}", f"{kl:.3f}"):
        search.solve([Goal(unit, gain * 2)], unit)


@pytest.mark.parametrize(("seed", "increase"), [(6, 0.1), (12, 0.2)])
def test_a_goal_that_other_steps_reach_within_the_floors_is_reached(
    seed: int, increase: float
) -> None:
    search, _, held_out, _, unit = made_search(seed, Floors(perplexity_increase=increase))
    goal = Goal(unit, 0.97 * search.within_floors(unit).gain(unit))
    blind = made_search(seed)[0].solve([goal], unit)
    assert held_out.kl(blind.cut) > math.log1p(increase), "the way of least damage breaks the floor"
    candidate = search.solve([goal], unit)
    assert candidate.gain(unit) >= goal.amount
    assert held_out.kl(candidate.cut) <= math.log1p(increase)


def level_search(*replacements: Any) -> Search:
    """Sublayers that all cost the same, a map a tenth of that."""
    maps = {name: BranchReplacement() for name in NAMES}
    meter = MadeMeter(dict.fromkeys(NAMES, 0.1), shares=dict.fromkeys(maps.values(), 0.1))
    options = [Option((name,)) for name in NAMES]
    options += [Option((n,), replacement="linear", branch_replacements={n: maps[n]}) for n in NAMES]
    options = [option for option in options if option.replacement in replacements]
    return Search(meter, QualityCheck(meter), options, ALL)


def test_what_a_later_goal_takes_back_is_made_up_for() -> None:
    # A map in an attention's place saves time, one in an MLP's takes more than the MLP.
    unit = MadeUnit({(n, "linear"): 10.0 if n[1] == "attention" else -3.0 for n in NAMES})
    mlps, search = numbers_of(("mlp",), "MLP"), level_search("linear")
    candidate = search.solve([Goal(unit, 17.0), Goal(mlps, 2)], unit)
    assert candidate.gain(unit) >= 17.0
    assert candidate.gain(mlps) == 2
    with raises(PlanError, "out-of-reach", 24.0, 26.0):
        search.solve([Goal(unit, 26.0), Goal(mlps, 2)], unit)


def test_floors_that_nothing_keeps_leave_nothing_and_nothing_that_may_go_is_said_so() -> None:
    search, *_, unit = made_search(6, Floors(perplexity_increase=1e-6))
    assert search.solve([], unit).options == ()
    assert len(search.smallest(unit).options) == 1
    meter, _, unit = made_case(0)
    search = Search(meter, QualityCheck(meter, Floors(perplexity_increase=0.1)), [])
    assert search.solve([], unit).options == ()
    with raises(PlanError, "nothing-to-drop"):
        search.refuse_nothing(unit)


@pytest.mark.parametrize("seed", CASES)
def test_the_gentlest_step_is_known_from_the_path(seed: int, monkeypatch: Any) -> None:
    search, meter, *_, options, unit = made_search(seed)
    search.path(unit, lambda _: True)
    monkeypatch.setattr(meter, "measure_many", None)
    candidate, damage = search.gentlest(unit)
    alone = [PlanCandidate((option,)) for option in options if unit.of([option]) > 0]
    assert damage.kl == pytest.approx(min(meter.kl(item.cut) for item in alone))
    assert damage.kl == pytest.approx(meter.kl(candidate.cut))


def test_an_option_that_is_beaten_in_both_is_never_tried() -> None:
    meter, options, unit = made_case(0)
    level = MadeUnit(dict.fromkeys(unit.gains, 1.0))
    worse = [replace(o, given_back=0.9 if o.replacement == "bias" else 0.0) for o in options]
    for own in (worse, options):
        search = Search(meter, QualityCheck(meter), own, ALL)
        tried = {option.replacement for option in search.solve([Goal(level, 3)], level).options}
        assert (tried == {"bias"}) is (own is worse)


def names_in(options: Sequence[Option]) -> list[Any]:
    return [name for option in options for name in option.names]


def standing_of(steps: Sequence[Any]) -> list[Option]:
    return [*PlanCandidate().plus(*(step.option for step in steps)).options]


def chosen(meter: Any, options: Any = None, **more: Any) -> list[Any]:
    """The names that a greedy search takes."""
    options = options_for("joint", Stacks(meter.num_layers)) if options is None else options
    return names_in(standing_of(greedy(meter, options, **more)))


@pytest.mark.parametrize("seed", range(5))
def test_each_greedy_step_is_the_best_there_is_and_is_told(seed: int) -> None:
    class Heard(Quiet):
        def detail(self, message: str) -> None:
            lines.append(message)

    meter, lines = made_meter(seed), list[str]()
    steps = greedy(meter, options_for("joint", Stacks(LAYERS)), goal=4, progress=Heard())
    names: list[Any] = []
    for step in steps:
        values = {n: meter.bare_kl([*names, n]) for n in NAMES if n not in names}
        names += step.option.names
        assert names[-1] == min(values, key=values.__getitem__)
        assert step.damage.kl == pytest.approx(values[names[-1]])
    assert [step.gain for step in steps] == [1, 2, 3, 4]
    assert all(str(step.option) in line for step, line in zip(steps, lines, strict=True))


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), goal=st.integers(1, 5))
def test_no_choice_has_a_sublayer_twice_or_all_of_them(seed: int, goal: int) -> None:
    meter = made_meter(seed)
    blocks = [Option(((n, "attention"), (n, "mlp")), 2.0) for n in range(LAYERS)]
    steps = greedy(meter, [*options_for("joint", Stacks(LAYERS)), *blocks], goal=goal, shortlist=3)
    names = names_in(standing_of(steps))
    assert len(names) == len(set(names)) < len(NAMES)
    assert sum(option.gain for option in standing_of(steps)) >= goal
    assert len(NAMES) not in {len(cut) for cut in meter.measured}


def test_damage_counts_by_gain() -> None:
    meter = made_meter(0, pairs=0.0)
    dear = max(NAMES, key=meter.alone.__getitem__)
    options = [Option((name,), 100.0 if name == dear else 1.0) for name in NAMES]
    assert chosen(meter, options, goal=2) != [dear]  # 98 of its gain are idle
    assert chosen(meter, options, goal=100) == [dear]


def test_a_replacement_gives_way_to_a_deletion() -> None:
    name, map_ = (0, "attention"), BranchReplacement(weight=np.zeros(1))
    meter = made_meter(0, pairs=0.0, shares={map_: 0.5})
    linear, gone = Option((name,), 1.0, "linear", {name: map_}), Option((name,), 1.5)
    steps = greedy(meter, [linear, gone], goal=1.5)
    assert [s.option for s in steps] == [linear, gone]
    assert standing_of(steps) == [gone]
    assert steps[-1].gain == 1.5
    assert [d.replacement for d in linear.deletions()] == ["linear"]
    assert standing_of(greedy(meter, [linear, gone], goal=2.5)) == [gone]  # both can't be had


def test_what_is_cut_before_stays() -> None:
    meter, before = made_meter(0), (0, "mlp")
    options = options_for("joint", Stacks(LAYERS))
    steps = greedy(meter, options, goal=3, start={before: NOTHING})
    names = names_in(standing_of(steps))
    assert before not in names
    assert steps[-1].damage.kl == pytest.approx(meter.bare_kl([*names, before]))


def test_a_shortlist_measures_less() -> None:
    few, all_ = made_meter(1, layers=8), made_meter(1, layers=8)
    prior, every = all_.alone, 5 + 16 + 15 + 14 + 13 + 12
    assert len(chosen(few, goal=5, shortlist=4, prior=prior)) == len(chosen(all_, goal=5)) == 5
    assert len(all_.measured) == every
    assert len(few.measured) < 0.6 * every
    first = sorted(prior, key=prior.__getitem__)[: 3 * 4]
    assert few.measured[1 : 1 + len(first)] == [frozenset([name]) for name in first]


def test_what_never_was_measured_gets_its_turn() -> None:
    meter = made_meter(1, layers=8, pairs=0.0)
    prior = {name: -price for name, price in meter.alone.items()}  # as wrong as can be
    names = chosen(meter, goal=9, shortlist=4, prior=prior)
    assert min(meter.alone, key=meter.alone.__getitem__) in names


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    class Dying(MadeMeter):
        def measure_many(self, cut: Any, others: Any, progress: Any = None) -> list[Damage]:
            if len(cut) == 2:
                raise KeyboardInterrupt
            return super().measure_many(cut, others)

    fresh, last = made_meter(4), made_meter(4)
    whole = chosen(fresh, goal=4)
    fresh.measured.clear()
    with pytest.raises(KeyboardInterrupt):
        chosen(RememberingMeter(Dying(fresh.alone, fresh.together), journal), goal=4)
    with journal.open("a") as end:
        end.write('{"name": "atten')  # a crash while it was written
    assert chosen(RememberingMeter(fresh, journal), goal=4) == whole
    assert min(map(len, fresh.measured)) == 2
    assert chosen(RememberingMeter(last, journal), goal=4) == whole
    assert last.measured == []


@pytest.mark.torch
def test_replacements_are_known_again_by_their_numbers(tmp_path: Path) -> None:
    import torch

    name = (0, "attention")

    def fitted(value: float) -> BranchReplacement:
        return BranchReplacement(torch.full((4,), value), torch.full((4, 4), value))

    def measured(*replacements: BranchReplacement) -> int:
        meter, others = made_meter(2), [{name: replacement} for replacement in replacements]
        RememberingMeter(meter, tmp_path / "journal").measure_many({}, others)
        return len(meter.measured)

    assert measured(fitted(1.0), fitted(2.0)) == 3  # with the whole model
    assert measured(fitted(2.0), fitted(1.0)) == 0
    assert measured(fitted(3.0)) == 2
    assert measured(BranchReplacement(torch.full((4,), 1.0))) == 2


@pytest.mark.parametrize("changed", ["depthcut", "transformers", "mask"])
def test_what_was_measured_under_other_versions_or_padding_is_measured_again(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = SimpleNamespace(dtype="float32")
    loaded = LoadedModel(model, None, SimpleNamespace(sha256="m"), tmp_path)
    ids, mask = np.zeros((2, 4), dtype=np.int64), np.ones((2, 4), dtype=np.bool_)
    meter, installed = made_meter(4), metadata.version
    monkeypatch.setattr("exporter.choose.budgets.limits.meter_here", lambda *_, **__: meter)

    def measure() -> int:
        text = CalibrationText(None, ids, mask)
        searched_meter(loaded, text, kept=tmp_path / "kept").measure_many({}, [])
        return len(meter.measured)

    assert (measure(), measure()) == (1, 1)
    mask[1, 3] = changed != "mask"
    version = {changed: "9"}
    monkeypatch.setattr(metadata, "version", lambda name: version.get(name) or installed(name))
    assert measure() == 2


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["first"], {(0, "attention"), (0, "mlp")}),
        (["last", "mlp:0"], {(2, "attention"), (2, "mlp"), (0, "mlp")}),
        (["attention:0,2"], {(0, "attention"), (2, "attention")}),
        (["block:1"], {(1, "attention"), (1, "mlp")}),
        ([], set()),
    ],
)
def test_what_is_protected(texts: list[str], expected: set[Any]) -> None:
    sublayers = protected_names(texts, Stacks(LAYERS))
    assert sublayers == expected
    left = names_in(options_for("joint", Stacks(LAYERS), sublayers))
    assert sorted(left) == sorted({*NAMES} - expected)
    # A protected sublayer protects its block.
    assert [str(option) for option in options_for("block", Stacks(LAYERS), sublayers)] == [
        f"block {n}" for n in range(LAYERS) if n not in {layer for layer, _ in expected}
    ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("attention:3", "layer-missing"),
        ("middle", "no-sublayers"),
        ("mixer:0", "sublayer-missing"),
    ],
)
def test_protection_that_makes_no_sense(text: str, code: str) -> None:
    with raises(UsageError, code, "--protect", text):
        protected_names([text], Stacks(LAYERS))
