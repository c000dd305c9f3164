"""An encoder-decoder's layers, numbered through, and the plans that name them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter.artifacts import (
    CalibrationRef,
    ImportanceReport,
    ModelRef,
    PlannedDeletion,
    PruningPlan,
    Score,
)
from exporter.artifacts.plans import plan_drop, validate_plan
from exporter.artifacts.stacks import Stacks
from exporter.choose.selection.options import protected_names
from exporter.cut.surgery import prune_file
from exporter.errors import PlanError, UnknownArchitectureError, UsageError
from graph_passes.types import SublayerRef
from tests.raising import raises

STACKS = Stacks(2, 3)


def drop(layer: int, kind: str) -> PlannedDeletion:
    return PlannedDeletion(layer=layer, kind=kind)  # type: ignore[arg-type]


def plan_of(*deletions: PlannedDeletion, encoder_layers: int | None = 2) -> PruningPlan:
    return PruningPlan(deletions=list(deletions), encoder_layers=encoder_layers)


def report() -> ImportanceReport:
    scores = [
        Score(layer=layer, kind=kind, score=10.0 * layer + number, std_error=None)
        for layer in range(5)
        for number, kind in enumerate(STACKS.units(layer))
    ]
    text = CalibrationRef(source="random", samples=1, sequence_length=1, tokens=1, sha256="a" * 64)
    model = ModelRef(source="m", architecture="M", num_layers=5, encoder_layers=2, sha256="b" * 64)
    return ImportanceReport(model=model, metric="cosine", calibration=text, scores=scores)


def test_both_ways_of_writing_depths_are_read() -> None:
    assert Stacks.of(SimpleNamespace(encoder_layers=2, decoder_layers=3)) == STACKS
    assert Stacks.of(SimpleNamespace(num_layers=2, num_decoder_layers=3)) == STACKS
    with raises(UnknownArchitectureError, "no-stacks"):
        Stacks.of(SimpleNamespace(num_hidden_layers=5))


def test_a_block_of_the_decoder_has_its_cross_attention() -> None:
    assert [ref.kind for ref in STACKS.named(1, "block")] == ["attention", "mlp"]
    kinds = [ref.kind for ref in STACKS.named(2, "block")]
    assert kinds == ["attention", "cross_attention", "mlp"]
    assert STACKS.named(4, "cross_attention") == [SublayerRef(4, "cross_attention")]


@pytest.mark.parametrize(
    ("layer", "kind", "code"),
    [(5, "mlp", "layer-missing"), (1, "cross_attention", "sublayer-missing"),
     (3, "mixer", "sublayer-missing")],
)  # fmt: skip
def test_what_a_model_does_not_have_is_refused(layer: int, kind: str, code: str) -> None:
    with raises(PlanError, code, layer):
        STACKS.named(layer, kind)


def test_each_graph_gets_its_own_numbers() -> None:
    plan = [drop(1, "mlp"), drop(2, "attention"), drop(4, "block")]
    assert STACKS.within(plan, "encoder") == [drop(1, "mlp")]
    assert STACKS.within(plan, "decoder") == [drop(0, "attention"), drop(2, "block")]


@pytest.mark.parametrize(
    ("plan", "encoder_layers", "code"),
    [
        (plan_of(drop(0, "mlp"), encoder_layers=None), 2, "plan-of-one-stack"),
        (plan_of(drop(0, "mlp")), None, "plan-of-two-stacks"),
        (plan_of(drop(0, "mlp"), encoder_layers=3), 2, "other-stacks"),
        (plan_of(drop(5, "mlp")), 2, "layer-missing"),
        (plan_of(drop(0, "cross_attention")), 2, "sublayer-missing"),
        (plan_of(drop(2, "block"), drop(2, "cross_attention")), 2, "dropped-twice"),
        (plan_of(*(drop(layer, "block") for layer in range(5))), 2, "nothing-left"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    plan: PruningPlan, encoder_layers: int | None, code: str
) -> None:
    with raises(PlanError, code):
        validate_plan(plan, 5, encoder_layers=encoder_layers)


def test_one_graph_is_not_cut_by_the_numbers_of_two_stacks(tmp_path: Path) -> None:
    from exporter.artifacts.loaded_plan import LoadedPlan

    with raises(PlanError, "plan-of-two-stacks"):
        prune_file(tmp_path / "a.onnx", tmp_path / "b.onnx", LoadedPlan(plan_of(drop(0, "mlp"))))


def test_a_joint_number_takes_cross_attentions_too() -> None:
    plan = plan_drop(report(), joint=7)
    assert plan.encoder_layers == 2
    assert [(d.layer, d.kind) for d in plan.deletions][4:] == [
        (2, "attention"), (2, "cross_attention"), (2, "mlp"),
    ]  # fmt: skip
    cross = plan_drop(report(), cross_attention=2)
    assert [d.layer for d in cross.deletions] == [2, 3]


def test_what_stays_is_named_by_its_stack() -> None:
    assert {ref.layer for ref in protected_names(["encoder"], 5, 2)} == {0, 1}
    assert {ref.layer for ref in protected_names(["decoder"], 5, 2)} == {2, 3, 4}
    assert {ref.layer for ref in protected_names(["first"], 5, 2)} == {0, 2}
    assert {ref.layer for ref in protected_names(["last"], 5, 2)} == {1, 4}
    one = protected_names(["cross_attention:3"], 5, 2)
    assert one == {SublayerRef(3, "cross_attention")}


@pytest.mark.parametrize(
    ("text", "kind", "code"),
    [("middle", UsageError, "no-sublayers"), ("cross_attention:1", PlanError, "sublayer-missing"),
     ("mlp:9", PlanError, "layer-missing")],
)  # fmt: skip
def test_what_can_not_stay_is_refused(text: str, kind: type[PlanError], code: str) -> None:
    with raises(kind, code):
        protected_names([text], 5, 2)
