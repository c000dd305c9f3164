"""Replacements fitted one after the other, each on the already healed model."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_families import hook_count, tiny_loaded

from exporter.artifacts import CalibrationRef
from exporter.errors import HealingError, PlanError
from exporter.models.architectures import sublayers
from exporter.models.residual_stream import run_backbone
from exporter.models.texts.calibration import CalibrationText
from graph_passes.types import SublayerRef

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.fit import (  # noqa: E402
    FitStore,
    fit_branches,
    observing,
)
from exporter.heal.fitting import fit_sequential  # noqa: E402
from exporter.models.ablation.branch_replacements import (  # noqa: E402
    NOTHING,
    branches_replaced,
)
from tests.raising import raises  # noqa: E402

_FAMILIES = ["llama", "granite", "gemma2", "bloom", "opt", "gptj", "gpt_neox", "bert"]


def _text(samples: int = 10, length: int = 24) -> CalibrationText:
    ids = np.random.default_rng(0).integers(3, 60, (samples, length))
    ref = CalibrationRef(
        source="test", samples=samples, sequence_length=length, tokens=ids.size, sha256="0" * 64
    )
    return CalibrationText(ref, ids, np.ones(ids.shape, dtype=np.bool_))


def _heard(loaded: Any, text: Any, name: Any, cut: Any) -> tuple[Any, Any]:
    """A branch's activations in a cut model, ``[tokens, width]``, float64."""
    part = next(p for p in sublayers(loaded.model) if (p.layer, p.kind) == name)
    kept: list[Any] = []
    shape = text.input_ids.shape
    with (
        branches_replaced(loaded.model, cut),
        observing([part], shape, lambda _p, x, y: kept.extend((x, y))),
    ):
        ids, mask = torch.from_numpy(text.input_ids), torch.from_numpy(text.mask)
        run_backbone(loaded.model, {"input_ids": ids, "attention_mask": mask.long()})
    x, y = (each.double().numpy()[text.mask] for each in kept)
    return x, y


def _least_squares(x: Any, y: Any) -> tuple[Any, Any]:
    # Behind a LayerNorm the sum of x is 0 but for float32's noise, which is not to be fitted.
    found = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=1e-5)[0]
    return found[:-1], found[-1]


def _close(found: Any, x: Any, expected: Any) -> None:
    """The replacement's outputs: what W does with directions that x never has can't be known."""
    given = found.contribution(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(given, expected, atol=1e-4 * np.abs(expected).max())  # float32


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("compensation", [0.0, 1.0])
def test_one_deletion_as_the_independent_fit(family: str, compensation: float) -> None:
    loaded, text = tiny_loaded(family), _text()
    for name in ((0, "mlp"), (1, "attention")):
        alone = fit_branches(loaded, text, [name])[name].linear
        found = fit_sequential(loaded, text, {name: "linear"}, compensation=compensation)
        torch.testing.assert_close(found[name].maps[0], alone.maps[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].bias, alone.bias, rtol=1e-4, atol=1e-5)
    assert hook_count(loaded.model) == 0


def test_fits_of_other_versions_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, text, name = tiny_loaded("llama"), _text(), SublayerRef(0, "mlp")
    kept = tmp_path / "fits.jsonl"
    FitStore(kept, loaded, text).keep(name, fit_branches(loaded, text, [name])[name])
    assert list(FitStore(kept, loaded, text).find([name])) == [name]
    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "9" if name == "depthcut" else installed(name)
    )
    assert not FitStore(kept, loaded, text).find([name])


@pytest.mark.parametrize("family", _FAMILIES)
def test_each_fit_reads_what_the_healed_model_gives(family: str) -> None:
    """By hand: run the model with what is fitted so far, and fit the next branch on that."""
    loaded, text = tiny_loaded(family), _text(16)
    names: list[Any] = [(0, "attention"), (1, "attention"), (1, "mlp"), (2, "mlp")]
    found = fit_sequential(
        loaded, text, dict.fromkeys(reversed(names), "linear"), ridge=1e-9, compensation=0.0
    )
    assert sorted(found) == names
    for number, name in enumerate(names):
        cut = {below: found[below] for below in names[:number]}
        x, y = _heard(loaded, text, name, cut)
        weight, bias = _least_squares(x, y)
        _close(found[name], x, x @ weight + bias)


