"""Holds a pruned graph against the masked oracle: the original with its branches times zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.artifacts import Verification
from exporter.cut.oracle.inputs import cases, draw, half_written
from exporter.cut.oracle.setting import FULL, Setting
from exporter.cut.oracle.verdict import MaskedDifference, compare_run, judge
from exporter.cut.oracle.weights import relocated, set_apart
from exporter.engines.runners.sessions import new_session
from exporter.engines.runners.widening import (
    has_bfloat16,
    in_float32,
    loaded,
    narrowed_arrays,
    widened_arrays,
)
from exporter.errors import VerificationError
from exporter.optional import require
from exporter.progress import Progress, Task
from graph_passes import testing
from graph_passes.files.storage import runtime_form
from graph_passes.types import Deletion, PassReport, SublayerRef

if TYPE_CHECKING:
    import onnx_ir as ir

    from graph_passes.replacements import ReplacementTensors

Arrays = dict[str, NDArray[Any]]

_ACCURACY, _IN_FLOAT32 = "accuracy_level", 1  # of MatMulNBits and its kin


@dataclass(frozen=True)
class UncutGraph:
    """A graph before the cut, and what the oracle makes of it.

    Attributes:
        model: The graph.
        weights_folder: Where its external weights lie.
        deletions: Whose branches are multiplied by zero.
        replacements: The numbers that are added in their places.
    """

    model: ir.Model
    weights_folder: Path
    deletions: Sequence[Deletion]
    replacements: Mapping[SublayerRef, ReplacementTensors]


@dataclass(frozen=True)
class PrunedFile:
    """A pruned graph's file, the folder that its weights lie in, and how it was made."""

    file: Path
    weights_folder: Path
    made: PassReport


def verify_candidate(
    original: UncutGraph, pruned: PrunedFile, progress: Progress, setting: Setting = FULL
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

    Graphs in bfloat16, for which the runtime's CPU has hardly a kernel, are run in float32, all
    three alike; the method says that too.

    Args:
        original: The graph before the cut, and what was cut.
        pruned: The result.
        progress: Who is told.
        setting: From :func:`exporter.cut.oracle.setting.choose`.

    Raises:
        VerificationError: An output differs by more than 1e-4 times its largest value, or 1 if
            that is larger (1e-2 in fp16, 5e-2 in bf16), or by more than a hundredth of what
            masking changes in it and rounding explains; is missing; or can't be computed.
        MissingDependencyError: Without ONNX Runtime.
    """
    if setting.thrifty:
        progress.say(f"verifying at a cheaper setting: {setting.reason}")
    rng, model = np.random.default_rng(0), original.model
    inputs = [(case, draw(model, case, rng)) for case in cases(model, one=setting.thrifty)]
    widened = has_bfloat16(model)
    with progress.task("verify against the masked original", 3 * len(inputs), "runs") as task:
        # A value that is fused away is not rounded, and in int8 each rounding shows.
        optimise = not any(node.op_type == "QuantizeLinear" for node in model.graph)
        runtime = _Runtime(optimise=optimise, thrifty=setting.thrifty, widen=widened, task=task)
        runs = _run_all(original, pruned, [feed for _, feed in inputs], runtime)
    found = _differences([case.name for case, _ in inputs], *runs)
    verification = judge(
        found, setting.reason, cut_anything=bool(pruned.made.deleted), widened=widened
    )
    if verification.passed is None:
        progress.say("the deleted branches have no measurable effect, so the check proves little")
    return verification


def _run_all(
    original: UncutGraph, pruned: PrunedFile, feeds: Sequence[Arrays], runtime: _Runtime
) -> tuple[list[Arrays], list[Arrays], list[Arrays]]:
    """What the original, the masked original and the pruned graph give, by the latter's names."""
    plain = runtime.outputs_of(original.model, original.weights_folder, feeds)
    masked_graph = testing.masked_model(original.model, original.deletions, original.replacements)
    masked = runtime.outputs_of(masked_graph, original.weights_folder, feeds)
    names = _Names(pruned.made, half_written(original.model))
    feeds = [names.inputs(feed) for feed in feeds]
    cut = runtime.outputs_of_file(pruned.file, pruned.weights_folder, feeds)
    if has_bfloat16(original.model) and original.replacements:
        # They are rounded in the graph, and not in the oracle.
        plain, masked, cut = (list(map(narrowed_arrays, runs)) for runs in (plain, masked, cut))
    return (
        list(map(names.outputs, plain)),
        list(map(names.outputs, masked)),
        list(map(names.settled, cut)),
    )


def _differences(
    cases_: Sequence[str],
    plain: Sequence[Arrays],
    masked: Sequence[Arrays],
    pruned: Sequence[Arrays],
) -> list[MaskedDifference]:
    runs = zip(cases_, plain, masked, pruned, strict=True)
    return [difference for run in runs for difference in compare_run(*run)]


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

    def __init__(self, *, optimise: bool, thrifty: bool, widen: bool, task: Task) -> None:
        self._module = require("onnxruntime", extra="cpu")
        self._widen = widen
        self._optimise = optimise
        self._thrifty = thrifty
        self._task = task

    def outputs_of(self, model: ir.Model, folder: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
        """Every feed's outputs; the model's lazy tensors may have become others afterwards."""
        if self._widen:
            model, feeds = in_float32(model), list(map(widened_arrays, feeds))
        given = set_apart(model, self._module)
        return self._outputs(*runtime_form(model, folder), feeds, given)

    def outputs_of_file(self, file: Path, folder: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
        """The same of a graph's file as it is, unless it has to be widened."""
        graph = relocated(file, folder)
        if self._widen:
            return self.outputs_of(loaded(graph, folder), folder, feeds)
        return self._outputs(graph, folder, feeds)

    def _outputs(
        self,
        model: bytes,
        folder: Path,
        feeds: Sequence[Arrays],
        given: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Arrays]:
        """Every feed's outputs; ``given`` holds weights that lie in no file."""
        results = []
        try:
            session = new_session(
                with_exact_products(model),
                optimise=self._optimise,
                thrifty=self._thrifty,
                weights_folder=folder,
                weights=given,
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


def with_exact_products(graph: bytes) -> bytes:
    """A serialised graph whose products with packed weights are computed in float32.

    At their usual level of accuracy they quantise their input to int8, so that a difference in
    the last place, as fused sums make it, comes out as a whole step of the quantiser.
    """
    if _ACCURACY.encode() not in graph:
        return graph
    proto = onnx.ModelProto.FromString(graph)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == _ACCURACY and attribute.i:
                attribute.i = _IN_FLOAT32
    data: bytes = proto.SerializeToString()
    return data
