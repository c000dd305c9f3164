"""What a training begins with: folded weights, or the bare cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_families import tiny_loaded

from exporter.errors import HealingError
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.mixtures import joined

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from distill_cases import fitting, text  # noqa: E402

from exporter.heal.distill.distilled import distilled  # noqa: E402
from exporter.heal.fitting import Fitting  # noqa: E402
from exporter.heal.folded import folded_values  # noqa: E402


def test_a_training_begins_with_folded_weights_and_keeps_them_where_it_gains_nothing() -> None:
    loaded = tiny_loaded("llama")
    with distilled(fitting(loaded, learning_rate=30.0)) as made:
        assert made.training is not None
        bare, folded, *trained = made.training.checks
        assert (bare.tokens, folded.tokens) == (0, 0)
        assert folded.held_out_loss < bare.held_out_loss
        assert made.training.fitted_loss == folded.held_out_loss
        assert all(folded.held_out_loss <= check.held_out_loss for check in trained)
        assert made.weights
        assert {len(each.numbers) for each in made.weights.values()} == {1}
        places = {name.split(".")[-2] for name in made.weights}
        assert places <= {"down_proj", "o_proj", "embed_tokens"}


@pytest.mark.parametrize(
    ("most", "samples"),
    [(6, [5, 2]), (16, [12, 4]), (600, [36, 12])],
    ids=["an eighth", "a third", "all"],
)
def test_the_fold_is_of_alike_much_of_each_text(
    monkeypatch: pytest.MonkeyPatch, most: int, samples: list[int]
) -> None:
    heard: list[CalibrationText] = []

    def hear(_: Any, few: CalibrationText) -> Any:
        heard.append(few)
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.heal.distill.distilled.folded_values", hear)
    monkeypatch.setattr("exporter.heal.distill.distilled.DEFAULT_TOKENS", most * 16)
    asked = fitting(tiny_loaded("llama"))
    mixture = joined([text(36, seed=2), text(12, seed=3)])
    texts = replace(asked.texts, fitting=mixture)
    with pytest.raises(KeyboardInterrupt), distilled(replace(asked, texts=texts)):
        pass
    (few,) = heard
    assert [each.ref.samples for each in few.apart] == samples


def test_a_model_that_can_not_be_folded_is_trained_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_given: Any) -> Any:
        raise HealingError("", code="nothing-to-fold-into")

    monkeypatch.setattr("exporter.heal.distill.distilled.folded_values", refused)
    with distilled(fitting(tiny_loaded("llama"))) as made:
        assert made.training is not None
        assert [check.tokens > 0 for check in made.training.checks[:2]] == [False, True]
        assert made.training.fitted_loss is None


def test_folded_weights_that_do_harm_are_not_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(*given: Any) -> Any:
        found = folded_values(*given)
        assert found
        for each in found:
            each.other = each.other + 5.0
        return found

    loaded = tiny_loaded("llama")
    monkeypatch.setattr("exporter.heal.distill.distilled.folded_values", harmful)
    with distilled(fitting(loaded)) as made:
        assert made.training is not None
        bare, folded, *trained = made.training.checks
        assert folded.held_out_loss > bare.held_out_loss
        assert made.training.fitted_loss is None
        assert min(check.held_out_loss for check in trained) < bare.held_out_loss
        products = [each for name, each in made.weights.items() if "proj" in name]
        assert products
        assert {len(each.numbers) for each in products} == {2}


@pytest.mark.parametrize("rank", [None, 4])
def test_replacements_that_do_harm_begin_with_nothing_and_learn(
    rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = Fitting.alike

    def harmful(self: Fitting, kind: Any) -> Any:
        found, fits = fitted(self, kind)
        for each in found.values():
            assert each.maps
            each.maps[-1].add_(5.0)
        return found, fits

    monkeypatch.setattr(Fitting, "alike", harmful)
    asked = fitting(tiny_loaded("llama"), tmp_path, replacements="linear", rank=rank)
    with distilled(asked) as made:
        assert made.training is not None
        bare, harmed, *trained = made.training.checks
        assert harmed.held_out_loss > bare.held_out_loss
        assert made.training.fitted_loss is None
        assert min(check.held_out_loss for check in trained) < bare.held_out_loss
        for each in made.branch_replacements.values():
            assert 0 < each.maps[-1].abs().max() < 1
            assert each.maps[0].abs().max() > 0


def test_memory_that_is_short_for_the_fold_leaves_the_training_to_begin_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short(*_given: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("exporter.heal.distill.distilled.folded_values", short)
    with distilled(fitting(tiny_loaded("llama"))) as made:
        assert made.training is not None
        assert made.training.fitted_loss is None
