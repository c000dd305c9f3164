from __future__ import annotations

import pytest

from exporter.pipeline.gpu.largest import largest_fit


@pytest.mark.parametrize("high", [1, 2, 7, 20])
def test_every_limit_is_found_from_every_guess_and_nothing_is_tried_twice(high: int) -> None:
    for limit in range(high + 1):
        for guess in range(high + 3):
            tried: list[int] = []

            def fits(number: int) -> bool:
                tried.append(number)  # noqa: B023
                return number <= limit  # noqa: B023

            wanted = (limit, None if limit == high else limit + 1)
            assert largest_fit(fits, guess, high) == wanted
            assert len(set(tried)) == len(tried)
            assert all(1 <= number <= high for number in tried)
