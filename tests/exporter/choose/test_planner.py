"""Plans for budgets of a tiny model, from its scores to figures; its clock is made up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import Speedup
from exporter.choose.budgets import planner as planning
from exporter.choose.budgets.budget import Budget, Floors, Memory, SearchOptions
from exporter.choose.costs.table import RequestShape
from exporter.errors import CalibrationError, CostError, PlanError, UndecidedGoalError, UsageError
from exporter.heal.options import HealOptions
from exporter.models.ablation.damage import ratio_std_error
from tests.exporter.made_plans import made_planner
from tests.made_tables import made_table
from tests.raising import raises
from tests.reading import Heard
from tests.tiny_models import made_text, tiny_loaded, tiny_tokenizer, write_words

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.choose.budgets.inputs import parted  # noqa: E402
from exporter.choose.costs.weighing import module_sizes  # noqa: E402
from exporter.models.ablation.branch_replacements import branches_replaced  # noqa: E402
from exporter.models.ablation.meter import CutMeter  # noqa: E402
from exporter.models.architectures import sublayers  # noqa: E402
from exporter.score.options import ScoreOptions  # noqa: E402
from exporter.score.scoring import score  # noqa: E402

NAMES: list[Any] = [(layer, kind) for layer in range(4) for kind in ("attention", "mlp")]
SAVED: Any = {name: {"none": 6.0, "bias": 5.5, "linear": 4.0} for name in NAMES}
AT = RequestShape(batch=1, prompt=8, new=4)
COSTS = made_table(SAVED, at=AT)


@dataclass
class MadeStopwatch:
    """Everything saves ``truth`` times what the costs say."""

    truth: float = 1.0
    noise: float = 0.01
    timed: list[Any] = field(default_factory=list)

    def costs(self) -> Any:
        return COSTS

    def speedup(self, candidate: Any) -> Speedup:
        self.timed.append(candidate.choices)
        saved = sum(SAVED[name][how] for name, how in candidate.choices.items())
        ratio = 100 / (100 - self.truth * saved)
        return Speedup(ratio=ratio, ci95=(ratio - self.noise, ratio + self.noise))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_loaded("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def report(loaded: Any, cache: Path) -> Any:
    options = ScoreOptions(calibration=("self",), samples=32, sequence_length=24)
    return score(loaded, options, cache_dir=cache)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def planner(loaded: Any, report: Any, cache: Path, tmp_path: Path, heard: Heard) -> Any:
    def made(budget: Budget, heal: Any = "none", check_text: Any = None, **more: Any) -> Any:
        options = None if heal == "none" else HealOptions(kind=heal, check_text=check_text)
        more = {"cache_dir": cache, "progress": heard, "importance_sha256": "a" * 64, **more}
        search = SearchOptions(search="greedy", shortlist=0, tokens=4096)
        return made_planner(loaded, report, tmp_path / "work", budget, search, heal=options, **more)

    return made


def test_a_share_of_parameters_goes(planner: Any, loaded: Any) -> None:
    result = planner(Budget(parameters=0.2)).plan()
    plan, predicted = result.plan, result.plan.predicted
    whole = sum(p.numel() for p in loaded.model.parameters())
    left = predicted["parameters"] / predicted["parameters_before"]
    assert f"({left - 1:+.1%})" in result.words()
    assert left <= 0.8
    sizes = module_sizes(loaded).sublayers.values()
    least = min(size.parameters for size in sizes)
    assert 0.8 * whole - 2 * least < predicted["parameters"] <= 0.8 * whole
    assert {deletion.replacement for deletion in plan.deletions} == {"none"}
    assert plan.budget["parameters"] == 0.2
    assert plan.importance_sha256 == "a" * 64
    assert list(plan.roles) == ["chosen", "judged"]  # nothing stopped it
    assert plan.judged_apart == []  # a single text
    assert result.healing is None


def test_the_figures_are_those_of_the_plan_on_held_out_tokens(planner: Any, loaded: Any) -> None:
    made = planner(Budget(attention=2), heal="linear")
    result = made.plan()
    assert [d.kind for d in result.plan.deletions] == ["attention"] * 2
    ids = torch.from_numpy(made.texts.reported.input_ids)
    logs = []
    with torch.no_grad():
        for cut in ({}, result.branch_replacements):
            with branches_replaced(loaded.model, cut):
                logs.append(loaded.model(ids).logits.log_softmax(-1)[:, :-1:2])
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    # float32 throughout, sums in another order
    assert result.plan.predicted["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert result.plan.predicted["kl"] < planner(Budget(attention=2)).plan().damage.kl
    healing = result.healing.healing
    own = healing.texts[0]
    assert own.text == made.texts.reported.ref
    # Every position here, every other one there.
    assert own.figures["kl"].healed == pytest.approx(result.damage.kl, rel=0.5)
    assert own.figures["kl"].healed < own.figures["kl"].dropped
    assert len(healing.texts) == 2 or any("domain only" in one for one in healing.warnings)


@pytest.mark.parametrize(
    ("target", "watch", "candidates"),
    [(1.25, MadeStopwatch(truth=1.6, noise=0.001), 2), (1.28, MadeStopwatch(), 1)],
)
def test_a_target_is_hit_by_measurement(
    planner: Any, target: float, watch: MadeStopwatch, candidates: int
) -> None:
    result = planner(Budget(target_speedup=target, at=AT), "bias", stopwatch=watch).plan()
    assert result.plan.predicted["measured_speedup"] == pytest.approx(target, rel=0.03)
    assert len(watch.timed) >= candidates, "the costs were wrong, as the first candidate showed"
    assert (len(watch.timed) == 1) is (candidates == 1)
    assert result.speedup.ratio == result.plan.predicted["measured_speedup"]


def test_costs_alone_foretell_and_nothing_is_called_measured(planner: Any) -> None:
    result = planner(Budget(target_speedup=1.25, at=AT), "bias", costs=COSTS).plan()
    assert result.plan.predicted["speedup"] >= 1.25
    assert "measured_speedup" not in result.plan.predicted
    assert "not measured" in result.words()


@pytest.mark.parametrize("watch", [MadeStopwatch(), None])
def test_floors_are_used_up_for_the_named_request_or_for_parameters(
    planner: Any, watch: Any
) -> None:
    floors = Floors(perplexity_increase=0.05)
    made = planner(Budget(floors=floors, at=AT if watch else None), "best", stopwatch=watch)
    result = made.plan()
    assert made.checker.rung_with(made.checker.damage_of(result.branch_replacements)).holds
    assert result.plan.predicted.get("measured_speedup", 0) > (1 if watch else -1)
    assert ("speedup" in result.plan.predicted) is (watch is not None)


def _rows(text: Any) -> set[bytes]:
    return {row.tobytes() for row in text.input_ids}


def test_what_is_reported_is_measured_on_text_that_steered_nothing(
    planner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched on, held floors on, reported on: no sample serves two ends."""
    read: dict[bool, set[bytes]] = {True: set(), False: set()}
    real, deciding = CutMeter.measure_many, True

    def hear(self: Any, *given: Any, **more: Any) -> Any:
        for batch in self._batches.values():
            read[deciding] |= {row.tobytes() for row in batch.ids}
        return real(self, *given, **more)

    monkeypatch.setattr(CutMeter, "measure_many", hear)
    made = planner(Budget(parameters=0.1, floors=Floors(perplexity_increase=0.9)), heal="bias")
    outcome = planning._outcome

    def finished(*given: Any) -> Any:
        nonlocal deciding
        deciding = False
        return outcome(*given)

    monkeypatch.setattr(planning, "_outcome", finished)
    plan, texts = made.plan().plan, made.texts
    assert read[True] == _rows(texts.searched) | _rows(texts.checked)
    assert read[False]
    assert not read[True] & read[False]
    assert not _rows(made.fitted_text) & (read[True] | read[False])
    assert plan.predicted_on == "unseen"
    roles = {role: [ref.ids_sha256 for ref in refs] for role, refs in plan.roles.items()}
    assert roles == {
        "chosen": [texts.searched.ids_sha256],
        "fitted": [made.fitted_text.ids_sha256],
        "stopped": [texts.checked.ids_sha256],
        "judged": [texts.reported.ids_sha256],
    }


