"""Maps and folds fitted from streamed sums: as float64 least squares on all tokens at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from exporter.errors import HealingError, PlanError, UsageError
from exporter.heal.options import HealOptions
from exporter.models.residual_stream import hooked, run_backbone, tapped
from exporter.models.texts.calibration import CalibrationText
from graph_passes.types import SublayerRef
from tests.raising import raises
from tests.tiny_models import hook_count, tiny_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.fit import (  # noqa: E402  # noqa: E402
    Fitting,
    Sums,
    choose_ridge,
    fit_branches,
    held_out_tokens,
    observing,
    solve,
)
from exporter.heal.folded import folded, places_of, refitted  # noqa: E402
from exporter.heal.texts import HealingTexts  # noqa: E402
from exporter.models.ablation.branch_replacements import (  # noqa: E402
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.architectures import layer_modules, sublayers  # noqa: E402
from exporter.progress import QUIET  # noqa: E402
from tests.exporter.distill_cases import text  # noqa: E402


def placed(model: Any, names: Any) -> Any:
    """Where a fold goes, and the kept branches before gaps that have no place."""
    return places_of(model, layer_modules(model), names)


_WIDTH = 32


def read_and_given(loaded: Any, samples: Any, name: Any) -> tuple[Any, Any]:
    """All of a branch's activations, ``[tokens, width]``, float64."""
    part = next(p for p in sublayers(loaded.model) if (p.layer, p.kind) == name)
    kept: list[Any] = []
    shape = samples.input_ids.shape
    with observing([part], shape, lambda _p, x, y: kept.extend((x, y))), torch.no_grad():
        loaded.model(torch.from_numpy(samples.input_ids))
    x, y = (item.double().numpy()[samples.mask] for item in kept)
    return x, y


@pytest.mark.parametrize("name", [(0, "attention"), (2, "mlp")])
@pytest.mark.parametrize("ridge", [0.0, 0.3, 1e12])
def test_a_fit_is_least_squares_over_all_tokens(name: Any, ridge: float) -> None:
    loaded, samples = tiny_loaded("llama"), text(10, 24)
    fit = fit_branches(loaded, samples, [name], ridge=ridge, batch_size=3)[name]
    x, y = read_and_given(loaded, samples, name)
    a, b = x - x.mean(0), y - y.mean(0)
    rows = np.vstack([a, np.sqrt(ridge * (a**2).sum() / _WIDTH) * np.eye(_WIDTH)])
    wanted = np.linalg.lstsq(rows, np.vstack([b, np.zeros((_WIDTH, _WIDTH))]), rcond=None)[0]
    atol = 1e-6 * np.abs(wanted).max()  # float32's rounding of the result
    np.testing.assert_allclose(fit.linear.weight.numpy().T, wanted, atol=atol)
    bias = y.mean(0) - x.mean(0) @ wanted
    np.testing.assert_allclose(fit.linear.bias.numpy(), bias, atol=1e-6 * np.abs(bias).max() + atol)
    np.testing.assert_allclose(fit.bias.bias.numpy(), y.mean(0), atol=1e-7)
    assert fit.bias.weight is None
    assert hook_count(loaded.model) == 0
    if ridge > 1:  # a huge one leaves the bias
        assert fit.linear_explained == pytest.approx(fit.bias_explained, abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "bloom"])
def test_a_linear_branch_is_recovered(family: str) -> None:
    """Where a map stands in the branch's place, the fit finds that map, multiplier and all."""
    loaded = tiny_loaded(family)
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(_WIDTH, _WIDTH, generator=generator) * 0.1, torch.ones(_WIDTH)
    name: Any = (1, "mlp")
    with branches_replaced(loaded.model, {name: BranchReplacement(bias, weight)}):
        fit = fit_branches(loaded, text(40, 20), [name])[name]
    # The ridge that is chosen is the smallest, and still holds small directions of x down a little.
    # Behind a LayerNorm the sum of x is always 0, and what W does with it can't be known.
    known = torch.eye(_WIDTH) - 1 / _WIDTH
    torch.testing.assert_close(fit.linear.weight @ known, weight @ known, rtol=0, atol=2e-4)
    torch.testing.assert_close(fit.linear.bias, bias, rtol=0, atol=2e-4)
    assert fit.linear_explained == pytest.approx(1, abs=1e-6)
    assert fit.bias_explained < 0.99
    # The branch itself is none such.
    assert fit_branches(loaded, text(40, 20), [name])[name].linear_explained < 0.999


