"""The page of builds: rows of engines, written as Markdown and read again by a test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

COMMAND = "make engines"

_INTRODUCTION = """\
# Builds

Written by `{command}`; don't edit it.
Versions: {versions}.

Real builds with TensorRT-RTX on a machine without a GPU. Each model is exported in the dtype and
opset of its row and built as it is (cut 0) and with attentions cut out. SmolLM2's engines
have one profile, decode; at opset 24 its caches are in place. BERT's and ViT's have one for all
that they do. BERT and ViT have random weights. Each engine is built twice.

Network layers are those of the parsed network, real layers the kernels that the builder made of
them; fused kernels do an attention as a whole. The builder's time is on {processor}; the rest is
what the build took beside. *alike*: both builds gave the same bytes.

"""
_COLUMNS = (
    "model", "dtype", "opset", "card", "attentions cut", "ONNX MB", "engine MB", "network layers",
    "real layers", "fused", "builder s", "rest s", "alike",
)  # fmt: skip


@dataclass(frozen=True)
class BuildRow:
    """One engine, as the page tells it."""

    model: str
    dtype: str
    opset: int
    card: str
    cut: int
    onnx_mb: float
    engine_mb: float
    network_layers: int
    real_layers: int
    fused: int
    builder_s: float
    rest_s: float
    alike: str


def render(rows: Sequence[BuildRow], versions: Mapping[str, str], processor: str) -> str:
    """The whole page."""
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    head = _INTRODUCTION.format(command=COMMAND, versions=told, processor=processor)
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *(map(_cell, astuple(row)) for row in rows)]
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read_rows(page: str) -> list[BuildRow]:
    """The rows of a page, in order."""
    types = [{"str": str, "int": int, "float": float}[str(f.type)] for f in fields(BuildRow)]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [
        BuildRow(*(kind(cell) for kind, cell in zip(types, cells, strict=True)))
        for cells in lines
        if len(cells) == len(types) and cells[2].isdigit()
    ]


def pairs(rows: Iterable[BuildRow]) -> list[tuple[BuildRow, BuildRow]]:
    """Each baseline with its candidate."""
    found: dict[tuple[str, str, int, str], list[BuildRow]] = {}
    for row in rows:
        found.setdefault((row.model, row.dtype, row.opset, row.card), []).append(row)
    return [(first, second) for first, second in found.values()]


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
