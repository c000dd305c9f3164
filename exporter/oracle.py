"""Holds a pruned graph against the masked oracle: the original with its branches times zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Verification
from exporter.errors import VerificationError
from exporter.optional import require
from exporter.oracle_inputs import cases, draw, half_written
from exporter.oracle_rounding import with_exact_products
from exporter.oracle_verdict import compare_run, judge
from exporter.oracle_weights import relocated, set_apart
from exporter.progress import Progress, Task
from graph_passes.types import Deletion, PassReport, SublayerRef

if TYPE_CHECKING:
    import onnx_ir as ir

    from graph_passes.replacements import ReplacementTensors

Arrays = dict[str, NDArray[Any]]

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
    replacements: Mapping[SublayerRef, ReplacementTensors] | None = None,
) -> Verification:
    """Runs both on ONNX Runtime's CPU provider, with random inputs of the graph's own shapes.

    A decoder with a cache is run in prefill (empty cache) and in decode (one token), anything
    else once; batches are padded on the left where there is a mask. All outputs that are left
    are compared, the caches included. The plain original is run too: the error must be small
    against what masking changes, or a wrong cut of a weak branch would pass.

    Args:
        original: The graph before the cut.
        weights_folder: Where its external weights lie.
        deletions: What was cut.
        candidate: The result.
        progress: Who is told.
        replacements: The numbers that took the places of deleted branches.

    Raises:
        VerificationError: An output differs by more than 1e-4 times its largest value, or 1 if
            that is larger (1e-2 in fp16, 5e-2 in bf16), or by more than a hundredth of what
            masking changes in it and rounding explains; is missing; or can't be computed.
        MissingDependencyError: Without ONNX Runtime.
    """
    from graph_passes.testing import masked_model

    runtime = require("onnxruntime", extra="cpu")
    rng = np.random.default_rng(0)
    inputs = [(case, draw(original, case, rng)) for case in cases(original)]
    feeds = [feed for _, feed in inputs]
    # A value that is fused away is not rounded, and in int8 each rounding shows.
    optimise = not any(node.op_type == "QuantizeLinear" for node in original.graph)
    with progress.task("verify against the masked original", 3 * len(inputs)) as task:
        plain = _outputs(runtime, _serialised(original), weights_folder, feeds, task, optimise)
        masked = masked_model(original, deletions, replacements)
        given = set_apart(masked, runtime)
        expected = _outputs(
            runtime, _serialised(masked), weights_folder, feeds, task, optimise, given
        )
        names = _Names(candidate.made, half_written(original))
        pruned = relocated(candidate.file, candidate.weights_folder)
        pruned_feeds = [names.inputs(feed) for feed in feeds]
        folder = candidate.weights_folder
        actual = _outputs(runtime, pruned, folder, pruned_feeds, task, optimise)
    found = [
        difference
        for (case, _), before, want, have in zip(inputs, plain, expected, actual, strict=True)
        for difference in compare_run(
            case.name, names.outputs(before), names.outputs(want), names.settled(have)
        )
    ]
    verification = judge(found, cut_anything=bool(candidate.made.deleted))
    if verification.passed is None:
        progress.say("the deleted branches change nothing measurable, so the check tells little")
    return verification


class _Names:
    """What the pruned graph calls the original's inputs and outputs, and which it lacks.

    Args:
        made: How it was pruned.
        half_written: The original's outputs that are compared by their shapes only.
    """

    def __init__(self, made: PassReport, half_written: set[str]) -> None:
        self._gone_inputs = {name for entry in made.deleted for name in entry.inputs_removed}
        self._gone_outputs = {name for entry in made.deleted for name in entry.outputs_removed}
        self._renamed = made.kv_renumbering
        self._blank = {self._renamed.get(name, name) for name in half_written}

    def inputs(self, feed: Mapping[str, Any]) -> Arrays:
        return self._translated(feed, self._gone_inputs)

    def outputs(self, arrays: Mapping[str, Any]) -> Arrays:
        return self.settled(self._translated(arrays, self._gone_outputs))

    def settled(self, arrays: Mapping[str, Any]) -> Arrays:
        """The pruned graph's outputs, with nothing in those that are half-written."""
        return {k: np.zeros_like(v) if k in self._blank else v for k, v in arrays.items()}

    def _translated(self, arrays: Mapping[str, Any], gone: set[str]) -> Arrays:
        return {self._renamed.get(k, k): v for k, v in arrays.items() if k not in gone}


def _serialised(model: ir.Model) -> bytes:
    import onnx_ir

    data: bytes = onnx_ir.to_proto(model).SerializeToString()
    return data


def _outputs(
    runtime: Any,
    model: bytes,
    folder: Path,
    feeds: Sequence[Arrays],
    task: Task,
    optimise: bool,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> list[Arrays]:
    options = runtime.SessionOptions()
    options.add_external_initializers(list(given), list(given.values()))
    options.log_severity_level = _ONLY_FATAL
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))
    results = []
    try:
        graph = with_exact_products(model)
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
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