def _reading(made: Any) -> Any:
    """A planner whose model has a tokenizer."""
    reading = replace(made.loaded, tokenizer=tiny_tokenizer())
    made._load, made.__dict__["loaded"] = lambda: reading, reading
    return made


@pytest.fixture
def words(tmp_path: Path) -> str:
    return write_words(tmp_path / "words.txt", 2600)


def test_a_plan_on_a_mixture_tells_of_each_text_apart(
    cache: Path, planner: Any, words: str
) -> None:
    made = _reading(planner(Budget(attention=1)))
    options = ScoreOptions(calibration=("self", words), samples=16, sequence_length=24)
    made.report = score(made.loaded, options, cache_dir=cache)
    made.settings = replace(made.settings, search=SearchOptions(search="greedy"))
    assert made.text.part == made.report.calibration  # the very samples that were scored on
    result = made.plan()
    plan, apart = result.plan, result.plan.judged_apart
    for refs, samples in ((plan.chosen_on, 24), (plan.judged_on, 4)):
        assert [ref.source.split(" ")[0] for ref in refs] == ["self", words]
        assert all(abs(ref.samples - samples // 2) <= 2 for ref in refs)  # documents stay whole
    assert [item.text for item in apart] == plan.judged_on
    kls, tokens = ([item.figures["kl"] for item in apart], [item.text.tokens for item in apart])
    assert np.average(kls, weights=tokens) == pytest.approx(plan.predicted["kl"], rel=1e-5)
    assert kls[0] != kls[1]
    clusters = made.texts.reported.clusters
    error = ratio_std_error(result.damage.kl_sums, result.damage.positions, clusters)
    assert plan.predicted["kl_std_error"] == pytest.approx(error)  # of documents
    assert all(f"{item.text.source} " in result.words() for item in apart)


@pytest.mark.parametrize(
    ("samples", "parts", "figures_from"),
    [
        (1, (1, 1, 1), "searched"), (2, (1, 1, 1), "checked"), (3, (2, 1, 1), "checked"),
        (4, (2, 1, 1), "unseen"), (20, (15, 3, 2), "unseen"), (32, (24, 4, 4), "unseen"),
    ],
)  # fmt: skip
def test_short_texts_say_on_what_figures_rest(
    samples: int, parts: tuple[int, ...], figures_from: str
) -> None:
    result = parted(made_text(np.arange(samples * 4).reshape(samples, 4)), 0.25)
    made = (result.searched, result.checked, result.reported)
    assert tuple(len(text.input_ids) for text in made) == parts
    assert tuple(text.ref.samples for text in made) == parts
    assert result.figures_from == figures_from
    assert len(set().union(*map(_rows, made))) == samples


def _short(made: Any, report: Any, samples: int) -> Any:
    ref = report.calibration
    tokens = samples * ref.sequence_length
    calibration = ref.model_copy(update={"samples": samples, "tokens": tokens, "sha256": "x"})
    made.report = report.model_copy(update={"calibration": calibration})
    made.settings = replace(made.settings, calibration=("self",))
    return made


@pytest.mark.parametrize(
    ("budget", "heal", "samples"),
    [
        (Budget(attention=1), "bias", 1),
        (Budget(floors=Floors(perplexity_increase=0.5)), "none", 1),
        (Budget(floors=Floors(perplexity_increase=0.5)), "none", 3),
    ],
)
def test_what_needs_held_out_text_is_refused_where_there_is_too_little(
    planner: Any, report: Any, budget: Budget, heal: Any, samples: int
) -> None:
    with pytest.raises(CalibrationError):
        _short(planner(budget, heal=heal), report, samples).plan()


@pytest.mark.parametrize(
    ("asked", "error", "code", "field"),
    [
        ({}, UsageError, "nothing-asked", ""),
        ({"at": AT, "floors": Floors(top1_agreement=0.9)}, UsageError, "needs-graph", ""),
        ({"fits": Memory(10**6, 64)}, UsageError, "needs-graph", ""),
        (
            {"floors": Floors(perplexity_increase=1e-9)},
            UndecidedGoalError,
            "undecided-nothing-within-floors",
            "mlp 3",
        ),
    ],
)
def test_what_makes_no_plan_is_refused(
    planner: Any, asked: Any, error: Any, code: str, field: str
) -> None:
    with raises(error, code, field):
        planner(Budget(**asked)).plan()


def test_memory_that_asks_for_no_plan_is_refused_before_the_model_is_loaded(planner: Any) -> None:
    sizes = replace(planner(Budget(parameters=0.1)).sizes, longest=64)
    made = planner(Budget(fits=Memory(10**9, 64)), sizes=sizes)
    made._load = lambda: pytest.fail("loaded")
    with raises(PlanError, "fits-already"):
        made.plan()
    with raises(CostError, "context-too-long", 64, 65):
        planner(Budget(fits=Memory(10**9, 65)), sizes=sizes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "bert"])
def test_sizes_by_modules_are_those_of_the_graph_but_for_norms(family: str) -> None:
    model = (other := tiny_loaded(family)).model
    sizes = module_sizes(other)
    parts = {(part.layer, part.kind): part for part in sublayers(model)}
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert set(sizes.sublayers) == set(parts)
    for name, size in sizes.sublayers.items():
        own = {id(p): p.numel() for p in parts[name].reads.parameters()}
        own |= {id(p): p.numel() for p in parts[name].contribution.parameters()}
        assert size.parameters >= sum(own.values()) > 0
        assert size.weight_bytes == 4 * size.parameters
    everything = sum(size.parameters for size in sizes.sublayers.values())
    inside = (".layers.", ".h.", ".layer.")
    layers = sum(
        p.numel() for n, p in model.named_parameters() if any(part in n for part in inside)
    )
    assert 0.9 * layers < everything <= layers, "only norms are left out"


def test_a_plan_is_judged_in_another_domain_too(planner: Any, words: str) -> None:
    result = planner(Budget(attention=1), heal="bias").plan()
    assert not any(name.startswith("other") for name in result.plan.predicted), "there is none"
    result = _reading(planner(Budget(attention=1), heal="bias", check_text=words)).plan()
    predicted = result.plan.predicted
    assert predicted["other_kl"] > 0
    assert f"{math.expm1(predicted['other_log_perplexity_increase']):+.1%}" in result.words()
    assert predicted["other_kl"] != predicted["kl"]
