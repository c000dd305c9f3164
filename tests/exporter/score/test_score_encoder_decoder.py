"""Scores of encoder-decoders: each branch against what it adds, counted over the right tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from exporter.artifacts.plans import plan_cut
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.budget import Budget, SearchOptions
from exporter.choose.budgets.options import options_for
from exporter.errors import PlanError, UnknownArchitectureError
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    branches_replaced,
    without_branches,
)
from exporter.models.architectures import every_sublayer, layer_modules
from exporter.models.families import STACKS
from exporter.models.residual_stream import probe, probe_inputs, run_backbone
from exporter.models.tasks import meter_here
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.pairs import PairReader, read_pairs, scored_pairs
from exporter.models.texts.samples import Sources
from exporter.score.options import ScoreOptions
from exporter.score.scoring import score, score_on
from graph_passes.types import SublayerRef
from tests.exporter.made_plans import made_planner, names_of
from tests.raising import raises
from tests.tiny_models import hook_count, made_loaded, tiny_config

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = ["whisper", "t5", "bart", "marian", "mbart", "pegasus", "m2m_100", "blenderbot"]
OF_BART = {"mbart": "MBart", "pegasus": "Pegasus", "m2m_100": "M2M100", "blenderbot": "Blenderbot"}


def model_of(family: str) -> Any:
    if family not in OF_BART:
        return made_loaded(family).model
    torch.manual_seed(0)
    kind = getattr(transformers, f"{OF_BART[family]}ForConditionalGeneration")
    model = kind(tiny_config(family)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_branches_add_up_to_the_streams(family: str) -> None:
    model = model_of(family)
    layers = layer_modules(model, both=True)
    assert probe(model, layers) == "adds_up"
    assert [modules.number for modules in layers] == [*range(len(layers))]
    half = len(layers) // 2
    assert [modules.cross_attention is not None for modules in layers] == [False] * half + [
        True
    ] * half
    with raises(UnknownArchitectureError, "two-stacks"):
        layer_modules(model)  # what knows one stack alone is given none of two


def test_half_of_an_encoder_decoder_has_one_stack() -> None:
    decoder = transformers.BartForCausalLM(made_loaded("bart").model.config).eval()
    assert len(layer_modules(decoder)) == 2
    encoder = transformers.T5EncoderModel(made_loaded("t5").model.config).eval()
    with raises(UnknownArchitectureError, "unknown-family", "t5"):
        layer_modules(encoder)


def test_classes_of_an_encoder_decoder_are_not_scored() -> None:
    model = transformers.BartForSequenceClassification(made_loaded("bart").model.config)
    loaded = replace(made_loaded("bart"), model=model.eval())
    with raises(UnknownArchitectureError, "unknown-family", "BartForSequenceClassification"):
        score(loaded, ScoreOptions(calibration=("random",), samples=2))


def test_a_wrong_norm_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made_loaded("bart").model
    monkeypatch.setitem(STACKS, "bart", STACKS["whisper"])
    assert probe(model, layer_modules(model, both=True)) == "differs"


@pytest.mark.parametrize("family", ["whisper", "t5", "bart"])
def test_each_branch_that_is_skipped_changes_the_answer(family: str) -> None:
    model = made_loaded(family).model
    inputs = probe_inputs(model)
    whole = run_backbone(model, inputs)[0]
    refs = [part.ref for part in every_sublayer(model)]
    assert len(refs) == 2 * 2 + 2 * 3
    for ref in refs:
        with branches_replaced(model, {ref: NOTHING}):
            assert not run_backbone(model, inputs)[0].equal(whole)
    assert run_backbone(model, inputs)[0].equal(whole)
    assert hook_count(model) == 0


def test_a_score_is_one_minus_the_cosine_over_real_tokens() -> None:
    """The first MLP of the encoder, of sources padded to one length."""
    loaded = made_loaded("t5")
    report = score(loaded, ScoreOptions(calibration=("random",), samples=2))
    sources = PairReader.of(loaded).sources(
        read_pairs("random", part="calibration", sound=False), 2, part="calibration"
    )
    seen: dict[str, Any] = {}
    layer = loaded.model.encoder.block[0].layer[1]
    handles = [
        layer.register_forward_pre_hook(lambda _m, args: seen.update(before=args[0].clone())),
        layer.register_forward_hook(lambda _m, _i, out: seen.update(after=out.clone())),
    ]
    given = {name: torch.from_numpy(array) for name, array in sources.arrays.items()}
    loaded.model.get_encoder()(**given)
    for handle in handles:
        handle.remove()
    cosine = torch.cosine_similarity(seen["before"], seen["after"], dim=-1).double().numpy()
    result = next(s for s in report.scores if (s.layer, s.kind) == (0, "mlp"))
    assert result.score == pytest.approx(float(np.mean(1 - cosine)), abs=1e-6)


def test_padding_of_the_source_does_not_count() -> None:
    loaded = made_loaded("bart")
    rng = np.random.default_rng(0)
    ids = rng.integers(6, 64, (1, 9))
    target = CalibrationText.unpadded(rng.integers(6, 64, (1, 5)), "t", "0" * 64)

    def scores(width: int) -> list[float]:
        wide = np.zeros((1, width), np.int64)
        wide[:, :9] = ids
        mask = np.arange(width) < np.array([[9]])
        sources = Sources({"input_ids": wide, "attention_mask": mask.astype(np.int64)}, mask)
        text = CalibrationText(target.ref, target.input_ids, target.mask, sources=sources)
        return [item.score for item in score_on(loaded, text).scores]

    assert scores(9) == pytest.approx(scores(14), abs=1e-6)


@pytest.mark.parametrize("family", ["whisper", "bart"])
def test_damage_is_that_of_a_whole_run_without_the_branches(family: str) -> None:
    """The runs that begin at the first changed layer, of both stacks, against plain ones."""
    loaded = made_loaded(family)
    text = scored_pairs(loaded, ("random",), samples=3)
    refs = [(0, "mlp"), (1, "attention"), (2, "cross_attention"), (3, "mlp"), (3, "block")]
    cuts = [without_branches([ref], loaded.model) for ref in refs]
    many = meter_here(loaded, text, 2, 1).measure_many({}, cuts)
    assert many[0].distance == pytest.approx(0, abs=1e-6)
    given = {name: torch.from_numpy(array) for name, array in text.sources.arrays.items()}
    given["decoder_input_ids"] = torch.from_numpy(text.input_ids)
    follows = torch.from_numpy(text.mask[:, :-1] & text.mask[:, 1:])

    def answers() -> Any:
        with torch.inference_mode():
            return loaded.model(**given).logits[:, :-1].log_softmax(-1)[follows].double()

    whole = answers()
    for cut, damage in zip(cuts, many[1:], strict=True):
        with branches_replaced(loaded.model, cut):
            left = answers()
        kl = float((whole.exp() * (whole - left)).sum(-1).mean())
        assert damage.distance == pytest.approx(kl, rel=1e-3)


def test_greedy_drops_no_worse_than_the_lowest_scores(tmp_path: Path) -> None:
    loaded = made_loaded("whisper")
    report = score(loaded, ScoreOptions(calibration=("random",), samples=3))
    meter = meter_here(loaded, scored_pairs(loaded, ("random",), samples=3))
    search = SearchOptions(search="greedy", protect=("mlp:0",))
    outcome = made_planner(loaded, report, tmp_path, Budget(joint=3), search).plan()
    assert len(outcome.plan.deletions) == 3
    assert (0, "mlp") not in names_of(outcome.plan)
    lowest = without_branches(plan_cut(report, joint=3).deletions, loaded.model)
    assert outcome.damage.distance <= meter.measure(lowest).distance + 1e-9
    blocks = options_for("block", Stacks(2, 2), {SublayerRef(0, "mlp")})
    assert [len(option.names) for option in blocks] == [2, 3, 3]
    never: Any = Mock(side_effect=AssertionError)
    for group, number, left in (("mlp", 5, 4), ("joint", 8, 7), ("block", 4, 3)):
        planner = made_planner(loaded, report, tmp_path, Budget(**{group: number}))
        planner.objective_meter = never
        with raises(PlanError, "too-many", number, left):
            planner.plan()
