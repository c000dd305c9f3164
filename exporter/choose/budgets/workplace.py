"""Where a planner keeps what an interrupted call has finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graph_passes.files.placing import SCRATCH


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
        return self.folder / "damages.jsonl"

    @property
    def checks(self) -> Path:
        """Damages on the tokens that floors are held on."""
        return self.folder / "checks.jsonl"

    @property
    def trials(self) -> Path:
        """Cuts that were healed, of which one is taken."""
        return self.folder / "trials"

    @property
    def scratch(self) -> Path:
        """Graphs while they are timed."""
        return self.folder / SCRATCH

    @property
    def fits(self) -> Path:
        """What may take each branch's place."""
        return self.folder / "fits.jsonl"
