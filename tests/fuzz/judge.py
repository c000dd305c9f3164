"""What must hold for any file: refused with a clear error, or cut as the masked oracle says."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from exporter.cut.random_inputs import cases, draw
from graph_passes import (
    Deletion,
    OnnxFileError,
    Refusal,
    ResidualSite,
    SurgeryError,
    find_sites,
    prune_graph,
)
from graph_passes.files.storage import load_model, save_model
from graph_passes.testing import masked_model
from tests.graph_passes.graph_support import tiny

Arrays = Mapping[str, Any]

_RELATIVE = 1e-4  # fused norms that are taken apart round otherwise
_FATAL, _PATIENCE_S = 4, 20


@functools.cache
def _serialised(name: str) -> bytes:
    data: bytes = ir.to_proto(tiny(name, layers=2)).SerializeToString()
    return data


def graph(name: str) -> onnx.ModelProto:
    """A fresh copy of one of the graphs that the tests of the surgery have."""
    return onnx.ModelProto.FromString(_serialised(name))


class WrongModel(AssertionError):
    """The property doesn't hold."""


@dataclass(frozen=True)
class Cut:
    """What is asked for: some of the sites that are found, by their numbers, and how."""

    picks: tuple[float, ...]
    whole_blocks: bool = False
    renumber: bool = False

    def deletions(self, sites: Sequence[ResidualSite]) -> list[Deletion]:
        chosen = [sites[int(pick * len(sites))] for pick in self.picks]
        return [
            Deletion(site.layer, "block" if self.whole_blocks else site.kind) for site in chosen
        ]


class Crashed(Exception):
    """The runtime took the process with it, or never came back."""


class Runtime:
    """ONNX Runtime in a process of its own: some broken graphs end the process that runs them."""

    _pool: ProcessPoolExecutor | None = None

    def run(self, model: bytes, feeds: Sequence[Arrays]) -> list[dict[str, Any]] | str:
        """Every feed's outputs, or why the model doesn't run."""
        self._pool = self._pool or ProcessPoolExecutor(1, get_context("spawn"))
        try:
            return self._pool.submit(_run, model, feeds).result(_PATIENCE_S)
        except (BrokenExecutor, TimeoutError) as error:
            self.close()
            raise Crashed from error

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in [*(pool._processes or {}).values()]:
                process.kill()
            pool.shutdown()


def _run(model: bytes, feeds: Sequence[Arrays]) -> list[dict[str, Any]] | str:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names, known = ([value.name for value in ends] for ends in
        (session.get_outputs(), session.get_inputs()))  # fmt: skip
        runs = [session.run(names, {k: feed[k] for k in known if k in feed}) for feed in feeds]
    except Exception as error:  # each of ONNX Runtime's own classes derives from Exception
        return str(error)
    return [dict(zip(names, arrays, strict=True)) for arrays in runs]


RUNTIME = Runtime()


def check_file(path: Path, cut: Cut, *, run: bool = True) -> str:
    """Reads a file, cuts it and holds it against the oracle; gives what came of it."""
    try:
        model = load_model(path)
    except OnnxFileError as error:
        _clear(error.message, error.hint)
        return "no file"
    before = _bytes(model)
    result = find_sites(model)
    sites = [item for item in result if isinstance(item, ResidualSite)]
    for refusal in result:
        if isinstance(refusal, Refusal):
            _clear(refusal.reason)
    deletions = cut.deletions(sites) if sites else [Deletion(0, "attention")]
    try:
        pruned, report = prune_graph(model, deletions, renumber_kv=cut.renumber)
    except SurgeryError as error:
        _clear(error.message, error.hint)
        return "refused"
    finally:
        if _bytes(model) != before:
            raise WrongModel("the model that was passed in has changed")
    if not report.deleted:
        return "refused"
    try:
        save_model(pruned, path.with_name("pruned.onnx"))
    except OnnxFileError as error:
        _clear(error.message, error.hint)
        return "refused"
    gone = {name for entry in report.deleted for name in entry.outputs_removed}
    lost = {name for entry in report.deleted for name in entry.inputs_removed}
    renamed = report.kv_renumbering
    return _compare(model, pruned, deletions, gone, lost, renamed) if run else "does not run"


