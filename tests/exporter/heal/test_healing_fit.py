"""Replacements fitted from streamed sums: as float64 least squares on all tokens at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tiny_families import hook_count, tiny_loaded

from exporter.artifacts import CalibrationRef
from exporter.errors import HealingError, PlanError
from exporter.models.architectures import sublayers
from exporter.models.texts.calibration import CalibrationText

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.fit import (  # noqa: E402
    fit_branches,
    held_out_tokens,
    observing,
)
from exporter.models.ablation.branch_replacements import (  # noqa: E402
    BranchReplacement,
    branches_replaced,
)
from tests.raising import raises, tells  # noqa: E402

_WIDTH = 32


def _text(samples: int = 10, length: int = 24, seed: int = 0) -> CalibrationText:
    ids = np.random.default_rng(seed).integers(3, 60, (samples, length))
    ref = CalibrationRef(
        source="test", samples=samples, sequence_length=length, tokens=ids.size, sha256="0" * 64
    )
    return CalibrationText(ref, ids, np.ones(ids.shape, dtype=np.bool_))


def _heard(loaded: Any, text: Any, name: Any) -> tuple[Any, Any]:
    """All of a branch's activations, ``[tokens, width]``, float64."""
    part = next(p for p in sublayers(loaded.model) if (p.layer, p.kind) == name)
    kept: list[Any] = []
    shape = text.input_ids.shape
    with observing([part], shape, lambda _p, x, y: kept.extend((x, y))), torch.no_grad():
        loaded.model(torch.from_numpy(text.input_ids))
    x, y = (each.double().numpy()[text.mask] for each in kept)
    return x, y


