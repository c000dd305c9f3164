"""Curves: KL divergence by position, and how many continuations are still the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from exporter.artifacts import GenerationAgreement, PositionError
from exporter.report.html.charts.scale import Scale, axis_below, axis_left
from exporter.report.html.charts.svg import WIDTH, Drawing, polyline
from exporter.report.words import significant

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, WIDTH - 10, 18, 170


def position_chart(key: str, positions: Sequence[PositionError]) -> Markup:
    """KL divergence over the position in the context: a step a range, all equally wide."""
    values = [error.kl_divergence for error in positions]
    across = Scale(0, len(positions), _LEFT, _RIGHT)
    finite = [value for value in values if math.isfinite(value)]
    up = Scale(0.0, 1.08 * max([*finite, 1e-9]), _BOTTOM, _TOP)  # above that: at its end
    worst = max(positions, key=lambda error: error.kl_divergence)
    drawing = Drawing(
        key, _BOTTOM + 36, title="KL divergence by position",
        description=f"From {significant(values[0], 3)} nats at the first positions to "
        f"{significant(values[-1], 3)} at the last; the most is "
        f"{significant(worst.kl_divergence, 3)}, at positions {worst.first} to {worst.last}.",
    )  # fmt: skip
    _frame(drawing, up, "KL divergence, nats", "position in the context")
    every = -(-len(positions) // 8)
    for index, error in enumerate(positions):
        if index % every == 0:
            drawing.text(across(index), _BOTTOM + 13, f"{error.first:,}", "tick", "middle")
    steps = [(across(i + d), up(value)) for i, value in enumerate(values) for d in (0, 1)]
    drawing.add("path", cls="curve candidate", d=polyline(steps))
    return drawing.markup()


def divergence_chart(key: str, found: GenerationAgreement) -> Markup:
    """Share of the prompts whose continuations are the same up to each token."""
    across = Scale(0, max(found.new_tokens, 1), _LEFT, _RIGHT)
    up = Scale(0, 100, _BOTTOM, _TOP)
    drawing = Drawing(
        key, _BOTTOM + 36, title="Continuations that are still the same",
        description=f"After {found.new_tokens} tokens {100 * found.exact_match:.1f} % of "
        f"{found.prompts} are.",
    )  # fmt: skip
    _frame(drawing, up, "prompts still the same, %", "tokens generated")
    axis_below(drawing, across, _BOTTOM, top=_BOTTOM)
    drawing.add("path", cls="curve candidate", d=polyline(_survival(found, across, up)))
    return drawing.markup()


def _survival(found: GenerationAgreement, across: Scale, up: Scale) -> list[tuple[float, float]]:
    ends = sorted(found.first_divergence)
    points, share = [(across(0), up(100))], 100.0
    for rank, end in enumerate(ends, start=1):
        if end >= found.new_tokens:
            break
        points.append((across(end), up(share)))
        share = 100.0 * (1 - rank / len(ends))
        points.append((across(end), up(share)))
    return [*points, (across(found.new_tokens), up(share))]


def _frame(drawing: Drawing, up: Scale, above: str, below: str) -> None:
    axis_left(drawing, up, _LEFT, _RIGHT)
    drawing.line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis")
    drawing.text(0, 10, above, "tick")
    drawing.text((_LEFT + _RIGHT) / 2, _BOTTOM + 30, below, "tick", "middle")
