"""What a planner has found out and a later call can use: fits, costs, damages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.heal.kept import read_fits, write_fits
from graph_passes.files.placing import SCRATCH
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    from exporter.heal import Fit

_FITS = "fits"


@dataclass(frozen=True)
class Workplace:
    """A folder that outlives an interrupted call; each thing in it says what it is about.

    Attributes:
        folder: Where it is; made when something is kept.
    """

    folder: Path

    @property
    def costs(self) -> Path:
        """Measured times of sublayers."""
        return self.folder / "costs.json"

    @property
    def journal(self) -> Path:
        """Measured damages."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / "damages.jsonl"

    @property
    def scratch(self) -> Path:
        """Graphs while they are timed."""
        return self.folder / SCRATCH

    def keep_fits(self, about: Mapping[str, Any], fits: Mapping[SublayerRef, Fit]) -> None:
        """Writes fits down, whole or not at all."""
        write_fits(self.folder / _FITS, about, fits)

    def kept_fits(self, about: Mapping[str, Any]) -> dict[SublayerRef, Fit] | None:
        """The fits that were kept; None where there are none, or none about this."""
        return read_fits(self.folder / _FITS, about)