@pytest.mark.parametrize("name", [(0, "attention"), (2, "mlp")])
def test_without_a_ridge_as_least_squares_over_all_tokens(name: Any) -> None:
    loaded, text = tiny_loaded("llama"), _text()
    found = fit_branches(loaded, text, [name], ridge=0.0, batch_size=3)[name]
    x, y = _heard(loaded, text, name)
    ones = np.ones((len(x), 1))
    expected = np.linalg.lstsq(np.hstack([x, ones]), y, rcond=None)[0]
    weight, bias = found.linear.maps[0].numpy(), found.linear.bias.numpy()
    # float32's rounding of the result; the norm leaves x well conditioned.
    np.testing.assert_allclose(weight.T, expected[:-1], atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(bias, expected[-1], atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(found.bias.bias.numpy(), y.mean(0), atol=1e-7)
    assert found.bias.maps == ()
    assert hook_count(loaded.model) == 0


def test_with_a_ridge_as_least_squares_with_further_rows() -> None:
    loaded, text, name, ridge = tiny_loaded("llama"), _text(), (1, "mlp"), 0.3
    found = fit_branches(loaded, text, [name], ridge=ridge)[name]
    x, y = _heard(loaded, text, name)
    x, y = x - x.mean(0), y - y.mean(0)
    penalty = ridge * (x**2).sum() / _WIDTH
    rows = np.vstack([x, np.sqrt(penalty) * np.eye(_WIDTH)])
    expected = np.linalg.lstsq(rows, np.vstack([y, np.zeros((_WIDTH, _WIDTH))]), rcond=None)[0]
    weight = found.linear.maps[0].numpy()
    np.testing.assert_allclose(weight.T, expected, atol=1e-6 * np.abs(expected).max())  # float32


def test_a_huge_ridge_leaves_the_bias() -> None:
    loaded, text, name = tiny_loaded("llama"), _text(), (1, "attention")
    found = fit_branches(loaded, text, [name], ridge=1e12)[name]
    assert float(found.linear.maps[0].abs().max()) < 1e-9
    torch.testing.assert_close(found.linear.bias, found.bias.bias, rtol=1e-6, atol=1e-8)
    assert found.linear_explained == pytest.approx(found.bias_explained, abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "bloom", "opt", "gptj"])
def test_a_linear_branch_is_recovered(family: str) -> None:
    """Where a map stands in the branch's place, the fit finds that map, multiplier and all."""
    loaded = tiny_loaded(family)
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(_WIDTH, _WIDTH, generator=generator) * 0.1, torch.ones(_WIDTH)
    name: Any = (1, "mlp")
    with branches_replaced(loaded.model, {name: BranchReplacement(bias, (weight,))}):
        found = fit_branches(loaded, _text(40, 20), [name])[name]
    # The ridge that is chosen is the smallest, and still holds small directions of x down a little.
    # Behind a LayerNorm the sum of x is always 0, and what W does with it can't be known.
    known = torch.eye(_WIDTH) - 1 / _WIDTH
    torch.testing.assert_close(found.linear.maps[0] @ known, weight @ known, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.linear.bias, bias, rtol=0, atol=2e-4)
    assert found.linear_explained == pytest.approx(1, abs=1e-6)
    assert found.bias_explained < 0.99
    # The branch itself is none such.
    other = fit_branches(loaded, _text(40, 20), [name])[name]
    assert other.linear_explained < 0.999


def test_the_result_does_not_depend_on_the_batches_or_the_groups() -> None:
    loaded, text = tiny_loaded("llama"), _text()
    whole = fit_branches(loaded, text, batch_size=10)
    parts = fit_branches(loaded, text, batch_size=1, memory_limit_bytes=1)
    assert list(whole) == list(parts)
    assert len(whole) == 6
    for name, one in whole.items():
        # float32 kernels of other batch sizes.
        torch.testing.assert_close(
            parts[name].linear.maps[0], one.linear.maps[0], rtol=1e-3, atol=1e-5
        )
        assert parts[name].ridge == one.ridge


def test_the_ridge_is_the_best_on_held_out_tokens() -> None:
    loaded, text, name = tiny_loaded("llama"), _text(), (1, "attention")
    chosen = fit_branches(loaded, text, [name])[name]
    for ridge in (chosen.ridge / 10, chosen.ridge * 10):
        other = fit_branches(loaded, text, [name], ridge=ridge)[name]
        assert other.linear_explained < chosen.linear_explained


@pytest.mark.parametrize("rank", [None, 3])
def test_the_share_explained_is_that_of_tokens_not_fitted_on(rank: int | None) -> None:
    loaded, text, name = tiny_loaded("llama"), _text(), (1, "attention")
    found = fit_branches(loaded, text, [name], ridge=0.01, rank=rank)[name]
    later = held_out_tokens(text.mask, 0.2)
    assert later.any(1).tolist() == [False, False, False, False, True] * 2
    x, y = _heard(loaded, text, name)
    first = ~later.ravel()
    x_mean, y_mean = x[first].mean(0), y[first].mean(0)
    a, b = x[first] - x_mean, y[first] - y_mean
    squares = a.T @ a + 0.01 * (a**2).sum() / _WIDTH * np.eye(_WIDTH)
    weight = np.linalg.solve(squares, a.T @ b)
    if rank is not None:
        _, directions = np.linalg.eigh(weight.T @ squares @ weight)
        weight = weight @ directions[:, -rank:] @ directions[:, -rank:].T
    x, y = x[~first], y[~first]
    left = ((y - y_mean - (x - x_mean) @ weight) ** 2).sum() / (y**2).sum()
    assert found.linear_explained == pytest.approx(1 - left, abs=1e-9)  # float64 sums
    left = ((y - y_mean) ** 2).sum() / (y**2).sum()
    assert found.bias_explained == pytest.approx(1 - left, abs=1e-9)


def test_padding_is_left_out() -> None:
    loaded, text, name = tiny_loaded("llama"), _text(6), (1, "mlp")
    mask = text.mask.copy()
    mask[:, 15:] = False
    padded = dataclasses.replace(text, mask=mask)
    short = CalibrationText(text.ref, text.input_ids[:, :15], text.mask[:, :15])
    found, expected, unmasked = (
        fit_branches(loaded, t, [name])[name] for t in (padded, short, text)
    )
    # Other attention kernels with a mask and without.
    torch.testing.assert_close(found.linear.maps[0], expected.linear.maps[0], rtol=1e-3, atol=1e-5)
    assert (found.linear.maps[0] - unmasked.linear.maps[0]).abs().max() > 1e-3


def test_activations_that_are_not_finite_name_layer_and_sample() -> None:
    loaded, text = tiny_loaded("llama"), _text()
    text.input_ids[7, 3] = 61
    loaded.model.get_input_embeddings().weight[61] = float("nan")
    with raises(HealingError, "not-finite", "attention", 0, 7):
        fit_branches(loaded, text, batch_size=3)
    text.input_ids[7, 3] = 60
    fit_branches(loaded, text, batch_size=3)


@pytest.mark.parametrize("shape", [(1, 1), (0, 8)])
def test_too_few_tokens(shape: tuple[int, int]) -> None:
    with raises(HealingError, "too-few-tokens", shape[0]):
        fit_branches(tiny_loaded("llama"), _text(*shape))


def test_fewer_tokens_than_inputs_take_a_ridge() -> None:
    loaded, text = tiny_loaded("llama"), _text(1, 20)
    with raises(HealingError, "map-not-settled", 20):
        fit_branches(loaded, text, ridge=0.0)
    found = fit_branches(loaded, text)
    assert all(bool(fit.linear.maps[0].isfinite().all()) for fit in found.values())


def test_a_warning_where_tokens_are_few() -> None:
    class Heard:
        said: list[str] = []  # noqa: RUF012

        def say(self, message: str) -> None:
            self.said.append(message)

    from exporter.progress import Quiet

    class Listener(Heard, Quiet):
        pass

    fit_branches(tiny_loaded("llama"), _text(4, 20), [(0, "mlp")], progress=Listener())
    assert tells(Heard.said[0], 80)
    Heard.said.clear()
    fit_branches(tiny_loaded("llama"), _text(8, 20), [(0, "mlp")], progress=Listener())
    assert Heard.said == []
    # Means need no more tokens.
    few = _text(4, 20)
    fit_branches(tiny_loaded("llama"), few, [(0, "mlp")], uses_maps=False, progress=Listener())
    assert Heard.said == []


def test_branches_that_are_not_there() -> None:
    with raises(PlanError, "layer-missing", 3):
        fit_branches(tiny_loaded("llama"), _text(), [(3, "mlp")])


def test_a_share_that_is_none() -> None:
    with raises(HealingError, "share-out-of-range", 1):
        fit_branches(tiny_loaded("llama"), _text(), held_out=1)


@pytest.mark.parametrize("rank", [None, 3])
def test_without_intercept_it_is_least_squares_through_the_origin(rank: int | None) -> None:
    loaded, text, name = tiny_loaded("llama"), _text(), (0, "attention")
    with_one = fit_branches(loaded, text, [name], ridge=1e-9, rank=rank)[name]
    fit = fit_branches(loaded, text, [name], ridge=1e-9, rank=rank, intercept=False)[name]
    assert not fit.linear.bias.any()
    assert not fit.bias.bias.any()
    assert with_one.intercept_explained is None
    assert fit.intercept_explained is not None
    assert with_one.linear.bias.any()
    x, y = _heard(loaded, text, name)
    if rank is None:
        wanted = np.linalg.lstsq(x, y, rcond=None)[0].T
        found = fit.linear.maps[0].double().numpy()
        assert np.abs(wanted - found).max() < 1e-3 * np.abs(wanted).max()


def test_what_the_intercept_was_worth_is_kept_with_the_fit() -> None:
    loaded, text, name = tiny_loaded("llama"), _text(), (0, "attention")
    fit = fit_branches(loaded, text, [name], intercept=False)[name]
    again = type(fit).of(fit.arrays(), fit.figures())
    assert again.intercept_explained == fit.intercept_explained
    assert type(fit).of(fit.arrays(), fit.figures()[:3]).intercept_explained is None
