"""Which of a model's modules a pruned one does without, found by looking at one run of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PlannedDeletion
from exporter.models.ablation.branch_replacements import (
    BranchReplacement,
    BranchReplacements,
    first_input,
)
from exporter.models.architectures import SublayerModules, layer_modules, sublayers
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import hooked
from graph_passes.types import BLOCK_KINDS, SublayerRef

if TYPE_CHECKING:
    import torch

    from exporter.models.branch_modules import BranchRecord, PrunedStructure


def structure_for(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    cut: BranchReplacements,
    inputs: dict[str, torch.Tensor],
) -> PrunedStructure:
    """Which modules of a model go, and what stands in their places; nothing is changed."""
    from exporter.models.branch_modules import PrunedStructure

    model: Any = loaded.model
    paths = {module: path for path, module in model.named_modules()}
    parts = [part for part in sublayers(model) if part.ref in cut]
    places = {part.ref: _ReplacedPlace(model, part, paths) for part in parts}
    returned = _returned(model, [place.module for place in places.values()], inputs)
    keepers = _length_layers(model)
    branches = []
    passing = [paths[norm] for norm in _lonely_norms(model, cut, inputs)]
    for part in parts:
        name = part.ref
        place = places[name]
        record = _record(part, cut[name], paths[place.module], returned[place.module])
        keeps = part.kind == "attention" and part.layer in keepers
        changes = {"adds_residual": place.adds_residual, "keeps_length": keeps}
        branches.append(record.model_copy(update=changes))
        passing += [paths[module] for module in place.passing]
    return PrunedStructure(
        base_sha256=loaded.ref.sha256,
        deletions=list(deletions),
        branches=branches,
        passing=sorted(set(passing)),
        empty=_emptied(model, [branch.path for branch in branches]),
    )


def _emptied(model: Any, paths: Sequence[str]) -> list[str]:
    """One weight of each module that goes, for :mod:`~exporter.models.branch_modules` to empty.

    None of experts': those are put together or taken apart when a model is loaded or saved.
    """
    names = [name for name, _ in model.named_parameters() if "expert" not in name]
    result = (next((n for n in names if n.startswith(f"{path}.")), None) for path in paths)
    return [name for name in result if name is not None]


def _record(
    part: SublayerModules, replacement: BranchReplacement, path: str, returns: int
) -> BranchRecord:
    from exporter.models.branch_modules import BranchRecord

    return BranchRecord(
        path=path,
        layer=part.layer,
        kind=part.kind,
        bias=None if replacement.bias is None else len(replacement.bias),
        maps=[(len(w), w.shape[1]) for w in [replacement.weight] if w is not None],
        multiplier=part.multiplier,
        returns=returns,
    )


class _ReplacedPlace:
    """Where in a branch its replacement stands, and which of its modules then only pass on."""

    def __init__(self, model: Any, part: SublayerModules, paths: dict[Any, str]) -> None:
        self.module, self.passing, self.adds_residual = part.reads, [], False
        reads, ends = part.reads, part.contribution
        if reads is ends:
            return
        if not paths[ends].startswith(f"{paths[reads]}."):
            self.passing = [ends, *_between(model, paths[ends])]
        elif (
            inner := getattr(reads, "self", None) or getattr(reads, "attention", None)
        ) is not None:
            # BERT's kind: a projection, a sum and a norm follow inside the same module.
            self.module, self.passing = inner, [ends]
        else:
            self.adds_residual = True


def _between(model: Any, path: str) -> list[torch.nn.Module]:
    """The activation between a layer's ``fc1`` and ``fc2``, which is the layer's own module."""
    import torch

    if not path.endswith(".fc2"):
        return []
    value = getattr(model.get_submodule(path.rpartition(".")[0]), "activation_fn", None)
    return [value] if isinstance(value, torch.nn.Module) else []


def _returned(
    model: Any, modules: Sequence[torch.nn.Module], inputs: dict[str, torch.Tensor]
) -> dict[torch.nn.Module, int]:
    """How many things each module returns in a tuple; 0 for a bare tensor."""
    import torch

    counts: dict[torch.nn.Module, int] = {}

    def keep(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        counts[module] = len(output) if isinstance(output, tuple) else 0

    hooks = (module.register_forward_hook(keep) for module in modules)
    with hooked(hooks), torch.inference_mode():
        model(**inputs)
    return counts


def _lonely_norms(
    model: Any, cut: BranchReplacements, inputs: dict[str, torch.Tensor]
) -> Iterator[torch.nn.Module]:
    """The norms whose results only branches read that are gone and have no map.

    A norm is a module of the layer whose output is the very tensor that a branch reads. In
    post-norm layers the norm belongs to the sum before, and stays.
    """
    layers = {modules.number: modules for modules in layer_modules(model)}
    gone = {name for name, what in cut.items() if what.weight is None}
    trace = _Trace(model, {layer for layer, _ in gone}, inputs)
    for number in sorted({layer for layer, _ in gone}):
        modules = layers[number]
        if modules.form == "post_norm":
            continue
        readers: dict[int, set[SublayerRef]] = {}
        for kind in BLOCK_KINDS:
            ref = SublayerRef(number, kind)
            readers.setdefault(trace.read[ref], set()).add(ref)
        for tensor, names in readers.items():
            norm = trace.made[number].get(tensor)
            if norm is not None and names <= gone:
                yield norm


class _Trace:
    """Which module made which tensor, and which tensor each branch read, in one run."""

    def __init__(self, model: Any, numbers: set[int], inputs: dict[str, torch.Tensor]) -> None:
        import torch

        self.made: dict[int, dict[int, torch.nn.Module]] = {number: {} for number in numbers}
        self.read: dict[SublayerRef, int] = {}
        self._alive: list[Any] = []  # so that no tensor gets the address of an earlier one
        with hooked(self._hooks(model, numbers)), torch.inference_mode():
            model(**inputs)

    def _hooks(self, model: Any, numbers: set[int]) -> Iterator[Any]:
        for modules in layer_modules(model):
            inside = {*modules.attention.modules(), *modules.mlp.modules()}
            for child in modules.layer.children() if modules.number in numbers else ():
                if child not in inside and not list(child.children()):
                    yield child.register_forward_hook(self._making(modules.number))
        for part in sublayers(model):
            if part.layer in numbers:
                look = self._reading(part.ref)
                yield part.reads.register_forward_pre_hook(look, with_kwargs=True)

    def _making(self, number: int) -> Callable[..., None]:
        def keep(module: Any, _inputs: Any, output: Any) -> None:
            self._alive.append(output)
            self.made[number][id(output)] = module

        return keep

    def _reading(self, name: SublayerRef) -> Callable[..., None]:
        def look(_module: Any, args: Any, kwargs: Any) -> None:
            x = first_input(args, kwargs)
            self._alive.append(x)
            self.read[name] = id(x)

        return look


def _length_layers(model: Any) -> set[int]:
    """The layers whose cache tells how long the past is: the first one of each type."""
    if not model.can_generate():
        return set()
    types = getattr(model.config.get_text_config(), "layer_types", None) or ["all"]
    return {types.index(item) for item in set(types)} | {0}