def _clear(*lines: str) -> None:
    for line in lines:
        if "\n" in line or "Traceback" in line or len(line) > 2000:
            raise WrongModel(f"no clear message: {line!r}")
    if not lines[0]:
        raise WrongModel("an empty message")


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


# An older opset, or a type that nothing declares: other domains' operators aren't checked for them.
_NOT_OURS = ("No Op registered for LayerNormalization", "Invalid tensor data type 0")


def _compare(
    model: ir.Model, pruned: ir.Model, deletions: Sequence[Deletion], gone: set[str],
    lost: set[str], renamed: Mapping[str, str],
) -> str:  # fmt: skip
    feeds = _feeds(model)
    masked = None
    try:
        if feeds and not isinstance(RUNTIME.run(_bytes(model), feeds), str):
            masked = RUNTIME.run(_bytes(masked_model(model, deletions)), feeds)
    except Crashed:
        return "does not run"
    if masked is None or isinstance(masked, str):
        return "does not run"  # a Sub of truth values, for one
    cut_feeds = [{renamed.get(k, k): v for k, v in feed.items() if k not in lost} for feed in feeds]
    actual = RUNTIME.run(_bytes(pruned), cut_feeds)
    if isinstance(actual, str):
        raise WrongModel(f"the original and the masked one run, the result doesn't: {actual}")
    expected = [{renamed.get(k, k): v for k, v in run.items() if k not in gone} for run in masked]
    if _ranks(expected) != _ranks(actual) and _hides_a_rank(model):
        return "shapes undeclared"
    flags = [_equal(want, have) for want, have in zip(expected, actual, strict=True)]
    error = _checks(pruned) if _checks(model) is None else None
    if error is not None and not any(reason in error for reason in _NOT_OURS):
        raise WrongModel(f"the result fails the full check: {error}")
    return "equal" if all(flags) else "says nothing"


def _ranks(runs: Sequence[Arrays]) -> list[dict[str, int]]:
    return [{name: np.ndim(array) for name, array in run.items()} for run in runs]


def _hides_a_rank(model: ir.Model) -> bool:
    """Whether a sum's shape is undeclared."""
    sums = (node for node in model.graph if node.op_type == "Add")
    return any(value.shape is None for node in sums for value in (*node.inputs, *node.outputs)
               if value is not None)  # fmt: skip


def _checks(model: ir.Model) -> str | None:
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except Exception as error:  # the checker's, shape inference's, and others
        return str(error) or type(error).__name__
    return None


def _feeds(model: ir.Model) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise cast to integers
        try:
            return [draw(model, case, rng) for case in cases(model)]
        except Exception:  # a mutant may declare its inputs in ways that nothing fits
            return []


def _equal(expected: Arrays, actual: Arrays) -> bool:
    """Whether there was anything finite to compare; raises where it differs."""
    if set(expected) != set(actual):
        raise WrongModel(f"other outputs: {sorted(set(expected) ^ set(actual))}")
    flag = False
    for name, want in expected.items():
        have = actual[name]
        if not isinstance(want, np.ndarray) or want.dtype.kind in "OSU":
            continue
        if want.shape != have.shape or want.dtype != have.dtype:
            raise WrongModel(
                f"{name!r} is {want.dtype}{want.shape} masked, {have.dtype}{have.shape} pruned"
            )
        want, have = want.astype(np.float64), have.astype(np.float64)
        finite = np.isfinite(want)  # a branch that overflows gives NaN when it is masked
        scale = max(1.0, float(np.abs(want[finite]).max(initial=0.0)))
        difference = np.abs(want[finite] - have[finite])
        if difference.size and not difference.max() <= _RELATIVE * scale:
            raise WrongModel(f"{name!r} differs by {difference.max():.2e} of {scale:.2e}")
        flag = flag or bool(difference.size)
    return flag
