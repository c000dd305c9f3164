"""Maps of low rank: the nearest outputs, not the nearest matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.errors import HealingError

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal import ridge as low_rank  # noqa: E402
from exporter.heal.ridge import (  # noqa: E402
    Sums,
    explained,
    solve,
)
from tests.raising import raises  # noqa: E402

_TOKENS, _IN, _OUT = 300, 12, 9


def _data(seed: int = 0) -> tuple[Any, Any]:
    """Inputs whose directions are of very unequal strength."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((_TOKENS, _IN)) * np.logspace(1, -1, _IN) @ rng.normal(size=(_IN, _IN))
    y = x @ rng.normal(size=(_IN, _OUT)) + rng.standard_normal((_TOKENS, _OUT)) + 3
    return torch.from_numpy(x), torch.from_numpy(y)


def _sums(x: Any, y: Any) -> Sums:
    sums = Sums(_IN, _OUT)
    sums.add(x, y)
    return sums


def test_at_full_rank_the_map_itself() -> None:
    sums = _sums(*_data())
    full = solve(sums, 0.01)
    down, up = low_rank.factors(full, sums, 0.01, _OUT)
    assert (down.shape, up.shape) == ((_OUT, _IN), (_OUT, _OUT))
    found = low_rank.product(down, up, sums)
    torch.testing.assert_close(found.weight, full.weight, rtol=0, atol=1e-10)  # float64
    torch.testing.assert_close(found.bias, full.bias, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_as_the_singular_values_of_the_fitted_outputs(rank: int) -> None:
    """By hand: the SVD of what the map gives on all tokens and on the ridge's rows, cut."""
    x, y = _data()
    sums, ridge = _sums(x, y), 0.05
    down, up = low_rank.factors(solve(sums, ridge), sums, ridge, rank)
    x, y = x - x.mean(0), y - y.mean(0)
    rows = torch.cat([x, (ridge * (x**2).sum() / _IN).sqrt() * torch.eye(_IN, dtype=x.dtype)])
    wanted = torch.cat([y, torch.zeros(_IN, _OUT, dtype=x.dtype)])
    outputs = rows @ torch.linalg.lstsq(rows, wanted).solution
    left, values, right = torch.linalg.svd(outputs, full_matrices=False)
    nearest = left[:, :rank] * values[:rank] @ right[:rank]
    torch.testing.assert_close(rows @ (up @ down).T, nearest, rtol=0, atol=1e-8)  # float64


@pytest.mark.parametrize("rank", [1, 4])
def test_no_other_map_of_that_rank_is_nearer(rank: int) -> None:
    x, y = _data()
    sums = _sums(x, y)
    full = solve(sums, 0.0)
    found = low_rank.product(*low_rank.factors(full, sums, 0.0, rank), sums)
    best = explained(sums, found)
    assert best < explained(sums, full)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        basis = torch.randn(_OUT, rank, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(basis)[0]
        other = low_rank.product(basis.T @ full.weight, basis, sums)
        assert explained(sums, other) < best
    # Cutting the matrix's own singular values is worse: it knows nothing of the inputs.
    left, values, right = torch.linalg.svd(full.weight, full_matrices=False)
    cut = low_rank.product(values[:rank, None] * right[:rank], left[:, :rank], sums)
    assert explained(sums, cut) < best - 1e-3


@pytest.mark.parametrize("rank", [0, _OUT + 1])
def test_ranks_that_do_not_exist(rank: int) -> None:
    sums = _sums(*_data())
    with raises(HealingError, "rank-out-of-range", rank, _OUT):
        low_rank.factors(solve(sums, 0.0), sums, 0.0, rank)
