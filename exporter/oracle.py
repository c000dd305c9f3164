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
from exporter.oracle_setting import FULL, Setting
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
    setting: Setting = FULL,
) -> Verification:
    """Runs both on ONNX Runtime's CPU provider, with random inputs of the graph's own shapes.

    A decoder with a cache is run in prefill (empty cache) and in decode (one token), anything
    else once; batches are padded on the left where there is a mask. All outputs that are left
    are compared, the caches included. The plain original is run too: the error must be small
    against what masking changes, or a wrong cut of a weak branch would pass.

    One session is open at a time. The thrifty setting needs hardly any memory, and the method says
    that it was taken: decode only (or the one run of a model without a cache), the graph not
    optimised, the weights left in their file. That still runs every node of the graph on the real
    weights, a filled cache and a padded batch; what it leaves out is the empty cache of prefill,
    and the runtime's own optimisations.

    Args:
        original: The graph before the cut.
        weights_folder: Where its external weights lie.
        deletions: What was cut.
        candidate: The result.
        progress: Who is told.
        replacements: The numbers that took the places of deleted branches.
        setting: From :func:`exporter.oracle_setting.choose`.

    Raises:
        VerificationError: An output differs by more than 1e-4 times its largest value, or 1 if
            that is larger (1e-2 in fp16, 5e-2 in bf16), or by more than a hundredth of what
            masking changes in it and rounding explains; is missing; or can't be computed.
        MissingDependencyError: Without ONNX Runtime.
    """
    from graph_passes.files.storage import runtime_form
    from graph_passes.testing import masked_model

    if setting.thrifty:
        progress.say(f"verifying at a cheaper setting: {setting.reason}")
    rng = np.random.default_rng(0)
    inputs = [(case, draw(original, case, rng)) for case in cases(original, one=setting.thrifty)]
    feeds = [feed for _, feed in inputs]
    # A value that is fused away is not rounded, and in int8 each rounding shows.
    optimise = not any(node.op_type == "QuantizeLinear" for node in original.graph)
    with progress.task("verify against the masked original", 3 * len(inputs)) as task:
        runtime = _Runtime(optimise=optimise, thrifty=setting.thrifty, task=task)
        plain = runtime.outputs(*runtime_form(original, weights_folder), feeds)
        masked = masked_model(original, deletions, replacements)
        given = set_apart(masked, runtime.module)
        expected = runtime.outputs(*runtime_form(masked, weights_folder), feeds, given)
        names = _Names(candidate.made, half_written(original))
        pruned = relocated(candidate.file, candidate.weights_folder)
        pruned_feeds = [names.inputs(feed) for feed in feeds]
        actual = runtime.outputs(pruned, candidate.weights_folder, pruned_feeds)
    found = [
        difference
        for (case, _), before, want, have in zip(inputs, plain, expected, actual, strict=True)
        for difference in compare_run(
            case.name, names.outputs(before), names.outputs(want), names.settled(have)
        )
    ]
    verification = judge(found, setting.reason, cut_anything=bool(candidate.made.deleted))
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


class _Runtime:
    """Runs models on ONNX Runtime, one after the other; only one is in memory at a time."""

    def __init__(self, *, optimise: bool, thrifty: bool, task: Task) -> None:
        self.module = require("onnxruntime", extra="cpu")
        self._optimise = optimise and not thrifty
        self._thrifty = thrifty
        self._task = task

    def outputs(
        self,
        model: bytes,
        folder: Path,
        feeds: Sequence[Arrays],
        given: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Arrays]:
        """Every feed's outputs; ``given`` holds weights that lie in no file."""
        results = []
        options = self._options(folder)
        options.add_external_initializers(list(given), list(given.values()))
        try:
            session = self.module.InferenceSession(
                with_exact_products(model), options, providers=["CPUExecutionProvider"]
            )
            names = [value.name for value in session.get_outputs()]
            for feed in feeds:
                results.append(dict(zip(names, session.run(names, feed), strict=True)))
                self._task.advance()
        except Exception as error:  # each of ONNX Runtime's own classes derives from Exception
            reason = str(error).strip().splitlines()[0][:300]
            raise VerificationError(
                f"The result can't be verified: ONNX Runtime says {reason}",
                "--verify none leaves this check out; the report will say so.",
            ) from error
        return results

    def _options(self, folder: Path) -> Any:
        options = self.module.SessionOptions()
        options.log_severity_level = _ONLY_FATAL
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))
        if not self._optimise:
            options.graph_optimization_level = self.module.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self._thrifty:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False  # it gives nothing back
            options.enable_mem_pattern = False
            # Widens each half-precision weight just before it is needed, not all at the start.
            options.execution_order = self.module.ExecutionOrder.PRIORITY_BASED
        return options
