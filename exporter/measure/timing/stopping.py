"""When a row is measured no longer, without more false alarms for having looked often.

A row's time budget is cut into chunks, and after some of them the verdict is looked at. Each look
could be wrong, so the chance of a wrong word is spent over the looks (Lan and DeMets, "Discrete
sequential boundaries for clinical trials", Biometrika 1983): up to a share f of the budget f**3 of
it. By the union bound all looks together are wrong no more often than one look with the whole
chance, whatever the noise is like. Little is spent early: only a large difference ends a row soon.
"""

from __future__ import annotations

from exporter.measure.statistics import ONE_LOOK, Chances

CHUNKS = 16
"""Parts of a row's budget."""

LOOKS = (6, 8, 11, 16)
"""Chunks after which the verdict is looked at; a t interval of fewer groups says nothing."""


def chances(look: int) -> Chances:
    """What may be spent at one of the looks.

    Args:
        look: Its place in :data:`LOOKS`.
    """
    share = _spent(look) - (_spent(look - 1) if look else 0.0)
    return Chances(equal=ONE_LOOK.equal * share, threshold=ONE_LOOK.threshold * share)


def rest(looks: int) -> Chances:
    """What is left for the last look.

    Args:
        looks: How many there were before.
    """
    share = 1 - (_spent(looks - 1) if looks else 0.0)
    return Chances(equal=ONE_LOOK.equal * share, threshold=ONE_LOOK.threshold * share)


def _spent(look: int) -> float:
    return (LOOKS[look] / LOOKS[-1]) ** 3
