"""The stack of layers, before and after: a block a column, its sublayers as cells."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from exporter.artifacts import PlannedDeletion
from exporter.printable import counted
from exporter.report.html.charts.bands import LEFT, bands, deletions_by_cell, places
from exporter.report.html.charts.heat import LABELS
from exporter.report.html.charts.svg import WIDTH, Drawing

_MARKS = {"bias": "b", "linear": "L", "none": ""}
_CELL = 18.0


def architecture_chart(
    key: str, layers: int, kinds: Sequence[str], plan: Sequence[PlannedDeletion], *, title: str
) -> Markup:
    """The drawing.

    Args:
        key: Its name.
        layers: How many.
        kinds: A layer's sublayers, in the order in which they run.
        plan: What is drawn hollow; what takes its place is marked by a letter. Empty: before.
        title: Its title.
    """
    gone, tall = deletions_by_cell(plan), _CELL * len(kinds) + 30
    drawing = Drawing(key, tall * bands(layers), title=title, description=_words(layers, gone))
    for place in places(layers, WIDTH - LEFT):
        top = tall * place.band
        if place.x == LEFT:
            _stream(drawing, kinds, top, LEFT + place.width * _in_row(layers))
        drawing.text(place.x + place.width / 2, top + 11, str(place.layer), "tick small", "middle")
        for row, kind in enumerate(kinds):
            box = (place.x + 1, top + 15 + _CELL * row, place.width - 3, _CELL - 3)
            _sublayer(drawing, box, kind, gone.get((place.layer, kind)), place.layer)
    return drawing.markup()


def sublayer_kinds(kinds: set[str]) -> list[str]:
    """Which lines are drawn: what is known of the model, attention and MLP at least."""
    return [kind for kind in LABELS if kind != "block" and kind in kinds | {"attention", "mlp"}]


def _in_row(layers: int) -> int:
    return -(-layers // bands(layers))


def _stream(drawing: Drawing, kinds: Sequence[str], top: float, end: float) -> None:
    """The names of the lines, and the residual stream that runs below all layers."""
    for row, kind in enumerate(kinds):
        drawing.text(0, top + 26 + _CELL * row, LABELS[kind], "tick")
    y = top + 19 + _CELL * len(kinds)
    drawing.line(LEFT, y, end - 3, y, "stream")


def _sublayer(
    drawing: Drawing,
    box: tuple[float, float, float, float],
    kind: str,
    replacement: str | None,
    layer: int,
) -> None:
    x, y, width, height = box
    state = "kept" if replacement is None else "hollow"
    what = "kept" if replacement is None else "dropped"
    if replacement not in (None, "none"):
        what = f"replaced ({replacement})"
    drawing.add(
        "rect", cls=f"{state} k-{kind}", x=x, y=y, width=width, height=height, rx=2,
        tip=f"layer {layer}, {LABELS[kind]}: {what}",
    )  # fmt: skip
    if replacement and _MARKS.get(replacement):
        drawing.text(x + width / 2, y + 11.5, _MARKS[replacement], "mark", "middle")


def _words(layers: int, gone: dict[tuple[int, str], str]) -> str:
    cells = [f"{LABELS[kind]} {layer}" for layer, kind in sorted(gone) if kind != "block"]
    told = f"without {', '.join(cells)}." if cells else "all sublayers."
    return f"{counted(layers, 'layer')}; {told}"