def test_the_result_does_not_depend_on_the_batches_or_the_groups() -> None:
    loaded, samples = tiny_loaded("llama"), text(10, 24)
    whole = fit_branches(loaded, samples, batch_size=10)
    parts = fit_branches(loaded, samples, batch_size=1, memory_limit_bytes=1)
    assert list(whole) == list(parts)
    assert len(whole) == 6
    for name, one in whole.items():
        other = parts[name].linear.weight  # float32 kernels of other batch sizes
        torch.testing.assert_close(other, one.linear.weight, rtol=1e-3, atol=1e-5)
        assert parts[name].ridge == one.ridge


def test_the_ridge_is_the_best_on_held_out_tokens() -> None:
    loaded, samples, name = tiny_loaded("llama"), text(10, 24), (1, "attention")
    chosen = fit_branches(loaded, samples, [name])[name]
    for ridge in (chosen.ridge / 10, chosen.ridge * 10):
        other = fit_branches(loaded, samples, [name], ridge=ridge)[name]
        assert other.linear_explained < chosen.linear_explained


def test_the_share_explained_is_that_of_tokens_not_fitted_on() -> None:
    loaded, samples, name = tiny_loaded("llama"), text(10, 24), (1, "attention")
    fit = fit_branches(loaded, samples, [name], ridge=0.01)[name]
    later = held_out_tokens(samples.mask)
    assert later.any(1).tolist() == [False, False, False, False, True] * 2
    x, y = read_and_given(loaded, samples, name)
    first = ~later.ravel()
    x_mean, y_mean = x[first].mean(0), y[first].mean(0)
    a, b = x[first] - x_mean, y[first] - y_mean
    squares = a.T @ a + 0.01 * (a**2).sum() / _WIDTH * np.eye(_WIDTH)
    weight = np.linalg.solve(squares, a.T @ b)
    x, y = x[~first], y[~first]
    left = ((y - y_mean - (x - x_mean) @ weight) ** 2).sum() / (y**2).sum()
    assert fit.linear_explained == pytest.approx(1 - left, abs=1e-9)  # float64 sums
    left = ((y - y_mean) ** 2).sum() / (y**2).sum()
    assert fit.bias_explained == pytest.approx(1 - left, abs=1e-9)


def test_padding_is_left_out() -> None:
    loaded, samples, name = tiny_loaded("llama"), text(6, 24), (1, "mlp")
    mask = samples.mask.copy()
    mask[:, 15:] = False
    padded = dataclasses.replace(samples, mask=mask)
    short = CalibrationText(samples.ref, samples.input_ids[:, :15], samples.mask[:, :15])
    one, other, unmasked = (
        fit_branches(loaded, t, [name])[name].linear.weight for t in (padded, short, samples)
    )
    # Other attention kernels with a mask and without.
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert (one - unmasked).abs().max() > 1e-3


def test_without_intercept_it_is_least_squares_through_the_origin() -> None:
    loaded, samples, name = tiny_loaded("llama"), text(10, 24), (0, "attention")
    assert fit_branches(loaded, samples, [name], ridge=1e-9)[name].linear.bias.any()
    fit = fit_branches(loaded, samples, [name], ridge=1e-9, intercept=False)[name]
    assert not fit.linear.bias.any()
    assert not fit.bias.bias.any()
    x, y = read_and_given(loaded, samples, name)
    wanted = np.linalg.lstsq(x, y, rcond=None)[0].T
    weight = fit.linear.weight.double().numpy()
    assert np.abs(wanted - weight).max() < 1e-3 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("shape", "how", "error", "code", "fields"),
    [
        ((1, 1), {}, HealingError, "too-few-tokens", [1]),
        ((0, 8), {}, HealingError, "too-few-tokens", [0]),
        ((10, 24), {"names": [(3, "mlp")]}, PlanError, "layer-missing", [3]),
    ],
)
def test_what_settles_no_fit_is_refused(
    shape: Any, how: Any, error: Any, code: str, fields: list[int]
) -> None:
    with raises(error, code, *fields):
        fit_branches(tiny_loaded("llama"), text(*shape), **how)
    fits = fit_branches(tiny_loaded("llama"), text(1, 20))  # a ridge settles it
    assert all(bool(fit.linear.weight.isfinite().all()) for fit in fits.values())


def test_activations_that_are_not_finite_name_layer_and_sample() -> None:
    loaded, samples = tiny_loaded("llama"), text(10, 24)
    samples.input_ids[7, 3] = 61
    loaded.model.get_input_embeddings().weight[61] = float("nan")
    with raises(HealingError, "not-finite", "attention", 0, 7):
        fit_branches(loaded, samples, batch_size=3)


