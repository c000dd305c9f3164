"""Holds a pruned graph against the masked oracle: the original with its branches times zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Verification
from exporter.errors import VerificationError
from exporter.optional import require
from exporter.oracle_inputs import Case, cases, draw
from exporter.progress import Progress, Task
from graph_passes.types import Deletion, PassReport

if TYPE_CHECKING:
    import onnx_ir as ir

Arrays = dict[str, NDArray[Any]]

_RELATIVE = {"float16": 1e-2, "bfloat16": 5e-2}
_RELATIVE_FP32 = 1e-4
_ONLY_FATAL = 4
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Candidate:
    """A pruned graph's file, the folder that its weights lie in, and how it was made."""

    file: Path
    weights_folder: Path
    made: PassReport


def verify_candidate(
    original: ir.Model,
    weights_folder: Path,
    deletions: Sequence[Deletion],
    candidate: Candidate,
    progress: Progress,
) -> Verification:
    """Runs both on ONNX Runtime's CPU provider, with random inputs of the graph's own shapes.

    A decoder with a cache is run in prefill (empty cache) and in decode (one token), anything
    else once; batches are padded on the left where there is a mask. All outputs that are left
    are compared, the caches included.

    Args:
        original: The graph before the cut.
        weights_folder: Where its external weights lie.
        deletions: What was cut.
        candidate: The result.
        progress: Who is told.

    Raises:
        VerificationError: An output differs by more than 1e-4 times the largest logit, or 1 if
            that is larger (1e-2 in fp16, 5e-2 in bf16), is missing, or can't be computed.
        MissingDependencyError: Without ONNX Runtime.
    """
    from graph_passes.testing import masked_model

    runtime = require("onnxruntime", extra="cpu")
    rng = np.random.default_rng(0)
    inputs = [(case, draw(original, case, rng)) for case in cases(original)]
    feeds = [feed for _, feed in inputs]
    names = _Names(candidate.made)
    # A value that is fused away is not rounded, and in int8 each rounding shows.
    optimise = not any(node.op_type == "QuantizeLinear" for node in original.graph)
    with progress.task("verify against the masked original", 2 * len(inputs)) as task:
        masked = _serialised(masked_model(original, deletions))
        expected = _outputs(runtime, masked, weights_folder, feeds, task, optimise)
        pruned = candidate.file.read_bytes()
        pruned_feeds = [names.inputs(feed) for feed in feeds]
        folder = candidate.weights_folder
        actual = _outputs(runtime, pruned, folder, pruned_feeds, task, optimise)
    logits = original.graph.outputs[0].name or ""
    found = [
        _compare(case, names.outputs(want), have, logits)
        for (case, _), want, have in zip(inputs, expected, actual, strict=True)
    ]
    return _judged(found)


class _Names:
    """What the pruned graph calls the original's inputs and outputs, and which it lacks."""

    def __init__(self, made: PassReport) -> None:
        self._gone_inputs = {name for entry in made.deleted for name in entry.inputs_removed}
        self._gone_outputs = {name for entry in made.deleted for name in entry.outputs_removed}
        self._renamed = made.kv_renumbering

    def inputs(self, feed: Mapping[str, Any]) -> Arrays:
        return self._translated(feed, self._gone_inputs)

    def outputs(self, arrays: Mapping[str, Any]) -> Arrays:
        return self._translated(arrays, self._gone_outputs)

    def _translated(self, arrays: Mapping[str, Any], gone: set[str]) -> Arrays:
        return {self._renamed.get(k, k): v for k, v in arrays.items() if k not in gone}


def _serialised(model: ir.Model) -> bytes:
    import onnx_ir

    data: bytes = onnx_ir.to_proto(model).SerializeToString()
    return data


def _outputs(
    runtime: Any, model: bytes, folder: Path, feeds: Sequence[Arrays], task: Task, optimise: bool
) -> list[Arrays]:
    options = runtime.SessionOptions()
    options.log_severity_level = _ONLY_FATAL
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))
    results = []
    try:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        for feed in feeds:
            results.append(dict(zip(names, session.run(names, feed), strict=True)))
            task.advance()
    except Exception as error:  # each of ONNX Runtime's own classes derives from Exception
        reason = str(error).strip().splitlines()[0][:300]
        raise VerificationError(
            f"The result can't be verified: ONNX Runtime says {reason}",
            "--verify none leaves this check out; the report will say so.",
        ) from error
    return results


@dataclass(frozen=True)
class _Difference:
    """The largest difference of one run, where it is, and what is tolerated."""

    case: str
    output: str
    max_abs_error: float
    tolerance: float


def _compare(case: Case, expected: Arrays, actual: Arrays, logits: str) -> _Difference:
    if set(expected) != set(actual):
        raise VerificationError(
            f"The pruned graph has other outputs than the masked original: "
            f"{sorted(set(expected) ^ set(actual))}."
        )
    first = expected[logits]
    if not first.size or not np.isfinite(first.astype(np.float64)).all():
        raise VerificationError(
            f"The masked original gives no finite {logits!r} for random inputs ({case.name}).",
            "--verify none leaves this check out; the report will say so.",
        )
    relative = _RELATIVE.get(first.dtype.name, _RELATIVE_FP32)
    tolerance = relative * max(1.0, float(np.abs(first).max()))
    errors = {name: _max_abs_error(expected[name], actual[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    return _Difference(case.name, worst, errors[worst], tolerance)


def _max_abs_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    difference = np.abs(expected.astype(np.float64) - actual.astype(np.float64))
    worst = float(difference.max())
    return worst if np.isfinite(worst) else float("inf")


def _judged(found: Sequence[_Difference]) -> Verification:
    worst = max(found, key=lambda item: item.max_abs_error / item.tolerance)
    if worst.max_abs_error > worst.tolerance:
        raise VerificationError(
            f"The pruned graph differs from the masked original: {worst.output!r} by "
            f"{worst.max_abs_error:.2e} in {worst.case}, more than {worst.tolerance:.2e}. "
            "Nothing was written.",
            "This is a fault in the surgery; please report it with the graph.",
        )
    return Verification(
        method="masked oracle, ONNX Runtime CPU: " + ", ".join(item.case for item in found),
        runs=len(found),
        max_abs_error=worst.max_abs_error,
        tolerance=worst.tolerance,
        passed=True,
    )
