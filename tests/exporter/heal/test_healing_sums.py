"""Streamed sums and what is computed from them, beside the same on all tokens at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.errors import HealingError

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.refit import map_and_factor  # noqa: E402
from exporter.heal.ridge import (  # noqa: E402
    Sums,
    choose_ridge,
    explained,
    solve,
)
from tests.raising import raises  # noqa: E402


def _sums(x: Any, y: Any, at_once: int) -> Sums:
    sums = Sums(x.shape[1], y.shape[1])
    for start in range(0, len(x), at_once):
        sums.add(x[start : start + at_once], y[start : start + at_once])
    return sums


def _data(tokens: int = 200, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, 6)) + 100  # a mean that would swallow a float32 sum
    y = x @ rng.normal(size=(6, 4)) + 0.1 * rng.standard_normal((tokens, 4)) - 50
    return torch.from_numpy(x), torch.from_numpy(y)


def test_however_the_tokens_come() -> None:
    x, y = _data()
    one, many = _sums(x, y, 200), _sums(x, y, 7)
    for name in ("x", "y", "xx", "xy"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-12, atol=0)
    assert one.tokens == many.tokens == 200
    joined = _sums(x[:50], y[:50], 9).plus(_sums(x[50:], y[50:], 9))
    torch.testing.assert_close(joined.xy, one.xy, rtol=1e-12, atol=0)
    assert joined.y_squares == pytest.approx(one.y_squares, rel=1e-12)


def test_least_squares_about_a_large_mean() -> None:
    x, y = _data()
    found = solve(_sums(x, y, 16), 0.0)
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    expected = torch.linalg.lstsq(rows, y).solution
    # float64, less what the mean of 100 takes: (100²)·1e-16.
    torch.testing.assert_close(found.weight.T, expected[:-1], rtol=0, atol=1e-9)
    torch.testing.assert_close(found.bias, expected[-1], rtol=0, atol=1e-7)
    left = ((y - x @ found.weight.T - found.bias) ** 2).sum() / (y**2).sum()
    assert explained(_sums(x, y, 16), found) == pytest.approx(1 - float(left), abs=1e-9)


@pytest.mark.parametrize(("made_with", "found"), [(1.25, 1.25), (1.0, 1.0), (0.1, 0.5)])
def test_the_stream_s_factor_is_found_beside_the_map(made_with: float, found: float) -> None:
    rng = np.random.default_rng(4)
    u, stream, noise = (torch.from_numpy(rng.standard_normal((800, n))) for n in (6, 4, 4))
    rule = torch.from_numpy(rng.normal(size=(6, 4)))
    wanted = made_with * stream + u @ rule + 0.01 * noise
    y = torch.cat([wanted - stream, stream, wanted], 1)
    change, factor = map_and_factor(_sums(u[:600], y[:600], 600), _sums(u[600:], y[600:], 200), [0])
    assert factor == pytest.approx(found, abs=0.01)
    # Beside a factor that the bounds keep from its value, the map is no more the rule.
    if made_with == found:
        assert change is not None
        torch.testing.assert_close(change.weight.T, rule, rtol=0, atol=0.02)


def test_a_factor_that_held_out_tokens_deny_is_one() -> None:
    rng = np.random.default_rng(5)
    u, stream = (torch.from_numpy(rng.standard_normal((800, n))) for n in (6, 4))
    signs = torch.cat([torch.full((600, 1), 0.3), torch.full((200, 1), -0.3)]).double()
    wanted = (1 + signs) * stream + u.sum(1, keepdim=True)
    y = torch.cat([wanted - stream, stream, wanted], 1)
    change, factor = map_and_factor(_sums(u[:600], y[:600], 600), _sums(u[600:], y[600:], 200), [0])
    assert factor == 1
    assert change is not None


def test_noise_takes_a_large_ridge_and_a_rule_a_small_one() -> None:
    x, y = _data(40)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((40, 4)))
    rule = choose_ridge(_sums(x[:20], y[:20], 20), _sums(x[20:], y[20:], 20))
    none = choose_ridge(_sums(x[:20], noise[:20], 20), _sums(x[20:], noise[20:], 20))
    assert rule.ridge < 1e-2 < 1 < none.ridge
    assert rule.linear_explained > 0.99 > none.linear_explained


def test_inputs_that_never_change() -> None:
    x, y = _data()
    found = solve(_sums(torch.ones_like(x), y, 50), 0.1)
    assert float(found.weight.abs().max()) < 1e-9
    torch.testing.assert_close(found.bias, y.mean(0), rtol=1e-9, atol=0)
    with raises(HealingError, "map-not-settled"):
        solve(_sums(torch.ones_like(x), y, 50), 0.0)


def test_no_tokens() -> None:
    x, y = _data()
    with raises(HealingError, "no-tokens"):
        choose_ridge(_sums(x, y, 50), Sums(6, 4))
    with raises(HealingError, "no-tokens"):
        solve(Sums(6, 4), 1.0)