def sums_of(x: Any, y: Any, at_once: int = 50) -> Sums:
    sums = Sums(x.shape[1], y.shape[1])
    for start in range(0, len(x), at_once):
        sums.add(x[start : start + at_once], y[start : start + at_once])
    return sums


def made_data(tokens: int = 200, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, 6)) + 100  # a mean that would swallow a float32 sum
    y = x @ rng.normal(size=(6, 4)) + 0.1 * rng.standard_normal((tokens, 4)) - 50
    return torch.from_numpy(x), torch.from_numpy(y)


def test_sums_are_the_same_however_the_tokens_come() -> None:
    x, y = made_data()
    one = sums_of(x, y, 200)
    for other in (sums_of(x, y, 7), sums_of(x[:50], y[:50], 9).plus(sums_of(x[50:], y[50:], 9))):
        for name in ("x", "y", "xx", "xy", "yy"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=0)
        assert one.tokens == other.tokens == 200
    linear = solve(one, 0.0)
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    wanted = torch.linalg.lstsq(rows, y).solution
    # float64, less what the mean of 100 takes: (100²)·1e-16.
    torch.testing.assert_close(linear.weight.T, wanted[:-1], rtol=0, atol=1e-9)
    torch.testing.assert_close(linear.bias, wanted[-1], rtol=0, atol=1e-7)


def test_noise_takes_a_large_ridge_and_a_rule_a_small_one() -> None:
    x, y = made_data(40)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((40, 4)))
    rule = choose_ridge(sums_of(x[:20], y[:20]), sums_of(x[20:], y[20:]))
    none = choose_ridge(sums_of(x[:20], noise[:20]), sums_of(x[20:], noise[20:]))
    assert rule.ridge < 1e-2 < 1 < none.ridge
    assert rule.linear_explained > 0.99 > none.linear_explained


def stream(model: Any, ids: Any) -> torch.Tensor:
    """What a model's backbone gives, also that of an encoder."""
    with torch.inference_mode():
        return run_backbone(model, {"input_ids": torch.from_numpy(ids)})[0].double()


ATTENTION, MLP = SublayerRef(1, "attention"), SublayerRef(2, "mlp")
BLOCK = [SublayerRef(1, "attention"), SublayerRef(1, "mlp")]


def fitting(loaded: Any, names: list[SublayerRef], **options: Any) -> Fitting:
    first = text(40)
    texts = HealingTexts(first, (first.ref,), (text(8, seed=1),), None)
    return Fitting(loaded, texts, names, HealOptions(kind="fold", **options), None, QUIET)


@pytest.mark.parametrize(
    ("family", "names", "replaced"),
    [
        *(
            (family, names, None)
            for family in ("llama", "gpt2", "mixtral")
            for names in ([ATTENTION, MLP], BLOCK)
        ),
        # Operators stand where nothing can be folded, if asked for.
        ("mixtral", [ATTENTION, MLP], [ATTENTION]),  # experts stand before it
        ("bert", BLOCK, BLOCK),
        ("llama", [ATTENTION, MLP], []),
    ],
)
def test_answers_come_nearer_and_the_model_is_as_it_was(
    family: str, names: list[SublayerRef], replaced: list[SublayerRef] | None
) -> None:
    loaded, judged = tiny_loaded(family), text(8, seed=2).input_ids
    before, hooks = stream(loaded.model, judged), hook_count(loaded.model)
    with branches_replaced(loaded.model, dict.fromkeys(names, NOTHING)):
        lost = (stream(loaded.model, judged) - before).square().mean()
    options = {} if replaced is None else {"replacements": "linear"}
    with folded(fitting(loaded, names, **options)) as made:
        kept = made.branch_replacements
        standing = [ref for ref in names if kept[ref] is not NOTHING]
        assert standing == (replaced or [])
        assert all(kept[ref].weight is not None for ref in standing)
        assert made.fits.keys() == set(standing)
        assert bool(made.weights) == (family != "bert")
        with made.within(), branches_replaced(loaded.model, kept):
            left = (stream(loaded.model, judged) - before).square().mean()
    assert torch.equal(stream(loaded.model, judged), before)
    assert hook_count(loaded.model) == hooks
    assert left < 0.95 * lost


