"""How a plan is to be healed. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.artifacts import HealKind
from exporter.errors import UsageError


@dataclass(frozen=True)
class HealOptions:
    """What takes the branches' places, and on which texts it is fitted and judged.

    Attributes:
        kind: ``bias``, ``linear``, or ``best``: for each branch what helps most on held-out text.
        rank: Of the linear maps; None: full.
        ridge: Relative to the mean eigenvalue of a branch's inputs; None: chosen for each branch.
        sequential: Fits each map on the already healed model below it.
        calibration: Texts to fit on, alike much of each; empty: the default of scoring.
        samples: Of each text, to fit on; a quarter as many more, four at least, are held out.
            None: about 10,000 tokens of each.
        sequence_length: Tokens in a sample.
        check_text: Another domain than the calibration's; None: ``pydoc``, or ``self`` for a model
            that is calibrated on that.
        batch_size: Samples in one forward pass.
        seed: For sampled text.
    """

    kind: HealKind = "linear"
    rank: int | None = None
    ridge: float | None = None
    sequential: bool = False
    calibration: tuple[str, ...] = ()
    samples: int | None = None
    sequence_length: int = 512
    check_text: str | None = None
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind == "bias" and (self.rank is not None or self.ridge is not None):
            raise UsageError("A bias has no rank and no ridge.", "They are for linear maps.")
        if self.ridge is not None and not 0 < self.ridge < float("inf"):
            raise UsageError(f"A ridge of {self.ridge} is none.", "Give one above 0, such as 0.01.")
        if len(set(self.calibration)) != len(self.calibration):
            raise UsageError("A calibration text is named twice.", "Name each text once.")
        if self.check_text is not None and self.check_text in self.calibration:
            raise UsageError(
                f"{self.check_text} is to be fitted on and to be the other domain.",
                "Give --check-text a text that the fit does not see.",
            )