@pytest.mark.parametrize("family", ["llama", "granite", "gptj", "bert"])
def test_compensation_makes_the_stream_the_whole_models(family: str) -> None:
    """By hand, from the streams that stand in front of the next layer."""
    loaded, text = tiny_loaded(family), _text(16)
    names: list[Any] = [(0, "mlp"), (1, "attention"), (1, "mlp")]
    found = fit_sequential(
        loaded, text, dict.fromkeys(names, "linear"), ridge=1e-9, compensation=1.0
    )
    whole, healed = (_sums(loaded, text, 1, cut) for cut in ({}, {names[0]: found[names[0]]}))
    x, _ = _heard(loaded, text, names[1], {names[0]: found[names[0]]})
    weight, bias = _least_squares(x, whole["attended"] - healed["entering"])
    _close(found[names[1]], x, x @ weight + bias)
    below = {name: found[name] for name in names[:2]}
    healed = _sums(loaded, text, 1, below)
    x, _ = _heard(loaded, text, names[2], below)
    parallel = family == "gptj"
    target = (
        whole["leaving" if parallel else "mlp_out"] - healed["attended" if parallel else "mlp_in"]
    )
    weight, bias = _least_squares(x, target)
    _close(found[names[2]], x, x @ weight + bias)
    plain = fit_sequential(loaded, text, dict.fromkeys(names, "linear"), compensation=0.0)
    assert (plain[names[2]].bias - found[names[2]].bias).abs().max() > 1e-4


def _sums(loaded: Any, text: Any, layer: int, cut: Any) -> dict[str, Any]:
    """The streams around a layer's sublayers, ``[tokens, width]``."""
    from exporter.models.architectures import layer_modules
    from exporter.models.residual_stream import tapped

    states: list[Any] = []
    with (
        branches_replaced(loaded.model, cut),
        tapped([layer_modules(loaded.model)[layer]], states.append),
    ):
        ids, mask = torch.from_numpy(text.input_ids), torch.from_numpy(text.mask)
        run_backbone(loaded.model, {"input_ids": ids, "attention_mask": mask.long()})
    names = ("entering", "attended", "mlp_in", "mlp_out", "leaving")
    return {n: getattr(states[0], n).double().numpy()[text.mask] for n in names}


def test_bias_and_none_are_among_the_choices() -> None:
    loaded, text = tiny_loaded("llama"), _text()
    choices: Any = {(0, "mlp"): "none", (1, "attention"): "bias", (2, "mlp"): "linear"}
    found = fit_sequential(loaded, text, choices, compensation=0.0, rank=3)
    assert found[0, "mlp"] is NOTHING
    _, y = _heard(loaded, text, (1, "attention"), {(0, "mlp"): NOTHING})
    np.testing.assert_allclose(found[1, "attention"].bias.numpy(), y.mean(0), atol=1e-6)  # float32
    assert found[1, "attention"].maps == ()
    assert [tuple(each.shape) for each in found[2, "mlp"].maps] == [(3, 32), (32, 3)]


def test_streams_on_disk_as_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded, text = tiny_loaded("llama"), _text()
    choices: Any = {(0, "mlp"): "linear", (2, "attention"): "linear"}
    kept = fit_sequential(loaded, text, choices)
    monkeypatch.setattr("exporter.score.streaming.available_bytes", lambda: 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spilled = fit_sequential(loaded, text, choices)
    for name in choices:
        assert kept[name].maps[0].equal(spilled[name].maps[0])


def test_the_result_does_not_depend_on_the_batches() -> None:
    loaded, text = tiny_loaded("llama"), _text()
    choices: Any = {(0, "mlp"): "linear", (1, "attention"): "linear", (2, "mlp"): "linear"}
    one, many = (fit_sequential(loaded, text, choices, batch_size=size) for size in (3, 10))
    for name in choices:
        # float32 kernels of other batch sizes.
        torch.testing.assert_close(one[name].maps[0], many[name].maps[0], rtol=1e-3, atol=1e-4)


def test_bad_input() -> None:
    loaded, text = tiny_loaded("llama"), _text()
    with raises(PlanError, "layer-missing", 3):
        fit_sequential(loaded, text, {(3, "mlp"): "bias"})
    loaded.model.get_input_embeddings().weight[61] = float("nan")
    text.input_ids[7, 3] = 61
    with raises(HealingError, "not-finite", "mlp", 1, 7):
        fit_sequential(loaded, text, {(1, "mlp"): "bias"})
    assert fit_sequential(loaded, text, {}) == {}