def tapped_streams(model: Any, ids: Any, cut: Any, product: Any) -> tuple[Any, list[Any], Any]:
    """What a product reads and gives, and the streams of each layer, in one run of the model."""
    states: list[Any] = []
    heard: list[Any] = []

    def hear(_module: Any, args: Any, output: Any) -> None:
        heard[:] = [args[0].clone(), output.clone()]

    with (
        branches_replaced(model, cut),
        tapped(layer_modules(model), states.append),
        hooked([product.register_forward_hook(hear)]),
    ):
        run_backbone(model, {"input_ids": torch.from_numpy(ids)})
    return heard[0].flatten(0, -2), states, heard[1].flatten(0, -2)


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "gpt_neox"])
def test_the_first_fold_is_the_map_beside_the_product(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand from runs of the whole model: weighted least squares, added as an operator."""
    loaded, fitted_on = tiny_loaded(family), text(40)
    cut = dict.fromkeys(BLOCK, NOTHING)
    place = places_of(loaded.model, layer_modules(loaded.model), BLOCK)[0][0]
    assert place.gap == tuple(BLOCK)
    assert place.part.ref == SublayerRef(0, "mlp")
    ids, factor = fitted_on.input_ids, place.part.multiplier
    _, whole, _ = tapped_streams(loaded.model, ids, {}, place.product)
    u, bare, given = tapped_streams(loaded.model, ids, cut, place.product)
    wanted = whole[1].leaving.flatten(0, -2).double()
    now = bare[0].leaving.flatten(0, -2).double()
    x = u.double()
    if place.product.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    roots = wanted.square().mean(-1, keepdim=True).rsqrt()
    operator = torch.linalg.lstsq(x * roots, (wanted - now) * roots).solution
    monkeypatch.setattr("exporter.heal.folded.RIDGES", [1e-12])
    with folded(fitting(loaded, BLOCK)) as made:
        assert made.within is not None
        with made.within():
            v, _, result = tapped_streams(loaded.model, ids, cut, place.product)
    assert torch.equal(u, v)
    # Both are float32 models; the fits are float64.
    torch.testing.assert_close(
        result.double(), given.double() + x @ operator / factor, rtol=0, atol=2e-4
    )
    assert (result - given).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "names", "expected", "without"),
    [
        ("llama", [SublayerRef(1, "attention")], [(0, "mlp")], []),
        ("llama", [ATTENTION, MLP], [(0, "mlp"), (2, "attention")], []),
        ("llama", BLOCK, [(0, "mlp")], []),
        ("llama", [SublayerRef(0, "attention"), SublayerRef(0, "mlp")], [(1, "attention")], []),
        ("llama", [SublayerRef(0, "attention"), MLP], [(0, "mlp"), (2, "attention")], []),
        ("llama", [MLP], [(2, "attention")], []),
        # A gap behind experts is made up for by the next product.
        ("mixtral", [ATTENTION], [(2, "attention")], [(0, "mlp"), (1, "mlp")]),
        # A weight that others read is no place.
        ("shared", BLOCK, [(2, "attention")], [(0, "mlp")]),
    ],
)
def test_places_are_the_last_products_before_gaps_or_else_behind_them(
    family: str, names: list[SublayerRef], expected: Any, without: Any
) -> None:
    model = tiny_loaded("llama" if family == "shared" else family).model
    if family == "shared":
        layers = model.model.layers
        layers[2].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    places, left = placed(model, names)
    assert [tuple(place.part.ref) for place in places] == expected
    assert [tuple(ref) for ref in left] == without
    before = [ref for place in places for ref in place.gap]
    assert without or before == [ref for ref in names if ref.layer]


@pytest.mark.parametrize(
    ("family", "harm", "code"),
    [
        ("bert", 0.0, "nothing-to-fold-into"),
        ("gemma2", 0.0, "nothing-to-fold-into"),
        ("llama", None, "healing-gained-nothing"),
        ("llama", 5.0, "healing-gained-nothing"),  # no better on other text
    ],
)
def test_what_can_not_be_folded_is_refused(
    family: str, harm: float | None, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmful(*given: Any, **more: Any) -> Any:
        values = [] if harm is None else refitted(*given, **more)
        for value in values:
            value.other = value.other + harm
        return values

    monkeypatch.setattr("exporter.heal.folded.refitted", harmful)
    with raises(HealingError, code), folded(fitting(tiny_loaded(family), BLOCK)):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "fold", "rank": 3},
        {"kind": "fold", "tokens": 5000},
        {"kind": "fold", "train": "all"},
        {"kind": "linear", "replacements": "bias"},
        {"kind": "bias", "rank": 3},
        {"calibration": ("self", "self")},
        {"calibration": ("pydoc",), "check_text": "pydoc"},
    ],
)
def test_options_that_a_kind_does_not_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        HealOptions(**options)
    HealOptions(kind="fold", replacements="linear")
