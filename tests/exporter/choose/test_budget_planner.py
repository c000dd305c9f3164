"""Plans for budgets of a tiny model, from its scores to figures; its clock is made up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import Speedup
from exporter.errors import (
    CalibrationError,
    CostError,
    PlanError,
    UndecidedGoalError,
    UsageError,
)

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from exporter.choose.budgets.budget import Budget, Floors, Memory  # noqa: E402
from exporter.choose.budgets.candidates import QualityCheck  # noqa: E402
from exporter.choose.budgets.planner import Planner  # noqa: E402
from exporter.choose.budgets.settings import PlanSettings  # noqa: E402
from exporter.choose.costs.request_shape import RequestShape  # noqa: E402
from exporter.choose.selection.search_options import SearchOptions  # noqa: E402
from exporter.heal.options import HealOptions  # noqa: E402
from exporter.models.ablation.damage import ratio_std_error  # noqa: E402
from exporter.models.ablation.embeddings import meter_here  # noqa: E402
from exporter.progress import Quiet  # noqa: E402
from exporter.score import ScoreOptions, score  # noqa: E402
from tests.made_tables import made_table  # noqa: E402
from tests.raising import raises  # noqa: E402
from tests.tiny_models import tiny_loaded, tiny_tokenizer  # noqa: E402

NAMES: list[Any] = [(layer, kind) for layer in range(4) for kind in ("attention", "mlp")]
SAVED: Any = {name: {"none": 6.0, "bias": 5.5, "linear": 4.0} for name in NAMES}
AT = RequestShape(batch=1, prompt=8, new=4)


@dataclass
class MadeStopwatch:
    """Everything saves ``truth`` times what the costs say."""

    truth: float = 1.0
    noise: float = 0.01
    timed: list[Any] = field(default_factory=list)
    asked: list[Sequence[str]] = field(default_factory=list)

    def costs(self, replacements: Sequence[str]) -> Any:
        self.asked.append(replacements)
        return made_table(SAVED, at=AT)

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
    return score(
        loaded, ScoreOptions(calibration=("self",), samples=32, sequence_length=24), cache_dir=cache
    )


@pytest.fixture
def planner(loaded: Any, report: Any, cache: Path, tmp_path: Path, said: list[str]) -> Any:
    def made(budget: Budget, stopwatch: Any = None, **settings: Any) -> Planner:
        given = {"costs": settings.pop("costs", None), "sizes": settings.pop("sizes", None)}
        search = SearchOptions(search="greedy", shortlist=0, tokens=4096)
        kind, result = settings.pop("heal", "best"), settings.pop("check_text", None)
        heal = None if kind == "none" else HealOptions(kind=kind, check_text=result)
        return Planner(
            report,
            lambda: loaded,
            budget,
            PlanSettings(search=search, heal=heal, **settings),
            work=tmp_path / "work",
            stopwatch=stopwatch,
            importance_sha256="a" * 64,
            cache_dir=cache,
            progress=Said(said),
            **given,
        )

    return made


@dataclass
class Said(Quiet):
    lines: list[str]

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.parametrize(
    ("target", "watch", "told"),
    [
        (1.22, MadeStopwatch(), None),
        (1.22, MadeStopwatch(noise=0.2), "is not proven: the interval reaches from 1.0"),
        (1.22, MadeStopwatch(truth=2.0), "not within 3% of a speedup of 1.22"),
    ],
)
def test_a_speedup_that_is_missed_or_not_shown_is_told(
    planner: Any, said: list[str], target: float, watch: MadeStopwatch, told: str | None
) -> None:
    planner(Budget(target_speedup=target, at=AT), watch, heal="none").plan()
    warnings = [line for line in said if "warning" in line and "speedup" in line]
    assert len(warnings) == (told is not None)
    assert all(told in line for line in warnings if told)


def test_a_share_of_parameters_goes(planner: Any, loaded: Any) -> None:
    result = planner(Budget(parameters=0.2), heal="none").plan()
    whole = sum(p.numel() for p in loaded.model.parameters())
    assert result.plan.predicted["parameters"] <= 0.8 * whole
    left = result.plan.predicted["parameters"] / result.plan.predicted["parameters_before"]
    assert f"({left - 1:+.1%})" in result.words()
    assert left <= 0.8
    least = min(_size(loaded, layer, kind) for layer, kind in NAMES)
    assert result.plan.predicted["parameters"] > 0.8 * whole - 2 * least
    assert {deletion.replacement for deletion in result.plan.deletions} == {"none"}
    assert result.plan.budget["parameters"] == 0.2
    assert result.plan.importance_sha256 == "a" * 64


def _size(loaded: Any, layer: int, kind: str) -> int:
    module = loaded.model.model.layers[layer]
    part = module.self_attn if kind == "attention" else module.mlp
    return sum(p.numel() for p in part.parameters())


def test_the_figures_are_those_of_the_plan_on_held_out_tokens(planner: Any, loaded: Any) -> None:
    import torch

    from exporter.models.ablation.branch_replacements import branches_replaced

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
    assert result.plan.predicted["kl"] < planner(Budget(attention=2), heal="none").plan().damage.kl


def test_what_replacements_gain_is_told_of_both_domains(planner: Any, tmp_path: Path) -> None:
    made = planner(Budget(attention=2), heal="linear")
    result = made.plan()
    assert result.healing is not None
    healing = result.healing.healing
    own = healing.texts[0]
    assert own.text == made.texts.reported.ref
    # Every position here, every other one there.
    assert own.healed.kl == pytest.approx(result.damage.kl, rel=0.5)
    assert own.healed.kl < own.dropped.kl
    assert len(healing.texts) == 2 or len(healing.warnings) == 1
    bare = planner(Budget(attention=2), heal="none").plan()
    assert bare.healing is None


def test_a_target_is_hit_by_measurement(planner: Any) -> None:
    watch = MadeStopwatch(truth=1.6, noise=0.001)
    result = planner(Budget(target_speedup=1.25, at=AT), watch, heal="bias").plan()
    assert result.plan.predicted["measured_speedup"] == pytest.approx(1.25, rel=0.03)
    assert len(watch.timed) > 1, "the costs were wrong, as the first candidate showed"
    assert result.speedup.ratio == result.plan.predicted["measured_speedup"]
    assert watch.asked == [("bias",)]
    right = MadeStopwatch()
    planner(Budget(target_speedup=1.28, at=AT), right, heal="bias").plan()
    assert len(right.timed) == 1


def test_costs_alone_foretell_and_nothing_is_called_measured(planner: Any) -> None:
    costs = made_table(SAVED, at=AT)
    result = planner(Budget(target_speedup=1.25, at=AT), costs=costs, heal="bias").plan()
    assert result.plan.predicted["speedup"] >= 1.25
    assert "measured_speedup" not in result.plan.predicted
    assert "not measured" in result.words()


def test_floors_are_used_up_for_the_named_request_or_for_parameters(planner: Any) -> None:
    floors = Floors(perplexity_increase=0.05)
    made = planner(Budget(floors=floors, at=AT), MadeStopwatch(), heal="best")
    timed = made.plan()
    assert made.checker.rung_with(made.checker.damage_of(timed.branch_replacements)).holds
    assert timed.plan.predicted["measured_speedup"] > 1
    made = planner(Budget(floors=floors), heal="best")
    sized = made.plan()
    assert made.checker.rung_with(made.checker.damage_of(sized.branch_replacements)).holds
    assert "speedup" not in sized.plan.predicted


def _rows(text: Any) -> set[bytes]:
    return {row.tobytes() for row in text.input_ids}


def test_what_is_reported_is_measured_on_text_that_steered_nothing(
    planner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched on, held floors on, reported on: no sample serves two ends."""
    from exporter.models.ablation.meter import DamageMeter

    read: list[tuple[bool, set[bytes]]] = []
    real, deciding = DamageMeter.measure_many, True

    def heard(self: Any, *given: Any, **more: Any) -> Any:
        read.append(
            (deciding, {row.tobytes() for item in self._asked.values() for row in item.batch.ids})
        )
        return real(self, *given, **more)

    monkeypatch.setattr(DamageMeter, "measure_many", heard)
    made = planner(Budget(parameters=0.1, floors=Floors(perplexity_increase=0.9)), heal="bias")
    outcome = made._outcome

    def finished(*given: Any) -> Any:
        nonlocal deciding
        deciding = False
        return outcome(*given)

    monkeypatch.setattr(made, "_outcome", finished)
    result = made.plan()
    steered = set().union(*(rows for steers, rows in read if steers))
    reported = set().union(*(rows for steers, rows in read if not steers))
    assert steered == _rows(made.texts.searched) | _rows(made.texts.checked)
    assert reported
    assert not steered & reported
    assert not _rows(made.fitted_text) & (steered | reported)
    assert result.plan.predicted_on == "unseen"
    texts = made.texts
    ids_sha256s = {
        role: [ref.ids_sha256 for ref in refs] for role, refs in result.plan.roles.items()
    }
    assert ids_sha256s == {
        "chosen": [texts.searched.ids_sha256],
        "fitted": [made.fitted_text.ids_sha256],
        "stopped": [texts.checked.ids_sha256],
        "judged": [texts.reported.ids_sha256],
    }


