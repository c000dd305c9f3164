"""What was seen of an architecture, in plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

TOLERANCE = 1e-5
"""Relative to the largest logit, and in caches to the largest entry of any."""
COUNTS = 100 * TOLERANCE
"""How much every sublayer must matter, or a wrong cut of it would pass."""


@dataclass
class Row:
    """What was seen of one architecture.

    Attributes:
        name: The architecture.
        model_class: Its class in transformers.
        graph: The kind of graph.
        form: How branches join the stream.
        exporter: What wrote the graph.
        layers: How many.
        sites: Sublayers by kind.
        cuts: How many sets of sublayers were cut and compared.
        random_sets: How many of them were drawn at random.
        cuts_refused: How many more the surgery refused, since with every self-attention the only
            inputs would go from which the past length is known.
        worst_error: The largest relative error of any cut, step and output.
        uncut_error: The same of the graph before any cut.
        weakest: The least that any single sublayer changes the main output by, relative.
        wrong: The cuts that are out of bounds or otherwise wrong, with the reason.
        refused: The reason where the graph is refused, and must be.
        not_exported: Why PyTorch's exporter can't write it, where that is known.
        failed: Why nothing could be compared.
        seconds: How long it took.
    """

    name: str
    model_class: str = ""
    graph: str = ""
    form: str = ""
    exporter: str = ""
    layers: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    cuts: int = 0
    random_sets: int = 0
    cuts_refused: int = 0
    worst_error: float = 0.0
    uncut_error: float = 0.0
    weakest: float = 0.0
    wrong: list[str] = field(default_factory=list)
    refused: str = ""
    not_exported: str = ""
    failed: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether everything was as it must be."""
        return not self.wrong and not self.failed

    @property
    def note(self) -> str:
        """What else there is to say."""
        if self.refused:
            return f"refused: {self.refused}"
        if self.not_exported:
            return f"not exported: {self.not_exported}"
        if self.cuts_refused:
            return f"{self.cuts_refused} more refused: no input that is left has the past length"
        return ""

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)
