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
    """What was seen of one architecture."""

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
