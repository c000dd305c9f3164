"""Cuts an architecture's graphs in many ways and holds each cut against PyTorch."""

from __future__ import annotations

import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from graph_passes import Deletion, Refusal, ResidualSite, SublayerRef, find_sites, prune_graph
from graph_passes.errors import SurgeryError
from graph_passes.types import PassReport
from tests.architectures.catalogue import Architecture
from tests.architectures.exports import Exported, export
from tests.architectures.graphs import subject_of
from tests.architectures.models import Silenced, build, silenced, sublayer_modules
from tests.architectures.subjects import Step, Subject
from tests.architectures.table import COUNTS, TOLERANCE, Row

Arrays = dict[str, NDArray[Any]]
Cut = frozenset[SublayerRef]
_TRIES = 50


class WrongModelError(AssertionError):
    """A graph that isn't what it has to be; where, and what is wrong."""


def check(architecture: Architecture, folder: Path, random_sets: int) -> Row:
    """Builds, exports, cuts and compares one architecture; a failure is part of the row."""
    begin = time.perf_counter()
    row = Row(architecture.name, graph=architecture.graph, form=architecture.form)
    try:
        _Checker(architecture, folder, row).run(random_sets)
    except Exception as error:  # the row says what and the others go on
        reason = f"{type(error).__name__}: {_first_line(error)}"
        known = architecture.not_exported
        if known and known in str(error):
            row.not_exported = known
        else:
            row.failed = reason
    row.seconds = round(time.perf_counter() - begin, 1)
    return row


class _Checker:
    def __init__(self, architecture: Architecture, folder: Path, row: Row) -> None:
        self._architecture = architecture
        self._row = row
        self.model = build(architecture)
        row.model_class = type(self.model).__name__
        self.subject: Subject = subject_of(architecture, self.model)
        self.files: list[Exported] = export(architecture, self.model, self.subject, folder)
        row.exporter = self.files[0].exporter
        self.modules: dict[SublayerRef, tuple[Silenced, ...]] = {}

    def run(self, random_sets: int) -> None:
        if self._architecture.refused:
            self._expect_refusal()
            return
        self.modules = sublayer_modules(self._architecture, self.model)
        self._row.layers = 1 + max(ref.layer for ref in self.modules)
        self._compare_sites()
        plain = self._pytorch(frozenset())
        self._row.uncut_error = self._error(plain, self._onnx(frozenset()))
        if self._row.uncut_error > TOLERANCE:
            raise WrongModelError(f"the uncut graph is off by {self._row.uncut_error:.1e}")
        strengths = []
        sublayers = list(self.modules)
        for cut in cuts(sublayers):
            witness = self._pytorch(cut)
            if len(cut) == 1:
                strengths.append(_main_difference(witness, plain))
            self._check_cut(cut, witness)
        before = self._row.cuts
        for cut in random_cuts(sublayers, self._architecture.name, random_sets):
            self._check_cut(cut, self._pytorch(cut))
        self._row.random_sets = self._row.cuts - before
        self._row.weakest = min(strengths)
        if self._row.weakest <= COUNTS:
            raise WrongModelError(f"a sublayer changes the output by {self._row.weakest:.1e} only")

    def _check_cut(self, cut: Cut, witness: Sequence[Arrays]) -> None:
        name = ", ".join(map(str, sorted(cut)))
        try:
            # Every other cut with dense numbers.
            error = self._error(witness, self._onnx(cut, renumber=self._row.cuts % 2 == 1))
        except SurgeryError as reason:
            if _lost_length(cut, self.modules, reason):
                self._row.cuts_refused += 1
            else:
                self._row.wrong.append(f"{name}: {reason}")
            return
        except Exception as reason:  # a wrong model, whatever shows it
            self._row.wrong.append(f"{name}: {type(reason).__name__}: {_first_line(reason)}")
            return
        self._row.cuts += 1
        self._row.worst_error = max(self._row.worst_error, error)
        if not error <= TOLERANCE:
            self._row.wrong.append(f"{name}: off by {error:.1e}")

    def _expect_refusal(self) -> None:
        for file in self.files:
            sites = find_sites(file.model)
            reasons = [site.reason for site in sites if isinstance(site, Refusal)]
            if len(reasons) != len(sites) or not re.search(self._architecture.refused, reasons[0]):
                raise WrongModelError(f"not refused as it must be: {sites}")
            self._row.refused = reasons[0]

    def _compare_sites(self) -> None:
        """Every sublayer of the model is found in each graph, and nothing else."""
        want = sorted(self.modules)
        for file in self.files:
            sites = find_sites(file.model)
            refusals = [site for site in sites if isinstance(site, Refusal)]
            if refusals:
                raise WrongModelError(f"refused at {refusals[0].node}: {refusals[0].reason}")
            have = sorted(site.ref for site in sites if isinstance(site, ResidualSite))
            if have != want:
                raise WrongModelError(f"found {_names(have)} instead of {_names(want)}")
        self._row.sites = dict(Counter(ref.kind for ref in want))

    def _pytorch(self, cut: Cut) -> list[Arrays]:
        everything = list(chain.from_iterable(self.modules.values()))
        chosen = list(chain.from_iterable(self.modules[ref] for ref in cut))
        with torch.inference_mode(), silenced(chosen, everything):
            return _walk(self.subject, lambda step, inputs: self._module(step, inputs))

    def _module(self, step: Step, inputs: Mapping[str, Any]) -> Arrays:
        part = self.subject.parts[step.part]
        tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
        return dict(
            zip(part.outputs, (v.numpy().copy() for v in part.module(tensors)), strict=True)
        )

    def _onnx(self, cut: Cut, *, renumber: bool = False) -> list[Arrays]:
        graphs = [_Graph(file, cut, renumber=renumber) for file in self.files]
        if len({graph.layer_numbers for graph in graphs}) > 1:
            raise WrongModelError("the files were renumbered in different ways")
        return _walk(self.subject, lambda step, inputs: graphs[step.part].run(inputs))

    def _error(self, witness: Sequence[Arrays], have: Sequence[Arrays]) -> float:
        return max(map(_step_error, self.subject.steps, witness, have))


