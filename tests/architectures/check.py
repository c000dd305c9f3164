"""Cuts an architecture's graphs in many ways and holds each cut against PyTorch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes import Deletion, Refusal, SublayerRef, find_sites, prune_graph
from graph_passes.errors import SurgeryError
from graph_passes.files.storage import load_model
from graph_passes.types import PassReport
from tests.architectures.catalogue import Architecture
from tests.trials import (
    OPSET,
    Arrays,
    Cut,
    cuts,
    export_part,
    random_cuts,
    root_of,
    run_named,
    session_of,
)

TOLERANCE = 1e-5
"""Relative to the largest logit, and in caches to the largest entry of any."""
COUNTS = 100 * TOLERANCE
"""How much every sublayer must matter, or a wrong cut of it would pass."""


@dataclass
class Row:
    """What was seen of one architecture."""

    sublayers: int = 0
    kinds: int = 0
    cuts: int = 0
    random_sets: int = 0
    cuts_refused: int = 0
    worst_error: float = 0.0
    wrong: list[str] = field(default_factory=list)
    note: str = ""


class WrongModelError(AssertionError):
    """A graph that isn't what it has to be; where, and what is wrong."""


def check(architecture: Architecture, folder: Path, random_sets: int) -> Row:
    """Builds, exports, cuts and compares one architecture; wrong cuts are part of the row."""
    row = Row()
    try:
        checker = _Checker(architecture, folder, row)
    except Exception as error:
        if not architecture.not_exported or architecture.not_exported not in str(error):
            raise
        row.note = f"not exported: {architecture.not_exported}"
        return row
    if architecture.refused:
        row.note = f"refused: {checker.refusal()}"
    else:
        checker.run(random_sets)
    if row.cuts_refused:
        row.note = f"{row.cuts_refused} more refused: no input that is left has the past length"
    return row


class _Checker:
    def __init__(self, architecture: Architecture, folder: Path, row: Row) -> None:
        from exporter.export.torch_export import export_onnx
        from tests.architectures.graphs import subject_of
        from tests.architectures.models import build, sublayer_modules
        from tests.tiny_models import as_loaded

        self._architecture, self._row = architecture, row
        self._model = build(architecture)
        self.subject = subject_of(architecture, self._model)
        if architecture.graph in ("decoder", "encoder"):
            loaded = as_loaded(self._model, architecture.name)
            paths = [export_onnx(loaded, folder / "model", opset=OPSET)]
        else:
            paths = [export_part(part, folder / part.name) for part in self.subject.parts]
        self._files = [(load_model(path), path.parent) for path in paths]
        self._modules = {} if architecture.refused else sublayer_modules(architecture, self._model)

    def refusal(self) -> str:
        """Why all files are refused, as they must be."""
        for model, _ in self._files:
            sites = find_sites(model)
            reasons = [site.reason for site in sites if isinstance(site, Refusal)]
            if len(reasons) != len(sites) or not re.search(self._architecture.refused, reasons[0]):
                raise WrongModelError(f"not refused as it must be: {sites}")
        return reasons[0]

    def run(self, random_sets: int) -> None:
        self._compare_sites()
        plain = self._pytorch(frozenset())
        if not (error := self._error(plain, self._onnx(frozenset()))) <= TOLERANCE:
            raise WrongModelError(f"the uncut graph is off by {error:.1e}")
        sublayers, main = list(self._modules), next(iter(plain[0]))
        for cut in cuts(sublayers):
            witness = self._pytorch(cut)
            change = max(
                _relative([(a[main], b[main])]) for a, b in zip(witness, plain, strict=True)
            )
            if len(cut) == 1 and change <= COUNTS:
                raise WrongModelError(f"a sublayer changes the output by {change:.1e} only")
            self._check_cut(cut, witness)
        before = self._row.cuts
        for cut in random_cuts(sublayers, self._architecture.name, random_sets):
            self._check_cut(cut, self._pytorch(cut))
        self._row.random_sets = self._row.cuts - before

    def _check_cut(self, cut: Cut, witness: Sequence[Arrays]) -> None:
        name = ", ".join(map(str, sorted(cut)))
        try:
            # Every other cut with dense numbers.
            error = self._error(witness, self._onnx(cut, renumber=self._row.cuts % 2 == 1))
        except Exception as reason:  # a wrong model, whatever shows it
            if isinstance(reason, SurgeryError) and _lost_length(cut, self._modules, reason):
                self._row.cuts_refused += 1
            else:
                self._row.wrong.append(f"{name}: {root_of(reason)}")
            return
        self._row.cuts += 1
        self._row.worst_error = max(self._row.worst_error, error)
        if not error <= TOLERANCE:
            self._row.wrong.append(f"{name}: off by {error:.1e}")

    def _compare_sites(self) -> None:
        """Every sublayer of the model is found in each graph, and nothing else."""
        want = sorted(self._modules)
        for model, _ in self._files:
            sites = find_sites(model)
            if refusals := [site for site in sites if isinstance(site, Refusal)]:
                raise WrongModelError(f"refused at {refusals[0].node}: {refusals[0].reason}")
            if (have := sorted(site.ref for site in sites)) != want:  # type: ignore[union-attr]
                raise WrongModelError(f"found {[*map(str, have)]} instead of {[*map(str, want)]}")
        self._row.sublayers, self._row.kinds = len(want), len({ref.kind for ref in want})

    def _pytorch(self, cut: Cut) -> list[Arrays]:
        import torch

        from tests.architectures.models import silenced

        def run(at: int, inputs: Mapping[str, Any]) -> Arrays:
            part = self.subject.parts[at]
            tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
            values = part.function(part.model, tensors)
            return dict(zip(part.outputs, (v.numpy().copy() for v in values), strict=True))

        everything = list(chain.from_iterable(self._modules.values()))
        chosen = list(chain.from_iterable(self._modules[ref] for ref in cut))
        with torch.inference_mode(), silenced(chosen, everything):
            return self._walk(run)

    def _onnx(self, cut: Cut, *, renumber: bool = False) -> list[Arrays]:
        graphs = [_Graph(*file, cut, renumber=renumber) for file in self._files]
        if len({graph.layer_numbers for graph in graphs}) > 1:
            raise WrongModelError("the files were renumbered in different ways")
        return self._walk(lambda at, inputs: graphs[at].run(inputs))

    def _walk(self, run: Any) -> list[Arrays]:
        """Runs all steps; caches go from one to the next where there are any."""
        results, kept = list[Arrays](), Arrays()
        for step in self.subject.steps:
            past = {name: kept[source] for name, source in step.carried.items() if source in kept}
            results.append(run(step.part, {**step.inputs, **past}))
            kept |= results[-1]
        return results

    def _error(self, witness: Sequence[Arrays], have: Sequence[Arrays]) -> float:
        return max(map(_step_error, self.subject.steps, witness, have))


