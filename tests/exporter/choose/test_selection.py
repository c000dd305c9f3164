"""Searches judged by exhaustive search, on models of three layers or meters made of numbers."""

from __future__ import annotations

import itertools
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.artifacts.store import Store
from exporter.choose.selection.greedy import greedy
from exporter.choose.selection.meters import RememberingMeter, searched_meter
from exporter.choose.selection.options import (
    Option,
    objective_of,
    options_for,
    protected_names,
    standing_options,
)
from exporter.errors import PlanError, UsageError
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.ablation.damage import Damage
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import Quiet
from tests.raising import raises

LAYERS = 3
NAMES = [(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp")]


class FakeMeter:
    """Damage is a sum of prices and of what pairs cost on top."""

    def __init__(self, seed: int, layers: int = LAYERS, pairs: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.num_layers = layers
        self.names = [(n, kind) for n in range(layers) for kind in ("attention", "mlp")]
        drawn = rng.random(2 * layers).tolist()
        self.prices = dict(zip(self.names, drawn, strict=True))
        self.pairs = {p: float(rng.normal()) * pairs for p in itertools.combinations(self.names, 2)}
        self.measured: list[frozenset[Any]] = []

    def value(self, cut: Any) -> float:
        names = sorted(cut)
        single = sum(self.prices[n] * (0.5 if cut[n].maps else 1.0) for n in names)
        return 5.0 + single + sum(self.pairs[p] for p in itertools.combinations(names, 2))

    def measure_many(
        self, cut: BranchReplacements, others: Any, progress: Any = None
    ) -> list[Damage]:
        self.measured += [frozenset(item) for item in (cut, *others)]
        return [_damage(self.value(item)) for item in (cut, *others)]


def _damage(kl: float) -> Damage:
    one = np.ones(1)
    return Damage(one, one * kl, one, one * -kl, one * 0)


def _sublayers(layers: int = LAYERS) -> list[Option]:
    return options_for("joint", layers)


def _names(options: Any) -> list[Any]:
    return [name for option in options for name in option.names]


@pytest.mark.parametrize("seed", range(5))
def test_each_greedy_step_is_the_best_there_is(seed: int) -> None:
    meter = FakeMeter(seed)
    steps = greedy(meter, _sublayers(), goal=4)
    names: list[Any] = []
    for step in steps:
        rest = [name for name in NAMES if name not in names]
        values = {n: meter.value(dict.fromkeys([*names, n], NOTHING)) for n in rest}
        names += step.option.names
        assert names[-1] == min(rest, key=values.__getitem__)
        assert step.damage.kl == values[names[-1]]
    assert [step.gain for step in steps] == [1, 2, 3, 4]


def test_the_objective_decides() -> None:
    meter = FakeMeter(0)  # its negative log-likelihood falls as its KL divergence rises
    by_kl = greedy(meter, _sublayers(), goal=1)
    by_perplexity = greedy(meter, _sublayers(), goal=1, objective="perplexity")
    assert _names(standing_options(by_kl)) == [min(NAMES, key=meter.prices.__getitem__)]
    assert _names(standing_options(by_perplexity)) == [max(NAMES, key=meter.prices.__getitem__)]


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), goal=st.integers(1, 5))
def test_no_choice_has_a_sublayer_twice_or_all_of_them(seed: int, goal: int) -> None:
    meter = FakeMeter(seed)
    options = [*_sublayers(), *(Option(((n, "attention"), (n, "mlp")), 2.0) for n in range(LAYERS))]
    steps = greedy(meter, options, goal=goal, shortlist=3)
    names = _names(standing_options(steps))
    assert len(names) == len(set(names)) < len(NAMES)
    assert sum(option.gain for option in standing_options(steps)) >= goal
    assert len(NAMES) not in {len(cut) for cut in meter.measured}


@pytest.mark.parametrize(("goal", "protect"), [(6, ()), (5, ("last",)), (3, ("mlp:0-2",))])
def test_a_goal_out_of_reach_says_what_is_reachable(goal: int, protect: tuple[str, ...]) -> None:
    options = options_for("joint", LAYERS, protected_names(protect, LAYERS))
    most = min(len(options), len(NAMES) - 1)
    if goal <= most:
        assert len(greedy(FakeMeter(0), options, goal=goal)) == goal
        return
    with raises(PlanError, "out-of-reach", goal, most):
        greedy(FakeMeter(0), options, goal=goal)


def test_damage_counts_by_gain() -> None:
    meter = FakeMeter(0, pairs=0.0)
    dear = max(NAMES, key=meter.prices.__getitem__)
    options = [Option((name,), 100.0 if name == dear else 1.0) for name in NAMES]
    assert _names(standing_options(greedy(meter, options, goal=2))) != [
        dear
    ]  # 98 of its gain are idle
    assert _names(standing_options(greedy(meter, options, goal=100))) == [dear]


def test_a_replacement_gives_way_to_a_deletion() -> None:
    meter = FakeMeter(0, pairs=0.0)
    map_ = BranchReplacement(maps=(np.zeros(1),))
    name = (0, "attention")
    linear = Option((name,), 1.0, "linear", {name: map_})
    gone = Option((name,), 1.5)
    steps = greedy(meter, [linear, gone], goal=1.5)
    assert [s.option for s in steps] == [linear, gone]
    assert standing_options(steps) == [gone]
    assert steps[-1].gain == 1.5
    assert [d.replacement for d in linear.deletions()] == ["linear"]
    with raises(PlanError, "out-of-reach", 2.5, 1.5):
        greedy(meter, [linear, gone], goal=2.5)  # both can't be had


def test_what_is_cut_before_stays() -> None:
    meter = FakeMeter(0)
    start = {(0, "mlp"): NOTHING}
    steps = greedy(meter, _sublayers(), goal=3, start=start)
    assert (0, "mlp") not in _names(standing_options(steps))
    names = [*_names(standing_options(steps)), (0, "mlp")]
    assert steps[-1].damage.kl == meter.value(dict.fromkeys(names, NOTHING))


def test_a_shortlist_measures_less() -> None:
    few, all_ = FakeMeter(1, layers=8), FakeMeter(1, layers=8)
    options = _sublayers(8)
    prior = all_.prices
    steps = greedy(few, options, goal=5, shortlist=4, prior=prior)
    assert len(few.measured) < 0.6 * (5 + 16 + 15 + 14 + 13 + 12)
    assert len(all_.measured) < len(greedy(all_, options, goal=5)) * 20
    assert len(all_.measured) == 5 + 16 + 15 + 14 + 13 + 12
    first = sorted(prior, key=prior.__getitem__)[: 3 * 4]
    assert few.measured[1 : 1 + len(first)] == [frozenset([name]) for name in first]
    assert len(steps) == 5


def test_what_looked_better_before_is_measured_again() -> None:
    """Where damage only adds up to more, a shortlist chooses as all would."""
    for seed in range(8):
        few, all_ = FakeMeter(seed, layers=6), FakeMeter(seed, layers=6)
        for meter in (few, all_):
            meter.pairs = {pair: abs(extra) * 0.1 for pair, extra in meter.pairs.items()}
        options = _sublayers(6)
        short, whole = greedy(few, options, goal=4, shortlist=4), greedy(all_, options, goal=4)
        assert _names(standing_options(short)) == _names(standing_options(whole))
        assert len(few.measured) < len(all_.measured)


def test_what_never_was_measured_gets_its_turn() -> None:
    meter = FakeMeter(1, layers=8, pairs=0.0)
    best = min(meter.prices, key=meter.prices.__getitem__)
    prior = {name: -price for name, price in meter.prices.items()}  # as wrong as can be
    steps = greedy(meter, _sublayers(8), goal=9, shortlist=4, prior=prior)
    assert best in _names(standing_options(steps))


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    journal, about = tmp_path / "journal", {"model": "a"}
    whole = greedy(FakeMeter(4), _sublayers(), goal=4)

    class Dying(FakeMeter):
        def measure_many(
            self, cut: BranchReplacements, others: Any, progress: Any = None
        ) -> list[Damage]:
            if len(cut) == 2:
                raise KeyboardInterrupt
            return super().measure_many(cut, others)

    with pytest.raises(KeyboardInterrupt):
        greedy(RememberingMeter(Dying(4), journal, about), _sublayers(), goal=4)
    with journal.open("a") as end:
        end.write('{"name": "atten')  # a crash while it was written
    fresh = FakeMeter(4)
    steps = greedy(RememberingMeter(fresh, journal, about), _sublayers(), goal=4)
    assert [s.option.names for s in steps] == [s.option.names for s in whole]
    assert [s.damage.kl for s in steps] == [s.damage.kl for s in whole]
    assert min(map(len, fresh.measured)) == 2
    last = FakeMeter(4)
    greedy(RememberingMeter(last, journal, about), _sublayers(), goal=4)
    assert last.measured == []


@pytest.mark.torch
def test_replacements_are_known_again_by_their_numbers(tmp_path: Path) -> None:
    import torch

    journal, name = tmp_path / "journal", (0, "attention")

    def fitted(value: float) -> BranchReplacement:
        return BranchReplacement(torch.full((4,), value), (torch.full((4, 4), value),))

    def measured(*replacements: BranchReplacement) -> int:
        meter = FakeMeter(2)
        others = [{name: replacement} for replacement in replacements]
        RememberingMeter(meter, journal, {}).measure_many({}, others)
        return len(meter.measured)

    assert measured(fitted(1.0), fitted(2.0)) == 3  # with the whole model
    assert measured(fitted(2.0), fitted(1.0)) == 0
    assert measured(fitted(3.0)) == 2
    assert measured(BranchReplacement(torch.full((4,), 1.0))) == 2


def test_what_was_measured_of_another_model_is_measured_again(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    RememberingMeter(FakeMeter(4), journal, {"model": "a"}).measure_many({}, [])
    for measured in ([frozenset()], []):
        other = FakeMeter(5)
        RememberingMeter(other, journal, {"model": "b"}).measure_many({}, [])
        assert other.measured == measured


@pytest.mark.parametrize("changed", ["depthcut", "transformers", "mask"])
def test_what_was_measured_under_other_versions_or_padding_is_measured_again(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Any = LoadedModel(
        cast("Any", SimpleNamespace(dtype="float32")),
        None,
        cast("Any", SimpleNamespace(sha256="m")),
        tmp_path,
    )
    ids, mask = np.zeros((2, 4), dtype=np.int64), np.ones((2, 4), dtype=np.bool_)
    meter = FakeMeter(4)

    def measure() -> int:
        text = CalibrationText(cast("Any", None), ids, mask)
        searched_meter(loaded, text, kept=tmp_path / "kept", make=lambda *_: meter).measure_many(
            {}, []
        )
        return len(meter.measured)

    assert (measure(), measure()) == (1, 1)
    if changed == "mask":
        mask[1, 3] = False
    else:
        installed = metadata.version
        monkeypatch.setattr(
            metadata, "version", lambda name: "9" if name == changed else installed(name)
        )
    assert measure() == 2


@pytest.mark.parametrize("value", [5, [], {}, {"x": [1]}, {"kl_sums": "many"}])
def test_an_entry_that_is_no_damage_is_measured_again(tmp_path: Path, value: Any) -> None:
    journal = tmp_path / "journal"
    Store(journal, {}).keep("whole", value)
    meter = FakeMeter(4)
    RememberingMeter(meter, journal, {}).measure_many({}, [])
    assert meter.measured == [frozenset()]


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
    sublayers = protected_names(texts, LAYERS)
    assert sublayers == expected
    assert not sublayers & set(_names(options_for("joint", LAYERS, sublayers)))
    assert len(options_for("joint", LAYERS, sublayers)) == len(NAMES) - len(expected)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("attention:3", "layer-missing"),
        ("middle", "no-sublayers"),
        ("mixer:0", "unprotected-kind"),
    ],
)
def test_protection_that_makes_no_sense(text: str, code: str) -> None:
    with raises(UsageError, code, text):
        protected_names([text], LAYERS)


def test_a_protected_sublayer_protects_its_block() -> None:
    left = options_for("block", LAYERS, [(1, "mlp")])
    assert [str(option) for option in left] == ["block 0", "block 2"]


def test_steps_are_told() -> None:
    class Heard(Quiet):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def detail(self, message: str) -> None:
            self.lines.append(message)

    heard = Heard()
    steps = greedy(FakeMeter(0), _sublayers(), goal=2, progress=heard)
    assert len(heard.lines) == 2
    assert str(steps[0].option) in heard.lines[0]
    assert objective_of(steps[0].damage, "kl") == steps[0].damage.kl
