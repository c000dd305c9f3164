"""The largest number that fits, seen from both sides."""

from __future__ import annotations

from collections.abc import Callable


def largest_fit(fits: Callable[[int], bool], guess: int, high: int) -> tuple[int, int | None]:
    """Looks upwards or downwards from a guess, by steps that grow, then between the two.

    Args:
        fits: Whether a number does; where one does, all smaller ones do.
        guess: Where to begin.
        high: The largest to try.

    Returns:
        The largest that fits, 0 where none does, and the smallest that was seen not to fit; None
        where ``high`` fits.
    """
    number, step = min(max(1, guess), high), 1
    below, above = 0, high + 1
    if fits(number):
        below = number
        while below < high and fits(number := min(below + step, high)):
            below, step = number, 2 * step
        above = number if below < high else above
    else:
        above = number
        while above > 1 and not fits(number := max(above - step, 1)):
            above, step = number, 2 * step
        below = number if above > 1 else 0
    while above - below > 1 and below < high:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below, None if below == high else above