def _lost_length(cut: Cut, everything: Collection[SublayerRef], reason: SurgeryError) -> bool:
    """Whether a cut of all self-attentions is refused for the past length."""
    attentions = {ref for ref in everything if ref.kind == "attention"}
    return attentions <= cut and "no input that stays has the same length" in str(reason)


class _Graph:
    """A file, cut, in a session."""

    def __init__(self, file: Exported, cut: Cut, *, renumber: bool) -> None:
        model, names = file.model, dict[str, str]()
        if cut:
            deletions = [Deletion(ref.layer, ref.kind) for ref in sorted(cut)]
            model, report = prune_graph(model, deletions, renumber_kv=renumber)
            _check_report(file.model, report, cut)
            names = {new: old for old, new in report.kv_renumbering.items()}
        self.layer_numbers = frozenset((_number(new), _number(old)) for new, old in names.items())
        self._names = {v.name: names.get(v.name or "", v.name) for v in model.graph.inputs}
        self._outputs = [
            names.get(value.name or "", value.name or "") for value in model.graph.outputs
        ]
        self._session = _session(model, file.folder)

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Takes and gives everything under the original's names."""
        feed = {new: np.asarray(inputs[old]) for new, old in self._names.items()}
        return dict(zip(self._outputs, self._session.run(None, feed), strict=True))


def _number(name: str) -> int:
    return int(re.findall(r"\d+", name)[0])


def _session(model: ir.Model, folder: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(folder))
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _walk(subject: Subject, run: Any) -> list[Arrays]:
    """Runs all steps; caches go from one to the next where there are any."""
    results: list[Arrays] = []
    kept: Arrays = {}
    for step in subject.steps:
        inputs: dict[str, Any] = dict(step.inputs)
        inputs |= {name: kept[source] for name, source in step.carried.items() if source in kept}
        results.append(run(step, inputs))
        kept |= results[-1]
    return results


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


def cuts(sublayers: Sequence[SublayerRef]) -> list[Cut]:
    """Every sublayer alone, and all of each kind, as far as something is left."""
    results: dict[Cut, None] = {frozenset([ref]): None for ref in sublayers}
    for kind in ("attention", "mixer", "cross_attention", "mlp"):
        results[frozenset(ref for ref in sublayers if ref.kind == kind)] = None
    return [cut for cut in results if cut and len(cut) < len(sublayers)]


def random_cuts(sublayers: Sequence[SublayerRef], name: str, number: int) -> list[Cut]:
    """All but one, and different sets of several, the same in every run."""
    chance = random.Random(zlib.crc32(name.encode()))
    result = {frozenset(sublayers) - {chance.choice(sublayers)}: None}
    for _ in range(_TRIES * number):
        if len(result) < number:
            size = chance.randint(2, len(sublayers) - 1)
            result[frozenset(chance.sample(sublayers, size))] = None
    return list(result)[:number]


def _step_error(step: Step, witness: Mapping[str, Any], have: Mapping[str, Any]) -> float:
    """The largest difference at real positions, relative to the largest value of its sort."""
    main = next(iter(witness))
    strangers = set(have) - set(witness)
    if strangers or main not in have:
        raise WrongModelError(f"the outputs are {sorted(have)}")
    groups = {True: [main], False: [name for name in have if name != main]}
    return max(
        _relative([_pair(step, name, is_main, witness, have) for name in names])
        for is_main, names in groups.items()
        if names
    )


def _pair(
    step: Step, name: str, is_main: bool, witness: Mapping[str, Any], have: Mapping[str, Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    want, got = witness[name], have[name]
    if want.shape != got.shape:
        raise WrongModelError(f"{name} has the shape {got.shape} instead of {want.shape}")
    real, axes = (step.real, (0, 1)) if is_main else (_real_entries(step, name), (0, 2))
    if real is None:
        return want, got
    want, got = (np.moveaxis(array, axes, (0, 1))[real.numpy()] for array in (want, got))
    return want, got


def _real_entries(step: Step, name: str) -> torch.Tensor | None:
    if not name.endswith((".key", ".value")):
        return None
    return step.source if ".encoder." in name else step.cached


def _relative(pairs: Collection[tuple[NDArray[Any], NDArray[Any]]]) -> float:
    scale = max(float(np.abs(want).max()) for want, _ in pairs)
    error = max(float(np.abs(want - got).max()) for want, got in pairs)
    return error / scale if np.isfinite(error) else float("inf")


def _main_difference(one: Sequence[Arrays], other: Sequence[Arrays]) -> float:
    """How far two models are apart in the step where they differ most."""
    main = next(iter(one[0]))
    return max(_relative([(a[main], b[main])]) for a, b in zip(one, other, strict=True))


def _names(refs: Sequence[SublayerRef]) -> str:
    return ", ".join(map(str, refs)) or "nothing"


def _first_line(error: BaseException) -> str:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line for line in chain(str(root).strip().splitlines()) if line.strip()]
    return (lines or [""])[0][:300]
