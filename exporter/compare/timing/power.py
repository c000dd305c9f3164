"""How long a row must be measured, so that a slowdown of a given size is found as often as asked.

A verdict needs an interval beyond the threshold and a stricter one that excludes equal arms
(:mod:`exporter.compare.timing.verdict`). With the standard error ``s`` of a log speedup, a slowdown
of ``d`` nats is found with the chance that ``d`` and a normal error leave both; what is left is
solved for ``s``. Its square falls as time grows, so the time that is needed follows from what was
measured so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from exporter.artifacts import PowerReached
from exporter.compare.timing.statistics import SpeedupEstimate, Spread
from exporter.compare.timing.verdict import FEWEST_LOADS, ONE_LOOK

PILOT_SECONDS = 60.0
"""Chunks are as long as those of a row of this budget, whatever the limit."""
_LEAST_ERROR = 1e-9
_IN_RANGE = 0.9
_WITHIN_COUNTS = 12.0
"""Degrees of freedom of what rounds explain, beside what chunks and later noise will add."""


@dataclass(frozen=True, order=True)
class Foretold:
    """The seconds of rounds that a row will take, and a range that is to hold them.

    It is made for 90 % of rows, of noise that chunks and rounds tell; on recordings it held 78 to
    96 % of them, a chunk beyond its end included.
    """

    seconds: float
    range_s: tuple[float, float]

    def __str__(self) -> str:
        return f"about {self.seconds:.0f} s ({self.range_s[0]:.0f} to {self.range_s[1]:.0f} s)"


@dataclass(frozen=True)
class PowerGoal:
    """What a measurement must be able to find.

    Attributes:
        power: In what share of sessions.
        smallest: The slowdown, as a share of the time.
        threshold: Below it a difference counts as none.
    """

    power: float
    smallest: float
    threshold: float

    def chance(self, std_error: float, degrees: float) -> float:
        """In what share of sessions of this standard error the slowdown is called one."""
        size, error = math.log1p(self.smallest), max(std_error, _LEAST_ERROR)
        sure = stats.t.ppf(1 - ONE_LOOK.threshold / 2, degrees)
        strict = stats.t.ppf(1 - ONE_LOOK.equal / 2, degrees)
        room = (size - math.log1p(self.threshold)) / error - sure
        return float(stats.norm.cdf(min(room, size / error - strict)))

    def wanted_error(self, degrees: float) -> float:
        """The largest standard error that has the power."""
        size, z = math.log1p(self.smallest), float(stats.norm.ppf(self.power))
        sure = float(stats.t.ppf(1 - ONE_LOOK.threshold / 2, degrees))
        strict = float(stats.t.ppf(1 - ONE_LOOK.equal / 2, degrees))
        return min((size - math.log1p(self.threshold)) / (sure + z), size / (strict + z))

    def outlook(self, found: SpeedupEstimate, chunks: int, seconds: float) -> PowerReached:
        """How far a row has come, and how long it must be measured in all.

        Args:
            found: Its estimate so far.
            chunks: It rests on so many; degrees of freedom grow with them.
            seconds: They took so long.
        """
        needed = seconds
        if found.std_error > _LEAST_ERROR and chunks >= 2:
            ratio = 1.0
            for _ in range(8):  # more time brings more degrees, which want less of the error
                wanted = self.wanted_error(max(1.0, found.degrees * ratio))
                ratio = max((found.std_error / wanted) ** 2, FEWEST_LOADS / chunks)
            needed = seconds * ratio
        return PowerReached(
            power=self.power,
            smallest=self.smallest,
            reached=self.chance(found.std_error, found.degrees),
            needed_s=needed,
        )

    def foretell(
        self, found: SpeedupEstimate, spreads: tuple[Spread, Spread], chunks: int, seconds: float
    ) -> Foretold:
        """How long a row must be measured in all, as far as its first chunks tell.

        How a few chunks differ is hardly known, how rounds differ within them is: the variance is
        the mean of both, weighted by degrees of freedom, of which the second has 12. That weight
        was chosen on replayed noise, where this foretold better than either alone. The time grows
        with the variance, so its range is that of a variance.

        Args:
            found: The estimate so far.
            spreads: Of it, between chunks and within.
            chunks: It rests on so many.
            seconds: They took so long.
        """
        between, within = spreads
        known = between.degrees + min(within.degrees, _WITHIN_COUNTS)
        if not known:
            return Foretold(seconds, (seconds, seconds))
        squares = between.variance * between.degrees + within.variance * (known - between.degrees)
        degrees = between.degrees + within.degrees
        joint = SpeedupEstimate(found.log_ratio, math.sqrt(squares / known), degrees)
        needed = self.outlook(joint, chunks, seconds).needed_s
        below, above = stats.chi2.ppf([(1 - _IN_RANGE) / 2, (1 + _IN_RANGE) / 2], known) / known
        return Foretold(needed, (max(seconds, needed / above), max(seconds, needed / below)))
