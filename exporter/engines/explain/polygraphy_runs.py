"""ONNX Runtime by Polygraphy, and Polygraphy's comparison of what two runners gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.engines.build.polygraphy_run import polygraphy
from exporter.engines.runners.base import Array
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner

ONNX_RUNTIME = "onnxruntime"
"""What its runner is called in Polygraphy's files."""
Results = Any
"""Polygraphy's ``RunResults``: by runner, the outputs of each run."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from ONNX Runtime's.

    Attributes:
        tensor: Its name.
        max_abs_error: The largest absolute difference; infinite where one has no number or another
            shape.
        tolerance: The largest that passes.
    """

    tensor: str
    max_abs_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within."""
        return self.max_abs_error <= self.tolerance


def run_onnx(model: Path, feed: Mapping[str, Array], threads: int) -> Results:
    """Runs an ONNX file on ONNX Runtime's CPU.

    Raises:
        BackendError: It can't be loaded.
        EngineError: It fails.
    """
    with polygraphy(), OnnxRuntimeRunner(model, threads=threads) as own:
        from polygraphy.backend.onnxrt import OnnxrtRunner
        from polygraphy.comparator import Comparator

        return Comparator.run([OnnxrtRunner(own.session, ONNX_RUNTIME)], data_loader=[dict(feed)])


def differences(wanted: Results, found: Results, tolerance: float) -> list[Difference]:
    """Compares what two runners gave for one input, by Polygraphy's comparison.

    Args:
        wanted: Of ONNX Runtime.
        found: Of the other.
        tolerance: Times a tensor's largest value, or 1 where that is smaller.

    Returns:
        One for each tensor with content that both have, in the order of ``wanted``.
    """
    from polygraphy.comparator import Comparator, SimpleCompareFunc

    ((_, (want,)),), ((_, (got,)),) = wanted.items(), found.items()
    names = [name for name in want.keys() if name in got.keys() and want[name].size]  # noqa: SIM118
    _keep_last(want, got, names)
    bounds = {name: tolerance * max(1.0, _largest(want[name])) for name in names}
    judge = SimpleCompareFunc(atol={**bounds, "": tolerance}, rtol=0.0, check_error_stat="max")
    with polygraphy(), np.errstate(all="ignore"):  # it divides by zeros for a relative error
        (verdicts,) = Comparator.compare_accuracy([wanted, found], compare_func=judge)[0].values()
    return [Difference(name, _error(verdicts[0].get(name)), bounds[name]) for name in names]


def _keep_last(want: Any, got: Any, names: Sequence[str]) -> None:
    """An engine may give the logits of the last position alone: holds those against it."""
    for name in names:
        shape, other = want[name].shape, got[name].shape
        if len(shape) == len(other) > 1 and other == (shape[0], 1, *shape[2:]) != shape:
            want[name] = np.ascontiguousarray(want[name][:, -1:])


def _largest(array: Array) -> float:
    return float(np.nan_to_num(np.abs(array.astype(np.float64)), posinf=0.0).max())


def _error(verdict: Any) -> float:
    error = getattr(verdict, "max_absdiff", None)  # there is none where the shapes differ
    return float("inf") if error is None or not np.isfinite(error) else float(error)


def save_inputs(feed: Mapping[str, Array], path: Path) -> None:
    """Writes inputs as ``polygraphy run --load-inputs`` reads them."""
    from polygraphy.json import save_json

    with polygraphy():
        save_json([dict(feed)], str(path))