def test_a_plan_without_fits_and_floors_was_stopped_by_nothing(planner: Any) -> None:
    result = planner(Budget(parameters=0.1), heal="none").plan()
    assert list(result.plan.roles) == ["chosen", "judged"]
    assert result.plan.judged_apart == []  # a single text


def _words(folder: Path) -> str:
    """A text for the model with :func:`_reading`'s tokenizer."""
    path = folder / "words.txt"
    path.write_text(" ".join(f"w{n % 60}" for n in range(2600)))
    return str(path)


def _reading(made: Any) -> Any:
    """A planner whose model has a tokenizer."""
    reading = replace(made.loaded, tokenizer=tiny_tokenizer())
    made._load, made.__dict__["loaded"] = lambda: reading, reading
    return made


def test_a_plan_on_a_mixture_tells_of_each_text_apart(
    cache: Path, planner: Any, tmp_path: Path
) -> None:
    words = _words(tmp_path)
    made = _reading(planner(Budget(attention=1), heal="none"))
    score_options = ScoreOptions(calibration=("self", words), samples=16, sequence_length=24)
    made.report = score(made.loaded, score_options, cache_dir=cache)
    made.settings = replace(made.settings, search=SearchOptions(search="greedy"))
    assert made.text.part == made.report.calibration  # the very samples that were scored on
    result = made.plan()
    for refs, samples in ((result.plan.chosen_on, 24), (result.plan.judged_on, 4)):
        assert [ref.source.split(" ")[0] for ref in refs] == ["self", words]
        assert all(abs(ref.samples - samples // 2) <= 2 for ref in refs)  # documents stay whole
    apart = result.plan.judged_apart
    assert [item.text for item in apart] == result.plan.judged_on
    kls = [item.figures["kl"] for item in apart]
    tokens = [item.text.tokens for item in apart]
    mean = sum(kl * number for kl, number in zip(kls, tokens, strict=True)) / sum(tokens)
    assert mean == pytest.approx(result.plan.predicted["kl"], rel=1e-5)
    assert kls[0] != kls[1]
    text = made.texts.reported
    error = ratio_std_error(result.damage.kl_sums, result.damage.positions, text.clusters)
    assert result.plan.predicted["kl_std_error"] == pytest.approx(error)  # of documents
    assert all(f"{item.text.source} " in result.words() for item in apart)


def test_a_search_takes_as_much_of_each_text_that_is_named(
    planner: Any, report: Any, tmp_path: Path
) -> None:
    texts = (_words(tmp_path), "self")
    made = _reading(planner(Budget(attention=1), heal="bias", calibration=texts))
    result = made.plan()
    assert [ref.samples for ref in made.text.parts] == [report.calibration.samples] * 2
    roles = result.plan.roles
    assert all(len(refs) == 2 for refs in roles.values())
    assert len({ref.ids_sha256 for refs in roles.values() for ref in refs}) == 8
    assert result.healing is not None
    assert len(result.healing.healing.calibration) == 2


def test_of_a_short_text_the_samples_that_are_searched_on_are_fitted_on_and_that_is_said(
    planner: Any, said: list[str], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(" ".join(f"w{n % 60}" for n in range(300)))
    counts = []
    for text in (_words(tmp_path), str(short)):
        said.clear()
        made = _reading(planner(Budget(attention=1), heal="bias", calibration=(text,)))
        roles = made.plan().plan.roles
        chosen, fitted = ({ref.ids_sha256 for ref in roles[r]} for r in ("chosen", "fitted"))
        assert (chosen == fitted) == (text == str(short))
        counts.append(sum("four parts" in line for line in said))
    assert counts == [0, 1]


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
    import numpy as np

    from exporter.choose.budgets.judges import parted
    from tests.tiny_models import made_text

    result = parted(made_text(np.arange(samples * 4).reshape(samples, 4)), 0.25)
    made = (result.searched, result.checked, result.reported)
    assert tuple(len(text.input_ids) for text in made) == parts
    assert tuple(text.ref.samples for text in made) == parts
    assert result.figures_from == figures_from
    distinct = set().union(*map(_rows, made))
    assert len(distinct) == samples


def test_best_weighs_replacements_by_damage_and_time(planner: Any) -> None:
    watch = MadeStopwatch()
    made = planner(Budget(target_speedup=1.25, at=AT), watch, heal="best")
    result = made.plan()
    assert watch.asked == [("none", "bias", "linear")]
    assert {d.replacement for d in result.plan.deletions} - {"none"}
    bare = planner(Budget(target_speedup=1.25, at=AT), MadeStopwatch(), heal="none").plan()
    searched = QualityCheck(meter_here(made.loaded, made.texts.searched))
    cost = [searched.damage_of(item.branch_replacements).kl for item in (result, bare)]
    assert cost[0] < cost[1]


def test_all_of_several_budgets_hold(planner: Any, loaded: Any) -> None:
    budget = Budget(target_speedup=1.1, at=AT, parameters=0.25, attention=1)
    result = planner(budget, MadeStopwatch(), heal="bias").plan()
    whole = sum(p.numel() for p in loaded.model.parameters())
    assert result.plan.predicted["parameters"] <= 0.75 * whole
    assert result.plan.predicted["speedup"] >= 1.1
    assert sum(d.kind == "attention" for d in result.plan.deletions) >= 1


def test_blocks_go_whole(planner: Any) -> None:
    result = planner(Budget(block=1), heal="bias").plan()
    assert [(d.kind, d.replacement) for d in result.plan.deletions] == [("block", "bias")]
    assert len(result.branch_replacements) == 2


def test_floors_that_nothing_keeps_name_the_nearest_plan(planner: Any) -> None:
    with raises(UndecidedGoalError, "undecided-nothing-within-floors", "mlp 3"):
        planner(Budget(floors=Floors(perplexity_increase=1e-9)), heal="none").plan()


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


def _short(made: Any, report: Any, samples: int) -> Any:
    ref = report.calibration
    tokens = samples * ref.sequence_length
    calibration = ref.model_copy(update={"samples": samples, "tokens": tokens, "sha256": "x"})
    made.report = report.model_copy(update={"calibration": calibration})
    made.settings = replace(made.settings, calibration=("self",))
    return made


def test_one_sample_serves_all_ends_and_the_plan_says_so(planner: Any, report: Any) -> None:
    result = _short(planner(Budget(attention=1), heal="none"), report, 1).plan()
    assert result.plan.predicted_on == "searched"
    assert result.plan.judged_on == result.plan.chosen_on
    assert "text of the search" in result.words()


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({}, "nothing-asked"),
        ({"at": AT, "floors": Floors(top1_agreement=0.9)}, "times-need-graph"),
        ({"fits": Memory(10**6, 64)}, "caches-need-graph"),
    ],
)
def test_what_can_not_be_told_is_refused_first(planner: Any, asked: Any, code: str) -> None:
    with raises(UsageError, code):
        planner(Budget(**asked)).plan()


def test_memory_that_asks_for_no_plan_is_refused_before_the_model_is_loaded(planner: Any) -> None:
    sizes = replace(planner(Budget(parameters=0.1)).sizes, longest=64)
    made = planner(Budget(fits=Memory(10**9, 64)), sizes=sizes)
    made._load = lambda: pytest.fail("loaded")
    with raises(PlanError, "fits-already"):
        made.plan()
    with raises(CostError, "context-too-long", 64, 65):
        planner(Budget(fits=Memory(10**9, 65)), sizes=sizes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi", "bert", "gemma2"])
def test_sizes_by_modules_are_those_of_the_graph_but_for_norms(family: str) -> None:
    from exporter.choose.budgets.inputs import module_sizes
    from exporter.models.architectures import sublayers

    other = tiny_loaded(family)
    sizes = module_sizes(other)
    parts = {(part.layer, part.kind): part for part in sublayers(other.model)}
    assert sizes.parameters == sum(p.numel() for p in other.model.parameters())
    assert set(sizes.sublayers) == set(parts)
    for name, size in sizes.sublayers.items():
        own = {id(p): p.numel() for p in parts[name].reads.parameters()}
        own |= {id(p): p.numel() for p in parts[name].contribution.parameters()}
        assert size.parameters >= sum(own.values()) > 0
        assert size.weight_bytes == 4 * size.parameters
    everything = sum(size.parameters for size in sizes.sublayers.values())
    layers = sum(
        p.numel() for n, p in other.model.named_parameters() if ".layers." in n or ".h." in n
        or ".layer." in n
    )  # fmt: skip
    assert everything <= layers
    assert everything > 0.9 * layers, "only norms are left out"


def test_a_plan_is_judged_in_another_domain_too(planner: Any, tmp_path: Path) -> None:
    result = planner(Budget(attention=1), heal="bias").plan()
    assert not any(name.startswith("other") for name in result.plan.predicted), "there is none"
    made = _reading(planner(Budget(attention=1), heal="bias", check_text=_words(tmp_path)))
    predicted = made.plan().plan.predicted
    assert predicted["other_kl"] > 0
    rise = math.expm1(predicted["other_log_perplexity_increase"])
    assert f"{rise:+.1%}" in made.plan().words()
    assert predicted["other_kl"] != predicted["kl"]
