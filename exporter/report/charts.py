"""The chart of a report as SVG, all of it escaped: estimates with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.printable import significant

WIDTH = 360
"""Units from left to right; a unit is a CSS pixel on a phone."""
_STEP, _LETTER, _MARGIN, _NARROWEST = 24.0, 6.3, 0.06, 40.0
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Scale:
    """A scale: ``low`` stands at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> Scale:
        """One with a margin around the finite values; without extent it is given some."""
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
        spread = (high - low) or abs(high) * 0.1 or 1.0
        return cls(low - _MARGIN * spread, high + _MARGIN * spread, start, end)

    def __call__(self, value: float) -> float:
        """The place of a value; what lies beyond the ends is held there."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values between the ends, at most so many."""
        span = self.high - self.low
        magnitude = 10.0 ** math.floor(math.log10(span / most))
        step = next(s * magnitude for s in _STEPS if span / (s * magnitude) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class IntervalLine:
    """What is estimated, the estimate with its interval, and that in words."""

    label: str
    value: float
    low: float
    high: float
    words: str
    tone: str
    noise: tuple[float, float]


@dataclass(frozen=True)
class Intervals:
    """At least one estimate; a line marks the ``neutral`` value, a band each one's noise."""

    title: str
    lines: Sequence[IntervalLine]
    neutral: float
    unit: str
    caption: str

    def draw(self, key: str) -> Markup:
        """The drawing, which also says in words what it shows."""
        left, right = (
            max(len(text) for text in texts) * _LETTER + 12
            for texts in ([x.label for x in self.lines], [x.words for x in self.lines])
        )
        ends = [end for x in self.lines for end in (x.low, x.value, x.high, *x.noise)]
        end = WIDTH - right
        scale = Scale.over([self.neutral, *ends], min(left, end - _NARROWEST), end)
        bottom = 4.0 + len(self.lines) * _STEP
        said = "; ".join(f"{line.label}: {line.words}" for line in self.lines)
        parts = [
            _element("title", self.title, id=f"{key}-t"),
            _element("desc", said, id=f"{key}-d"),
        ]
        for tick in scale.ticks():
            text = f"{tick:.10g}"
            words = (text if len(text) <= 7 else significant(tick, 3)) + self.unit
            parts.append(_path("grid", (scale(tick), 0), (scale(tick), bottom)))
            parts.append(_text(scale(tick), bottom + 13, words, "tick", "middle"))
        for index, line in enumerate(self.lines):
            parts += _line(line, scale, 4 + _STEP * (index + 0.5))
        parts.append(_path("neutral", (scale(self.neutral), 0), (scale(self.neutral), bottom)))
        return _element(
            "svg", Markup("").join(parts), role="img", viewBox=f"0 0 {WIDTH} {bottom + 20:g}",
            aria_labelledby=f"{key}-t {key}-d",
        )  # fmt: skip


def _line(line: IntervalLine, scale: Scale, y: float) -> list[Markup]:
    band, end, low, high = map(scale, (*line.noise, line.low, line.high))
    bar = f"bar {line.tone}"
    return [
        _element("rect", cls="noise", x=band, y=y - 10, width=end - band, height=20),
        _path(bar, (low, y), (high, y)),
        *(_path(bar, (x, y - 4), (x, y + 4)) for x in (low, high)),
        _element("circle", cls=f"dot {line.tone}", cx=scale(line.value), cy=y, r=4),
        _text(0, y + 4, line.label, "", "start"),
        _text(WIDTH, y + 4, line.words, f"num {line.tone}", "end"),
    ]


def _text(x: float, y: float, text: str, cls: str, anchor: str) -> Markup:
    return _element("text", text, x=x, y=y, cls=cls, text_anchor=anchor)


def _path(cls: str, start: tuple[float, float], end: tuple[float, float]) -> Markup:
    return _element("path", cls=cls, d="M{:.1f} {:.1f}L{:.1f} {:.1f}".format(*start, *end))


def _element(tag: str, inside: str = "", **attributes: str | float) -> Markup:
    """An element; ``cls`` is its class."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(
            "class" if name == "cls" else name.replace("_", "-"),
            value if isinstance(value, str) else f"{value:.1f}",
        )
        for name, value in attributes.items()
    )
    return Markup("<{}{}>{}</{}>").format(tag, pairs, inside, tag)
