"""Is a pruned graph's output the masked original's, and would a wrong cut have shown?

A fixed tolerance alone passes anything where the cut branches say little. So the error is also
held against what masking changes: a wrong cut is off by about that much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Verification
from exporter.errors import VerificationError

Arrays = Mapping[str, NDArray[Any]]

_RELATIVE = {"float16": 1e-2, "bfloat16": 5e-2}
_RELATIVE_FP32 = 1e-4
_OF_THE_EFFECT = 1e-2
# What rounding alone may come to where two graphs are fused differently: 32 units in the last
# place of fp32. In half precision it comes near the tolerance, which then decides alone.
_ROUNDING_FP32 = 32 * float(np.finfo(np.float32).eps)
_FILLER = 1e6  # larger values stand for "never": suppressed tokens, masks
_LEAVE_OUT = "--verify none leaves this check out; the report will say so."


@dataclass(frozen=True)
class MaskedDifference:
    """One output of one run.

    Attributes:
        case: The run.
        output: The output's name in the pruned graph.
        max_abs_error: Pruned against masked original.
        allowed: What that error may be.
        tolerance: What it may be at most, however much masking changes.
        effect: Masked against plain original.
        rounding: Below this, an effect can't be told from rounding.
    """

    case: str
    output: str
    max_abs_error: float
    allowed: float
    tolerance: float
    effect: float
    rounding: float


def compare_run(case: str, plain: Arrays, masked: Arrays, pruned: Arrays) -> list[MaskedDifference]:
    """Compares every output of one run.

    Args:
        case: The run's name.
        plain: What the original gives.
        masked: What it gives with its branches multiplied by zero.
        pruned: What the pruned graph gives, under the same names.

    Raises:
        VerificationError: The pruned graph has other outputs; or one is no tensor of numbers, or
            holds nothing finite to compare.
    """
    if set(masked) != set(pruned):
        raise VerificationError(
            f"The pruned graph has other outputs than the masked original: "
            f"{sorted(set(masked) ^ set(pruned))}.",
            code="other-outputs",
        )
    for name, array in masked.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind in "OSUc":
            raise VerificationError(
                f"The output {name!r} is no tensor of numbers, so it can't be compared.",
                _LEAVE_OUT,
                code="not-numbers",
            )
    first = next(iter(masked))
    if not np.isfinite(masked[first].astype(np.float64)).any():
        raise VerificationError(
            f"The masked original gives no finite {first!r} for random inputs ({case}).",
            _LEAVE_OUT,
        )
    return [_compare(case, name, plain[name], masked[name], pruned[name]) for name in masked]


def _compare(
    case: str,
    name: str,
    plain: NDArray[Any],
    masked: NDArray[Any],
    pruned: NDArray[Any],
) -> MaskedDifference:
    relative = _RELATIVE.get(masked.dtype.name, _RELATIVE_FP32)  # before all becomes float64
    plain, masked, pruned = (array.astype(np.float64) for array in (plain, masked, pruned))
    values = np.abs(masked[np.isfinite(masked)])
    scale = max(1.0, float(values[values <= _FILLER].max(initial=0.0)))
    if masked.shape == pruned.shape and (np.isnan(masked) & np.isfinite(pruned)).any():
        raise VerificationError(
            f"The masked original gives NaN in {name!r} for random inputs ({case}): "
            "a branch overflows there, and infinity times zero is NaN.",
            _LEAVE_OUT,
        )
    tolerance = relative * scale
    rounding = tolerance if relative > _RELATIVE_FP32 else _ROUNDING_FP32 * scale
    effect = _effect(plain, masked)
    allowed = min(tolerance, max(rounding, _OF_THE_EFFECT * effect))
    error = _max_abs_error(masked, pruned, relative)
    return MaskedDifference(case, name, error, allowed, tolerance, effect, rounding)


def _max_abs_error(expected: NDArray[Any], actual: NDArray[Any], relative: float) -> float:
    """The largest difference; infinite where shapes, or values that aren't finite, differ."""
    if expected.shape != actual.shape:
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        return float("inf")
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return float("inf")
    expected, actual = expected[finite], actual[finite]
    difference = np.abs(expected - actual)
    # A filler is so large that its own rounding would drown all else.
    filler = np.abs(expected) > _FILLER
    difference[filler & (difference <= relative * np.abs(expected))] = 0.0
    return float(difference.max(initial=0.0))


def _effect(plain: NDArray[Any], masked: NDArray[Any]) -> float:
    if plain.shape != masked.shape:
        return float("inf")
    told = (np.abs(plain) <= _FILLER) & (np.abs(masked) <= _FILLER)  # neither NaN nor infinite
    return float(np.abs(plain[told] - masked[told]).max(initial=0.0))


def judge(
    found: Sequence[MaskedDifference],
    cheaper_since: str = "",
    *,
    cut_anything: bool,
    widened: bool = False,
) -> Verification:
    """Sums up all outputs of all runs.

    ``passed`` is None where masking changes no output by more than rounding does: then a wrong
    cut would have looked the same.

    Args:
        found: One entry per run and output.
        cheaper_since: Why the runs were made at the cheaper setting; empty at the full one.
        cut_anything: Whether there was anything to cut; it had all been cut earlier otherwise.
        widened: Whether a graph in bfloat16 was run in float32.

    Raises:
        VerificationError: An output differs by more than it may.
    """
    worst = max(found, key=lambda item: item.max_abs_error / item.allowed)
    if worst.max_abs_error > worst.allowed:
        raise VerificationError(
            f"The pruned graph differs from the masked original: {worst.output!r} by "
            f"{worst.max_abs_error:.2e} in {worst.case}, more than {worst.allowed:.2e} "
            f"(masking changes it by {worst.effect:.2e}). Nothing was written.",
            "This is a bug in depthcut; please report it with the graph. " + _LEAVE_OUT,
            code="wrong-results",
        )
    tells = not cut_anything or any(item.effect > item.rounding for item in found)
    runs = list(dict.fromkeys(item.case for item in found))
    method = "masked oracle, ONNX Runtime CPU: " + ", ".join(runs)
    if widened:
        method += "; bfloat16 as float32"
    if cheaper_since:
        method += f"; cheaper setting ({cheaper_since}): not optimised, weights mapped"
    return Verification(
        method=method if tells else f"{method}; masking has no measurable effect",
        runs=len(runs),
        max_abs_error=worst.max_abs_error,
        tolerance=worst.allowed,
        passed=True if tells else None,
    )