def _lost_length(cut: Cut, everything: Collection[SublayerRef], reason: SurgeryError) -> bool:
    """Whether a cut of all self-attentions is refused for the past length."""
    attentions = {ref for ref in everything if ref.kind == "attention"}
    return attentions <= cut and "no input that stays has the same length" in str(reason)


class _Graph:
    """A file, cut, in a session that takes and gives everything under the original's names."""

    def __init__(self, model: ir.Model, folder: Path, cut: Cut, *, renumber: bool) -> None:
        self._names: dict[str, str] = {}
        if cut:
            deletions = [Deletion(ref.layer, ref.kind) for ref in sorted(cut)]
            pruned, report = prune_graph(model, deletions, renumber_kv=renumber)
            _check_report(model, report, cut)
            self._names, model = {new: old for old, new in report.kv_renumbering.items()}, pruned
        numbers = ((_number(new), _number(old)) for new, old in self._names.items())
        self.layer_numbers = frozenset(numbers)
        self._session = session_of(model, folder)

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        feed = dict(inputs) | {
            new: inputs[old] for new, old in self._names.items() if old in inputs
        }
        outputs = run_named(self._session, feed)
        return {self._names.get(name, name): value for name, value in outputs.items()}


def _number(name: str) -> int:
    return int(re.findall(r"\d+", name)[0])


_OWN = {
    "attention": re.compile(r"(?<!\.encoder)\.(key|value)$"),
    "cross_attention": re.compile(r"\.encoder\.(key|value)$"),
    "mixer": re.compile(r"\.(conv|recurrent)$"),
}
"""The names of what a sublayer keeps for the next step."""


def _check_report(original: ir.Model, report: PassReport, cut: Cut) -> None:
    """What was asked for went, and with each sublayer its own caches and no other's."""
    if {SublayerRef(entry.layer, entry.kind) for entry in report.deleted} != cut:
        raise WrongModelError("something else was deleted")
    public = [value.name or "" for value in (*original.graph.inputs, *original.graph.outputs)]
    for entry in report.deleted:
        gone = {*entry.inputs_removed, *entry.outputs_removed}
        own = _OWN.get(entry.kind)
        left = [n for n in public if own and own.search(n) and _number(n) == entry.layer]
        if left := [name for name in left if name not in gone]:
            raise WrongModelError(f"{entry.kind} {entry.layer} left {left[0]!r} behind")
        if others := [name for name in gone if _number(name) != entry.layer]:
            raise WrongModelError(f"{entry.kind} {entry.layer} took {others[0]!r} with it")


def _step_error(step: Any, witness: Mapping[str, Any], have: Mapping[str, Any]) -> float:
    """The largest difference at real positions, relative to the largest value of its sort."""
    main = next(iter(witness))
    if set(have) - set(witness) or main not in have:
        raise WrongModelError(f"the outputs are {sorted(have)}")
    pairs: dict[bool, list[tuple[Any, Any]]] = {}
    for name, got in have.items():
        want, real, axes = witness[name], None, (0, 2)
        if want.shape != got.shape:
            raise WrongModelError(f"{name} has the shape {got.shape} instead of {want.shape}")
        if name == main:
            real, axes = step.real, (0, 1)
        elif name.endswith((".key", ".value")):
            real = step.source if ".encoder." in name else step.cached
        if real is not None:
            want, got = (np.moveaxis(array, axes, (0, 1))[real.numpy()] for array in (want, got))
        pairs.setdefault(name == main, []).append((want, got))
    return max(map(_relative, pairs.values()))


def _relative(pairs: Sequence[tuple[Any, Any]]) -> float:
    scale = max(float(np.abs(want).max()) for want, _ in pairs)
    error = max(float(np.abs(want - got).max()) for want, got in pairs)
    return error / scale if np.isfinite(error) else float("inf")
